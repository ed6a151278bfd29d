"""Where samples come from, in which order, and how they reach the loop.

What a sample looks like (its crop, its flip, its mask) depends on (seed, epoch, index) alone, and which samples make a
batch on (seed, epoch) and the effective batch: never on the number of workers or processes.
"""

import contextlib
import logging
import os
import random
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from util import dist
from util.decode import decode
from util.transforms import Transform

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})


class Source(Protocol):
    """A data set before decoding: the bytes of an image file, and its label (-1 where there are no classes)."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int]: ...

    def name(self, index: int) -> str:
        """How to call a sample when it can't be read."""


class ImageFiles:
    """The image files below a folder, nested or flat, in the order of their names.

    Args:
        root: the folder. If all its images lie in its sub-folders, these are the classes, in the order of their names.

    Raises:
        ValueError: no such folder, or no image in it.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"--data_path: there is no folder {root}")
        started = time.perf_counter()
        self.paths = sorted(_image_files(str(root)))
        if not self.paths:
            raise ValueError(
                f"--data_path: no images under {root} (looked in all its folders for {', '.join(sorted(SUFFIXES))})"
            )
        folders = [os.path.relpath(path, root).split(os.sep)[:-1] for path in self.paths]
        self.classes = sorted({parts[0] for parts in folders}) if all(folders) else []
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers[parts[0]] if self.classes else -1 for parts in folders]
        logger.info(f"{len(self):,} images under {root}, found in {time.perf_counter() - started:.1f} s")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self.paths[index], "rb") as file:
            return file.read(), self.labels[index]

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]


def _image_files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _image_files(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield entry.path


def open_source(data_path: str | None, split: str) -> Source:
    """The images of a data set: those in its folder `split` ("train", "val") if it has one, else all.

    Raises:
        ValueError: no path, no such folder, or no image in it.
    """
    if not data_path:
        raise ValueError("--data_path is needed: a folder of images, or one with the folder train/ in it")
    root = Path(data_path)
    return ImageFiles(root / split if (root / split).is_dir() else root)


class Samples(Dataset):
    """Decoded, augmented samples of a source, asked for by (epoch, index).

    Args:
        num_noise: random numbers that go with each sample: in pre-training one a patch, which choose its mask.

    Returns of each item:
        The image as a uint8 tensor (c, H, W), its label, its noise (num_noise,).
    """

    def __init__(self, source: Source, transform: Transform, *, in_chans: int, seed: int, num_noise: int = 0) -> None:
        self.source = source
        self.transform = transform
        self.in_chans = in_chans
        self.seed = seed
        self.num_noise = num_noise

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, Tensor]:
        epoch, index = place
        data, label = self.source[index]
        try:
            picture = decode(data, self.in_chans)
        except ValueError as error:
            raise ValueError(f"{self.source.name(index)}: {error}") from error
        with seeded_for(self.seed, epoch, index):
            noise = torch.rand(self.num_noise)  # first, so that the mask stays the same under another augmentation
            return self.transform(picture), label, noise


def examples(samples: Samples, count: int) -> list[Tensor]:
    """A batch of up to `count` samples, evenly spread over the data set: the same ones in every epoch and run."""
    indices = np.unique(np.linspace(0, len(samples) - 1, count, dtype=int))
    return default_collate([samples[0, int(index)] for index in indices])


@contextlib.contextmanager
def seeded_for(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seeds every generator that an augmentation may use, for one sample.

    A checksum makes the 32 bits that the generators take: within an epoch no two samples share them. In the training
    process itself (no workers) the generators go on afterwards as if nothing had been drawn.
    """
    key = zlib.crc32(struct.pack("<3q", seed, epoch, index))
    before = None if get_worker_info() else (torch.get_rng_state(), random.getstate(), np.random.get_state())
    # torch.manual_seed would look for every kind of device first: 72 µs in place of 1.
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key)
    yield
    if before is not None:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This process's batches of (epoch, index); `seek` chooses the epoch and the batch to begin with.

    Every epoch is a permutation of the data set drawn from (seed, epoch). Consecutive images of it make the batches of
    all processes, so that any number of processes sees the same images in the same step (batch size x accumulation x
    processes being the same). What does not fill the last batch is left out, another part in each epoch.

    Raises:
        ValueError: there are fewer images than one batch takes.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first_step = 0
        if not len(self):
            raise ValueError(
                f"--batch_size {batch_size} x {dist.world_size()} processes is more than the {num_images} images "
                f"there are; lower --batch_size"
            )

    @property
    def images_per_step(self) -> int:
        """Images in the batches of all processes together."""
        return self.batch_size * dist.world_size()

    def seek(self, epoch: int, first_step: int = 0) -> None:
        """Chooses what the next iteration yields."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_images // self.images_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        for step in range(self.first_step, len(self)):
            start = step * self.images_per_step
            mine = order[start + dist.rank() : start + self.images_per_step : dist.world_size()]
            yield [(epoch, int(index)) for index in mine]


def train_loader(samples: Samples, batch_size: int, seed: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches for `loop.run_epoch`: images uint8 (B, c, H, W), labels (B,), noise (B, num_noise).

    More workers than processor cores would only take turns: `num_workers` counts up to this process's share of them.
    """
    cores = max(1, _cores() // dist.processes_here())
    if num_workers > cores:
        logger.info(f"--num_workers {num_workers}: this process has {cores} processor cores, using {cores} workers")
    workers = min(num_workers, cores)
    return DataLoader(
        samples,
        batch_sampler=EpochBatches(len(samples), batch_size, seed),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
