"""Throughput from JPEG files to predictions and features, compared with timm and transformers.

    python benchmarks/evaluation.py                              # ViT-B in bf16, ten minutes on two CPU cores
    python benchmarks/evaluation.py --amp off --rounds 3 --only "timm eager" "transformers eager" "ours eager"

eval: `main_finetune.py --eval`, and a loop like timm's validate.py with its dataset, loader, model and accuracy.
features: `python -m mae.inference.features`, and transformers' image processor and ViTModel in a DataLoader. All read
the same files of 500 x 375 pixels, with the same batch size and number of worker processes, and take turns. The time
begins after the first batch, which includes the start of the workers. The share of the peak is the FLOP/s of the
forward pass divided by the FLOP/s of a large matrix product, which is measured between the rounds.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from transformers import ViTConfig, ViTImageProcessor, ViTModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import models_vit
from benchmarks import machine, model_table, peers, train_step
from benchmarks.input_pipeline import write_photographs
from engine_finetune import evaluate
from mae.cli import entry_point
from mae.data import loader, transforms
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.data.source import Source
from mae.inference import features, get_model
from mae.parallel import choose_device
from mae.settings import DataSpec, types
from mae.training.compiling import compile_model
from mae.training.precision import Precision


class Clock:
    """Batches of a data loader; `rate` is the throughput after the first one."""

    def __init__(self, batches: Any, num_images: int, batch_size: int) -> None:
        self.batches = batches
        self.num_images = num_images - batch_size
        self.started = 0.0

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            yield batch
            if number == 0:
                self.started = time.perf_counter()

    def rate(self) -> float:
        """Images/s from the second batch until now."""
        return self.num_images / (time.perf_counter() - self.started)


# --------------------------------------------------------------------------------------------------- implementations


def our_evaluation(model: Any, source: Source, args: argparse.Namespace, precision: Precision, fast: bool) -> float:
    """Images/s of `main_finetune.py --eval`."""
    samples = Samples(source, model.preprocess, in_chans=3, seed=0, fast_jpeg=fast)
    clock = Clock(loader.eval_loader(samples, args.batch_size, args.num_workers, False), len(source), args.batch_size)
    evaluate(model, clock, normalize=model.normalize, precision=precision)
    return clock.rate()


def timms_evaluation(model: torch.nn.Module, folder: Path, args: argparse.Namespace, precision: Precision) -> float:
    """Images/s of a loop like timm's validate.py."""
    dataset, side = create_dataset("", root=str(folder / "train")), peers.image_side(args.size)
    batches: Any = create_loader(
        dataset, (3, side, side), args.batch_size, use_prefetcher=False, interpolation="bicubic", crop_pct=0.875,
        mean=transforms.IMAGENET_MEAN, std=transforms.IMAGENET_STD, num_workers=args.num_workers,
    )  # fmt: skip
    clock = Clock(batches, len(dataset), args.batch_size)
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, targets in clock:
            with precision.autocast():
                logits = model(images.to(precision.device))
                loss = torch.nn.functional.cross_entropy(logits, targets.to(precision.device))
            acc1, acc5 = accuracy(logits.float(), targets.to(precision.device), topk=(1, 5))
            for meter, value in ((losses, loss), (top1, acc1), (top5, acc5)):
                meter.update(value.item(), len(images))
    return clock.rate()


def our_features(
    extractor: features.Extractor, source: Source, args: argparse.Namespace, precision: Precision, fast: bool
) -> float:
    """Images/s of `python -m mae.inference.features`, which also writes them."""
    clocks = []

    def timed_loader(*parts: Any, **options: Any) -> Clock:
        clocks.append(Clock(eval_loader(*parts, **options), len(source), args.batch_size))
        return clocks[-1]

    eval_loader = loader.eval_loader
    with tempfile.TemporaryDirectory() as root, patch.object(loader, "eval_loader", timed_loader):
        features.extract(extractor, source, Path(root, "rows"), {}, args.batch_size, args.num_workers, precision, fast)
        return clocks[0].rate()


def prepare(processor: Any, image: Image.Image) -> torch.Tensor:
    """An image as transformers' processor prepares it."""
    return processor(image, return_tensors="pt")["pixel_values"][0]


def transformers_features(
    model: torch.nn.Module, folder: Path, args: argparse.Namespace, precision: Precision
) -> float:
    """Images/s of transformers' image processor and ViTModel: the class tokens, in memory."""
    side = peers.image_side(args.size)
    processor = ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=list(transforms.IMAGENET_MEAN),
        image_std=list(transforms.IMAGENET_STD), resample=Image.Resampling.BICUBIC,
    )  # fmt: skip
    dataset = ImageFolder(str(folder / "train"), partial(prepare, processor))
    clock = Clock(DataLoader(dataset, args.batch_size, num_workers=args.num_workers), len(dataset), args.batch_size)
    rows = []
    with torch.inference_mode():
        for images, _ in clock:
            with precision.autocast():
                rows.append(model(images.to(precision.device)).last_hidden_state[:, 0].float().cpu())
    torch.cat(rows)
    return clock.rate()


def transformers_encoder(size: str) -> torch.nn.Module:
    """transformers' ViTModel in one of our sizes."""
    width, depth, heads = (models_vit.SIZES[size][key] for key in ("embed_dim", "depth", "num_heads"))
    config = ViTConfig(
        image_size=peers.image_side(size), patch_size=models_vit.SIZES[size]["patch_size"], hidden_size=width,
        num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=round(peers.mlp_ratio(size) * width),
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def implementations(
    task: str, args: argparse.Namespace, folder: Path, precision: Precision
) -> dict[str, Callable[[], float]]:
    """The passes over all images by name; each returns images/s."""
    source: Any = open_source(DataSpec(data_path=str(folder)), "train")
    ours, peer = (our_evaluation, timms_evaluation) if task == "eval" else (our_features, transformers_features)
    builders: dict[str, Callable[[], Any]] = {
        "timm": lambda: peers.timm_classifier(args.size),
        "ours": lambda: get_model(f"vit_{args.size}", nb_classes=1000),
    }
    if task == "features":
        builders = {
            "transformers": lambda: transformers_encoder(args.size),
            "ours": lambda: features.Extractor(get_model(f"vit_{args.size}"), "cls"),
        }
    passes: dict[str, Callable[[], float]] = {}
    for name, how in itertools.product(builders, ("eager", "compiled")):
        title = f"{name} {how}"
        if args.only and name not in args.only and title not in args.only:
            continue
        model = builders[name]().eval().to(precision.device)
        if name != "ours":
            if how == "compiled":
                model.compile()
            passes[title] = partial(peer, model, folder, args, precision)
            continue
        if how == "compiled":
            compile_model(model, precision.device, freeze_weights=True)
        for fast, flag in ((False, ""), (True, ", --fast_jpeg")):
            passes[title + flag] = partial(ours, model, source, args, precision, fast)
    return passes


# ------------------------------------------------------------------------------------------------------ measurements


def compare(task: str, args: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """Prints and returns the images/s of all implementations of a task, eval or features."""
    with tempfile.TemporaryDirectory() as root:
        write_photographs(Path(root), args.images)
        passes = implementations(task, args, Path(root), precision)
        runs, peaks = train_step.take_turns(passes, precision, args.rounds)
    title = f"{task}, {args.size}, batch {args.batch_size}"
    return train_step.report(title, precision, runs, peaks, model_table.classifier_flops(args.size))


def main(args: argparse.Namespace) -> None:
    """Prints a table for each task and writes it as JSON."""
    if args.images < 2 * args.batch_size:
        raise ValueError(f"--images {args.images} is less than two batches; give {2 * args.batch_size} or more")
    torch.manual_seed(0)
    device = choose_device(args.device)
    precision = Precision(args.amp, device)
    for task in args.task:
        name = f"{task}_{args.size}_{precision.name}_{device.type}_files"
        machine.write(name, device, vars(args), compare(task, args, precision), args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = machine.model_parser("Throughput of evaluation and features from files, compared with others.")
    tasks = ("eval", "features")
    parser.add_argument("--task", nargs="+", default=[*tasks], choices=tasks, help="measurements")
    parser.add_argument("--images", default=192, type=types.positive_int, metavar="N", help="number of image files")
    parser.add_argument("--num_workers", default=1, type=types.count, metavar="N", help="worker processes of all")
    machine.add_rounds(parser)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
