"""Throughput and memory of an update, compared with other implementations in one process.

    python benchmarks/train_step.py                             # pre-training, ViT-B, 5 minutes on two CPU cores
    python benchmarks/train_step.py --amp off --only transformers ours
    python benchmarks/train_step.py --task finetune             # also: features (of a probe)
    python benchmarks/train_step.py --size huge_patch14 --batch_size 512 --device cuda

The implementations take turns. "ours compiled" is compiled as by --compile: blocks of a size share a graph. "ours one
graph" is compiled as the peers are: the whole model is a graph. Eager peers use the default AdamW, and compiled peers
the fused AdamW. Our update is the one of the training loop: it includes the gradient norm and the check for gradients
that are not finite. Data loading is not included. The share of the peak is the FLOP/s of the method divided by the
FLOP/s of a large matrix product, which is measured between the rounds. Pre-training of He et al. 2021's ViT-B, ViT-L
and ViT-H takes 58.46, 124.23 and 290.99 GFLOP per image.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import models_mae
import models_vit
from benchmarks import machine, model_table, peers
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.parallel import choose_device
from mae.training.compiling import compile_model
from mae.training.precision import Precision

Step = Callable[[], Any]


def training_step(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], precision: Precision, is_ours: bool, fused: bool
) -> Step:
    """An update: of our model as in `mae.training.loop`, of others as in PyTorch's tutorials."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=fused or None)

    def step() -> None:
        with precision.autocast():
            loss = loss_of(model)
        if is_ours:
            precision.backward(loss)
            precision.step(optimizer, None)
        else:
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad()

    return step


def inference(model: nn.Module, images: Tensor, precision: Precision) -> None:
    """A forward pass without gradients."""
    with torch.no_grad(), precision.autocast():
        model(images)


def input_images(args: argparse.Namespace, precision: Precision) -> Tensor:
    """A batch of noise (B, 3, H, W)."""
    side = peers.image_side(args.size)
    return torch.rand(args.batch_size, 3, side, side, device=precision.device)


# The implementations of pre-training, and of fine-tuning and its features, by name.
MODELS: dict[str, Callable[[str], nn.Module]] = {
    "transformers": peers.transformers_mae,
    "plain": peers.PlainMAE,
    "ours": lambda size: getattr(models_mae, f"mae_vit_{size}")(),
}
CLASSIFIERS: dict[str, Callable[[str], nn.Module]] = {
    "timm": peers.timm_classifier,
    "ours": lambda size: getattr(models_vit, f"vit_{size}")(global_pool=True, drop_path_rate=0.1),
}


def implementations(args: argparse.Namespace, precision: Precision) -> dict[str, Step]:
    """The updates of all implementations of the task by name."""
    images = input_images(args, precision)
    labels = torch.randint(1000, (args.batch_size,), device=precision.device)
    models = MODELS if args.task == "pretrain" else CLASSIFIERS

    def loss_of(model: nn.Module) -> Tensor:
        return model(images)[0] if args.task == "pretrain" else F.cross_entropy(model(images), labels)

    steps: dict[str, Step] = {}
    for how, (name, build) in itertools.product(("eager", "compiled", "one graph"), models.items()):
        if how == "one graph" and name != "ours":  # the same as compiled
            continue
        if args.only and name not in args.only and f"{name} {how}" not in args.only:
            continue
        model, is_ours = build(args.size).to(precision.device), name == "ours"
        if how == "compiled" and is_ours:
            compile_model(model, precision.device)
        elif how != "eager":
            model.compile(fullgraph=True, dynamic=False)
        steps[f"{name} {how}"] = (
            partial(inference, model.eval(), images, precision)
            if args.task == "features"
            else training_step(model, loss_of, precision, is_ours, fused=is_ours or how != "eager")
        )
    return steps


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """The mean time of `repeats` calls."""
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def take_turns(
    measures: Mapping[str, Callable[[], float]], precision: Precision, rounds: int, warm_ups: int = 1
) -> tuple[dict[str, list[float]], list[float]]:
    """Calls every function in each round; first, `warm_ups` times without a result, because the first call compiles.

    It prints the seconds of these first calls.

    Returns:
        The results by name, one for each round; and the peak in FLOP/s in each round: the best of ten large matrix
        products.
    """
    device, side = precision.device, 8192 if precision.device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=precision.dtype) for _ in range(2))
    for name, measure in measures.items():
        print(f"warming up: {name}", end="", flush=True)
        started = time.perf_counter()
        for _ in range(warm_ups):
            measure()
        print(f", {time.perf_counter() - started:.0f} s", flush=True)
    results: dict[str, list[float]] = {name: [] for name in measures}
    peaks = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        peaks.append(2 * side**3 / min(seconds(lambda: a @ b, 1, device) for _ in range(10)))
        for name, measure in measures.items():
            results[name].append(measure())
    return results, peaks


def report(
    title: str, precision: Precision, runs: dict[str, list[float]], peaks: list[float], flops: float
) -> dict[str, Any]:
    """Prints and returns the throughput of implementations.

    Args:
        runs: images/s in each round, by name.
        peaks: FLOP/s of a large matrix product in each round.
        flops: FLOPs per image.
    """
    rates = {name: statistics.median(values) for name, values in runs.items()}
    first, peak = next(iter(rates)), statistics.median(peaks)
    ratios = {name: statistics.median(a / b for a, b in zip(runs[name], runs[first], strict=True)) for name in rates}
    print(
        f"\n{title}, {precision.name}, {precision.device.type}: {flops / 1e9:.2f} GFLOP per image, "
        f"peak {peak / 1e12:.3f} TFLOP/s\n"
    )
    rows = [(name, f"{rate:.2f}", f"{ratios[name]:.2f}", f"{rate * flops / peak:.1%}") for name, rate in rates.items()]
    print(markdown(["", "images/s", f"relative to {first}", "share of the peak"], rows))
    return {"images_per_second": rates, "all_images_per_second": runs, "peak_flops": peak, "flops_per_image": flops}


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that the loss saves for the backward pass, without the weights; shared storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss = model(images)[0]  # keeps the storages alive, so that no address is used twice
    return sum(sizes.values())


def memory(args: argparse.Namespace, precision: Precision) -> dict[str, int]:
    """Activation memory of the pre-training models in bytes; ours with the fused attention kernel, as on a GPU."""
    images = input_images(args, precision)
    results = {}
    for name, build in MODELS.items():
        model = build(args.size).to(precision.device)
        with precision.autocast(), patch.object(models_vit, "attend", F.scaled_dot_product_attention):
            results[name] = saved_bytes(model, images)
    return results


def compare_steps(args: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """Prints and returns the throughput of the implementations, and their activation memory in pre-training."""
    activation_bytes = memory(args, precision) if args.task == "pretrain" and not args.only else {}
    repeats = 10 if precision.device.type == "cuda" else 1
    steps = implementations(args, precision)
    if not steps:
        raise ValueError(
            f"--only {' '.join(args.only)}: no implementation of --task {args.task} has this name; "
            f"give ours, or {'timm' if args.task != 'pretrain' else 'transformers or plain'}"
        )
    measures = {
        name: partial(lambda step: args.batch_size / seconds(step, repeats, precision.device), step)
        for name, step in steps.items()
    }
    runs, peaks = take_turns(measures, precision, args.rounds, warm_ups=3)
    forward = model_table.classifier_flops(args.size)
    flops = {"pretrain": model_table.training_flops(args.size), "finetune": 3 * forward, "features": forward}[args.task]
    results = report(f"{args.task}, {args.size}, batch {args.batch_size}", precision, runs, peaks, flops)
    if activation_bytes:
        sizes = [(way, f"{size / 1e9:.3f}") for way, size in activation_bytes.items()]
        print(f"\n{markdown(['activation memory', 'GB'], sizes)}")
    peak_memory = torch.cuda.max_memory_allocated() if precision.device.type == "cuda" else None
    if peak_memory:
        print(f"\npeak memory of all implementations together: {peak_memory / 1e9:.1f} GB")
    return {**results, "saved_bytes": activation_bytes, "cuda_peak_bytes": peak_memory}


def main(args: argparse.Namespace) -> None:
    """Prints a table and writes it as JSON."""
    torch.manual_seed(0)
    device = choose_device(args.device)
    precision = Precision(args.amp, device)
    name = args.name or f"{args.task}_{args.size}_{precision.name}_{device.type}"
    machine.write(name, device, vars(args), compare_steps(args, precision), args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = machine.model_parser("Throughput and memory of training, compared with other implementations.")
    parser.add_argument("--task", default="pretrain", choices=("pretrain", "finetune", "features"))
    machine.add_rounds(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the file (default: from task, size, precision and device)"
    )
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
