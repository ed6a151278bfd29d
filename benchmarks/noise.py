"""Pre-training with and without normalized pixels, on clean and on noisy images: the table of noise.md.

    python demo/unpack_data.py
    OMP_NUM_THREADS=1 python benchmarks/noise.py                # 24 runs, four minutes each on an idle core
    OMP_NUM_THREADS=1 python benchmarks/noise.py --noise 0.1    # more of them

Started once per core, the command shares the runs. The same command resumes an interrupted study. Each run appends its
row to noise.jsonl and writes the table to noise.md.

Images: the garments of the repository, and cells (cells.py), as files of 8 bits. Gaussian noise of a standard deviation
of .3 of the range is added to training and held-out images alike, and values outside the range are clipped. An encoder
is pre-trained by the settings that `python -m mae.data --recipe` gives for the images and one core, with and without
`norm_pix_loss`. Its length is fixed, 200,000 images, so that the load of the machine does not change a result. They
took about 230 seconds of a core of an AMD EPYC: two minutes on two cores. The score is the accuracy of
the 20 nearest neighbors of held-out images among the training images, by `main_knn.py`.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image
from scipy import stats

import main_knn
import main_pretrain
from benchmarks import cells, leaderboard, machine, scoring, scripts
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.data.image_facts import all_facts
from mae.data.open import open_source
from mae.data.source import Source
from mae.evaluate.tables import markdown
from mae.files import atomic, locks, results
from mae.recommend import rules
from mae.recommend.facts import Images, Machine
from mae.settings import DataSpec
from mae.settings.types import non_negative
from mae.training.environment import commit

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("noise.jsonl", "noise.md"))
WORK = scripts.ROOT / "runs/noise"
EPOCHS = {"garments": 20, "cells": 25}  # 200,000 images
NOISE = (0.3, 0.0)  # standard deviation, as a share of the range
SEEDS = (0, 1, 2)
MODEL = rules.MODELS[0]
ONE_CORE = Machine(gpus=0, cores=1, cache_bytes=math.inf)


def images_of(kind: str, noise: float) -> Path:
    """Returns the folder of images with noise, which are written if they are absent."""
    if not noise and kind == "garments":
        return scripts.ROOT / scripts.DATA
    folder = WORK / kind / f"noise_{noise:g}" / "images"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.locked(folder.parent, "images.lock", waits=True):
        if not folder.exists():
            with atomic.replacing(folder) as written:
                if noise:
                    add_noise(images_of(kind, 0), written, noise)
                else:
                    cells.write(written)
    return folder


def add_noise(clean: Path, folder: Path, noise: float) -> None:
    """Writes gray images with Gaussian noise to a folder, under the same names.

    Args:
        noise: standard deviation, as a share of the range.
    """
    draw = np.random.default_rng(0)
    for path in sorted(clean.glob("*/*/*.png")):
        pixels = np.asarray(Image.open(path), dtype=float)
        noisy = np.clip(pixels + 255 * noise * draw.standard_normal(pixels.shape), 0, 255)
        out = folder / path.relative_to(clean)
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.round().astype(np.uint8)).save(out)


def recipe(data_path: Path, in_chans: int = 1) -> dict[str, Any]:
    """Returns the settings that the rules of the recipes give for images, on one core."""
    source = cast(Source, open_source(DataSpec(data_path=str(data_path)), "train"))
    facts = list(all_facts(source, in_chans, list(range(len(source))), 0))
    images = Images.of(facts, len(source), in_chans, has_range=False)
    lines = [
        *rules.image_lines(images),
        *rules.optimization_lines(images, ONE_CORE, MODEL),
        *rules.loading_lines(images, ONE_CORE),
    ]
    return {"data_path": data_path, "model": f"mae_vit_{MODEL}", **{line.name: line.value for line in lines}}


def measure(settings: Mapping[str, Any], out: Path) -> float:
    """Pre-trains an encoder; returns the accuracy of neighbors in percent."""
    epochs = settings["epochs"]
    run_flags = {
        "warmup_epochs": epochs / 20,
        "save_every": epochs,
        "vis_every": 0,
        "resume": "auto",
        "output_dir": out,
    }

    def neighbors(folder: Path, _: object) -> dict[str, Any]:
        encoder = {"finetune": folder / f"checkpoint-{epochs - 1}.pth", "model": f"vit_{MODEL}", "global_pool": False}
        flags = {**encoder, "data_path": settings["data_path"], "k": [scoring.NEIGHBORS], "num_workers": 0}
        (accuracy,) = Script(main_knn).call_main(flags, folder / "knn.txt").values()
        return {"k-NN": accuracy}

    return store.run_once(out, Script(main_pretrain), {**settings, **run_flags}, neighbors)["k-NN"]


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of the seeds that have a run with and one without normalized pixels.

    From two seeds on, the mean difference has the p of a paired two-sided t-test over the seeds.
    """
    found: dict[tuple[str, float], dict[bool, dict[int, float]]] = {}
    for row in rows:
        runs = found.setdefault((row["kind"], row["noise"]), {True: {}, False: {}})
        runs[row["norm_pix_loss"]][row["seed"]] = row["k-NN"]
    lines = []
    for (kind, noise), runs in sorted(found.items()):
        if seeds := sorted(runs[True].keys() & runs[False].keys()):
            normalized, plain = ([runs[on][seed] for seed in seeds] for on in (True, False))
            difference = statistics.fmean(normalized) - statistics.fmean(plain)
            p = f"{stats.ttest_rel(normalized, plain).pvalue:.2g}" if len(seeds) > 1 else ""
            accuracies = [" ".join(f"{value:.2f}" for value in values) for values in (normalized, plain)]
            lines.append([kind, f"{noise:g}", *accuracies, f"{difference:+.2f}", p])
    return markdown(["images", "noise", "with, %", "without, %", "difference", "p"], lines)


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, each noise by seeds, and prints the table."""
    os.chdir(scripts.ROOT)
    version = commit()
    for noise, seed, kind, on in itertools.product(args.noise, args.seeds, EPOCHS, (True, False)):
        row = {"kind": kind, "noise": noise, "seed": seed, "norm_pix_loss": on}
        if any(row.items() <= done.items() for done in read()):
            continue
        data_path = images_of(kind, noise)
        settings = {**recipe(data_path), "norm_pix_loss": on, "seed": seed, "epochs": EPOCHS[kind]}
        out = WORK / kind / f"noise_{noise:g}" / f"{'with' if on else 'without'}-{seed}"
        try:
            accuracy = measure(settings, out)
        except locks.Busy:  # a process of the other core has it
            continue
        row |= {"epochs": EPOCHS[kind], "k-NN": accuracy, "machine": machine.processor(), "commit": version}
        results.add_line(ROWS, json.dumps(row))
        leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(read()), PAGE)
        print(json.dumps(row), flush=True)
    print(table(read()))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Pre-trains with and without normalized pixels, on clean and on noisy images.")
    parser.add_argument("--noise", nargs="+", default=NOISE, type=non_negative, metavar="S", help="standard "
                        "deviations, as shares of the range")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", default=SEEDS, type=int, metavar="N", help="seeds")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
