"""Throughput from JPEG files to training batches in one process, compared with the usual torchvision pipeline.

    python benchmarks/input_pipeline.py          # two minutes

The classic pipeline is Pillow with torchvision's RandomResizedCrop (bicubic), RandomHorizontalFlip, ToTensor and
Normalize. The files have 500 x 375 pixels and JPEG quality 95; they are crops of photographs of scikit-image and
scikit-learn. `examples/resize_folder.py` writes the resized copy. All pipelines take turns. Then the pixels of
--fast_jpeg are compared with those of Pillow.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, scripts, timing
from benchmarks.image_sets import write_jpeg_files
from mae.cli import entry_point
from mae.data import loader, transforms
from mae.data.item import Item
from mae.data.jpeg import decode_rgb
from mae.data.open import open_source
from mae.data.pixels import MAX_PIXELS
from mae.data.samples import Samples
from mae.settings import DataSpec

BATCH = 64
IMAGES = 1280
CROPS = 200  # random crops whose pixels are compared

CLASSIC = T.Compose([
    T.RandomResizedCrop(224, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
    T.RandomHorizontalFlip(),
    T.ToTensor(),
    T.Normalize(transforms.IMAGENET_MEAN, transforms.IMAGENET_STD),
])  # fmt: skip


def classic(folder: Path) -> Iterable[Any]:
    """Batches of the classic pipeline."""
    return DataLoader(ImageFolder(str(folder / "train"), CLASSIC), BATCH, shuffle=True, drop_last=True)


def ours(folder: Path, workers: int = 0, fast_jpeg: bool = False) -> Iterable[Any]:
    """Batches of the pipeline of main_pretrain.py."""
    source = open_source(DataSpec(data_path=str(folder)), "train")
    transform = transforms.pretrain_transform(224)
    draw_noise = partial(torch.rand, 196)
    samples = Samples(source, transform, in_chans=3, seed=0, draw_noise=draw_noise, fast_jpeg=fast_jpeg)
    return loader.TrainLoader(samples, BATCH, 0, workers, pin_memory=False)


def rate(batches: Iterable[Any], limit: int) -> float:
    """Images/s over `limit` batches of an epoch, without the first batch, which includes the start of the workers."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    count = sum(BATCH for _ in itertools.islice(iterator, limit))
    return count / (time.perf_counter() - started)


def differences(folder: Path) -> dict[str, float]:
    """The share of pixel values at each difference between --fast_jpeg and Pillow, on the same random crops."""
    files = sorted((folder / "train" / "photograph").iterdir())
    transform = transforms.pretrain_transform(224)
    counts = np.zeros(256, dtype=np.int64)
    for number in range(CROPS):
        data = files[number % len(files)].read_bytes()
        versions = []
        pixels = decode_rgb(data, MAX_PIXELS)
        assert pixels is not None
        for picture in (pixels, Image.open(files[number % len(files)])):
            torch.manual_seed(number)
            versions.append(transform(Item(picture)).image.numpy().astype(int))
        counts += np.bincount(np.abs(versions[0] - versions[1]).ravel(), minlength=256)
    return {str(level): float(share) for level, share in enumerate(counts / counts.sum()) if share}


def main(args: argparse.Namespace) -> None:
    """Prints the table and the differences, and writes them as JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "originals")
        copy = Path(root, "copy")
        write_jpeg_files(folder, IMAGES)
        scripts.run_python("examples/resize_folder.py", folder, copy)
        pipelines = {
            "classic": classic(folder),
            "ours": ours(folder),
            "ours, --fast_jpeg": ours(folder, fast_jpeg=True),
            "ours, resized copy, --fast_jpeg": ours(copy, fast_jpeg=True),
        }
        measures: dict[str, Callable[[], float]] = {
            name: partial(rate, batches, IMAGES // BATCH - 1) for name, batches in pipelines.items()
        }
        found = timing.report("one process", timing.take_turns(measures, args.rounds))
        shares = differences(folder)
    levels = ", ".join(f"{share:.4%} differ by {level}" for level, share in shares.items())
    print(f"values of {CROPS} crops, --fast_jpeg compared with Pillow: {levels}")
    results = {"one process": found, "differences": shares}
    machine.write("input_pipeline", torch.device("cpu"), vars(args), results, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return machine.parser("Throughput from JPEG files to training batches, compared with Pillow and torchvision.", 7)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
