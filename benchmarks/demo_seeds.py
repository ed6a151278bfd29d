"""./run demo with several seeds of the pre-training: its time, and how far the encoder is above its rivals.

    python benchmarks/demo_seeds.py     # five seeds, half an hour on two idle cores

Each run appends its row to demo_seeds.jsonl. The command writes the table of demo/README.md. The time is without the
set-up of .venv.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import leaderboard, machine, scripts
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.files import results
from mae.training import log
from mae.training.environment import commit

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = scripts.ROOT / "demo/README.md"
OUT = scripts.ROOT / "demo/output"
TUNED = "500 labels: the same, fine-tuned from the pre-trained encoder"
MARGINS = {  # the results of demo/report.py whose difference is a margin
    "logistic regression": ("pre-trained encoder", "raw pixels"),
    "20 nearest neighbors": ("pre-trained encoder, neighbours", "raw pixels, neighbours"),
    "500 labels, to pixels": (TUNED, "500 labels: raw pixels, RBF-SVM"),
    "500 labels, to scratch": (TUNED, "500 labels: transformer from scratch"),
}


def measure(seed: int) -> dict[str, Any]:
    """Runs the demo; returns its seconds, epochs and margins, in points."""
    begin = time.monotonic()
    command = ["./run", "demo", "--seed", str(seed)]
    subprocess.run(command, cwd=scripts.ROOT, env=os.environ | {"PYTHON": sys.executable}, check=True)
    seconds = round(time.monotonic() - begin)
    scores = json.loads((OUT / "results.json").read_text())
    margins = {name: round(100 * (scores[ours] - scores[other]), 2) for name, (ours, other) in MARGINS.items()}
    return {"seed": seed, "seconds": seconds, "epochs": len(log.read(OUT / "pretrain")), **margins}


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table() -> str:
    """Returns the table, with a line for each processor: medians, and the range of the seeds."""
    rows = read()
    if not rows:
        return "No run has been measured yet."
    lines = []
    for name in dict.fromkeys(row["machine"] for row in rows):
        runs = [row for row in rows if row["machine"] == name]
        epochs = " ".join(map(str, sorted({row["epochs"] for row in runs})))
        seconds = _with_range([row["seconds"] for row in runs], ".0f")
        margins = [_with_range([row[margin] for row in runs], "+.1f") for margin in MARGINS]
        lines.append([name, str(len(runs)), epochs, seconds, *margins])
    return markdown(["processor, two cores", "seeds", "epochs", "seconds", *MARGINS], lines)


def _with_range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(args: argparse.Namespace) -> None:
    """Runs the demo with each seed, and writes the table."""
    version = commit()
    for seed in args.seeds:
        row = {**measure(seed), "machine": machine.processor(), "commit": version}
        results.add_line(ROWS, json.dumps(row))
        leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), PAGE)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Runs the demo with several seeds, and writes its times and margins.")
    parser.add_argument("--seeds", nargs="+", default=range(5), type=int, metavar="N", help="seeds of the pre-training")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
