"""Throughput from JPEG files to predictions and features, compared with timm and transformers.

    python benchmarks/evaluation.py                              # ViT-B in bf16, ten minutes on two CPU cores
    python benchmarks/evaluation.py --amp off --rounds 3 --only "timm eager" "transformers eager" "ours eager"

eval: `main_finetune.py --eval`, and a loop like timm's validate.py with its dataset, loader, model and accuracy.
features: `python -m mae.inference.features`, and transformers' image processor and ViTModel in a DataLoader. All read
the same files of 500 x 375 pixels, with the same batch size and number of worker processes, and take turns. The time
begins after the first batch, which includes the start of the workers.
"""

import argparse
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
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from transformers import ViTImageProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, peers, timing
from benchmarks.image_sets import write_jpeg_files
from engine_finetune import evaluate_model
from mae.cli import entry_point
from mae.data import loader, transforms
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.inference import extraction, get_model
from mae.parallel import choose_device
from mae.settings import DataSpec, types
from mae.training.compiling import compile_model
from mae.training.precision import Precision

PEERS = {"eval": "timm", "features": "transformers"}


class Clock:
    """Batches of a data loader; `rate` is the throughput after the first one."""

    def __init__(self, batches: Any, args: argparse.Namespace) -> None:
        self.batches = batches
        self.num_images = args.images - args.batch_size
        self.started = 0.0

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            yield batch
            if number == 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # the first batch ends before the clock starts
                self.started = time.perf_counter()

    def rate(self) -> float:
        """Images/s from the second batch until now."""
        return self.num_images / (time.perf_counter() - self.started)


# The passes over all images return images/s. `fast_jpeg` is ours.


def our_evaluation(
    model: Any, folder: Path, args: argparse.Namespace, precision: Precision, fast_jpeg: bool = False
) -> float:
    """`main_finetune.py --eval`."""
    source = open_source(DataSpec(data_path=str(folder)), "train")
    samples = Samples(source, model.preprocess, in_chans=3, seed=0, fast_jpeg=fast_jpeg)
    clock = Clock(loader.eval_loader(samples, args.batch_size, args.num_workers, False), args)
    evaluate_model(model, clock, normalize=model.normalize, precision=precision)
    return clock.rate()


def timms_evaluation(model: nn.Module, folder: Path, args: argparse.Namespace, precision: Precision) -> float:
    """A loop like timm's validate.py."""
    side = peers.image_side(args.size)
    batches: Any = create_loader(
        create_dataset("", root=str(folder / "train")), (3, side, side), args.batch_size, use_prefetcher=False,
        interpolation="bicubic", crop_pct=0.875, mean=transforms.IMAGENET_MEAN, std=transforms.IMAGENET_STD,
        num_workers=args.num_workers,
    )  # fmt: skip
    clock = Clock(batches, args)
    meters = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, targets in clock:
            targets = targets.to(precision.device)
            with precision.autocast():
                logits = model(images.to(precision.device))
                loss = nn.functional.cross_entropy(logits, targets)
            for meter, value in zip(meters, (loss, *accuracy(logits.float(), targets, topk=(1, 5))), strict=True):
                meter.update(value.item(), len(images))
    return clock.rate()


def our_features(
    extractor: Any, folder: Path, args: argparse.Namespace, precision: Precision, fast_jpeg: bool = False
) -> float:
    """`python -m mae.inference.features`, which also writes them."""
    source: Any = open_source(DataSpec(data_path=str(folder)), "train")
    clocks = []
    eval_loader = loader.eval_loader

    def timed_loader(*parts: Any, **options: Any) -> Clock:
        clocks.append(Clock(eval_loader(*parts, **options), args))
        return clocks[-1]

    with tempfile.TemporaryDirectory() as out, patch.object(loader, "eval_loader", timed_loader):
        extraction.extract(
            extractor, source, Path(out, "rows"), {}, args.batch_size, args.num_workers, precision, fast_jpeg
        )
        return clocks[0].rate()


def prepare(processor: Any, image: Image.Image) -> torch.Tensor:
    """An image as transformers' processor prepares it."""
    return processor(image, return_tensors="pt")["pixel_values"][0]


def transformers_features(model: nn.Module, folder: Path, args: argparse.Namespace, precision: Precision) -> float:
    """transformers' image processor and ViTModel: the class tokens, in memory."""
    side = peers.image_side(args.size)
    processor = ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=list(transforms.IMAGENET_MEAN),
        image_std=list(transforms.IMAGENET_STD), resample=Image.Resampling.BICUBIC,
    )  # fmt: skip
    dataset = ImageFolder(str(folder / "train"), partial(prepare, processor))
    clock = Clock(DataLoader(dataset, args.batch_size, num_workers=args.num_workers), args)
    rows = []
    with torch.inference_mode():
        for images, _ in clock:
            with precision.autocast():
                rows.append(model(images.to(precision.device)).last_hidden_state[:, 0].float().cpu())
    torch.cat(rows)
    return clock.rate()


# Task and name -> the model, and the pass.
IMPLEMENTATIONS: dict[tuple[str, str], tuple[Callable[[str], Any], Callable[..., float]]] = {
    ("eval", "timm"): (peers.timm_classifier, timms_evaluation),
    ("eval", "ours"): (lambda size: get_model(f"vit_{size}", nb_classes=1000), our_evaluation),
    ("features", "transformers"): (peers.transformers_encoder, transformers_features),
    ("features", "ours"): (
        lambda size: extraction.Extractor(get_model(f"vit_{size}", global_pool=False), "cls"),
        our_features,
    ),
}


def passes(task: str, args: argparse.Namespace, folder: Path, precision: Precision) -> dict[str, Callable[[], float]]:
    """Returns the passes of the implementations of a task by name."""
    found: dict[str, Any] = {}
    for name, how in timing.implementations((PEERS[task], "ours"), args.only):
        build, measure = IMPLEMENTATIONS[task, name]
        model = build(args.size).eval().to(precision.device)
        if how == "compiled" and name == "ours":
            compile_model(model, precision.device, freeze_weights=True)
        elif how == "compiled":
            model.compile()
        found[f"{name} {how}"] = partial(measure, model, folder, args, precision)
        if name == "ours":
            found[f"ours {how}, --fast_jpeg"] = partial(found[f"ours {how}"], fast_jpeg=True)
    return found


def main(args: argparse.Namespace) -> None:
    """Prints a table for each task and writes it as JSON."""
    if args.images < 2 * args.batch_size:
        raise ValueError(f"--images {args.images} is less than two batches; give {2 * args.batch_size} or more")
    torch.manual_seed(0)
    device = choose_device(args.device)
    precision = Precision(args.amp, device)
    for task in args.task:
        with tempfile.TemporaryDirectory() as folder:
            write_jpeg_files(Path(folder), args.images)
            runs = timing.take_turns(passes(task, args, Path(folder), precision), args.rounds)
        found = timing.report(f"{task}, {args.size}, batch {args.batch_size}, {precision.name}", runs)
        machine.write(f"{task}_{args.size}_{precision.name}_{device.type}_files", device, vars(args), found, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = machine.model_parser("Throughput of evaluation and features from files, compared with others.")
    parser.add_argument("--task", nargs="+", default=[*PEERS], choices=PEERS, help="measurements")
    parser.add_argument("--images", default=192, type=types.positive_int, metavar="N", help="number of image files")
    parser.add_argument("--num_workers", default=1, type=types.count, metavar="N", help="worker processes of all")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
