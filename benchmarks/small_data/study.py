"""Pre-training on few images: which settings matter, measured on subsets of Fashion-MNIST with two CPU cores.

    python demo/unpack_data.py
    python benchmarks/small_data/study.py                     # all; four hours
    python benchmarks/small_data/study.py patch-7 mask-0.9    # these; the table has all so far

Each encoder is pre-trained without labels on 1,000 or 10,000 images. main_compare.py then evaluates it: a linear probe
and fine-tuning with 500 and 10,000 labels. table.md and results.json are written beside this file after each encoder;
results that are in results.json are not computed again. The encoders are in runs/small_data.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from util.evaluation.comparison import Cell
from util.evaluation.tables import markdown
from util.files import atomic

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = Path("runs/small_data")
DATA = Path("demo/data/fashion_mnist")
RESULTS = HERE / "results.json"


EVALUATION = [
    "main_compare.py", "--data_path", DATA, "--input_size", 28, "--in_chans", 1, "--crop_pct", 1, "--num_workers", 1,
    "--protocols", "linear", "finetune", "--labels", 500, 10_000, "--draws", 3, 1, "--budget", 60, 15, "--jobs", 2,
    "--recipes", "finetune=recipes/finetune_fashion_mnist.yaml",
]  # fmt: skip


class Run(NamedTuple):
    """A run of main_pretrain.py with recipes/pretrain_fashion_mnist.yaml and patches of 4 pixels."""

    images: int
    epochs: int
    flags: list[Any]

    def command(self, out: Path) -> list[Any]:
        """Returns the command of pre-training."""
        return [
            "main_pretrain.py", "--config", "recipes/pretrain_fashion_mnist.yaml", "--patch_size", 4,
            "--data_path", DATA / "train", "--train_list", WORK / f"{self.images}.txt", "--epochs", self.epochs,
            "--warmup_epochs", max(1, self.epochs // 20), "--save_every", self.epochs, "--vis_every", 0,
            "--output_dir", out, *self.flags,
        ]  # fmt: skip


# Fifty epochs of 10,000 images take ten minutes. The variants differ from "base" in one setting.
RUNS = {
    "base": Run(10_000, 50, []),
    "epochs-10": Run(10_000, 10, []),
    "epochs-200": Run(10_000, 200, []),
    "patch-2": Run(10_000, 50, ["--patch_size", 2]),
    "patch-7": Run(10_000, 50, ["--patch_size", 7]),
    "mask-0.5": Run(10_000, 50, ["--mask_ratio", 0.5]),
    "mask-0.9": Run(10_000, 50, ["--mask_ratio", 0.9]),
    "crop-0.2": Run(10_000, 50, ["--crop_scale", 0.2, 1]),
    "no-crop": Run(10_000, 50, ["--crop_scale", 1, 1]),
    "lr-0.0003": Run(10_000, 50, ["--lr", 3e-4]),
    "lr-0.003": Run(10_000, 50, ["--lr", 3e-3]),
    "decoder-2": Run(10_000, 50, ["--decoder_depth", 2]),
    "normalized-target": Run(10_000, 50, ["--norm_pix_loss"]),
    "1000-images-epochs-50": Run(1_000, 50, []),
    "1000-images-epochs-500": Run(1_000, 500, []),
    "1000-images-epochs-2000": Run(1_000, 2_000, []),
    "1000-images-epochs-500-mask-0.5": Run(1_000, 500, ["--mask_ratio", 0.5]),
    "1000-images-epochs-500-crop-0.2": Run(1_000, 500, ["--crop_scale", 0.2, 1]),
}


def write_list(images: int) -> None:
    """Writes a list of the first images of each class, equally many."""
    folder = ROOT / DATA / "train"
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [file for path in classes for file in sorted(path.iterdir())[: images // len(classes)]]
    atomic.write_text(ROOT / WORK / f"{images}.txt", "".join(f"{file.relative_to(folder)}\n" for file in files))


def call(command: list[Any]) -> None:
    """Runs a script in the repository with one thread."""
    words = [sys.executable, *map(str, command)]
    print("$", shlex.join(words), flush=True)
    subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def evaluate(name: str, run: Run) -> dict[str, Any]:
    """Pre-trains an encoder and evaluates it; returns the loss, the minutes, and the accuracies by column."""
    out = WORK / name
    write_list(run.images)
    call([*run.command(out), "--resume", "auto"])
    lines = [json.loads(line) for line in (ROOT / out / "log.txt").read_text().splitlines()]
    encoder = out / f"checkpoint-{run.epochs - 1}.pth"
    call([*EVALUATION, "--encoders", f"{name}={encoder}", "--output_dir", out / "compare"])
    accuracies: dict[str, list[float]] = {}
    with (ROOT / out / "compare" / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            column = f"{row['protocol']}, {int(row['labels']):,} labels"
            accuracies.setdefault(column, []).append(float(row["accuracy"]))
    minutes = sum(line["seconds"] for line in lines) / 60
    return {"loss": lines[-1]["train_loss"], "minutes": round(minutes, 1), "accuracies": accuracies}


def table(results: dict[str, Any]) -> str:
    """Returns the table of the results so far in Markdown: mean ± standard deviation over the draws."""
    columns = list(dict.fromkeys(column for result in results.values() for column in result["accuracies"]))
    rows = []
    for name in RUNS:
        if name in results:
            result = results[name]
            cells = [str(Cell(name, column, dict(enumerate(result["accuracies"][column])))) for column in columns]
            rows.append([name, f"{result['minutes']:.0f}", f"{result['loss']:.4f}", *cells])
    return markdown(["pre-training", "minutes", "loss", *columns], rows)


def main() -> None:
    """Pre-trains and evaluates the encoders that have no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RUNS)} (default: all)")
    names = parser.parse_args().names or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"there is no encoder {unknown[0]}; the names are {', '.join(RUNS)}")
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    for name in names:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        command = shlex.join(map(str, ["python", *RUNS[name].command(WORK / name)]))
        if results.get(name, {}).get("command") != command:
            results[name] = {**evaluate(name, RUNS[name]), "command": command}
            atomic.write_text(RESULTS, json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        atomic.write_text(HERE / "table.md", table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
