"""The study of forecasts: what is fitted on other kinds, coverage, and the decision whether pages show it."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import forecast
from benchmarks.forecast import MEAN_GAIN, SLOPE, STAYS, Pair

KINDS = ("a", "b", "c")


def rows_of(gain, noise=0.0, kinds=KINDS):
    """Runs whose gain is a function(slope, factor, kind); the slopes of kinds differ."""
    draw = np.random.default_rng(0)
    rows = []
    for number, kind in enumerate(kinds):
        for seed in (0, 1):
            slope = 1.0 + number + 0.5 * seed
            for factor in (1, 2, 4, 10):
                end = 60.0 + gain(slope, factor, kind) + noise * draw.normal() * (factor > 1)
                curve = [end - 3, end - 2, end - slope, end - 1, end] if factor > 1 else [0, 60.0 - slope, 59.0, 60.0]
                rows.append({"kind": kind, "seed": seed, "factor": factor, "curve": curve})
    return rows


def test_gains_that_follow_the_slope_are_forecast():
    pairs = forecast.pairs_of(rows_of(lambda slope, factor, _: 0.8 * slope * np.log2(factor), noise=0.1))
    assert len(pairs) == 18
    found = forecast.forecasts(pairs, SLOPE)
    assert max(abs(one.value - pair.reached) for pair, one in found.items()) < 0.6
    stays = forecast.forecasts(pairs, STAYS)
    assert all(one.value == pair.start for pair, one in stays.items())
    assert forecast.summary(pairs, SLOPE)[1] < forecast.summary(pairs, MEAN_GAIN)[1]


def test_nothing_is_fitted_on_the_kind_that_is_forecast():
    pairs = forecast.pairs_of(rows_of(lambda slope, factor, _: slope * np.log2(factor)))
    before = forecast.forecasts(pairs, SLOPE)
    changed = [pair._replace(reached=pair.reached + 50) if pair.kind == "a" else pair for pair in pairs]
    for method in (SLOPE, STAYS, MEAN_GAIN):
        after = {pair[:3]: one for pair, one in forecast.forecasts(changed, method).items() if pair.kind == "a"}
        same = {pair[:3]: one for pair, one in forecast.forecasts(pairs, method).items() if pair.kind == "a"}
        assert after == same
    assert forecast.forecasts(changed, SLOPE) != before


def test_an_interval_has_a_degree_of_freedom_less_for_each_fitted_number():
    """The residuals of a mean have the standard deviation of the sample; a fit without freedom left tells nothing."""
    gains = np.array([1.0, 2.0, 4.0])
    width = forecast.half_width_of([*(gains - gains.mean())], 1)
    assert width == pytest.approx(stats.t.ppf(0.9, 2) * gains.std(ddof=1))
    assert forecast.half_width_of([0.0], 1) == math.inf


def test_intervals_of_80_percent_cover_as_many():
    """Gains that differ from the law by Gaussian noise: of many pairs, about 80 % are in their intervals."""
    draw = np.random.default_rng(1)
    pairs = [
        Pair(f"kind {number % 30}", number, 4, 60.0, slope, 60.0 + 2 * slope + draw.normal())
        for number, slope in enumerate(draw.uniform(1, 3, 150))
    ]
    found = forecast.forecasts(pairs, SLOPE)
    covered = np.mean([abs(one.value - pair.reached) <= one.half_width for pair, one in found.items()])
    assert 0.72 < covered < 0.88
    assert forecast.is_better(pairs)
    level = [pair._replace(reached=60.0 + draw.normal()) for pair in pairs]  # nothing to forecast
    assert not forecast.is_better(level)


def test_an_interval_follows_the_gain_of_a_doubling():
    pairs = forecast.pairs_of(rows_of(lambda slope, factor, _: 0.5 * slope * np.log2(factor), noise=0.1))
    low, high = forecast.interval_of(80.0, 4.0, 4, pairs)
    assert (low + high) / 2 == pytest.approx(84.0, abs=0.3) and 0 < high - low < 1
    assert forecast.interval_of(98.0, 8.0, 10, pairs)[1] == 100.0


def test_the_table_has_the_forecasts_of_three_kinds_only():
    two = forecast.table(rows_of(lambda slope, factor, _: slope * np.log2(factor), kinds=KINDS[:2]))
    assert "forecast" not in two
    text = forecast.table(rows_of(lambda slope, factor, _: slope * np.log2(factor), noise=0.3))
    assert len([line for line in text.splitlines() if line.startswith(("| slope", "| it stays", "| mean gain"))]) == 3
    assert text.splitlines()[-1].startswith("The rule ")


@pytest.mark.slow
def test_the_rehearsal_stores_each_run_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "WORK", tmp_path)
    monkeypatch.setattr(forecast, "FACTORS", (1, 2))
    monkeypatch.setattr(forecast, "SEEDS", (0,))
    monkeypatch.setattr(forecast, "POINTS", 2)
    args = forecast.get_args_parser().parse_args(["--rehearse"])
    forecast.main(args)
    text = capsys.readouterr().out.splitlines()[-3:]
    runs = (tmp_path / "rehearsal/forecast.jsonl").read_text().splitlines()
    assert len(runs) == 6
    monkeypatch.setattr(forecast.Script, "call_main", None)  # nothing is trained again
    forecast.main(args)
    assert capsys.readouterr().out.splitlines()[-3:] == text
