"""Class token, mean of the patches, and both together as features: the table of pooling.md.

    python demo/unpack_data.py
    apt-get install $(python benchmarks/letters.py)
    OMP_NUM_THREADS=1 python benchmarks/pooling.py              # 10 runs, six minutes each on an idle core

Started once per core, the command shares the runs. The same command resumes an interrupted study. Each run appends its
rows to pooling.jsonl and writes the table to pooling.md.

An encoder is pre-trained on 200,000 images of each kind, by the settings that `python -m mae.data --recipe` gives for
them and one core. Its frozen features are evaluated on the images of val/: the accuracy of 20 nearest neighbors by
`main_knn.py`, and of a linear probe by `main_linprobe.py`, whose rate is chosen on a tenth of the training images.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import main_linprobe
import main_pretrain
from benchmarks import curation, leaderboard, machine, noise, scoring, scripts
from benchmarks.image_sets import images_of
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.evaluate.tables import markdown
from mae.files import atomic, locks, results
from mae.settings.choices import POOL_CHOICES
from mae.training import log
from mae.training.environment import commit

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("pooling.jsonl", "pooling.md"))
WORK = scripts.ROOT / "runs/pooling"
KINDS = {"garments": 1, "photographs": 3, "letters": 1, "cells": 1, "spectrograms": 1}  # their channels
PROCESSED = 200_000  # images
SPECTROGRAMS = {"train": 4, "val": 1}  # times `curation.IMAGES`
SEEDS = (0, 1)
LINEAR = {name: value for name, value in scoring.LINPROBE.items() if name != "model"}
MEASURES = ("k-NN", "linear")


def folder_of(kind: str) -> Path:
    """Returns the folder of the images of a kind, which are written if they are absent."""
    if kind in ("garments", "cells"):
        return noise.images_of(kind, 0)
    if kind != "spectrograms":
        return scripts.ROOT / images_of(kind)
    folder = WORK / kind / "images"
    with locks.locked(WORK / kind, "images.lock", waits=True):
        if not folder.exists():
            with atomic.replacing(folder) as written:
                write_spectrograms(written)
    return folder


def write_spectrograms(folder: Path) -> None:
    """Writes the images to folder/train and folder/val, with a folder for each class."""
    draw = np.random.default_rng(0)
    for split, times in SPECTROGRAMS.items():
        for part in range(times):
            for number, (name, image) in enumerate(curation.spectrograms(draw)):
                out = folder / split / name
                out.mkdir(parents=True, exist_ok=True)
                image.save(out / f"{part}{number:04}.png")


def encoder_of(kind: str, seed: int) -> Path:
    """Pre-trains an encoder of a kind of images; returns its file."""
    folder = folder_of(kind)
    epochs = round(PROCESSED / sum(1 for _ in folder.glob("train/*/*")))
    out = WORK / kind / f"encoder{seed}"
    settings = {
        **noise.recipe(folder, KINDS[kind]), "seed": seed, "epochs": epochs, "warmup_epochs": epochs / 20,
        "save_every": epochs, "vis_every": 0, "resume": "auto", "output_dir": out,
    }  # fmt: skip
    store.run_once(out, Script(main_pretrain), settings, lambda run, _: {"loss": log.read(run)[-1]["train_loss"]})
    return out / f"checkpoint-{epochs - 1}.pth"


def measure(kind: str, seed: int, pool: str, encoder: Path) -> dict[str, float]:
    """Returns the accuracies of a pooling in percent."""
    flags = {"data_path": folder_of(kind), "finetune": encoder, "pool": pool}
    out = WORK / kind / f"linear-{pool}{seed}"
    settings = {**LINEAR, **flags, "model": f"vit_{noise.MODEL}", "seed": seed, "resume": "auto", "output_dir": out}
    linear = store.run_once(
        out, Script(main_linprobe), settings, lambda run, _: {"acc1": log.read(run)[-1]["test_acc1"]}
    )
    return {"k-NN": round(scoring.neighbors(flags), 2), "linear": round(linear["acc1"], 2)}


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Returns the table: the accuracies of each seed, the standard error that the number of images leaves of one, and
    the mean differences to the single poolings.
    """
    rows = read() if rows is None else rows
    images = {row["kind"]: row["images"] for row in rows}
    lines = []
    for kind, name in itertools.product(dict.fromkeys(row["kind"] for row in rows), MEASURES):
        found = {
            pool: [row[name] for row in rows if (row["kind"], row["pool"]) == (kind, pool)] for pool in POOL_CHOICES
        }
        if min(map(len, found.values())):
            *single, both = (statistics.fmean(values) for values in found.values())
            texts = [" ".join(f"{value:.1f}" for value in values) for values in found.values()]
            error = f"{scoring.standard_error([*single, both], images[kind]):.1f}"
            lines.append([kind, name, *texts, error, f"{both - single[0]:+.1f}", f"{both - single[1]:+.1f}"])
    return markdown(["images", "accuracy, %", *POOL_CHOICES, "standard error", "both − cls", "both − avg"], lines)


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, and prints the table."""
    os.chdir(scripts.ROOT)
    version = commit()
    for seed, kind in itertools.product(args.seeds, args.kinds):
        run = {"kind": kind, "seed": seed}
        pools = [
            pool for pool in POOL_CHOICES if not any((run | {"pool": pool}).items() <= row.items() for row in read())
        ]
        folder = WORK / kind / f"run{seed}"
        with suppress(locks.Busy), locks.locked(folder):  # busy: a process of the other core has it
            for pool in pools:
                found = measure(kind, seed, pool, encoder_of(kind, seed))
                images = sum(1 for _ in folder_of(kind).glob("val/*/*"))
                row = run | {
                    "pool": pool, **found, "images": images, "machine": machine.processor(), "commit": version
                }  # fmt: skip
                results.add_line(ROWS, json.dumps(row))
                print(json.dumps(row), flush=True)
            leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), PAGE)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Compares the class token, the mean of the patches, and both together as features.")
    parser.add_argument("--seeds", nargs="+", default=SEEDS, type=int, metavar="N", help="seeds")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
