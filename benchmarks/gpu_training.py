"""The steps of gpu_check.py that measure training, and variants of it.

It is measured at the batch sizes 64, 128 and 512 and at the largest that fits, eager and compiled: pre-training
of ViT-B, ViT-L and ViT-H, and fine-tuning of ViT-B, which starts from a file in the published layout with random
weights. An update is that of `train_step.py`.
"""

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import engine_pretrain
import models_mae
import models_vit
from benchmarks import model_table, peers, train_step
from benchmarks.gpu_correct import KERNELS
from benchmarks.gpu_task import TINY, Task
from benchmarks.masked_queries import MaskedQueries
from mae.build import blocks_of
from mae.data.item import Batch
from mae.data.transforms import Normalize
from mae.interrupts import Interrupts
from mae.training import loop
from mae.training.compiling import compile_model
from mae.training.log import NullLog
from mae.training.precision import Precision
from mae.training.saver import NullSaver
from mae.weights import loading, reading

BATCHES = (64, 128, 512)
# Step: task, size, and the batch size at which it is compared with other implementations.
TRAINING = {
    "base": ("pretrain", "base_patch16", 512),
    "large": ("pretrain", "large_patch16", 512),
    "huge": ("pretrain", "huge_patch14", 128),
    "finetune": ("finetune", "base_patch16", 128),
}
FULL: dict[str, int] = {}
FEW = {"depth": 1, "decoder_depth": 1}  # blocks of a model that is compiled only for its graphs
SPARE = 0.06  # of the memory, which the largest batch leaves free
GRAPHS = 1000  # the limit of PyTorch is for the batch sizes of a run, and here are more

# --------------------------------------------------------------------------------------------------- training


class Workload:
    """The training of a step at any batch size: models, updates, measurements."""

    def __init__(self, task: Task, kind: str, size: str) -> None:
        self.task = task
        self.kind = kind
        self.size = size if task.has_gpu else TINY
        self.precision = Precision("bf16", task.device)
        flops = model_table.training_flops, lambda size: 3 * model_table.classifier_flops(size)
        self.flops = flops[kind == "finetune"](self.size)
        self.published = self.published_file() if kind == "finetune" else None

    def published_file(self) -> reading.Weights:
        """An autoencoder in the layout of the published files, with random weights."""
        file = self.task.folder / f"{self.task.name}_published.pth"
        torch.save({"model": getattr(models_mae, f"mae_vit_{self.size}")().state_dict()}, file)
        return reading.read(file)

    def model(self, depths: Mapping[str, int] = FULL, name: str = "ours") -> nn.Module:
        """A model on the device: ours, of fewer blocks if `depths` says so, or that of another implementation."""
        with self.task.device:
            if name != "ours":
                model = train_step.MODELS[name](self.size)
            elif self.kind == "pretrain":
                model = getattr(models_mae, f"mae_vit_{self.size}")(**depths)
            else:
                rate = 0.1 if self.task.has_gpu else 0.0  # a rehearsal compiles fewer graphs
                model = getattr(models_vit, f"vit_{self.size}")(global_pool=True, drop_path_rate=rate, **depths)
                if self.published and not depths:
                    loading.load_encoder(model, self.published)
        return model.to(self.task.device)  # tables that the CPU has computed

    def compiled(self, depths: Mapping[str, int] = FULL) -> nn.Module:
        """Our model, compiled as by --compile."""
        model = self.model(depths)
        compile_model(model, self.task.device)
        allow_graphs()
        return model

    def update(self, model: nn.Module, batch: int, is_ours: bool = True) -> train_step.Step:
        """An update of a model with a batch of noise."""
        images = train_step.input_images(Namespace(size=self.size, batch_size=batch), self.precision)
        labels = torch.randint(1000, (batch,), device=self.task.device)

        def loss_of(model: nn.Module) -> Tensor:
            return model(images)[0] if self.kind == "pretrain" else F.cross_entropy(model(images), labels)

        return train_step.training_step(model, loss_of, self.precision, is_ours, fused=is_ours)

    def warm_up(self, batch: int) -> None:
        """Compiles the blocks for a batch size, in a model of few blocks: all blocks have the same graphs.

        The first block of fine-tuning drops no path, and the others do.
        """
        depths = FEW if self.kind == "pretrain" else {"depth": 2}
        self.update(self.compiled(depths), batch)()
        empty_cache(self.task)

    def measure(self, build: Callable[[], nn.Module], batch: int, is_ours: bool = True) -> dict[str, Any]:
        """Images/s, milliseconds and memory of an update; {"fits": False} if the memory is too small."""
        empty_cache(self.task)
        if self.task.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            step = self.update(build(), batch, is_ours)
            times = timed(step, self.task)
        except torch.OutOfMemoryError:
            return {"batch_size": batch, "fits": False}
        rate, peak = batch / median(times), torch.cuda.max_memory_allocated() if self.task.has_gpu else None
        return {
            "batch_size": batch, "images_per_second": rate, "all_images_per_second": [batch / time for time in times],
            "milliseconds": 1000 * batch / rate, "flops": rate * self.flops, "peak_bytes": peak,
        }  # fmt: skip


def allow_graphs() -> None:
    """Raises PyTorch's limit of graphs."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = GRAPHS


def empty_cache(task: Task) -> None:
    """Frees the memory of models that are no longer used: a compiled model refers to itself."""
    gc.collect()
    if task.has_gpu:
        torch.cuda.empty_cache()


def timed(step: train_step.Step, task: Task) -> list[float]:
    """Seconds of an update, in three rounds of about a third of a second each; on a CPU, of one update."""
    train_step.seconds(step, 2, task.device)
    if not task.has_gpu:
        return [train_step.seconds(step, 1, task.device)]
    repeats = max(2, round(0.35 / train_step.seconds(step, 2, task.device)))
    return [train_step.seconds(step, repeats, task.device) for _ in range(3)]


def largest_batch(cells: list[dict[str, Any]]) -> int:
    """The batch size that fills the memory, a multiple of 32, from the memory of two smaller ones."""
    small, large = [cell for cell in cells if cell["way"] == "eager" and "peak_bytes" in cell][-2:]
    bytes_of_image = (large["peak_bytes"] - small["peak_bytes"]) / (large["batch_size"] - small["batch_size"])
    free, _ = torch.cuda.mem_get_info()
    available = (1 - SPARE) * (free + torch.cuda.memory_reserved())
    return int((available - small["peak_bytes"]) / bytes_of_image + small["batch_size"]) // 32 * 32


def training(task: Task) -> None:
    """Pre-training or fine-tuning of a size: eager and compiled at each batch size, and other implementations."""
    kind, size, compared_at = TRAINING[task.name]
    work = Workload(task, kind, size)
    batches = BATCHES if task.has_gpu else (2,)
    compared_at = compared_at if task.has_gpu else 2
    began = time.monotonic()
    for batch in batches:
        work.warm_up(batch)
    task.write(task=kind, size=work.size, flops_per_image=work.flops, compile_seconds=time.monotonic() - began)
    task.wait_for_turn()

    cells: list[dict[str, Any]] = []

    def add(way: str, batch: int, build: Callable[[], nn.Module], is_ours: bool = True) -> dict[str, Any]:
        cells.append({"way": way, **work.measure(build, batch, is_ours)})
        task.write(cells=cells)
        return cells[-1]

    for batch in batches:
        add("eager", batch, work.model)
        add("compiled", batch, work.compiled)
        if kind == "pretrain" and batch == compared_at:
            for name in ("transformers", "plain"):
                add(f"{name} eager", batch, partial(work.model, name=name), is_ours=False)
    if task.has_gpu:
        batch = largest_batch(cells)
        while not add("eager", batch, work.model).get("images_per_second") and batch > 64:
            batch = batch * 7 // 8 // 32 * 32
        add("compiled", batch, work.compiled)
        profile(work, compared_at)
    else:
        task.skip("the largest batch that fits", "kernels of an update")


def profile(work: Workload, batch: int) -> None:
    """Writes the time of each kernel in three compiled updates."""
    step = work.update(work.compiled(), batch)
    train_step.seconds(step, 2, work.task.device)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        train_step.seconds(step, 3, work.task.device)
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=50, max_name_column_width=100)
    (work.task.folder / f"{work.task.name}.profile.txt").write_text(table)


# --------------------------------------------------------------------------------------------------- variants


class Bf16Residual(models_mae.MaskedAutoencoderViT):
    """The residual stream of encoder and decoder is bf16; without this class it is fp32."""

    def all_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().all_tokens(x, grid).bfloat16()

    def decoder_positions(self, grid: tuple[int, int]) -> Tensor:
        return super().decoder_positions(grid).bfloat16()


def with_mode(work: Workload, mode: str) -> nn.Module:
    """Our model, whose blocks are compiled with a mode of torch.compile."""
    model = work.model()
    for block in blocks_of(model):
        block.compile(fullgraph=True, dynamic=False, mode=mode)
    allow_graphs()
    return model


def one_graph(work: Workload, depths: Mapping[str, int]) -> nn.Module:
    """Our model, compiled as a graph."""
    model = work.model(depths)
    model.compile(fullgraph=True, dynamic=False)
    return model


def variant(work: Workload, model_class: type[nn.Module], depths: Mapping[str, int]) -> nn.Module:
    """A subclass of our model, compiled as by --compile; in a rehearsal, it is not compiled."""
    sizes = {**models_vit.SIZES[work.size], **models_mae.DECODERS[work.size], **depths}
    with work.task.device:
        model = model_class(**sizes)
    model.to(work.task.device)
    if work.task.has_gpu:
        compile_model(model, work.task.device)
        allow_graphs()
    return model


class Noise:
    """Batches of noise in pinned memory, as `loader.TrainLoader` returns them."""

    def __init__(self, work: Workload, batch: int, count: int) -> None:
        side, has_gpu = peers.image_side(work.size), work.task.has_gpu
        pixels = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, pin_memory=has_gpu).permute(0, 3, 1, 2)
        patches = (side // models_vit.SIZES[work.size]["patch_size"]) ** 2
        noise = torch.rand(batch, patches, pin_memory=has_gpu)
        self.batch = Batch(pixels, torch.zeros(batch, dtype=torch.int64, pin_memory=has_gpu), noise=noise)
        self.images_per_iteration = batch
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.count)

    def seek(self, epoch: int, first_iteration: int = 0) -> None:
        pass

    def seed_iteration(self, iteration: int) -> None:
        pass


def training_loop(work: Workload, batch: int, updates: int) -> Callable[[], float]:
    """Images/s of the loop of main_pretrain.py, compiled, with its copies of batches and without a data loader."""
    model = work.compiled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data: Any = Noise(work, batch, updates)
    normalize = Normalize([0.5] * 3, [0.25] * 3).to(work.task.device)
    options = loop.EpochOptions(
        epoch=0, schedule=lambda epoch: 1e-4, precision=work.precision, guard=loop.NonFiniteGuard("abort"),
        log=NullLog(), saver=NullSaver(Interrupts()),
    )  # fmt: skip

    def epoch() -> None:
        engine_pretrain.train_one_epoch(model, data, optimizer, options, mask_ratio=0.75, normalize=normalize)

    return lambda: updates * batch / train_step.seconds(epoch, 1, work.task.device)


def rate_of(task: Task, step: train_step.Step, batch: int, updates: int) -> Callable[[], float]:
    """Returns a function that measures images/s."""
    return lambda: batch / train_step.seconds(step, updates, task.device)


def compare(task: Task, work: Workload, rates: dict[str, Callable[[], float]]) -> None:
    """Measures variants in turns, and writes their throughput."""
    runs, peaks = train_step.take_turns(rates, work.precision, rounds=3 if task.has_gpu else 1)
    task.write(
        size=work.size, flops_per_image=work.flops, peak_flops=median(peaks),
        images_per_second={name: median(found) for name, found in runs.items()}, all_images_per_second=runs,
    )  # fmt: skip


def variants(task: Task) -> None:
    """Pre-training of ViT-B at 512 images in other ways, in turns."""
    work = Workload(task, "pretrain", "base_patch16")
    batch, updates = (512, 8) if task.has_gpu else (2, 2)
    depths = FULL if task.has_gpu else FEW

    def with_kernel(kernel: str) -> train_step.Step:
        step = work.update(work.model(), batch)

        def limited() -> None:
            with sdpa_kernel(KERNELS[kernel]):
                step()

        return limited

    steps = {
        "compiled": work.update(work.compiled(depths), batch),
        "compiled as one graph": work.update(one_graph(work, depths), batch),
        "compiled, residual stream in bf16": work.update(variant(work, Bf16Residual, depths), batch),
        "compiled, last decoder block for masked patches": work.update(variant(work, MaskedQueries, depths), batch),
        "eager": work.update(work.model(depths), batch),
    }
    steps |= {f"eager, attention of {kernel}": with_kernel(kernel) for kernel in ("cuDNN", "flash") if task.has_gpu}
    if not task.has_gpu:
        task.skip("cuDNN and flash attention in training", "compilation of subclasses")
    rates = {name: rate_of(task, step, batch, updates) for name, step in steps.items()}
    rates["the loop of main_pretrain.py, compiled"] = training_loop(work, batch, updates)
    for step in steps.values():  # compiles
        step()
    empty_cache(task)
    task.wait_for_turn()
    compare(task, work, rates)


def autotune(task: Task) -> None:
    """Pre-training of ViT-B at 512 images with mode="max-autotune-no-cudagraphs", in turns with the default."""
    work = Workload(task, "pretrain", "base_patch16")
    batch, updates = (512, 8) if task.has_gpu else (2, 1)
    if not task.has_gpu:
        task.skip('mode="max-autotune-no-cudagraphs"')
    mode = "max-autotune-no-cudagraphs"
    began = time.monotonic()
    models = {"compiled": work.compiled(), f"compiled, {mode}": with_mode(work, mode if task.has_gpu else "default")}
    steps = {name: work.update(model, batch) for name, model in models.items()}
    for step in steps.values():
        step()
    task.write(compile_seconds=time.monotonic() - began)
    compare(task, work, {name: rate_of(task, step, batch, updates) for name, step in steps.items()})
