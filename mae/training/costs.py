"""What training costs: FLOPs, their share of what a GPU can compute, and memory."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae import parallel
from mae.data.generators import preserve_generators
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

# TFLOP/s of dense matrix products in bf16 or fp16, accumulated in fp32, by the name that the driver gives a GPU.
PEAK_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA B200": 2250, "NVIDIA GeForce RTX 4090": 165, "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA L40S": 362, "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-SXM2-32GB": 125,
}  # fmt: skip


def count_flops(call: Callable[[], Any]) -> int:
    """Counts the FLOPs of matrix products and convolutions in a call, from the shapes: two for each multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a tenth of a second

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def training_flops(model: nn.Module, forward: Callable[[], Any], precision: Precision) -> int | None:
    """Returns the FLOPs of the forward and the backward pass for an image: three times those of the forward pass.

    Activations that --grad_checkpointing computes again do not count. The buffers of the model, such as a count of its
    forward passes, have their values again afterwards.

    Args:
        model: not compiled. It is in evaluation mode afterwards.
        forward: calls the model with one image.

    Returns:
        None if they are unknown: weights are frozen, the features of a start are preserved, the model needs more than
        an image, or it has an operation that the counter does not know.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if getattr(model, "preserve", None):  # its pass through the start is in training only
        return None
    if not all(weight.requires_grad for layer in layers for weight in layer.parameters()):
        return None
    model.eval()
    # A resumed run must not differ by this forward pass.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # The counter does not know the fused attention of other devices.
    attention = nullcontext() if precision.device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
    # Nor does it know the fused evaluation of nn.TransformerEncoderLayer.
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with preserve_generators(), torch.no_grad(), precision.autocast(), attention:
            return 3 * count_flops(forward)
    except Exception:  # of any type. The first update shows an error of the user's code with its line.
        logger.info(f"log.txt has no TFLOP/s: those of {type(model).__name__} can't be counted")
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers.get(name, buffer))


def measurement(precision: Precision, flops: int | None) -> Callable[[float], dict[str, float]]:
    """Starts to measure a run; returns `of_epoch` as a function of the throughput."""
    if precision.device.type == "cuda":  # an earlier run of the process may have taken more memory
        torch.cuda.reset_peak_memory_stats(precision.device)
    return partial(of_epoch, precision, flops)


def of_epoch(precision: Precision, flops: int | None, images_per_s: float) -> dict[str, float]:
    """Returns the entries of an epoch in log.txt, as far as they are known.

    - `tflops`: TFLOP/s of a process.
    - `mfu`: their share of the peak of its GPU, 0 to 1.
    - `peak_memory_gb`: the most GPU memory that tensors of this process took since the last call, in 10^9 bytes.

    Args:
        flops: of an image, from `training_flops`.
        images_per_s: the throughput of all processes.
    """
    device = precision.device
    entries = dict[str, float]()
    if flops:
        entries["tflops"] = flops * images_per_s / parallel.world_size() / 1e12
    if device.type == "cuda":
        peak = PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
        if flops and peak and precision.dtype:
            entries["mfu"] = entries["tflops"] / peak
        entries["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    return {name: float(f"{value:.4g}") for name, value in entries.items()}


def describe(entries: Mapping[str, float]) -> str:
    """Returns the entries of `of_epoch` as the end of a line of the log."""
    text = ""
    if entries.get("tflops", 0) >= 0.1:  # of models that are not tiny
        per_process = " per process" if parallel.world_size() > 1 else ""
        text += f", {entries['tflops']:.3g} TFLOP/s{per_process}"
    if "mfu" in entries:
        text += f" ({entries['mfu']:.0%} of the peak)"
    if "peak_memory_gb" in entries:
        text += f", peak memory {entries['peak_memory_gb']:.1f} GB"
    return text
