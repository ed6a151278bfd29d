"""What few labels make of an encoder, and a student of half its width: the table of docs/start_from.md.

    python demo/unpack_data.py
    python benchmarks/start_from.py                     # Fashion-MNIST, under 20 minutes on two cores
    python benchmarks/start_from.py --images letters    # benchmarks/letters.py says what to install

docs/start_from.md says what is measured. The seconds of an adaptation are those of a run in this process, from its
settings to its test accuracy. The learning rate of the updates was chosen on held-out training images. The results are
written to benchmarks/results, and the table to the page.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import main_finetune
import main_linprobe
from benchmarks import leaderboard, machine, scoring, scripts
from benchmarks.image_sets import images_of
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.compare.summary import Entry
from mae.evaluate.tables import markdown
from mae.settings.types import positive
from mae.training import log
from models_vit import Encoder

PAGE = scripts.ROOT / "docs/start_from.md"
NAME = "start_from"  # of the files of the results
RECIPE = leaderboard.ENTRIES["demo with normalized pixels, uniformity .1"]
STUDENT = {"encoder": "benchmarks.start_from:HalfWidth"}
FULL: tuple[ModuleType, dict[str, Any]] = (main_finetune, scoring.FINETUNE)
LORA = {**scoring.FINETUNE, "lr": 5e-3, "layer_decay": 1}
WAYS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "fine-tuned in full": FULL,
    "LoRA of rank 16": (main_finetune, {**LORA, "lora": 16}),
    "LoRA of rank 4": (main_finetune, {**LORA, "lora": 4}),
    "frozen, with a linear head": (main_linprobe, {**scoring.LINPROBE, "batch_size": 32}),
}


class HalfWidth(Encoder):
    """An encoder of half the width, with half the heads."""

    def __init__(self, *, embed_dim: int, num_heads: int, **arguments: Any) -> None:
        super().__init__(embed_dim=embed_dim // 2, num_heads=num_heads // 2, **arguments)


def adapt(way: tuple[ModuleType, dict[str, Any]], encoder: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains with few labels, on three random subsets; returns accuracies, trained weights and seconds.

    Args:
        way: a script and its flags.
        encoder: flags of the encoder and the images.
    """
    module, flags = way

    def read(folder: Path, _: object) -> dict[str, Any]:
        last = log.read(folder)[-1]
        return {"accuracy": round(last["test_acc1"], 2), "weights": last["n_parameters"]}

    drawn = {"train_per_class": scoring.labels_per_class(encoder["data_path"])}
    found = []
    for draw in range(scoring.DRAWS):
        given = {**flags, **encoder, **drawn, "seed": draw, "output_dir": out / str(draw)}
        found.append(store.run_once(out / str(draw), Script(module), given, read))
    return {
        "accuracies": [scores["accuracy"] for scores in found],
        "weights": found[0]["weights"],
        "seconds": round(statistics.fmean(scores["seconds"] for scores in found), 1),
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pre-trains and adapts all encoders; returns the results."""
    kind, image_flags = leaderboard.KINDS[args.images]
    default = scripts.DATA if args.images == leaderboard.FASHION_MNIST else images_of(args.images)
    data = {"data_path": scripts.ROOT / (args.data_path or default)}
    base = {**leaderboard.BASE, **image_flags, **data}

    def pretrained(name: str, minutes: float, flags: dict[str, Any]) -> Path:
        out, lines = leaderboard.pretrain_for(minutes, {**base, **flags}, folder / name)
        file = out / f"checkpoint-{len(lines) - 1}.pth"
        encoder = data | {name: flags[name] for name in STUDENT if name in flags} | {"finetune": file}
        encoders[name] = {
            **adapt(FULL, encoder, folder / name / "tuned"), "k-NN": round(scoring.neighbors(encoder), 2),
            "minutes": round(leaderboard.minutes_of(lines), 2), "epochs": len(lines),
        }  # fmt: skip
        return file

    encoders: dict[str, dict[str, Any]] = {}
    file = pretrained("encoder", args.minutes, RECIPE)
    teacher = {"model_class": "examples.frozen_teacher:FrozenTeacher",
               "model_args": [f"teacher={file}", "distance=cosine", "class_token=true"], "mask_ratio": 0}  # fmt: skip
    pretrained("student, distilled from it", args.student_minutes, {**leaderboard.DEMO, **STUDENT, **teacher})
    pretrained("student, pre-trained alone", args.student_minutes, {**RECIPE, **STUDENT})
    full, *others = WAYS
    adapted = {name: adapt(WAYS[name], {**data, "finetune": file}, folder / name) for name in others}
    return {"kind": kind, "adapted": {full: encoders["encoder"], **adapted}, "encoders": encoders}


def table() -> str:
    """Returns the tables of all results."""
    parts = []
    for path in sorted(machine.RESULTS.glob(f"*/{NAME}_*.json")):
        found = json.loads(path.read_text())
        adapted = [
            [name, _accuracy(of), f"{of['weights']:,}", f"{of['seconds']:.0f}"] for name, of in found["adapted"].items()
        ]
        encoders = [
            [name, f"{of['minutes']:.1f}", f"{_score(of):.2f}", _accuracy(of), f"{of['k-NN']:.1f}",
             f"{of['weights']:,}"]
            for name, of in found["encoders"].items()
        ]  # fmt: skip
        parts += [
            f"{found['kind'][0].upper()}{found['kind'][1:]}, {found['machine']['processor']}:",
            markdown(["500 labels", "accuracy, %", "trained weights", "seconds"], adapted),
            markdown(["encoder", "minutes", "score", "500 labels, %", "k-NN, %", "weights"], encoders),
        ]
    return "\n\n".join(parts)


def _accuracy(found: dict[str, Any]) -> str:
    return str(Entry("", "", dict(enumerate(found["accuracies"]))))


def _score(found: dict[str, Any]) -> float:
    return statistics.fmean([statistics.fmean(found["accuracies"]), found["k-NN"]])


def main(args: argparse.Namespace) -> None:
    """Measures, writes the results as JSON, and prints the tables and writes them to the page."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    machine.write(f"{NAME}_{args.images}", torch.device("cpu"), vars(args), found, args.out)
    leaderboard.write_table(f"python benchmarks/{NAME}.py", table(), PAGE)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Measures ways to adapt an encoder with few labels, and a student of it.")
    parser.add_argument("--images", choices=leaderboard.KINDS, default=leaderboard.FASHION_MNIST, help="their kind")
    parser.add_argument("--minutes", default=4.0, type=positive, metavar="M", help="pre-training of the encoder")
    parser.add_argument("--student_minutes", default=3.0, type=positive, metavar="M", help="training of each student")
    parser.add_argument("--data_path", type=Path, metavar="DIR", help="images of this kind (default: those of the "
                        "repository, or written to runs/small_data)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON file (default: a folder in "
                        "benchmarks/results)")  # fmt: skip
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
