"""Pre-training on few images: which settings matter, measured on subsets of Fashion-MNIST with two CPU cores.

    python demo/unpack_data.py
    python benchmarks/small_data/study.py                     # all; about three hours
    python benchmarks/small_data/study.py patch-7 mask-0.9    # these; the table has all so far

Each encoder is pre-trained without labels on 1,000 or 10,000 images, two encoders at a time. main_compare.py then
evaluates them with 500 labels: a linear probe and fine-tuning, three random subsets each. table.md and results.json are
written beside this file; an encoder that has a result there is left out. The same command resumes an interrupted study.
The encoders are in runs/small_data.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from util.cli.advice import arguments
from util.evaluation.comparison import Cell
from util.evaluation.tables import markdown
from util.files import atomic
from util.jobs.commands import Commands

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = Path("runs/small_data")
DATA = Path("demo/data/fashion_mnist")
RESULTS = HERE / "results.json"
JOBS = 2

EVALUATION = {
    "data_path": DATA, "input_size": 28, "in_chans": 1, "crop_pct": 1, "num_workers": 1,
    "protocols": ["linear", "finetune"], "labels": [500], "draws": [3], "budget": [30],
    "recipes": ["finetune=recipes/finetune_fashion_mnist_full.yaml"], "jobs": JOBS, "output_dir": WORK / "compare",
}  # fmt: skip


class Run(NamedTuple):
    """A run of main_pretrain.py with recipes/pretrain_fashion_mnist.yaml and patches of 4 pixels."""

    images: int
    epochs: int
    others: dict[str, Any]

    def flags(self, name: str) -> dict[str, Any]:
        """Returns its flags."""
        return {
            "config": "recipes/pretrain_fashion_mnist.yaml", "patch_size": 4, "amp": "bf16", "num_workers": 1,
            "data_path": DATA / "train", "train_list": WORK / f"{self.images}.txt", "epochs": self.epochs,
            "warmup_epochs": max(1, self.epochs // 20), "save_every": self.epochs, "vis_every": 0, "resume": "auto",
            "output_dir": WORK / name, **self.others,
        }  # fmt: skip

    def command(self, name: str) -> str:
        """Returns its command."""
        return shlex.join(["python", "main_pretrain.py", *arguments(self.flags(name))])


# Each row differs from "base", or from "1000-images", in one setting.
RUNS = {
    "base": Run(10_000, 20, {}),
    "1000-images": Run(1_000, 200, {}),
    "epochs-5": Run(10_000, 5, {}),
    "epochs-80": Run(10_000, 80, {}),
    "mask-0.5": Run(10_000, 20, {"mask_ratio": 0.5}),
    "mask-0.9": Run(10_000, 20, {"mask_ratio": 0.9}),
    "patch-7": Run(10_000, 20, {"patch_size": 7}),
    "patch-2": Run(10_000, 20, {"patch_size": 2}),
    "crop-0.2": Run(10_000, 20, {"crop_scale": [0.2, 1]}),
    "no-crop": Run(10_000, 20, {"crop_scale": [1, 1]}),
    "lr-0.0003": Run(10_000, 20, {"lr": 3e-4}),
    "lr-0.003": Run(10_000, 20, {"lr": 3e-3}),
    "decoder-2": Run(10_000, 20, {"decoder_depth": 2}),
    "normalized-target": Run(10_000, 20, {"norm_pix_loss": True}),
    "1000-images-epochs-20": Run(1_000, 20, {}),
    "1000-images-epochs-1000": Run(1_000, 1_000, {}),
    "1000-images-mask-0.5": Run(1_000, 200, {"mask_ratio": 0.5}),
    "1000-images-crop-0.2": Run(1_000, 200, {"crop_scale": [0.2, 1]}),
}


def write_list(images: int) -> None:
    """Writes a list of the first images of each class, equally many."""
    folder = DATA / "train"
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [file for path in classes for file in sorted(path.iterdir())[: images // len(classes)]]
    atomic.write_text(WORK / f"{images}.txt", "".join(f"{file.relative_to(folder)}\n" for file in files))


def pretrain(commands: Commands, name: str) -> tuple[str, dict[str, Any]]:
    """Pre-trains an encoder; returns its name with the loss of the last epoch and the minutes of training."""

    def read(out: Path, _: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
        return {"loss": lines[-1]["train_loss"], "minutes": sum(line["seconds"] for line in lines) / 60}

    return name, commands.run(name, ROOT / "main_pretrain.py", RUNS[name].flags(name), read)


def compare(names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Evaluates encoders; returns the accuracies of the draws, by encoder and protocol."""
    encoders = [f"{name}={WORK / name / f'checkpoint-{RUNS[name].epochs - 1}.pth'}" for name in names]
    words = ["main_compare.py", *arguments({**EVALUATION, "encoders": encoders})]
    print("$", shlex.join(["python", *words]), flush=True)
    subprocess.run([sys.executable, *words], check=True)
    accuracies: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    with (WORK / "compare" / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            accuracies[row["encoder"]].setdefault(row["protocol"], []).append(float(row["accuracy"]))
    return accuracies


def table(results: dict[str, Any]) -> str:
    """Returns the table of the results so far in Markdown: mean ± standard deviation over the draws."""
    protocols = list(dict.fromkeys(protocol for result in results.values() for protocol in result["accuracies"]))
    rows = []
    for name in RUNS:
        if name in results:
            result = results[name]
            cells = [
                str(Cell(name, protocol, dict(enumerate(result["accuracies"][protocol])))) for protocol in protocols
            ]
            run = RUNS[name]
            rows.append([name, f"{run.images:,}", f"{run.epochs:,}", f"{result['minutes']:.0f}",
                         f"{result['loss']:.4f}", *cells])  # fmt: skip
    return markdown(["encoder", "images", "epochs", "minutes", "loss", *(f"{name}, %" for name in protocols)], rows)


def main() -> None:
    """Pre-trains and evaluates the encoders that have no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RUNS)} (default: all)")
    names = parser.parse_args().names or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"there is no encoder {unknown[0]}; the names are {', '.join(RUNS)}")
    WORK.mkdir(parents=True, exist_ok=True)
    for images in {RUNS[name].images for name in names}:
        write_list(images)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = [name for name in names if results.get(name, {}).get("command") != RUNS[name].command(name)]
    commands = Commands(WORK, WORK / "results.json", JOBS)
    trained = {}
    for name, scores in commands.each([partial(pretrain, commands, name) for name in names]):
        trained[name] = scores
        print(
            f"[{len(trained)}/{len(names)}] {name}: loss {scores['loss']:.4f}, {scores['minutes']:.1f} min", flush=True
        )
    for name, accuracies in (compare(names) if names else {}).items():
        minutes = round(trained[name]["minutes"], 1)
        command = trained[name]["command"]
        results[name] = {
            "loss": trained[name]["loss"],
            "minutes": minutes,
            "accuracies": accuracies,
            "command": command,
        }
    atomic.write_text(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
    atomic.write_text(HERE / "table.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
