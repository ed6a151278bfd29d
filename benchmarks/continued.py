"""Where it helps to continue an encoder on images of another kind: a table of docs/start_from.md.

    apt-get install dataset-fashion-mnist $(python benchmarks/letters.py)
    python benchmarks/fashion_mnist/unpack.py
    OMP_NUM_THREADS=1 python benchmarks/continued.py    # started once for each core, the command shares the runs

A small encoder stands for a released one: pre-trained on 60,000 garments, for 40 epochs. Each arm continues it on
letters or on cells (cells.py) for five minutes, or trains from scratch for the same time. The number of epochs of an
arm follows from its speed, which is measured first, in turns, and is the same for all seeds, so that the load of the
machine does not change a result. The rate of an arm is the best of RATES on held-out letters, by k-NN after a fifth
of the epochs.

Exported encoders are evaluated as in scoring.py: k-NN, a linear probe and fine-tuning with 500 labels of the new kind,
and k-NN of garments, the old kind. `agreement` needs no labels: the share of the 20 nearest neighbors that two random
crops of an image have in common. The same command resumes an interrupted study, also on another machine: each row is
appended to continued.jsonl, and later seeds take its epochs and rate.
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

import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

import main_pretrain
from benchmarks import cells, image_sets, leaderboard, machine, scoring, scripts
from benchmarks.fashion_mnist import unpack
from mae import get_model
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.data.generators import preserve_generators
from mae.evaluate.tables import markdown
from mae.files import atomic, locks, results
from mae.fp32 import in_fp32
from mae.inference.export import export
from mae.training import log
from mae.training.environment import commit
from models_mae import MaskedAutoencoderViT

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = scripts.ROOT / "docs/start_from.md"
WORK = scripts.ROOT / "runs/continued"
KINDS = {"letters": {"hflip": 0}, "cells": {}}
CHOSEN_ON = "letters"  # the kind on which the rates are chosen
SEEDS = (0, 1, 2)
START_EPOCHS = 40  # of 60,000 images
SECONDS = 300  # of a run
TIMED_EPOCHS = 3
SHARE = 5  # of the epochs of a run, one in SHARE for the choice of a rate
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
UPDATES = {"lora": 16, "unfreeze_blocks": 1}
GRAM = {"preserve": 1, "model_class": "benchmarks.continued:Gram"}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, preserve 1": {"preserve": 1},
    "full, Gram 1": GRAM,
    "LoRA 16": UPDATES,
    "LoRA 16, preserve .1": {**UPDATES, "preserve": 0.1},
    "LoRA 16, preserve 1": {**UPDATES, "preserve": 1},
    "from scratch": {},
}
START = "start, frozen"
SCRATCH = "from scratch"
MEASURES = ("k-NN", "linear", "500 labels", "k-NN, garments")
AGREEMENT = "agreement"
BASE: dict[str, Any] = {
    **leaderboard.BASE, **leaderboard.ENTRIES["demo with normalized pixels, uniformity .1"], **leaderboard.SMALL,
    "batch_size": 128,
}  # fmt: skip


class Gram(MaskedAutoencoderViT):
    """The Gram term of DINOv3 (Siméoni et al. 2025) in place of the cosine, for the visible patches."""

    def with_terms(self, loss: Any, latent: Tensor, imgs: Tensor, ids_restore: Tensor, **context: Any) -> Any:
        found = super().with_terms(loss, latent, imgs, ids_restore, **context)
        if "preserve" in found:
            preserve: Any = self.preserve
            tokens = preserve.tokens_of_start(latent, imgs, ids_restore, **context)
            found["preserve"] = preserve.weight * gram_distance(self.patch_tokens(latent), self.patch_tokens(tokens))
        return found


@in_fp32
def gram_distance(patches: Tensor, of_start: Tensor) -> Tensor:
    """Returns the mean squared difference of the cosines between the patches of an image: (B, K, D) each -> ()."""
    encoder, start = (F.normalize(tokens, dim=2) for tokens in (patches, of_start))
    return (encoder @ encoder.mT - start @ start.mT).square().mean()


def images_of(kind: str) -> Path:
    """Returns the folder of the images of a kind, which are written if they are absent."""
    if kind == "letters":
        return scripts.ROOT / image_sets.images_of(kind)
    folder = WORK / kind / "images"
    with locks.locked(WORK / kind, "images.lock", waits=True):
        if not folder.exists():
            with atomic.replacing(folder) as written:
                cells.write(written)
    return folder


def pretrain(settings: Mapping[str, Any], out: Path, epochs: int) -> dict[str, Any]:
    """Pre-trains an encoder once; returns the seconds of an epoch."""
    of_run = {
        "epochs": epochs, "warmup_epochs": epochs / 20, "save_every": epochs, "keep_last": 1, "resume": "auto",
        "output_dir": out,
    }  # fmt: skip

    def read(folder: Path, _: object) -> dict[str, Any]:
        return {"epoch seconds": statistics.median(line["seconds"] for line in log.read(folder))}

    return store.run_once(out, Script(main_pretrain), {**settings, **of_run}, read)


def start() -> Path:
    """Returns the checkpoint from which the arms start. One process trains it, and others wait."""
    out = WORK / "start/run"
    garments = {"data_path": unpack.OUT / "images", "seed": 0}
    with locks.locked(WORK, "start.lock", waits=True):
        pretrain({**BASE, **garments}, out, START_EPOCHS)
    return out / f"checkpoint-{START_EPOCHS - 1}.pth"


def settings_of(arm: str, kind: str, seed: int, file: Path) -> dict[str, Any]:
    """Returns the settings of a run, without its rate."""
    given = {**BASE, **KINDS[kind], **ARMS[arm], "data_path": images_of(kind), "seed": seed}
    return given if arm == SCRATCH else {**given, "init_from": file}


def epochs_of(file: Path) -> dict[tuple[str, str], int]:
    """Returns the epochs of an arm on a kind that take SECONDS. The speeds are measured once, in turns."""
    path = WORK / "speeds.json"
    with locks.locked(WORK, "speeds.lock", waits=True):
        if not path.exists():
            seconds = {}
            for kind, arm in itertools.product(KINDS, ARMS):
                out = WORK / "speed" / kind / arm
                seconds[f"{kind}: {arm}"] = pretrain(settings_of(arm, kind, 0, file), out, TIMED_EPOCHS)
            atomic.write_text(path, json.dumps({name: found["epoch seconds"] for name, found in seconds.items()}))
    speeds = json.loads(path.read_text())
    return {
        (kind, arm): max(1, round(SECONDS / speeds[f"{kind}: {arm}"])) for kind, arm in itertools.product(KINDS, ARMS)
    }


def rate_of(arm: str, file: Path, epochs: int) -> float:
    """Returns the rate of an arm with the best k-NN of held-out images, after some of the epochs."""
    scores = {}
    with locks.locked(WORK / "rates", f"{arm}.lock", waits=True):
        settings = settings_of(arm, CHOSEN_ON, 0, file)
        held_out = scoring.hold_out(settings["data_path"], WORK / "rates")
        for rate in RATES:
            out = WORK / "rates" / arm / f"{rate:g}"
            pretrain({**settings, "lr": rate, "train_list": held_out["train_list"]}, out, max(1, epochs // SHARE))
            flags = {"data_path": settings["data_path"], **held_out}
            scores[rate] = scoring.neighbors(flags | {"finetune": encoder_of(out)})
    return max(scores, key=scores.__getitem__)


def encoder_of(run: Path) -> Path:
    """Returns the encoder of a run, with merged updates; it is exported if the file is absent."""
    out = run / "encoder.safetensors"
    if not out.exists():
        (file,) = run.glob("checkpoint-[0-9]*.pth")
        export(get_model(file), "safetensors", out)
    return out


def evaluate(file: Path, kind: str, seed: int, out: Path) -> dict[str, Any]:
    """Returns the accuracies of an encoder, in percent, and the agreement, from 0 to 1."""
    found = scoring.of_encoder(file, {"data_path": images_of(kind)}, seed, out, threads=1)
    garments = scoring.neighbors({"data_path": scripts.ROOT / scripts.DATA, "finetune": file})
    return {**found, "k-NN, garments": round(garments, 2), AGREEMENT: round(agreement(file, images_of(kind)), 4)}


@torch.no_grad()
def agreement(file: Path, data_path: Path) -> float:
    """Returns the share of the nearest neighbors that two random crops of a test image have in common."""
    model = get_model(file)
    images = [Image.open(path) for path in sorted(data_path.glob("val/*/*"))]
    crop = RandomResizedCrop(images[0].size[::-1], (0.6, 1.0))
    with preserve_generators():
        torch.manual_seed(0)
        views = [[crop(image) for image in images] for _ in range(2)]
    bank = features(model, images)
    nearest = []
    for view in views:
        cosines = features(model, view) @ bank.T
        cosines.fill_diagonal_(-1)  # the image itself
        nearest.append(cosines.topk(scoring.NEIGHBORS).indices)
    both = (nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)).any(dim=2)
    return float(both.double().mean())


def features(model: Any, images: Sequence[Image.Image]) -> Tensor:
    """Returns normalized class tokens of images, (n, D)."""
    parts = [model.extract_feat(images[first : first + 500], pool="cls") for first in range(0, len(images), 500)]
    return F.normalize(torch.cat(parts), dim=1)


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def recorded(name: str, **of_run: str) -> Any:
    """Returns a value of the first row with these values; None if no row has it.

    So another machine continues a study with the epochs and rates of its first runs.
    """
    return next((row[name] for row in read() if of_run.items() <= row.items() and name in row), None)


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Returns a table for each kind, with the means over the seeds, and the rank correlation of k-NN and agreement."""
    rows = read() if rows is None else rows
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        lines = []
        for arm in dict.fromkeys([START, *ARMS]):
            if runs := [row for row in of_kind if row["arm"] == arm]:
                speed = [f"{runs[0][name]:,.0f}" if name in runs[0] else "" for name in ("images/s", "updates")]
                rate = f"{runs[0]['lr']:g}" if "lr" in runs[0] else ""
                lines.append([arm, *(mean_of(runs, name) for name in MEASURES), rate, *speed])
        means = [
            [statistics.fmean(row[name] for row in of_kind if row["arm"] == arm) for name in ("k-NN", AGREEMENT)]
            for arm in dict.fromkeys(row["arm"] for row in of_kind)
        ]
        correlation = stats.spearmanr(*zip(*means, strict=True)).statistic
        machines = " and ".join(dict.fromkeys(row["machine"] for row in of_kind))  # the speed is of the first
        parts += [
            f"{kind.capitalize()}, {machines}, {len(of_kind)} runs:",
            markdown(["arm", *(f"{name}, %" for name in MEASURES), "lr", "images/s", "updates"], lines),
            f"Spearman's rank correlation of k-NN and the agreement of neighbors, of the arms: {correlation:.2f}.",
        ]
    return "\n\n".join(parts)


def mean_of(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns the mean of a measure over the seeds, with its standard deviation."""
    values = [run[name] for run in runs]
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def measure(arm: str, kind: str, seed: int, file: Path) -> dict[str, Any]:
    """Trains and evaluates an arm; returns its results."""
    if arm == START:
        return evaluate(encoder_of(file.parent), kind, seed, WORK / kind / "start" / str(seed))
    epochs = recorded("epochs", arm=arm, kind=kind) or epochs_of(file)[kind, arm]
    rate = recorded("lr", arm=arm) or rate_of(arm, file, epochs_of(file)[CHOSEN_ON, arm])
    out = WORK / kind / arm / f"run{seed}"
    seconds = pretrain({**settings_of(arm, kind, seed, file), "lr": rate}, out, epochs)["epoch seconds"]
    images = sum(1 for _ in images_of(kind).glob("train/*/*"))
    return {
        **evaluate(encoder_of(out), kind, seed, WORK / kind / arm / f"evaluation{seed}"),
        "lr": rate, "epochs": epochs, "images/s": round(images / seconds),
        "updates": epochs * (images // BASE["batch_size"]),
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, and prints the tables and writes them to the page."""
    os.chdir(scripts.ROOT)
    version = commit()
    file = start()
    for seed, kind, arm in itertools.product(args.seeds, args.kinds, [START, *ARMS]):
        row = {"arm": arm, "kind": kind, "seed": seed}
        if any(row.items() <= done.items() for done in read()):
            continue
        folder = WORK / kind / f"{arm}-{seed}"
        with suppress(locks.Busy), locks.locked(folder):  # busy: a process of the other core has it
            row |= {**measure(arm, kind, seed, file), "machine": machine.processor(), "commit": version}
            results.add_line(ROWS, json.dumps(row))
            leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), PAGE)
            print(json.dumps(row), flush=True)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Continues an encoder on images of other kinds, in several ways, at equal time.")
    parser.add_argument("--seeds", nargs="+", default=SEEDS, type=int, metavar="N", help="seeds")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
