"""./run demo with several seeds of the pre-training, then fine-tuning with all labels: the accuracies of both.

    python benchmarks/demo_seeds.py     # five seeds, 15 minutes each on two idle cores

Each seed has two rows in demo_seeds.jsonl: of the demo, and of the fine-tuning. The same command resumes: it skips what
has a row. It writes the table of README.md and demo/README.md.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import leaderboard, machine, scripts
from demo import report
from mae.cli import entry_point
from mae.compare.verdict import PIXELS
from mae.evaluate.tables import markdown
from mae.files import results
from mae.plurals import counted
from mae.training import log
from mae.training.environment import commit

ROWS = Path(__file__).with_suffix(".jsonl")
README, PAGE = (scripts.ROOT / name for name in ("README.md", "demo/README.md"))
OUT = scripts.ROOT / "demo/output"
WORK = scripts.ROOT / "runs/demo_seeds"
BUDGET = 20  # epochs of fine-tuning with all labels: about 7 minutes of two idle cores, one for each encoder
SIZES = ("500", "10000")  # labels
DEMO = "demo"  # the parts of a seed
ALL_LABELS = "all labels"

Accuracies = dict[str, dict[str, dict[str, float]]]  # in percent, by frozen or trained, number of labels, and row


def encoder_of(seed: int) -> Path:
    """Returns the file of the encoder of a seed."""
    return WORK / f"encoder{seed}.pth"


def run_demo(seed: int) -> dict[str, Any]:
    """Runs the demo, and keeps its encoder; returns seconds, epochs and accuracies."""
    begin = time.monotonic()
    command = ["./run", "demo", "--seed", str(seed)]
    subprocess.run(command, cwd=scripts.ROOT, env=os.environ | {"PYTHON": sys.executable}, check=True)
    seconds = round(time.monotonic() - begin)
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.copy(OUT / "pretrained.pth", encoder_of(seed))
    found = json.loads((OUT / "results.json").read_text())
    return {"seconds": seconds, "epochs": len(log.read(OUT / "pretrain")), **means(found)}


def fine_tune(seed: int) -> dict[str, Any]:
    """Fine-tunes with all labels, from the encoder of a seed and from scratch; returns the accuracies."""
    out = WORK / f"all_labels{seed}"
    command = [
        sys.executable, "main_compare.py", "--encoders", "scratch", f"pretrained={encoder_of(seed)}",
        "--protocols", "finetune", "--labels", "all", "--recipes", "finetune=recipes/finetune_fashion_mnist.yaml",
        "--budget", str(BUDGET), "--data_path", str(scripts.DATA), "--output_dir", str(out),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, cwd=scripts.ROOT, env=environment) for _ in range(2)]  # one has each encoder
    codes = [process.wait() for process in both]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes, key=abs), command)
    return {"budget": BUDGET, **means({"trained": report.of_comparison(out)})}


def means(found: Mapping[str, report.Accuracies]) -> Accuracies:
    """Returns the means over the draws."""
    return {
        kind: {
            labels: {row: statistics.fmean(draws) for row, draws in rows.items()} for labels, rows in by_labels.items()
        }
        for kind, by_labels in found.items()
    }


def read() -> list[dict[str, Any]]:
    """Returns the rows of all seeds."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table() -> str:
    """Returns the table of accuracies, with the points to the strongest classifier of pixels on the same labels."""
    rows = read()
    by_seed: dict[int, Accuracies] = {}
    for row in rows:
        found = by_seed.setdefault(row["seed"], {"frozen": {}, "trained": {}})
        for kind, by_labels in found.items():
            by_labels |= row.get(kind, {})
    names = [
        (kind, name) for kind in ("frozen", "trained") for row in rows for name in row.get(kind, {}).get("500", {})
    ]
    lines = []
    for kind, name in dict.fromkeys(names):
        if kind == "trained" and name.startswith(PIXELS):  # of other draws than the page: in `margin`
            continue
        texts = []
        for size in SIZES:
            having = [found for found in by_seed.values() if name in found[kind].get(size, {})]
            texts.append(with_range([found[kind][size][name] for found in having], ".1f"))
            texts.append(with_range([margin(found, kind, size, name) for found in having], "+.1f"))
        lines.append([name, *texts])
    counts = [f"{int(size):,} labels" for size in SIZES]
    titles = ["accuracy on test images, %", *(text for count in counts for text in (count, "to pixels"))]
    demos, tuned = (counted(sum(row["part"] == part for row in rows), "seed") for part in (DEMO, ALL_LABELS))
    machines = " and ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"{markdown(titles, lines)}\n\n{demos}; fine-tuned with 10,000 labels: {tuned}. On two cores of {machines}."


def margin(found: Accuracies, kind: str, size: str, name: str) -> float:
    """Returns the points to the strongest classifier of pixels, fitted on the same labels."""
    rows = found[kind][size]
    if not any(other.startswith(PIXELS) for other in rows):  # all labels: there is one draw of them
        rows = found["frozen"][size]
    return found[kind][size][name] - max(value for other, value in rows.items() if other.startswith(PIXELS))


def with_range(values: Sequence[float], form: str) -> str:
    """Returns the mean of the seeds, and their range if they differ; "" without values."""
    if not values:
        return ""
    low = f"{min(values):{form}}"
    high = f"{max(values):{form}}"
    return f"{statistics.fmean(values):{form}}" + (f" ({low} to {high})" if low != high else "")


def main(args: argparse.Namespace) -> None:
    """Runs what has no row, and writes the table."""
    version = commit()
    for seed, (part, measure) in itertools.product(args.seeds, {DEMO: run_demo, ALL_LABELS: fine_tune}.items()):
        done = {(row["seed"], row["part"]) for row in read()}
        if (seed, part) not in done:
            if part == ALL_LABELS and not encoder_of(seed).exists():
                run_demo(seed)
            row = {"seed": seed, "part": part, **measure(seed), "machine": machine.processor(), "commit": version}
            results.add_line(ROWS, json.dumps(row))
        for page in (README, PAGE):
            leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), page)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Runs the demo with several seeds, fine-tunes with all labels, and writes the tables.")
    parser.add_argument("--seeds", nargs="+", default=range(5), type=int, metavar="N", help="seeds of the pre-training")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
