"""./run demo with several seeds of the pre-training, then fine-tuning with all labels: accuracies, and its time.

    python benchmarks/demo_seeds.py     # five seeds, an hour on two idle cores

Each seed appends its row to demo_seeds.jsonl. The same command resumes: it skips the seeds that have a row. It writes
the tables of README.md and demo/README.md. The time is that of `./run demo` without the set-up of .venv.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
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
COMMAND = "python benchmarks/demo_seeds.py"
OUT = scripts.ROOT / "demo/output"
BUDGET = 30  # epochs of fine-tuning with all labels, as with 500: about 3 minutes for both encoders, one on each core
SIZES = ("500", "10000")  # labels


def measure(seed: int) -> dict[str, Any]:
    """Runs the demo, and fine-tunes with all labels; returns seconds, epochs and accuracies in percent."""
    begin = time.monotonic()
    command = ["./run", "demo", "--seed", str(seed)]
    subprocess.run(command, cwd=scripts.ROOT, env=os.environ | {"PYTHON": sys.executable}, check=True)
    seconds = round(time.monotonic() - begin)
    found = json.loads((OUT / "results.json").read_text())
    found["trained"] |= report.of_comparison(fine_tuned())
    accuracies = {
        kind: {labels: {row: round(statistics.fmean(draws), 2) for row, draws in rows.items()}
               for labels, rows in by_labels.items()}
        for kind, by_labels in found.items()
    }  # fmt: skip
    return {"seed": seed, "seconds": seconds, "epochs": len(log.read(OUT / "pretrain")), **accuracies}


def fine_tuned() -> Path:
    """Fine-tunes with all labels, from the encoder and from scratch; returns the folder of the comparison."""
    out = OUT / "all_labels"
    command = [
        sys.executable, "main_compare.py", "--encoders", "scratch", f"pretrained={OUT / 'pretrained.pth'}",
        "--protocols", "finetune", "--labels", "all", "--recipes", "finetune=recipes/finetune_fashion_mnist.yaml",
        "--budget", str(BUDGET), "--data_path", str(scripts.DATA), "--output_dir", str(out),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, cwd=scripts.ROOT, env=environment) for _ in range(2)]  # one has each encoder
    codes = [process.wait() for process in both]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes, key=abs), command)
    return out


def read() -> list[dict[str, Any]]:
    """Returns the rows of all seeds."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table() -> str:
    """Returns the table of accuracies, with the points to the strongest classifier of pixels on the same labels."""
    seeds = read()
    if not seeds:
        return "No seed has been measured yet."
    rows = dict.fromkeys(row for kind in ("frozen", "trained") for size in SIZES for row in seeds[0][kind][size])
    lines = []
    for row in rows:
        kind = "frozen" if row in seeds[0]["frozen"]["500"] else "trained"
        cells = []
        for size in SIZES:
            cells.append(with_range([seed[kind][size][row] for seed in seeds], ".1f"))
            cells.append(with_range([margin(seed, kind, size, row) for seed in seeds], "+.1f"))
        lines.append([row, *cells])
    counts = [f"{int(size):,} labels" for size in SIZES]
    titles = ["accuracy on test images, %", *(text for count in counts for text in (count, "to pixels"))]
    return f"{markdown(titles, lines)}\n\n{times()}"


def margin(seed: dict[str, Any], kind: str, size: str, row: str) -> float:
    """Returns the points to the strongest classifier of pixels, fitted on the same labels."""
    rows = seed[kind][size]
    if not any(name.startswith(PIXELS) for name in rows):  # all labels: there is one draw of them
        rows = seed["frozen"][size]
    return seed[kind][size][row] - max(value for name, value in rows.items() if name.startswith(PIXELS))


def times() -> str:
    """Returns a sentence on the seeds, the processors and the time of the demo."""
    rows = read()
    texts = []
    for name in dict.fromkeys(row["machine"] for row in rows):
        runs = [row for row in rows if row["machine"] == name]
        epochs = " or ".join(map(str, sorted({row["epochs"] for row in runs})))
        seconds = with_range([row["seconds"] for row in runs], ".0f")
        of_epochs = f"{counted(len(runs), 'seed')} of {epochs} epochs"
        texts.append(f"{of_epochs} on two cores of {name}. `./run demo` takes {seconds} seconds there.")
    return "\n".join(texts)


def with_range(values: Sequence[float], form: str) -> str:
    """Returns the mean of the seeds, and their range if they differ."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return f"{statistics.fmean(values):{form}}" + (f" ({low} to {high})" if low != high else "")


def main(args: argparse.Namespace) -> None:
    """Runs the seeds that have no row, and writes the tables."""
    version = commit()
    done = {row["seed"] for row in read()}
    for seed in args.seeds:
        if seed not in done:
            results.add_line(ROWS, json.dumps({**measure(seed), "machine": machine.processor(), "commit": version}))
        for page in (README, PAGE):
            leaderboard.write_table(COMMAND, table(), page)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Runs the demo with several seeds, fine-tunes with all labels, and writes the tables.")
    parser.add_argument("--seeds", nargs="+", default=range(5), type=int, metavar="N", help="seeds of the pre-training")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
