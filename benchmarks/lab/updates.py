"""The steps of gpu_lab.py that train: updates of each variant in turns, and curves.

On a CPU they are a rehearsal: the smallest model, nothing compiled, no CUDA graph.
"""

import gc
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu_steps import ROUNDS
from benchmarks.gpu_task import TINY, Task
from benchmarks.lab import curves as demo_curves
from benchmarks.lab import parts, profiles, variants
from benchmarks.lab.graph import Update
from mae.training.precision import Precision

SECONDS = 0.3  # of a round of updates
GRAPHS = {"main", "exact", "all"}  # variants whose update is captured, too
PROFILED = {"main", "exact"}
FEW = {"depth": 2, "decoder_depth": 2}  # the second block receives another input than the first one


def update(task: Task) -> None:
    """Milliseconds of an update of a variant, and of the host, in turns with other variants; NAME.SIZE.BATCH.VARIANT.

    The last turn captures the update as a CUDA graph, and counts the time of kernels.
    """
    _, size, batch, variant = task.name.split(".")
    if not task.has_gpu:
        size = TINY
        batch = "2"
    build = partial(build_update, size, int(batch), variant, task)
    is_tuned = task.has_gpu and getattr(variants.VARIANTS[variant].block, "attention", None) is variants.PackedAttention
    if is_tuned:
        tune_for(size, int(batch), task)  # compiles the kernels
    if task.has_gpu:
        few = build(**FEW)  # compiles the graphs, which all blocks share
        few.compute()
        few.compute()
        del few
        clear(task)
    times: dict[str, list[float]] = {"milliseconds": [], "host_milliseconds": []}
    step = None
    for number in range(ROUNDS):
        task.wait_for_turn()
        if step is None:
            if is_tuned:
                tune_for(size, int(batch), task)  # with the GPU for itself
            step = build()
            step.compute()
        step.compute()  # allocates its memory again
        repeats = max(2, round(SECONDS / timing.seconds(step.compute, 1, task.device))) if task.has_gpu else 1
        for name, seconds in zip(times, timing.times(step.compute, repeats, task.device), strict=True):
            times[name].append(1e3 * seconds)
        task.write(size=size, batch_size=int(batch), variant=variant, **times)
        clear(task)
        if number + 1 == ROUNDS:
            last_turn(step, variant, task)


def last_turn(step: Update, variant: str, task: Task) -> None:
    """Profiles an update, and measures it as a CUDA graph."""
    if variant in PROFILED:
        task.write(profile=profiles.profile(step.compute, task))
    if variant not in GRAPHS:
        return
    if not task.has_gpu:
        return task.skip("the update as a CUDA graph")
    eager = [float(step(step.images, step.noise, 0.0)["loss"]) for _ in range(2)][-1]
    step.capture()
    replayed = float(step(step.images, step.noise, 0.0)["loss"])
    task.check(f"the CUDA graph has the loss of the update, {replayed:.6f}", abs(replayed - eager) < 1e-4 * abs(eager))
    repeats = max(2, round(SECONDS / timing.seconds(step.run, 2, task.device)))
    task.write(
        graph_milliseconds=[1e3 * timing.seconds(step.run, repeats, task.device) for _ in range(ROUNDS)]
    )  # fmt: skip


def build_update(size: str, batch: int, variant: str, task: Task, **depths: int) -> Update:
    """Builds a variant of a model, and returns its update, with random images in its buffers."""
    with task.device:
        model = variants.of_size(variant, size, **depths)
    model.to(task.device)  # tables that the CPU has computed
    if task.has_gpu:
        from mae.training.compiling import compile_model

        compile_model(model, task.device)
    images = torch.empty(batch, 3, *model.patch_embed.img_size)
    noise = torch.empty(batch, model.num_patches)
    step = Update(model, Precision("bf16", task.device), images, noise)
    step.images.normal_()
    step.noise.uniform_()
    step.lr.fill_(1e-4)
    return step


def tune_for(size: str, batch: int, task: Task) -> None:
    """Chooses the launch settings of the packed kernels for the encoder and the decoder of a model size."""
    letter = size[0].upper()
    decoder = parts.SHAPES["H decoder" if letter == "H" else "B decoder"]
    for shape in (parts.SHAPES[f"{letter} encoder"], decoder):
        parts.tune((batch, *shape[1:]), task)


def clear(task: Task) -> None:
    """Frees the memory of tensors that are gone, also for other processes."""
    gc.collect()
    if task.has_gpu:
        torch.cuda.empty_cache()


def curves(task: Task) -> None:
    """5,000 updates of the demo's model, eager, compiled, and two controls of 1e-6 (`curves.py`)."""
    task.wait_for_turn()
    updates = 5000 if task.has_gpu else 2
    precision = Precision("bf16", task.device, trains=True)
    found: dict[str, Any] = {}
    for way in ("main", demo_curves.COMPILED, "control-1", "control-2") if task.has_gpu else ("main", "control-1"):
        found[way] = demo_curves.train_and_evaluate(way, 0, updates, precision)
        task.write(updates=updates, curves=found)
