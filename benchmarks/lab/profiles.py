"""The time of the kernels of an update by group, and the time in which no kernel runs."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks.gpu_task import Task

UPDATES = 3
# Parts of the names of kernels, in lower case. The first group that has one of them counts.
GROUPS = {
    "attention": ("flash", "fmha", "cudnn_generated", "sdpa", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "optimizer": ("multi_tensor", "lpnorm", "foreach"),
    "GELU": ("gelu", "erf"),
    "LayerNorm": ("layer_norm", "norm_backward"),
    "gather, scatter, sort": ("gather", "scatter", "sort", "index"),
    "concatenation": ("cat",),
    "sums": ("sum", "reduce"),
    "casts and additions": ("copy", "add", "elementwise"),
}
TOP = 30  # kernels whose times are listed
Kernel = tuple[float, float, str]  # begin and end in microseconds, name


def profile(step: Callable[[], Any], task: Task) -> dict[str, Any]:
    """Milliseconds of an update: in all, without a kernel, by group and by kernel. On a CPU: in all."""
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if task.has_gpu else [])]
    with profiler(activities=activities) as found:
        began = time.perf_counter()
        for _ in range(UPDATES):
            step()
        if task.has_gpu:
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - began) / UPDATES
    kernels = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]  # fmt: skip
    return {"milliseconds": wall, **summary(kernels, wall)}


def summary(kernels: list[Kernel], wall: float) -> dict[str, Any]:
    """Sums the times of the kernels of `UPDATES` updates, in milliseconds per update.

    Args:
        wall: milliseconds of an update.
    """
    busy = 0.0
    last = 0.0
    groups = Counter[str]()
    names = Counter[str]()
    for begin, end, name in sorted(kernels):
        milliseconds = (end - begin) / 1e3 / UPDATES
        groups[group_of(name)] += milliseconds  # type: ignore[assignment]
        names[name[:110]] += milliseconds  # type: ignore[assignment]
        busy += max(0.0, end - max(begin, last)) / 1e3 / UPDATES  # kernels may overlap
        last = max(last, end)
    return {
        "idle_milliseconds": wall - busy, "kernels": len(kernels) / UPDATES,
        "groups": dict(groups.most_common()), "top": dict(names.most_common(TOP)),
    }  # fmt: skip


def group_of(name: str) -> str:
    """The group of a kernel."""
    return next((group for group, parts in GROUPS.items() if any(part in name.lower() for part in parts)), "others")
