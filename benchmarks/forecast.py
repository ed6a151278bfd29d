"""Whether the log of a run forecasts longer runs: the table of forecast.md.

    python demo/unpack_data.py
    OMP_NUM_THREADS=1 python benchmarks/forecast.py              # 24 runs, six hours of a core
    OMP_NUM_THREADS=1 python benchmarks/forecast.py --rehearse   # short runs of generated images

Started once per core, the command shares the runs. The same command resumes an interrupted study, and each run in it:
a run saves a checkpoint with each measurement, and appends its row to forecast.jsonl when it ends. The command writes
the table to forecast.md.

The schedule of a run ends at zero, so that a longer run is another run. Runs of 1, 2, 4 and 10 times the updates are
trained, on garments, squares of photographs and letters, with two seeds. From the log of the shortest, k-NN of the
longer ones is forecast:

    k-NN + c · log2(factor) · (k-NN - k-NN after half of the updates)

The number c is the least-squares fit of the gains of the other kinds, and the interval is that of their residuals
(Student's t, with a degree of freedom less for each number that is fitted). Nothing is fitted on the kind that is
forecast. Two naive forecasts have intervals of the same kind: k-NN stays as it is; and it gains as much as the mean of
the other kinds for this factor.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from scipy import stats

import main_pretrain
from benchmarks import cells, leaderboard, machine, scripts
from benchmarks.image_sets import images_of
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.evaluate.tables import markdown
from mae.files import atomic, locks, results
from mae.training import log
from mae.training.environment import commit
from mae.training.gate import KNN

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("forecast.jsonl", "forecast.md"))
WORK = scripts.ROOT / "runs/forecast"
FACTORS = (1, 2, 4, 10)
SEEDS = (0, 1)
POINTS = 8  # measurements of a run, of which one is after half of the updates
# Epochs of the shortest run: about 90 seconds of two cores of an AMD EPYC, a multiple of POINTS.
EPOCHS = {leaderboard.FASHION_MNIST: 16, "photographs": 40, "letters": 16}
IMAGES = {leaderboard.FASHION_MNIST: 10_000, "photographs": 960, "letters": 10_922}
LEVEL = 0.8  # of an interval
COVERED = 0.7, 0.9  # bounds of the share of right forecasts, for the rule
ENTRY = leaderboard.ENTRIES[leaderboard.RECIPE]
ONE_PROCESS = {"batch_size": 128}

SLOPE = "slope of the log"
STAYS = "it stays as it is"
MEAN_GAIN = "mean gain of the other kinds"


class Case(NamedTuple):
    """A run of the study."""

    kind: str
    seed: int
    factor: int


class Pair(NamedTuple):
    """A run, and what the log of the shortest run of the same kind and seed has."""

    kind: str
    seed: int
    factor: int
    start: float  # k-NN at the end of the shortest run
    slope: float  # its gain in the last half of its updates
    reached: float  # k-NN at the end of the run

    @property
    def gain(self) -> float:
        """The gain in k-NN, in points."""
        return self.reached - self.start


class Forecast(NamedTuple):
    """A forecast of a pair, and half of the width of its interval."""

    value: float
    half_width: float


class Study(NamedTuple):
    """What is measured: of a kind, its settings and the epochs of the shortest run."""

    kinds: Mapping[str, tuple[Mapping[str, Any], int]]
    work: Path


def study_of(rehearses: bool) -> Study:
    """Returns the study, or a short one of generated images."""
    kinds: dict[str, tuple[Mapping[str, Any], int]] = {}
    if not rehearses:
        for kind, epochs in EPOCHS.items():
            data = scripts.DATA if kind == leaderboard.FASHION_MNIST else images_of(kind)
            flags = {**leaderboard.BASE, **ENTRY, **ONE_PROCESS, **leaderboard.KINDS[kind][1]}
            kinds[kind] = {**flags, "data_path": scripts.ROOT / data}, epochs
        return Study(kinds, WORK)
    for kind in ("cells", "more cells", "other cells"):
        folder = WORK / "rehearsal" / kind / "images"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic.replacing(folder) as written:
                cells.write(written, {"train": 16, "val": 8})
        flags = {**leaderboard.BASE, **ENTRY, **leaderboard.SMALL, "batch_size": 32}
        kinds[kind] = {**flags, "data_path": folder}, POINTS
    return Study(kinds, WORK / "rehearsal")


def measure(study: Study, case: Case) -> dict[str, Any]:
    """Trains a run; returns the curve of k-NN of its log, in percent."""
    flags, shortest = study.kinds[case.kind]
    epochs = shortest * case.factor
    of_run = {
        "seed": case.seed, "epochs": epochs, "warmup_epochs": epochs / 20, "save_every": epochs // POINTS,
        "keep_last": 1, "probe_every": epochs // POINTS, "probe_path": flags["data_path"], "resume": "auto",
    }  # fmt: skip

    def read(folder: Path, _: object) -> dict[str, Any]:
        found = [line for line in log.read(folder) if KNN in line]
        return {"epochs": epochs, "curve": [round(line[KNN], 3) for line in found]}

    out = study.work / case.kind / f"{case.factor}-{case.seed}"
    return store.run_once(out, Script(main_pretrain), {**flags, **of_run, "output_dir": out}, read)


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Returns the longer runs whose shortest run is there."""
    curves = {Case(row["kind"], row["seed"], row["factor"]): row["curve"] for row in rows}
    pairs = []
    for case, curve in curves.items():
        shortest = curves.get(case._replace(factor=1))
        if case.factor > 1 and shortest:
            half = shortest[len(shortest) // 2 - 1]
            pairs.append(Pair(*case, shortest[-1], shortest[-1] - half, curve[-1]))
    return pairs


def fitted(pairs: Sequence[Pair]) -> tuple[float, list[float]]:
    """Returns the number c of some pairs, and their residuals."""
    inputs = np.array([np.log2(pair.factor) * pair.slope for pair in pairs])
    gains = np.array([pair.gain for pair in pairs])
    number = float(inputs @ gains / (inputs @ inputs))
    return number, [*(gains - number * inputs)]


def half_width_of(residuals: Sequence[float], num_fitted: int) -> float:
    """Returns half of the width of an interval, from the residuals of a fit of `num_fitted` numbers."""
    freedom = len(residuals) - num_fitted
    if freedom < 1:
        return math.inf
    scale = float(np.sqrt(np.sum(np.square(residuals)) / freedom))
    return scale * float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def from_slope(start: float, slope: float, factor: float, others: Sequence[Pair]) -> Forecast:
    """Returns the forecast from the slope of the log."""
    number, residuals = fitted(others)
    return Forecast(start + number * float(np.log2(factor)) * slope, half_width_of(residuals, 1))


def by_slope(pair: Pair, others: Sequence[Pair]) -> Forecast:
    """Returns the forecast of a pair from the slope of its log."""
    return from_slope(pair.start, pair.slope, pair.factor, others)


def as_it_is(pair: Pair, others: Sequence[Pair]) -> Forecast:
    """Returns k-NN of the shortest run; the gains of the other kinds are the residuals."""
    return Forecast(pair.start, half_width_of([other.gain for other in others], 0))


def with_mean_gain(pair: Pair, others: Sequence[Pair]) -> Forecast:
    """Returns k-NN of the shortest run with the mean gain of the other kinds for the factor."""
    means = {
        factor: statistics.fmean(other.gain for other in others if other.factor == factor)
        for factor in {other.factor for other in others}
    }
    residuals = [other.gain - means[other.factor] for other in others]
    return Forecast(pair.start + means[pair.factor], half_width_of(residuals, len(means)))


METHODS: dict[str, Callable[[Pair, Sequence[Pair]], Forecast]] = {
    SLOPE: by_slope, STAYS: as_it_is, MEAN_GAIN: with_mean_gain,
}  # fmt: skip


def forecasts(pairs: Sequence[Pair], method: str) -> dict[Pair, Forecast]:
    """Returns the forecasts of a method. The other kinds of a pair determine its forecast and its interval."""
    found = {}
    for pair in pairs:
        others = [other for other in pairs if other.kind != pair.kind]
        if not any(other.factor == pair.factor for other in others):
            continue
        found[pair] = METHODS[method](pair, others)
    return found


def num_covered(found: Mapping[Pair, Forecast]) -> tuple[int, int]:
    """Returns how many runs are within the intervals of their forecasts, and the number of runs."""
    return sum(bool(abs(one.value - pair.reached) <= one.half_width) for pair, one in found.items()), len(found)


def is_complete(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no run of the study is missing."""
    return len(rows) == len(EPOCHS) * len(SEEDS) * len(FACTORS)


def summary(pairs: Sequence[Pair], method: str) -> list[str]:
    """Returns the row of a method: errors, widths, and coverage with its 95 % interval."""
    found = forecasts(pairs, method)
    errors = [abs(forecast.value - pair.reached) for pair, forecast in found.items()]
    covered, _ = num_covered(found)
    low, high = stats.binomtest(covered, len(errors)).proportion_ci(0.95)
    return [
        method, f"{statistics.median(errors):.2f}",
        f"{2 * statistics.median(forecast.half_width for forecast in found.values()):.2f}",
        f"{covered} of {len(errors)}", f"{100 * covered / len(errors):.0f} ({100 * low:.0f} to {100 * high:.0f})",
    ]  # fmt: skip


def is_better(pairs: Sequence[Pair]) -> bool:
    """Whether the rule holds: 70 to 90 % are covered, and the error is a quarter below that of both naive ones."""
    found = {method: forecasts(pairs, method) for method in METHODS}
    errors = {
        method: statistics.median(abs(one.value - pair.reached) for pair, one in of_method.items())
        for method, of_method in found.items()
    }
    num, of = num_covered(found[SLOPE])
    low, high = COVERED
    return low * of <= num <= high * of and errors[SLOPE] <= 0.75 * min(errors[STAYS], errors[MEAN_GAIN])


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Returns k-NN of the runs, the forecasts of each method, and whether the rule of forecast.md holds."""
    rows = read() if rows is None else rows
    reached = {Case(row["kind"], row["seed"], row["factor"]): f"{row['curve'][-1]:.1f}" for row in rows}
    lines = [
        [kind, str(seed), *(reached.get(Case(kind, seed, factor), "") for factor in FACTORS)]
        for kind, seed in dict.fromkeys((case.kind, case.seed) for case in reached)
    ]
    text = markdown(["images", "seed", *(f"{factor} × updates, %" for factor in FACTORS)], lines)
    pairs = pairs_of(rows)
    if len({pair.kind for pair in pairs}) < len(EPOCHS):
        return text
    titles = ["forecast", "median error, points", "median width, points", "covered", "covered, %"]
    rule = "The rule holds." if is_complete(rows) and is_better(pairs) else "The rule does not hold."
    covered = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        num, of = num_covered({pair: one for pair, one in forecasts(pairs, SLOPE).items() if pair.kind == kind})
        covered.append(f"{num} of {of} {kind}")
    note = f"Covered by the slope of the log: {', '.join(covered)}."
    return "\n\n".join([text, markdown(titles, [summary(pairs, method) for method in METHODS]), note, rule])


def interval_of(start: float, slope: float, factor: float, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Returns the bounds of k-NN in percent after `factor` times the updates, for images of another kind than `pairs`.

    Args:
        start: k-NN of the run.
        slope: its gain in the last doubling of its updates.
    """
    value, half_width = from_slope(start, slope, factor, pairs)
    return max(0.0, value - half_width), min(100.0, value + half_width)


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, the shortest first, and prints the table."""
    os.chdir(scripts.ROOT)
    version = commit()
    study = study_of(args.rehearse)
    rows_file = study.work / ROWS.name if args.rehearse else ROWS
    found: list[dict[str, Any]] = []
    for factor, seed, kind in itertools.product(FACTORS, SEEDS, study.kinds):
        case = Case(kind, seed, factor)
        done = read() if not args.rehearse else found
        if any(Case(row["kind"], row["seed"], row["factor"]) == case for row in done):
            continue
        try:
            scores = measure(study, case)
        except locks.Busy:  # a process of the other core has it
            continue
        row = {**case._asdict(), **{name: scores[name] for name in ("epochs", "curve")}}
        row |= {"machine": machine.processor(), "commit": version}
        found.append(row)
        results.add_line(rows_file, json.dumps(row))
        if not args.rehearse:
            leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), PAGE)
        print(json.dumps(row), flush=True)
    print(table(found) if args.rehearse else table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Trains runs of several lengths, and forecasts the longer ones from the shortest.")
    parser.add_argument("--rehearse", action="store_true", help="short runs of generated images")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
