"""What `mae start` answers after 2, 10 and 40 minutes, and what longer runs reached: the tables of answers.md.

    taskset -c 0 python benchmarks/answers.py   # 7 runs, 100 minutes of a core of an AMD EPYC

Started once per core (`taskset -c 1` for the second), the command shares the runs. The same command resumes an
interrupted study, and each run in it. When a run ends, the command appends its row to answers.jsonl and writes the
tables to answers.md.

The images are squares of 16 photographs, generated cells in a microscope, and generated spectrograms. A run is `mae
start IMAGES --minutes N`, with no other setting. From the log of a run, k-NN of the longer runs of its kind is forecast
by the rule of forecast.py, which is fitted on all of its pairs. k-NN is that of the log then.
"""

import argparse
import html
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import forecast, leaderboard, machine, pooling, scripts
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.files import locks, results
from mae.inference import more_time, report, verdict
from mae.training import environment, log
from mae.training.environment import commit
from mae.training.gate import KNN

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("answers.jsonl", "answers.md"))
WORK = scripts.ROOT / "runs/answers"
KINDS = ("photographs", "cells", "spectrograms")
MINUTES = (2, 10, 40)
IN_FORTY = ("cells",)  # kinds with a run of 40 minutes
VERDICT = re.compile(r'<p class="verdict">(.*?)</p>\s*<table>(.*?)</table>', re.DOTALL)
ENTRY = re.compile("<td>(.*?)</td>")


def result_of(run_dir: Path) -> dict[str, Any]:
    """Returns the processed images, the curve of k-NN, and the verdict of a run with a page."""
    entries = log.read(run_dir)
    measured = [entry for entry in entries if KNN in entry]
    return {
        "processed": round(sum(entry["images_per_s"] * entry["seconds"] for entry in entries)),
        "epochs": environment.read_last(run_dir)["settings"]["epochs"],
        "curve": [[entry["epoch"] + 1, round(entry[KNN], 3)] for entry in measured],
        **verdict_of((run_dir / report.NAME).read_text(encoding="utf-8")),
    }


def verdict_of(page: str) -> dict[str, Any]:
    """Returns the words of the verdict of a page, the accuracies in percent, and the differences to the baselines."""
    words, table_of_page = VERDICT.findall(page)[0]
    texts = [html.unescape(text) for text in ENTRY.findall(table_of_page)]
    rows = {texts[number]: texts[number + 1 : number + 3] for number in range(0, len(texts), 3)}
    return {
        "words": html.unescape(words),
        "accuracy": {name: float(accuracy) for name, (accuracy, _) in rows.items()},
        "difference": {name: difference for name, (_, difference) in rows.items() if difference},
    }


class Outcome(NamedTuple):
    """What the log of a run forecasts of a longer one, and what came."""

    kind: str
    minutes: tuple[float, float]
    factor: float  # of their epochs
    start: float
    interval: tuple[float, float] | None  # None: the log is too short
    reached: float

    @property
    def is_right(self) -> bool:
        """Whether k-NN of the longer run is in the interval."""
        return self.interval is not None and self.interval[0] <= self.reached <= self.interval[1]


def outcomes(rows: Sequence[Mapping[str, Any]], pairs: Sequence[forecast.Pair]) -> list[Outcome]:
    """Returns what each run forecasts of the longer ones of its kind.

    Args:
        rows: the shorter runs first.
        pairs: on which the forecast is fitted.
    """
    found = []
    for row, longer in itertools.combinations(rows, 2):
        if row["kind"] != longer["kind"]:
            continue
        start = row["curve"][-1][1]
        factor = longer["epochs"] / row["epochs"]
        interval = None
        if found_gain := last_half(row["curve"]):
            gain, doublings = found_gain
            interval = forecast.interval_of(start, gain / doublings, factor, pairs)
        minutes = (row["minutes"], longer["minutes"])
        found.append(Outcome(row["kind"], minutes, factor, start, interval, longer["curve"][-1][1]))
    return found


def last_half(curve: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Returns the gain of a curve, of epochs and k-NN, since half of its epochs, and the doublings of these.

    It returns None if the curve is too short.
    """
    halves = more_time.second_half([{"epoch": epoch - 1, KNN: knn} for epoch, knn in curve], KNN)
    if not halves:
        return None
    first, last = halves
    return last[KNN] - first[KNN], math.log2((last["epoch"] + 1) / (first["epoch"] + 1))


def in_words(outcome: Outcome) -> list[str]:
    """Returns a row of the table of forecasts."""
    said = "{:.0f} to {:.0f}".format(*outcome.interval) if outcome.interval else "the log is too short"
    answer = {True: "yes", False: "no"}[outcome.is_right] if outcome.interval else ""
    minutes = "{:g} to {:g}".format(*outcome.minutes)
    numbers = [f"{value:.1f}" for value in (outcome.factor, outcome.start)]
    return [outcome.kind, minutes, *numbers, said, f"{outcome.reached:.1f}", answer]


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Returns the verdict of each run, and what the shorter runs forecast for the longer ones."""
    rows = sorted(read() if rows is None else rows, key=lambda row: (KINDS.index(row["kind"]), row["minutes"]))
    lines = []
    for row in rows:
        accuracies = (row["accuracy"][name] for name in (verdict.ENCODER, verdict.PIXELS, verdict.RANDOM))
        said = f"{row['words'].split('. ')[0].split(': ')[0].rstrip('.')}."
        gain = last_half(row["curve"])
        lines.append([
            row["kind"], f"{row['minutes']:g}", f"{row['seconds'] / 60:.1f}", f"{row['processed']:,}",
            *(f"{accuracy:.1f}" for accuracy in accuracies), row["difference"][verdict.PIXELS], said,
            f"{gain[0]:+.1f}" if gain else "",
        ])  # fmt: skip
    titles = [
        "images", "minutes of training", "of the command", "processed images", "encoder, %", "raw pixels, %",
        "random weights, %", "encoder − raw pixels, points", "the page says",
        "k-NN since half of the epochs, points",
    ]  # fmt: skip
    pairs = forecast.pairs_of(forecast.read())
    found = outcomes(rows, pairs)
    if not found:
        return markdown(titles, lines)
    of_forecasts = ["images", "minutes", "times the epochs", "k-NN, %", "forecast, %", "reached, %", "within"]
    made = [outcome for outcome in found if outcome.interval]
    num_right = sum(outcome.is_right for outcome in made)
    right, of = forecast.num_covered(forecast.forecasts(pairs, forecast.SLOPE))
    note = (
        f"Within the interval: {num_right} of {len(made)}; with those of forecast.md, {right + num_right} of "
        f"{of + len(made)} ({(right + num_right) / (of + len(made)):.0%})."
    )
    return "\n\n".join([markdown(titles, lines), markdown(of_forecasts, map(in_words, found)), note])


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, and prints the tables."""
    os.chdir(scripts.ROOT)
    version = commit()
    cases = [
        (minutes, kind) for minutes in args.minutes for kind in args.kinds if minutes < max(MINUTES) or kind in IN_FORTY
    ]
    for minutes, kind in sorted(cases, key=lambda case: -case[0]):
        case = {"kind": kind, "minutes": minutes}
        out = WORK / kind / f"{minutes:g}"
        out.parent.mkdir(parents=True, exist_ok=True)
        with suppress(locks.Busy), locks.locked(out.parent, f"{out.name}.lock"):  # busy: the other core has it
            if any(case.items() <= row.items() for row in read()):
                continue
            begin = time.perf_counter()
            images = pooling.folder_of(kind)
            scripts.run_python("-m", "mae", "start", images, "--minutes", f"{minutes:g}", "--output_dir", out)
            row = {**case, "seconds": round(time.perf_counter() - begin), **result_of(out)}
            row |= {"machine": machine.processor(), "commit": version}
            results.add_line(ROWS, json.dumps(row))
            leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), PAGE)
            print(json.dumps(row), flush=True)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Runs `mae start` for 2, 10 and 40 minutes, and compares its answers.")
    parser.add_argument("--minutes", nargs="+", default=MINUTES, type=float, metavar="N", help="times of training")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
