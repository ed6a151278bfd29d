"""What `mae start` answers after 2, 10 and 40 minutes, and what longer runs reached: the tables of answers.md.

    taskset -c 0 python benchmarks/answers.py   # 7 runs, 100 minutes of a core of an AMD EPYC

Started once per core (`taskset -c 1` for the second), the command shares the runs. The same command resumes an
interrupted study, and each run in it. When a run ends, the command appends its row to answers.jsonl and writes the
tables to answers.md.

The images are squares of 16 photographs, generated cells in a microscope, and generated spectrograms. A run is `mae
start IMAGES --minutes N`, with no other setting. From the log of a run, k-NN of the longer runs of its kind is forecast
as a page does it (`mae.inference.more_time`), with the numbers of all pairs of forecast.py.
"""

import argparse
import html
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import forecast, leaderboard, machine, pooling, scripts
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.files import locks
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


def forecast_of(row: Mapping[str, Any], longer: Mapping[str, Any], law: Mapping[str, Any]) -> list[str]:
    """Returns how many times the epochs a longer run has, and k-NN: now, in the forecast interval, and reached."""
    entries = [{"epoch": epoch - 1, KNN: knn} for epoch, knn in row["curve"]]
    factor = longer["epochs"] / row["epochs"]
    interval = more_time.interval_of(entries, law, factor)
    reached = longer["curve"][-1][1]
    texts = [row["kind"], f"{row['minutes']:g} to {longer['minutes']:g}", f"{factor:.1f}", f"{row['curve'][-1][1]:.1f}"]
    if interval is None:
        return [*texts, "the log is too short", f"{reached:.1f}", ""]
    low, high = interval
    return [*texts, f"{low:.0f} to {high:.0f}", f"{reached:.1f}", "yes" if low <= reached <= high else "no"]


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Returns the verdict of each run, and what the shorter runs forecast for the longer ones."""
    rows = sorted(read() if rows is None else rows, key=lambda row: (KINDS.index(row["kind"]), row["minutes"]))
    lines = []
    for row in rows:
        accuracies = (row["accuracy"][name] for name in (verdict.ENCODER, verdict.PIXELS, verdict.RANDOM))
        said = f"{row['words'].split('. ')[0].split(': ')[0].rstrip('.')}."
        lines.append([
            row["kind"], f"{row['minutes']:g}", f"{row['seconds'] / 60:.1f}", f"{row['processed']:,}",
            *(f"{accuracy:.1f}" for accuracy in accuracies), row["difference"][verdict.PIXELS], said,
        ])  # fmt: skip
    titles = [
        "images", "minutes of training", "of the command", "processed images", "encoder, %", "raw pixels, %",
        "random weights, %", "encoder − raw pixels, points", "the page says",
    ]  # fmt: skip
    law = forecast.law_of(forecast.read())
    pairs = [
        forecast_of(row, longer, law)
        for row, longer in itertools.combinations(rows, 2)
        if row["kind"] == longer["kind"]
    ]
    if not pairs:
        return markdown(titles, lines)
    of_pairs = ["images", "minutes", "times the epochs", "k-NN, %", "forecast, %", "reached, %", "within"]
    return f"{markdown(titles, lines)}\n\n{markdown(of_pairs, pairs)}"


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
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
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
