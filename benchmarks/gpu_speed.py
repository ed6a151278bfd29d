"""The steps of gpu_check.py that measure the machine and data loading."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks import gpu_task, input_pipeline, peers, scripts, train_step
from benchmarks.gpu_correct import KERNELS, SHAPES
from benchmarks.gpu_task import TINY, Task
from mae.training.precision import Precision

# Products of ViT-B's decoder and encoder, ViT-L's and ViT-H's encoder: rows of 512, 512, 256 and 128 images, outputs,
# inputs.
PRODUCTS = (
    (512 * 197, 1536, 512), (512 * 197, 512, 512), (512 * 197, 2048, 512), (512 * 197, 512, 2048),
    (512 * 50, 2304, 768), (512 * 50, 3072, 768), (256 * 50, 4096, 1024), (128 * 65, 5120, 1280),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- ceilings


def ceilings(task: Task) -> None:
    """What the machine can do: a copy, matrix products in bf16, and attention of the shapes of the models."""
    task.wait_for_turn()
    torch.manual_seed(0)
    repeats = 20 if task.has_gpu else 1

    def seconds(call: Callable[[], Any]) -> float:
        train_step.seconds(call, 3, task.device)
        return train_step.seconds(call, repeats, task.device)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=task.device, dtype=torch.bfloat16)

    a, b = tensor(2**29 if task.has_gpu else 2**20), tensor(2**29 if task.has_gpu else 2**20)
    task.write(copy_bytes_per_second=2 * a.nbytes / seconds(lambda: b.copy_(a)))
    side = 8192 if task.has_gpu else 256
    a, b = tensor(side, side), tensor(side, side)
    task.write(product_flops=2 * side**3 / seconds(lambda: a @ b))
    products = {}
    for rows, outputs, inputs in PRODUCTS if task.has_gpu else [(64, 32, 16)]:
        x, weight, grad = tensor(rows, inputs), tensor(outputs, inputs), tensor(rows, outputs)
        calls = {
            "forward": partial(F.linear, x, weight),
            "input gradient": partial(torch.matmul, grad, weight),
            "weight gradient": partial(torch.matmul, grad.T, x),
        }
        flops = 2 * rows * outputs * inputs
        products[f"{rows} x {outputs} x {inputs}"] = {name: flops / seconds(call) for name, call in calls.items()}
    task.write(products_flops=products)
    attention(task, seconds)


def attention_step(precision: Precision, batch_size: int, shape: tuple[int, int, int]) -> train_step.Step:
    """Forward and backward pass of PyTorch's attention of a shape (heads, tokens, channels)."""
    dtype = precision.dtype or torch.float32
    qkv = torch.randn(3, batch_size, *shape, device=precision.device, dtype=dtype, requires_grad=True)

    def step() -> None:
        qkv.grad = None
        out = F.scaled_dot_product_attention(*qkv)
        out.backward(out.detach())

    return step


def attention(task: Task, seconds: Callable[[Callable[[], Any]], float]) -> None:
    """Microseconds per image of attention, forward and backward pass, with each kernel and with PyTorch's choice."""
    precision, batch = Precision("bf16", task.device), 256 if task.has_gpu else 2
    if not task.has_gpu:
        task.skip("kernels of attention compared: cuDNN, flash")
    kernels: dict[str, Any] = {"default": None, **(KERNELS if task.has_gpu else {})}
    times: dict[str, dict[str, float | str]] = {}
    for heads, tokens, width in SHAPES if task.has_gpu else SHAPES[:1]:
        step = attention_step(precision, batch, (heads, tokens, width))
        found: dict[str, float | str] = {}
        for name, kernel in kernels.items():
            try:
                with sdpa_kernel(kernel) if kernel else nullcontext():
                    found[name] = 1e6 * seconds(step) / batch
            except RuntimeError as error:  # the kernel does not support the shape
                found[name] = gpu_task.last_line(str(error))[:100]
        times[f"{heads} heads, {tokens} tokens, {width} channels"] = found
    task.write(attention_microseconds_per_image=times)


# --------------------------------------------------------------------------------------------------- data


def loader(task: Task) -> None:
    """Images/s from JPEG files to batches, in one worker process and in one for each core."""
    folder, cores = task.folder / "files", os.cpu_count() or 1
    count = 24_000 if task.has_gpu else 6 * input_pipeline.BATCH
    input_pipeline.write_photographs(folder, count, input_pipeline.OF_SCIKIT_LEARN)
    task.wait_for_turn()
    ways = {"Pillow": {}, "--fast_jpeg": {"fast_jpeg": True}} if scripts.has_fast_jpeg() else {"Pillow": {}}
    found: dict[str, float] = {}
    for name, options in ways.items():
        for workers in sorted({1, cores}):
            batches = input_pipeline.ours(folder, workers, **options)
            limit = min(20 * workers, count // input_pipeline.BATCH - 2) if task.has_gpu else 3
            found[f"{name}, {workers} workers"] = input_pipeline.rate(batches, limit)
            task.write(cores=cores, images_per_second=found)


def whole(task: Task) -> None:
    """main_pretrain.py with data from JPEG files: the second epoch as log.txt has it."""
    folder = task.folder / "files"
    if not folder.exists():
        input_pipeline.write_photographs(folder, 256, input_pipeline.OF_SCIKIT_LEARN)
    size, batch, updates = ("base_patch16", 512, 30) if task.has_gpu else (TINY, 8, 4)
    flags = ["--model", f"mae_vit_{size}", "--input_size", peers.image_side(size), "--batch_size", batch, "--device",
             "cuda:0" if task.has_gpu else "cpu", "--epochs", 2, "--warmup_epochs", 1, "--updates_per_epoch", updates,
             "--compile", "--save_every", 9]  # fmt: skip
    if not task.has_gpu:
        task.skip("--compile of main_pretrain.py with data")
        flags.remove("--compile")
    line = scripts.pretrain(folder, task.folder / "whole", *flags)[1]
    task.write(size=size, batch_size=batch, fast_jpeg=scripts.has_fast_jpeg(), second_epoch=line)
    task.check("main_pretrain.py trains on JPEG files", line["images_per_s"] > 0)
