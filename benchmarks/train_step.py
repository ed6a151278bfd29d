"""Throughput and memory of an update, compared with other implementations in one process.

    python benchmarks/train_step.py                             # pre-training, ViT-B, 5 minutes on two CPU cores
    python benchmarks/train_step.py --amp off --only transformers ours
    python benchmarks/train_step.py --task finetune             # also: features (of a probe), attention
    python benchmarks/train_step.py --size huge_patch14 --batch_size 512 --device cuda

The implementations take turns. Eager peers use the default AdamW, and compiled peers the fused AdamW. Our update is the
one of the training loop: it includes the gradient norm and the check for gradients that are not finite. Data loading is
not included. The share of the peak is the FLOP/s of the method divided by the FLOP/s of a large matrix product, which
is measured between the rounds. Pre-training of He et al. 2021's ViT-B, ViT-L and ViT-H takes 58.46, 124.23 and 290.99
GFLOP per image.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
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
from benchmarks import machine, peers
from util.cli import entry_point
from util.cli.choices import AMP_CHOICES
from util.dist import choose_device
from util.evaluation.tables import markdown
from util.training.precision import Precision

Step = Callable[[], Any]

# Heads, tokens and channels per head: ViT-B's encoder in pre-training, its decoder, its encoder on all patches; the
# encoders of ViT-L and ViT-H in pre-training.
SHAPES = ((12, 50, 64), (16, 197, 32), (12, 197, 64), (16, 50, 64), (16, 65, 80))


def training_flops(size: str) -> float:
    """FLOPs of a pre-training iteration per image: two for each multiply-add of a matrix product."""
    model, decoder = models_vit.SIZES[size], models_mae.DECODERS[size]
    N, P = (peers.image_side(size) // model["patch_size"]) ** 2, 3 * model["patch_size"] ** 2
    D, E, K = model["embed_dim"], decoder["decoder_embed_dim"], N // 4

    encoder = N * P * D + block_macs(model["depth"], K + 1, D, peers.mlp_ratio(size))
    forward = encoder + (K + 1) * D * E + block_macs(decoder["decoder_depth"], N + 1, E) + (N + 1) * E * P
    return 2.0 * (3 * forward - N * P * D)  # the pixels need no gradient


def classifier_flops(size: str) -> float:
    """FLOPs of the forward pass of a classifier per image, counted as in `training_flops`."""
    model = models_vit.SIZES[size]
    N, D = (peers.image_side(size) // model["patch_size"]) ** 2, model["embed_dim"]
    return 2.0 * (N * 3 * model["patch_size"] ** 2 * D + block_macs(model["depth"], N + 1, D, peers.mlp_ratio(size)))


def block_macs(depth: int, tokens: int, width: int, mlp_ratio: float = 4) -> float:
    """Multiply-adds of the matrix products of blocks: four projections and the MLP, and the products of attention."""
    return depth * ((4 + 2 * mlp_ratio) * tokens * width**2 + 2 * tokens**2 * width)


# --------------------------------------------------------------------------------------------------- implementations


def training_step(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], precision: Precision, is_ours: bool, fused: bool
) -> Step:
    """An update: of our model as in `util.training.loop`, of others as in PyTorch's tutorials."""
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


def inference(model: nn.Module, images: Tensor, precision: Precision) -> Step:
    """A forward pass without gradients."""
    model.eval()

    def step() -> None:
        with torch.no_grad(), precision.autocast():
            model(images)

    return step


def input_images(args: argparse.Namespace, precision: Precision) -> Tensor:
    """A batch of noise (B, 3, H, W)."""
    side = peers.image_side(args.size)
    return torch.rand(args.batch_size, 3, side, side, device=precision.device)


# The implementations of pre-training by name.
MODELS: dict[str, Callable[[str], nn.Module]] = {
    "transformers": peers.transformers_mae,
    "plain": peers.PlainMAE,
    "ours": lambda size: getattr(models_mae, f"mae_vit_{size}")(),
}


def loss_of_images(model: nn.Module, images: Tensor) -> Tensor:
    """The pre-training loss of a batch."""
    return model(images)[0]


def implementations(args: argparse.Namespace, precision: Precision) -> dict[str, Step]:
    """The updates of all implementations of the task by name."""
    images = input_images(args, precision)
    labels = torch.randint(1000, (args.batch_size,), device=precision.device)
    steps: dict[str, Step] = {}
    for how in ("eager", "compiled"):

        def selected(name: str, how: str = how) -> bool:
            return not args.only or name in args.only or f"{name} {how}" in args.only

        def add(name: str, model: nn.Module, loss_of: Callable[[nn.Module], Tensor] | None, how: str = how) -> None:
            model.to(precision.device)
            if how == "compiled":
                model.compile(fullgraph=True, dynamic=False)
            is_ours = name == "ours"
            steps[f"{name} {how}"] = (
                training_step(model, loss_of, precision, is_ours, fused=is_ours or how == "compiled")
                if loss_of
                else inference(model, images, precision)
            )

        if args.task == "pretrain":
            for name, build in MODELS.items():
                if selected(name):
                    add(name, build(args.size), partial(loss_of_images, images=images))
        else:
            loss = (lambda model: F.cross_entropy(model(images), labels)) if args.task == "finetune" else None
            if selected("timm"):
                add("timm", peers.timm_classifier(args.size), loss)
            if selected("ours"):
                ours = getattr(models_vit, f"vit_{args.size}")(global_pool=True, drop_path_rate=0.1)
                add("ours", ours, loss)
    return steps


def attention_steps(
    precision: Precision, batch_size: int, shape: tuple[int, int, int], with_backward: bool
) -> dict[str, Step]:
    """Forward pass of each implementation of attention, with the backward pass or without gradients."""
    heads, tokens, width = shape
    dtype, device = precision.dtype or torch.float32, precision.device
    qkv = torch.randn(3, batch_size, heads, tokens, width, device=device, dtype=dtype, requires_grad=with_backward)

    def step_of(attend: Callable[..., Tensor]) -> Step:
        def step() -> None:
            qkv.grad = None
            out = attend(*qkv)
            if with_backward:
                out.backward(out.detach())

        return step

    return {
        "fused kernel": step_of(F.scaled_dot_product_attention),
        "plain products": step_of(lambda q, k, v: models_vit.attention_weights(q, k) @ v),
        "ours": step_of(models_vit.attend),
    }


# ------------------------------------------------------------------------------------------------------ measurements


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """The mean time of `repeats` calls."""
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def matrix_product(precision: Precision) -> tuple[Step, float]:
    """A large matrix product in the given precision, and its FLOPs."""
    side = 8192 if precision.device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=precision.device, dtype=precision.dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def take_turns(steps: dict[str, Step], precision: Precision, rounds: int, repeats: int) -> tuple[dict[str, Any], float]:
    """Times every implementation in each round.

    Returns:
        The seconds per update of each implementation, one value per round; and the peak of a matrix product in FLOP/s:
        the best of each round, then the median over the rounds.
    """
    product, operations = matrix_product(precision)
    for name, step in steps.items():
        print(f"warming up: {name}", flush=True)
        seconds(step, 3, precision.device)  # the first call compiles
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        peaks.append(operations / min(seconds(product, 1, precision.device) for _ in range(10)))
        for name, step in steps.items():
            times[name].append(seconds(step, repeats, precision.device))
    return times, statistics.median(peaks)


def saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass saves for the backward pass, without the weights; shared storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call()  # keeps the storages alive until they are counted, so that no address is used twice
    total = sum(sizes.values())
    del loss
    return total


def memory(args: argparse.Namespace, precision: Precision) -> dict[str, int]:
    """Activation memory of the pre-training models in bytes; ours with the fused attention kernel, as on a GPU."""
    images = input_images(args, precision)
    results = {}
    for name, build in MODELS.items():
        model = build(args.size).to(precision.device)
        with precision.autocast(), patch.object(models_vit, "attend", F.scaled_dot_product_attention):
            results[name] = saved_bytes(model, partial(loss_of_images, model, images))
    return results


def compare_attention(args: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """Prints and returns the milliseconds of each implementation in training and evaluation, for each of SHAPES."""
    results = {}
    print(
        "| heads, tokens, channels | pass | fused kernel, ms | plain products, ms | ours, ms |\n|---|---|---|---|---|"
    )
    for shape, (title, with_backward) in itertools.product(SHAPES, {"training": True, "evaluation": False}.items()):
        steps = attention_steps(precision, args.batch_size, shape, with_backward)
        runs = [
            {way: seconds(step, 5, precision.device) for way, step in steps.items()} for _ in range(args.rounds + 2)
        ]
        times = {way: 1000 * statistics.median(run[way] for run in runs[2:]) for way in steps}
        results[f"{shape} {title}"] = times
        print(f"| {shape} | {title} | " + " | ".join(f"{value:.1f}" for value in times.values()) + " |", flush=True)
    return {"milliseconds": results}


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
    times, peak = take_turns(steps, precision, args.rounds, repeats)
    forward = classifier_flops(args.size)
    flops = {"pretrain": training_flops(args.size), "finetune": 3 * forward, "features": forward}[args.task]
    rates = {name: args.batch_size / statistics.median(values) for name, values in times.items()}
    first = next(iter(rates))
    print(
        f"\n{args.task}, {args.size}, batch {args.batch_size}, {precision.name}, {precision.device.type}: "
        f"{flops / 1e9:.2f} GFLOP per image, peak {peak / 1e12:.3f} TFLOP/s\n"
    )
    speeds = [
        (way, f"{rate:.2f}", f"{rate / rates[first]:.2f}", f"{rate * flops / peak:.1%}") for way, rate in rates.items()
    ]
    print(markdown(["", "images/s", f"relative to {first}", "share of the peak"], speeds))
    if activation_bytes:
        sizes = [(way, f"{size / 1e9:.3f}") for way, size in activation_bytes.items()]
        print(f"\n{markdown(['activation memory', 'GB'], sizes)}")
    peak_memory = torch.cuda.max_memory_allocated() if precision.device.type == "cuda" else None
    if peak_memory:
        print(f"\npeak memory of all implementations together: {peak_memory / 1e9:.1f} GB")
    return {"images_per_second": rates, "seconds": times, "peak_flops": peak, "flops_per_image": flops,
            "saved_bytes": activation_bytes, "cuda_peak_bytes": peak_memory}  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Prints a table and writes it as JSON."""
    torch.manual_seed(0)
    device = choose_device(args.device)
    precision = Precision(args.amp, device)
    results = (compare_attention if args.task == "attention" else compare_steps)(args, precision)
    name = args.name or f"{args.task}_{args.size}_{precision.name}_{device.type}"
    machine.write(name, device, vars(args), results, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = entry_point.parser("Throughput and memory of training, compared with other implementations.")
    parser.add_argument("--task", default="pretrain", choices=("pretrain", "finetune", "features", "attention"))
    parser.add_argument(
        "--size", default="base_patch16", choices=models_vit.SIZES, metavar="SIZE", help="a size of models_vit"
    )
    parser.add_argument("--batch_size", default=16, type=int, metavar="N", help="batch size")
    parser.add_argument("--amp", default="bf16", choices=AMP_CHOICES, help="bf16, fp16 or off (fp32)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--rounds", default=5, type=int, metavar="N", help="repetitions; each measures every implementation once"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="implementations, such as ours or 'ours compiled'"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=machine.OUT_HELP)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the file (default: from task, size, precision and device)"
    )
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
