"""What a short pre-training is worth on five kinds of images: the tables of worth.md, and one of README.md.

    python demo/unpack_data.py
    apt-get install $(python benchmarks/letters.py)
    OMP_NUM_THREADS=1 python benchmarks/worth.py        # 5 kinds, about ten minutes each on an idle core

The encoders are those of pooling.py: 200,000 images processed, in some minutes. Each is compared with classifiers of
pixels and with random weights as on the page of a run (`mae.compare.answer`). The same command resumes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import leaderboard, machine, pooling, scripts
from mae.cli import entry_point
from mae.compare import answer, verdict
from mae.data.run_data import RunData
from mae.data.source import Source
from mae.evaluate.tables import markdown
from mae.files import atomic, results
from mae.inference import report
from mae.inference.model import get_model
from mae.settings import DataSpec, ImageSpec
from mae.training.environment import commit
from mae.training.precision import Precision

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("worth.jsonl", "worth.md"))


def measure(kind: str) -> dict[str, Any]:
    """Computes an answer; returns its sentences and tables."""
    model: Any = get_model(str(pooling.encoder_of(kind, 0)))
    device = torch.device("cpu")
    spec = DataSpec(data_path=str(pooling.folder_of(kind)), num_workers=0)
    source = cast(Source, report.open_images(spec))
    images = report.open_labelled(RunData(ImageSpec.of(model.settings), spec, device), source)
    how = answer.Extraction(Precision("off", device), 256, 0)
    found = answer.compute(pooling.WORK / kind / answer.FILE, model, images, [], how)
    return {
        "labels": verdict.sizes_of(found), "images": found["images"], "sentences": found["sentences"],
        "table": verdict.table(found), "uses": verdict.table_of_uses(found),
    }  # fmt: skip


def read() -> list[dict[str, Any]]:
    """Returns the rows of all kinds."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table() -> str:
    """Returns a line for each kind and number of labels: accuracies in percent, and the difference to pixels."""
    rows = read()
    if not rows:
        return "No kind has been measured yet."
    lines = []
    for row in rows:
        encoder, pixels, random = row["table"][1][:3]
        for column, labels in enumerate(row["labels"], 1):
            accuracies = [part[column] for part in (encoder, pixels, random)]
            lines.append([row["kind"], f"{labels:,}", *accuracies, pixels[column + len(row["labels"])]])
    titles = [verdict.ENCODER, verdict.PIXELS, verdict.RANDOM, "better than pixels by (95 % interval)"]
    return markdown(["images", "labels", *titles], lines)


def main(args: argparse.Namespace) -> None:
    """Measures the kinds that have no row, and writes the pages."""
    version = commit()
    for kind in args.kinds:
        if kind not in {row["kind"] for row in read()}:
            row = {"kind": kind, **measure(kind), "machine": machine.processor(), "commit": version}
            results.add_line(ROWS, json.dumps(row))
        sections = [f"## {row['kind']}\n\n{' '.join(row['sentences'])}\n\n{markdown(*row['uses'])}" for row in read()]
        atomic.write_text(PAGE, "\n\n".join([f"# What is it worth?\n\n{table()}", *sections]) + "\n")
        leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), scripts.ROOT / "README.md")
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Compares encoders of several kinds of images with pixels and random weights.")
    kinds = [*pooling.KINDS]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, metavar="KIND", help=", ".join(kinds))
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
