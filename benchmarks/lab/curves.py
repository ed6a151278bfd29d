"""Losses of the demo's model, trained on the same images, masks and seeds in several ways.

    python benchmarks/lab/curves.py --updates 700                                  # the variants: half an hour
    python benchmarks/lab/curves.py --updates 5000 --ways main compiled control-1 control-2 --name compiled

A control is the model as it is, with weights that a factor of 1 + 1e-6 · noise has changed: rounding errors grow in
training, and a way that differs no more than the controls is as good as another order of sums. `compiled` is the model
as `--compile` trains it. On a GPU, each update is a CUDA graph. The file is written after each way.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.lab import variants
from benchmarks.lab.emulation import fast_bf16
from benchmarks.lab.graph import Update
from demo.unpack_data import ARCHIVE
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.parallel import choose_device
from mae.settings import types
from mae.settings.choices import AMP_CHOICES
from mae.training.precision import Precision
from models_mae import MaskedAutoencoderViT

# recipes/pretrain_fashion_mnist.yaml
MODEL = {"patch_size": 7, "img_size": 28, "in_chans": 1, "uniformity": 0.1}
SIZE = "mini_patch4"
MEAN = 0.286
STD = 0.353
BATCH = 128
PEAK_LR = 4e-3 * BATCH / 256
WARM_UP = 156  # updates: two epochs

COMPILED = "compiled"
CONTROL = "control-"
CONTROL_FACTOR = 1e-6
INTERVALS = 10  # of a curve, whose mean losses are written
WAYS = (*variants.VARIANTS, COMPILED, f"{CONTROL}1", f"{CONTROL}2", f"{CONTROL}3")


def images(split: str) -> Tensor:
    """The normalized images of the demo: (n, 1, 28, 28) of "train" or "val"."""
    with np.load(ARCHIVE, allow_pickle=False) as archive:
        return ((torch.from_numpy(archive[f"{split}_images"]) / 255 - MEAN) / STD).unsqueeze(1)


def model_of(way: str, seed: int) -> MaskedAutoencoderViT:
    """The model of a way on the CPU; those of a seed start from the same weights, but for the controls."""
    torch.manual_seed(seed)
    model = variants.of_size(way if way in variants.VARIANTS else "main", SIZE, **MODEL)
    if way.startswith(CONTROL):
        generator = torch.Generator().manual_seed(int(way.removeprefix(CONTROL)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + CONTROL_FACTOR * torch.randn(parameter.shape, generator=generator))
    return model


def lr_of(update: int, updates: int) -> float:
    """The learning rate of an update: linear warm-up, then a half-cycle cosine."""
    if update < WARM_UP:
        return PEAK_LR * update / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (update - WARM_UP) / max(1, updates - WARM_UP)))


def train(way: str, seed: int, updates: int, precision: Precision) -> tuple[MaskedAutoencoderViT, Tensor]:
    """Trains a model; returns it, and the pixel loss of each update (updates,)."""
    device = precision.device
    pictures = images("train")
    model = model_of(way, seed).to(device)
    if way == COMPILED:
        from mae.training.compiling import compile_model

        compile_model(model, device)
    update = Update(model, precision, pictures[:BATCH], torch.empty(BATCH, model.num_patches))
    if device.type == "cuda":
        update.images.copy_(pictures[:BATCH])
        update.noise.uniform_()
        update.capture()
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    for number in range(updates):
        if len(order) < BATCH:
            order = torch.randperm(len(pictures), generator=generator)
        chosen = order[:BATCH]
        order = order[BATCH:]
        noise = torch.rand(BATCH, model.num_patches, generator=generator)
        terms = update(pictures[chosen], noise, lr_of(number, updates))
        losses.append(terms["pixels"].clone())
    return model, torch.stack(losses).cpu()


def held_out_loss(model: MaskedAutoencoderViT) -> float:
    """The pixel loss of the images that are not trained on, with fixed masks, in fp32."""
    model.cpu().eval()
    pictures = images("val")
    noise = torch.rand(len(pictures), model.num_patches, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(model(pictures, noise=noise)[0])


def train_and_evaluate(way: str, seed: int, updates: int, precision: Precision) -> dict[str, Any]:
    """Trains a model; returns the mean losses of the intervals, the held-out loss, and the seconds."""
    began = time.monotonic()
    with fast_bf16(precision.device):
        model, losses = train(way, seed, updates, precision)
    means = [float(part.double().mean()) for part in losses.tensor_split(min(INTERVALS, updates))]
    seconds = round(time.monotonic() - began, 1)
    if way == COMPILED:  # its graphs are of the device
        plain = model_of("main", seed)
        plain.load_state_dict(model.state_dict())
        model = plain
    return {"first": float(losses[0]), "means": means, "held_out": held_out_loss(model), "seconds": seconds}


def table(found: dict[str, dict[str, Any]], updates: int) -> str:
    """The losses of each way, and their differences from the first way, in units of 1e-5."""
    first = next(iter(found.values()))
    rows = []
    for way, one in found.items():
        differences = [1e5 * (ours - main) for ours, main in zip(one["means"], first["means"], strict=True)]
        held_out = 1e5 * (one["held_out"] - first["held_out"])
        rows.append([
            way, f"{one['means'][-1]:.5f}", f"{one['held_out']:.5f}", f"{1e5 * (one['first'] - first['first']):+.2f}",
            *(f"{difference:+.0f}" for difference in differences), f"{held_out:+.0f}",
        ])  # fmt: skip
    ends = [f"to {updates * (number + 1) // len(first['means'])}" for number in range(len(first["means"]))]
    return markdown(["way", "pixels, at the end", "held out", "1e-5: first", *ends, "held out"], rows)


def main(args: argparse.Namespace) -> None:
    """Trains the model in each way, prints a table, and writes the losses after each way."""
    device = choose_device(args.device)
    precision = Precision(args.amp, device, trains=True)
    results: dict[str, Any] = {"precision": precision.name, "curves": {}}
    for seed in args.seeds:
        found = results["curves"].setdefault(str(seed), {})
        for way in args.ways:
            found[way] = train_and_evaluate(way, seed, args.updates, precision)
            print(f"seed {seed}, {way}: {found[way]}", flush=True)
            machine.write(args.name or f"curves_{args.updates}", device, vars(args), results, args.out)
        print(f"\nseed {seed}, {precision.name}\n\n{table(found, args.updates)}\n", flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Losses of the demo's model, trained in several ways from the same weights.")
    parser.add_argument("--updates", default=700, type=types.positive_int, metavar="N", help="updates of each way")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--seeds", nargs="+", default=[0], type=int, metavar="SEED", help="one curve each")
    parser.add_argument("--amp", default="bf16", choices=AMP_CHOICES, help="precision; off is fp32")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--name", metavar="NAME", help="name of the file (default: curves_UPDATES)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the JSON file (default: benchmarks/results/MACHINE)"
    )
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
