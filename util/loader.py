"""How samples reach the loop: decoded, augmented, in which order, and what happens to those that can't be read.

What a sample looks like (its crop, its flip, its mask) depends on (seed, epoch, index) alone, and which samples make a
batch on (seed, epoch) and the effective batch: never on the number of workers or processes. Streamed shards are the
exception: their samples look the same in any batch, but meet in other ones.
"""

import contextlib
import itertools
import logging
import os
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from util import dist
from util.decode import BadImage, Picture, decode
from util.library_sets import Shards
from util.sources import Source
from util.transforms import Transform, to_unit_range

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.1  # of an epoch's images; more of them mean that something else is wrong
MAX_BAD_IN_A_ROW = 20

Bad = tuple[str, str]  # a sample's name, and why it can't be read


class Sample(NamedTuple):
    """What a loading process makes of one place of an epoch, before batches are formed."""

    image: Tensor  # uint8 or float (c, H, W)
    label: int
    noise: Tensor  # (num_noise,)
    bad: list[Bad]  # found on the way; this sample stands in for the first of them


class Samples(Dataset):
    """Decoded, augmented samples of a source, asked for by (epoch, index).

    Args:
        num_noise: random numbers that go with each sample: in pre-training one a patch, which choose its mask.
        on_bad_image: "error", or "skip": another sample, drawn by (seed, epoch, index), takes the place.
    """

    def __init__(
        self,
        source: Source | Shards,
        transform: Transform,
        *,
        in_chans: int,
        seed: int,
        num_noise: int = 0,
        on_bad_image: str = "error",
    ) -> None:
        self.source = source
        self.transform = transform
        self.in_chans = in_chans
        self.seed = seed
        self.num_noise = num_noise
        self.skips = on_bad_image == "skip"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        picture, label, bad = self._read(epoch, index)
        return self.finish(picture, label, bad, epoch, index)

    def finish(self, picture: Picture, label: int, bad: list[Bad], epoch: int, number: int) -> Sample:
        """Augments a decoded picture with the random numbers of (seed, epoch, number)."""
        with seeded_for(self.seed, epoch, number):
            noise = torch.rand(self.num_noise)  # first, so that the mask stays the same under another augmentation
            return Sample(self.transform(picture), label, noise, bad)

    def refuse(self, name: str, error: Exception, bad: list[Bad]) -> None:
        """Notes a sample that can't be read, or ends the run: at once, or where all seem to be so."""
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        if not self.skips:
            raise BadImage(f"{name}: {reason} (--on_bad_image skip leaves such images out)") from error
        bad.append((name, reason))
        if len(bad) >= MAX_BAD_IN_A_ROW:
            raise BadImage(f"{len(bad)} images in a row can't be read; the last is {name}: {reason}") from error

    def _read(self, epoch: int, index: int) -> tuple[Picture, int, list[Bad]]:
        assert not isinstance(self.source, Shards), "streamed samples come from StreamedSamples"
        bad: list[Bad] = []
        for candidate in self._candidates(epoch, index):
            try:
                data, label = self.source[candidate]
                return decode(data, self.in_chans), label, bad
            except (BadImage, OSError) as error:
                self.refuse(self.source.name(candidate), error, bad)
        raise AssertionError("candidates never end")

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The index itself, then what may stand in for it."""
        yield index
        generator = np.random.default_rng([self.seed, epoch, index])
        while True:
            yield int(generator.integers(len(self.source)))


class StreamedSamples(IterableDataset):
    """Samples of streamed shards. Every loading process gets its own part of them, and makes whole batches of it.

    Args:
        samples: augments, and decides about bad images; its source are the shards.
    """

    def __init__(self, samples: Samples, shards: Shards) -> None:
        self.samples = samples
        self.shards = shards
        # Epoch, first batch, end, batch size; in shared memory, because workers outlive an epoch.
        self.place = torch.zeros(4, dtype=torch.int64).share_memory_()

    def seek(self, epoch: int, first_step: int, num_steps: int, batch_size: int) -> None:
        """Chooses what the next iteration yields: batches from `first_step` to `num_steps` of an epoch."""
        self.place.copy_(torch.tensor([epoch, first_step, num_steps, batch_size]))

    def __iter__(self) -> Iterator[Sample]:
        epoch, first_step, num_steps, batch_size = self.place.tolist()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches = len(range(first_step + worker, num_steps, workers))  # workers take turns
        yield from itertools.islice(self._stream(epoch, first_step, worker, workers), batches * batch_size)

    def _stream(self, epoch: int, first_step: int, worker: int, workers: int) -> Iterator[Sample]:
        bad: list[Bad] = []

        def report(name: str, error: Exception) -> bool:
            self.samples.refuse(name, error, bad)
            return True

        part, parts = dist.rank() * workers + worker, dist.world_size() * workers
        for name, data, label in self.shards.stream([self.samples.seed, epoch, first_step], part, parts, report):
            try:
                picture = decode(data, self.samples.in_chans)
            except BadImage as error:
                self.samples.refuse(name, error, bad)
                continue
            yield self.samples.finish(picture, label, bad, epoch, zlib.crc32(name.encode()))
            bad = []


def examples(samples: Samples, count: int) -> list[Tensor]:
    """A batch of up to `count` samples, evenly spread over the data set: the same ones in every epoch and run."""
    if isinstance(samples.source, Shards):
        stream = StreamedSamples(samples, samples.source)
        stream.seek(0, 0, 1, min(count, len(samples)))
        chosen = list(stream)
    else:
        indices = np.unique(np.linspace(0, len(samples) - 1, count, dtype=int))
        chosen = [samples[0, int(index)] for index in indices]
    return _collate(chosen)[0]


def _collate(samples: list[Sample]) -> tuple[list[Tensor], list[Bad]]:
    """Images (B, c, H, W), labels (B,), noise (B, num_noise); and what was bad."""
    images = [sample.image for sample in samples]
    if len({image.dtype for image in images}) > 1:  # files of 8 and of 16 bits
        images = [to_unit_range(image) for image in images]
    labels = torch.tensor([sample.label for sample in samples])
    noise = torch.stack([sample.noise for sample in samples])
    return [torch.stack(images), labels, noise], [bad for sample in samples for bad in sample.bad]


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


class TrainLoader:
    """Batches for `loop.run_epoch`: images (B, c, H, W), uint8 or float, labels (B,), noise (B, num_noise).

    Each image that can't be read is named once, and counted at the end of the epoch.

    Raises (also while iterating):
        BadImage: more than MAX_BAD_SHARE of an epoch's images can't be read.
        ValueError: there are fewer images than one batch takes.
    """

    def __init__(self, samples: Samples, batch_size: int, seed: int, num_workers: int, pin_memory: bool) -> None:
        self.order = EpochBatches(len(samples), batch_size, seed)
        self.named: set[str] = set()
        self.num_bad = 0  # in the last epoch
        workers = up_to_cores(num_workers)
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory, "persistent_workers": workers > 0}
        self.stream = StreamedSamples(samples, samples.source) if isinstance(samples.source, Shards) else None
        if self.stream:
            self.batches = DataLoader(self.stream, batch_size, collate_fn=_collate, **options)
        else:
            self.batches = DataLoader(samples, batch_sampler=self.order, collate_fn=_collate, **options)

    @property
    def images_per_step(self) -> int:
        """Images in the batches of all processes together."""
        return self.order.images_per_step

    def seek(self, epoch: int, first_step: int = 0) -> None:
        """Chooses the epoch that the next iteration yields, and the batch to begin with."""
        self.order.seek(epoch, first_step)
        if self.stream:
            self.stream.seek(epoch, first_step, len(self), self.order.batch_size)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[Tensor]]:
        found: dict[str, str] = {}
        for batch, bad in self.batches:
            for name, reason in bad:
                found[name] = reason
                if name not in self.named:
                    self.named.add(name)
                    logger.warning(f"{name}: {reason}; another image takes its place")
            yield batch
        self._count(found)

    def counts(self) -> dict[str, int]:
        """The entry of the last epoch in log.txt."""
        return {"bad_images": self.num_bad} if self.num_bad else {}

    def _count(self, found: dict[str, str]) -> None:
        """All processes meet: what one has named, no other will name again, and all come to the same judgement."""
        found = {name: reason for part in dist.gather(found) for name, reason in part.items()}
        self.named |= found.keys()
        self.num_bad = len(found)
        num_images = (len(self) - self.order.first_step) * self.images_per_step
        if self.num_bad > MAX_BAD_SHARE * num_images:
            name, reason = next(iter(found.items()))
            raise BadImage(
                f"{self.num_bad:,} of the epoch's {num_images:,} images can't be read, more than "
                f"{MAX_BAD_SHARE:.0%}; one of them: {name}: {reason}"
            )
        if found:
            logger.warning(f"{self.num_bad:,} of the epoch's {num_images:,} images can't be read")


def up_to_cores(num_workers: int) -> int:
    """The number of loading processes, up to this process's share of the cores: more would only take turns."""
    cores = max(1, _cores() // dist.processes_here())
    if num_workers > cores:
        logger.info(f"--num_workers {num_workers}: this process has {cores} processor cores, using {cores} workers")
    return min(num_workers, cores)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
