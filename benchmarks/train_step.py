"""Throughput of an update, compared with other implementations in one process.

    python benchmarks/train_step.py                             # pre-training, ViT-B, 5 minutes on two CPU cores
    python benchmarks/train_step.py --amp off --only transformers ours
    python benchmarks/train_step.py --task finetune
    python benchmarks/train_step.py --size huge_patch14 --batch_size 512 --device cuda

The implementations take turns. Ours is compiled as by --compile: blocks of a size share a graph. The whole model of a
peer is a graph. Eager peers use the default AdamW, and compiled peers the fused AdamW. Our update is the one of the
training loop: it includes the gradient norm and the check for gradients that are not finite. Data loading is not
included.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import models_mae
import models_vit
from benchmarks import machine, peers, timing
from mae.cli import entry_point
from mae.parallel import choose_device
from mae.training.compiling import compile_model
from mae.training.precision import Precision

Step = Callable[[], Any]


def our_autoencoder(size: str, **depths: int) -> nn.Module:
    """Our masked autoencoder."""
    return getattr(models_mae, f"mae_vit_{size}")(**depths)


def our_classifier(size: str, **depths: int) -> nn.Module:
    """Our classifier as in fine-tuning."""
    return getattr(models_vit, f"vit_{size}")(global_pool=True, drop_path_rate=0.1, **depths)


# The implementations of a task by name.
MODELS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "pretrain": {"transformers": peers.transformers_mae, "plain": peers.PlainMAE, "ours": our_autoencoder},
    "finetune": {"timm": peers.timm_classifier, "ours": our_classifier},
}


def update(task: str, name: str, how: str, size: str, batch_size: int, precision: Precision, **depths: int) -> Step:
    """Builds an implementation; returns its update with a batch of noise.

    Our update is that of `mae.training.loop`, the others are as in PyTorch's tutorials.

    Args:
        how: "eager"; "compiled": a whole model of others; "compiled by blocks": others as ours.
        depths: fewer blocks, of our models and transformers' autoencoder only.
    """
    device = precision.device
    is_ours = name == "ours"
    is_compiled = how != "eager"
    with device:
        model = MODELS[task][name](size, **depths)
    model.to(device)  # tables that the CPU has computed
    if is_compiled and is_ours:
        compile_model(model, device)
    elif how == "compiled by blocks":
        peers.compile_blocks(model)
    elif is_compiled:
        model.compile(fullgraph=True, dynamic=False)
    side = peers.image_side(size)
    images = torch.rand(batch_size, 3, side, side, device=device)
    labels = torch.randint(1000, (batch_size,), device=device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=is_ours or is_compiled or None)

    def step() -> None:
        with precision.autocast():
            loss = model(images)[0] if task == "pretrain" else F.cross_entropy(model(images), labels)
        if is_ours:
            precision.backward(loss)
            precision.step(optimizer, None)
        else:
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad()

    return step


def main(args: argparse.Namespace) -> None:
    """Prints a table and writes it as JSON."""
    torch.manual_seed(0)
    device = choose_device(args.device)
    precision = Precision(args.amp, device)
    repeats = 10 if device.type == "cuda" else 1

    def measure(name: str, how: str) -> Callable[[], float]:
        step = update(args.task, name, how, args.size, args.batch_size, precision)
        return lambda: args.batch_size / timing.seconds(step, repeats, device)

    pairs = timing.implementations(MODELS[args.task], args.only)
    runs = timing.take_turns({" ".join(pair): measure(*pair) for pair in pairs}, args.rounds, warm_ups=3)
    found = timing.report(f"{args.task}, {args.size}, batch {args.batch_size}, {precision.name}", runs)
    name = args.name or f"{args.task}_{args.size}_{precision.name}_{device.type}"
    machine.write(name, device, vars(args), found, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = machine.model_parser("Throughput of training, compared with other implementations.")
    parser.add_argument("--task", default="pretrain", choices=MODELS)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the file (default: from task, size, precision and device)"
    )
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
