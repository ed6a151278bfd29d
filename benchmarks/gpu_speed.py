"""The steps of gpu_check.py that measure: updates, data loading, and a run with data.

An update is that of train_step.py, eager and compiled, at the batch sizes 64, 128 and 512: pre-training of ViT-B, ViT-L
and ViT-H, and fine-tuning of ViT-B. The ways take turns in five rounds.
"""

import gc
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import gpu_task, image_sets, input_pipeline, model_table, peers, timing, train_step
from benchmarks.gpu_steps import ROUNDS
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


OURS = (("ours", "eager"), ("ours", "compiled"))
PEERS = (("transformers", "eager"), ("transformers", "compiled by blocks"), ("plain", "eager"))


def training(task: Task) -> None:
    """Pre-training or fine-tuning of a size: eager and compiled at each batch size, and other implementations."""
    kind, size, compared_at = TRAINING[task.name]
    batches = BATCHES
    if not task.has_gpu:
        size = TINY
        batches = (2,)
        compared_at = 2
    update = partial(train_step.update, kind, size=size, precision=Precision("bf16", task.device))
    others = [way for way in PEERS if task.has_gpu or "eager" in way] if kind == "pretrain" else []
    if not task.has_gpu and kind == "pretrain":
        task.skip("transformers, compiled")
    ways = {batch: [*OURS, *(others if batch == compared_at else ())] for batch in batches}
    began = time.monotonic()
    for batch in batches:
        for way in ways[batch]:
            if way[1] != "eager":
                update(*way, batch_size=batch, **FEW[kind])()
                empty_cache(task)
    flops = model_table.training_flops(size) if kind == "pretrain" else 3 * model_table.classifier_flops(size)
    task.write(task=kind, size=size, flops_per_image=flops, compile_seconds=time.monotonic() - began)
    task.wait_for_turn()
    entries = list[dict[str, Any]]()
    compared = dict[str, float]()
    for batch in batches:
        found = measure({" ".join(way): partial(update, *way, batch_size=batch) for way in ways[batch]}, task)
        for way, entry in found.items():
            if entry["fits"]:
                rates = [batch / seconds for seconds, _ in entry.pop("times")]
                entry |= {"images_per_second": median(rates), "all_images_per_second": rates,
                         "milliseconds": 1000 * batch / median(rates), "flops": median(rates) * flops}  # fmt: skip
                if batch == compared_at:
                    compared[way] = median(rates)
            entries.append({"way": way, "batch_size": batch, **entry})
        task.write(cells=entries, compared_at=compared_at, images_per_second=compared)


def empty_cache(task: Task) -> None:
    """Frees the memory of the models that are gone, also for other processes."""
    gc.collect()
    if task.has_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(builds: Mapping[str, Callable[[], train_step.Step]], task: Task) -> dict[str, dict[str, Any]]:
    """Measures updates that take turns, so that a change of the machine's speed concerns all.

    Returns:
        By name: whether the update fits into the memory; if so, its peak memory, the times of each round, which are
        the seconds of an update and those of the host, and the milliseconds of the host.
    """
    steps: dict[str, train_step.Step] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, build in builds.items():
        empty_cache(task)
        others = torch.cuda.memory_allocated() if task.has_gpu else 0
        try:
            steps[name] = build()
            timing.seconds(steps[name], 2, task.device)
            peak = torch.cuda.max_memory_allocated() - others if task.has_gpu else None
            found[name] = {"fits": True, "peak_bytes": peak, "times": []}
        except torch.OutOfMemoryError:
            steps.pop(name, None)
            found[name] = {"fits": False}
    for _ in range(ROUNDS if task.has_gpu else 1):
        for name, step in steps.items():
            empty_cache(task)  # of the other ways
            seconds = timing.seconds(step, 1, task.device)
            repeats = max(2, round(0.35 / seconds)) if task.has_gpu else 1
            found[name]["times"].append(timing.times(step, repeats, task.device))
    for name in steps:
        found[name]["host_milliseconds"] = 1000 * median(host for _, host in found[name]["times"])
    return found


def loader(task: Task) -> None:
    """Images/s from JPEG files to batches, in one worker process and in one for each core."""
    folder = task.folder / "loader"
    cores = os.cpu_count() or 1
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
    folder = task.folder / "whole"
    out = task.folder / "whole_run"
    size, batch, updates = ("base_patch16", 512, 30) if task.has_gpu else (TINY, 8, 4)
    image_sets.write_jpeg_files(folder, batch * updates, image_sets.OF_SCIKIT_LEARN)
    task.wait_for_turn()
    compiled = ["--compile"] if task.has_gpu else []
    if not task.has_gpu:
        task.skip("--compile of main_pretrain.py with data")
    gpu_task.run_python(
        "main_pretrain.py", "--data_path", folder, "--output_dir", out, "--model", f"mae_vit_{size}", "--input_size",
        peers.image_side(size), "--batch_size", batch, "--device", task.device, "--epochs", 2, "--warmup_epochs", 1,
        "--updates_per_epoch", updates, "--save_every", 9, "--vis_every", 0, "--fast_jpeg", *compiled,
    )  # fmt: skip
    line = log.read(out)[1]
    task.write(size=size, batch_size=batch, second_epoch=line)
    task.check("main_pretrain.py trains on JPEG files", line["images_per_s"] > 0)
