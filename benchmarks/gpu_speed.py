"""The steps of gpu_check.py that measure: updates, data loading, and a run with data.

An update is that of train_step.py, eager and compiled, at the batch sizes 64, 128 and 512: pre-training of ViT-B, ViT-L
and ViT-H, and fine-tuning of ViT-B.
"""

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import gpu_task, image_sets, input_pipeline, model_table, peers, timing, train_step
from benchmarks.gpu_task import TINY, Task
from mae.training import log
from mae.training.precision import Precision

BATCHES: tuple[int, ...] = (64, 128, 512)
# Step: task, size, and the batch size at which it is compared with other implementations.
TRAINING = {
    "base": ("pretrain", "base_patch16", 512),
    "large": ("pretrain", "large_patch16", 512),
    "huge": ("pretrain", "huge_patch14", 128),
    "finetune": ("finetune", "base_patch16", 128),
}
# Blocks of a model that is compiled only for its graphs, which all blocks share. In fine-tuning, the first block drops
# no path, and the others do.
FEW: dict[str, Any] = {"pretrain": {"depth": 1, "decoder_depth": 1}, "finetune": {"depth": 2}}


def training(task: Task) -> None:
    """Pre-training or fine-tuning of a size: eager and compiled at each batch size, and other implementations."""
    kind, size, compared_at = TRAINING[task.name]
    batches = BATCHES
    if not task.has_gpu:
        size, batches, compared_at = TINY, (2,), 2
    update = partial(train_step.update, kind, size=size, precision=Precision("bf16", task.device))
    began = time.monotonic()
    for batch in batches:
        update("ours", "compiled", batch_size=batch, **FEW[kind])()
        empty_cache(task)
    flops = model_table.training_flops(size) if kind == "pretrain" else 3 * model_table.classifier_flops(size)
    task.write(task=kind, size=size, flops_per_image=flops, compile_seconds=time.monotonic() - began)
    task.wait_for_turn()
    cells, compared = list[dict[str, Any]](), dict[str, float]()
    for batch in batches:
        ways = [("ours", "eager"), ("ours", "compiled")]
        if batch == compared_at and kind == "pretrain":
            ways += [("transformers", "eager"), ("plain", "eager")]
        for way in ways:
            found = measure(partial(update, *way, batch_size=batch), batch, flops, task)
            cells.append({"way": " ".join(way), "batch_size": batch, **found})
            if batch == compared_at and "images_per_second" in found:
                compared[" ".join(way)] = found["images_per_second"]
            task.write(cells=cells, compared_at=compared_at, images_per_second=compared)


def empty_cache(task: Task) -> None:
    """Frees the memory of the models that are gone, also for other processes."""
    gc.collect()
    if task.has_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(build: Callable[[], train_step.Step], batch_size: int, flops: int, task: Task) -> dict[str, Any]:
    """Images/s, milliseconds and memory of an update; {"fits": False} if the memory is too small."""
    empty_cache(task)
    try:
        times = timed(build(), task)
    except torch.OutOfMemoryError:
        return {"fits": False}
    rate = batch_size / median(times)
    return {
        "images_per_second": rate, "all_images_per_second": [batch_size / time for time in times],
        "milliseconds": 1000 * median(times), "flops": rate * flops,
        "peak_bytes": torch.cuda.max_memory_allocated() if task.has_gpu else None,
    }  # fmt: skip


def timed(step: train_step.Step, task: Task) -> list[float]:
    """Seconds of an update, in three rounds of about a third of a second each; on a CPU, of one update."""
    timing.seconds(step, 2, task.device)
    if not task.has_gpu:
        return [timing.seconds(step, 1, task.device)]
    repeats = max(2, round(0.35 / timing.seconds(step, 2, task.device)))
    return [timing.seconds(step, repeats, task.device) for _ in range(3)]


def loader(task: Task) -> None:
    """Images/s from JPEG files to batches, in one worker process and in one for each core."""
    folder, cores = task.folder / "loader", os.cpu_count() or 1
    count = 24_000 if task.has_gpu else 6 * input_pipeline.BATCH
    image_sets.write_jpeg_files(folder, count, image_sets.OF_SCIKIT_LEARN)
    task.wait_for_turn()
    found: dict[str, float] = {}
    for name, fast_jpeg in (("Pillow", False), ("--fast_jpeg", True)):
        for workers in sorted({1, cores}):
            batches = input_pipeline.ours(folder, workers, fast_jpeg)
            limit = min(20 * workers, count // input_pipeline.BATCH - 2) if task.has_gpu else 3
            found[f"{name}, {workers} workers"] = input_pipeline.rate(batches, limit)
            task.write(cores=cores, images_per_second=found)


def whole(task: Task) -> None:
    """main_pretrain.py with data from JPEG files: the second epoch as log.txt has it."""
    folder, out = task.folder / "whole", task.folder / "whole_run"
    size, batch, updates = ("base_patch16", 512, 30) if task.has_gpu else (TINY, 8, 4)
    image_sets.write_jpeg_files(folder, batch * updates, image_sets.OF_SCIKIT_LEARN)
    task.wait_for_turn()
    compiled = ["--compile"] if task.has_gpu else []
    if not task.has_gpu:
        task.skip("--compile of main_pretrain.py with data")
    gpu_task.run(
        "main_pretrain.py", "--data_path", folder, "--output_dir", out, "--model", f"mae_vit_{size}", "--input_size",
        peers.image_side(size), "--batch_size", batch, "--device", task.device, "--epochs", 2, "--warmup_epochs", 1,
        "--updates_per_epoch", updates, "--save_every", 9, "--vis_every", 0, "--fast_jpeg", *compiled,
    )  # fmt: skip
    line = log.read(out)[1]
    task.write(size=size, batch_size=batch, second_epoch=line)
    task.check("main_pretrain.py trains on JPEG files", line["images_per_s"] > 0)
