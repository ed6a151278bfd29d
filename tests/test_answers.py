"""The study of what `mae start` answers: what is read from a page, and the tables."""

import pytest
from mains import call, lines

from benchmarks import answers
from mae.inference import report, verdict


def row(minutes, epochs, curve, difference):
    return {
        "kind": "cells", "minutes": minutes, "epochs": epochs, "curve": curve, "seconds": 90, "processed": 20_000,
        "accuracy": dict.fromkeys((verdict.ENCODER, verdict.PIXELS, verdict.RANDOM), 50.0),
        "difference": {verdict.PIXELS: difference},
        "words": "Pre-training has not helped: raw pixels have better features. More time may help.",
    }  # fmt: skip


def test_the_tables_have_the_verdicts_and_what_shorter_runs_forecast():
    rows = [
        row(10, 80, [[40, 52.0], [80, 55.0]], "-1.0"),
        row(2, 8, [[4, 50.0], [8, 50.0]], "-3.0"),
        row(40, 160, [[160, 95.0]], "-1.0"),
    ]
    verdicts, forecasts, note = answers.table(rows).split("\n\n")
    first, second = verdicts.splitlines()[2:4]
    assert (
        first.startswith("| cells | 2 | 1.5 | 20,000 | 50.0 |") and "| -3.0 | Pre-training has not helped. |" in first
    )
    assert second.startswith("| cells | 10 |")
    lines = [line.strip("| ").split(" | ") for line in forecasts.splitlines()[2:]]
    assert [line[:4] for line in lines] == [
        ["cells", "2 to 10", "10.0", "50.0"], ["cells", "2 to 40", "20.0", "50.0"], ["cells", "10 to 40", "2.0", "55.0"]
    ]  # fmt: skip
    for _, _, _, start, interval, reached, within in lines:
        low, high = map(float, interval.split(" to "))
        assert low <= float(start) <= high and within == ("yes" if low <= float(reached) <= high else "no")
    assert lines[1][-1] == "no" and note.startswith("Within the interval: 1 of 3; with those of forecast.md, ")


def test_a_log_with_one_measurement_forecasts_nothing():
    rows = [row(2, 8, [[8, 50.0]], "-3.0"), row(10, 80, [[80, 55.0]], "-1.0")]
    line, note = answers.table(rows).split("\n\n")[1:]
    assert "| the log is too short | 55.0 |  |" in line and note.startswith("Within the interval: 0 of 0")


def test_the_row_of_a_run_has_what_its_page_says(pretrain, labelled):
    run = pretrain(data_path=labelled, epochs=2, probe_every=1, probe_path=labelled)
    page = call(report, run, device="cpu", num_workers=0).read_text()
    found = answers.result_of(run)
    assert found["epochs"] == 2 and [epoch for epoch, _ in found["curve"]] == [1, 2]
    last = lines(run)[-1]
    assert found["accuracy"] == pytest.approx(
        {
            verdict.ENCODER: last["test_knn_acc1"], verdict.PIXELS: last["test_knn_pixels"],
            verdict.RANDOM: found["accuracy"][verdict.RANDOM],
        },
        abs=0.06,
    )  # fmt: skip
    for name in (verdict.PIXELS, verdict.RANDOM):
        difference = found["accuracy"][verdict.ENCODER] - found["accuracy"][name]
        assert float(found["difference"][name].split()[0]) == pytest.approx(difference, abs=0.11)
    assert f'<p class="verdict">{found["words"]}</p>' in page
