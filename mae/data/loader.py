"""Batches of training and evaluation, and the count of images that can't be read."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from mae import parallel
from mae.data.batches import Batches, require_space, up_to_cores
from mae.data.extra_inputs import original
from mae.data.generators import seed_generators
from mae.data.item import Batch, Item
from mae.data.kinds.listing import folder_of
from mae.data.pixels import BadImage
from mae.data.sampler import EpochBatches
from mae.data.samples import Bad, Sample, Samples, StreamedSamples
from mae.data.source import evenly_spaced, is_stream
from mae.data.transforms import of_one_range

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.1  # of the images of an epoch; a larger share indicates another problem


class TrainLoader:
    """Batches of training, for a `loop.Trainer`.

    It logs each image that can't be read once, and their number at the end of the epoch.

    Raises (also while iterating):
        BadImage: more than MAX_BAD_SHARE of an epoch's images can't be read.
        ValueError: the images do not fill one effective batch.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        repeats: int = 1,
        accum_iter: int = 1,
        updates: int | None = None,
    ) -> None:
        self.order = EpochBatches(len(samples), batch_size, seed, repeats, accum_iter, updates)
        self.num_images = self.order.num_images  # images of the dataset, including repetitions
        self.images_per_iteration = self.order.images_per_iteration
        self.source = original(samples.source)
        self.named: set[str] = set()
        self.num_bad = 0  # in the last epoch
        workers = up_to_cores(num_workers)
        options: dict[str, Any] = {"pin_memory": pin_memory, "persistent_workers": workers > 0, "collate_fn": _collate}
        self.stream = StreamedSamples(samples, samples.source, repeats) if is_stream(samples.source) else None
        if self.stream:
            if workers:  # persistent worker processes read the next pass from it
                require_space(workers)
                self.stream.next_pass.share_memory_()
            self.batches = Batches(self.stream, workers, batch_size=batch_size, **options)
        else:
            self.batches = Batches(samples, workers, batch_sampler=self.order, **options)

    def image_names(self) -> bytes:
        """Returns the names of the images of a folder, each followed by a zero byte; nothing for other datasets."""
        folder = folder_of(self.source)
        return folder.names.joined() if folder else b""

    def seek(self, epoch: int, first_iteration: int = 0) -> None:
        """Sets the epoch and the first batch of the next iteration over this object."""
        self.order.seek(epoch, first_iteration)
        if self.stream:
            start = self.order.images_before(first_iteration)
            self.stream.seek(start, len(self) - first_iteration, self.order.batch_size)

    def seed_iteration(self, iteration: int) -> None:
        """Seeds the random numbers of a batch, such as the numbers of drop path and mixup.

        A run that resumes within an epoch uses the same numbers as a run without interruption.
        """
        seed = seed_generators(self.order.seed, self.order.epoch, iteration, parallel.rank())
        if torch.accelerator.is_available():
            torch.manual_seed(seed)  # without a device to seed, it would record a traceback for it: 300 µs

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        failures: dict[str, str] = {}
        for batch, bad in self.batches:
            for name, reason in bad:
                failures[name] = reason
                if name not in self.named:
                    self.named.add(name)
                    logger.warning(f"{name}: {reason}; another image replaces it", extra={"every_rank": True})
            self._limit(failures)
            yield batch
        # All processes exchange their failures, so that no image is logged twice and all apply the limit equally.
        failures = {name: reason for part in parallel.gather(failures) for name, reason in part.items()}
        self.named |= failures.keys()
        self.num_bad = len(failures)
        self._limit(failures)
        if failures:
            num_read = (len(self) - self.order.first_iteration) * self.images_per_iteration // self.order.repeats
            logger.warning(
                f"{self.num_bad:,} of {num_read:,} images since the start or resume of this epoch can't be read"
            )

    def counts(self) -> dict[str, int]:
        """Returns the entries of the last epoch in log.txt."""
        return {"bad_images": self.num_bad} if self.num_bad else {}

    def _limit(self, failures: dict[str, str]) -> None:
        num_images = len(self) * self.images_per_iteration // self.order.repeats
        if len(failures) > MAX_BAD_SHARE * num_images:
            name, reason = next(iter(failures.items()))
            raise BadImage(
                f"{len(failures):,} of the {num_images:,} images of an epoch can't be read, more than "
                f"{MAX_BAD_SHARE:.0%}; one of them: {name}: {reason}"
            )


def eval_loader(
    samples: Samples, batch_size: int, num_workers: int, pin_memory: bool, indices: Sequence[int] | None = None
) -> DataLoader:
    """Loads this process's share of a dataset for evaluation: each sample occurs once over all processes.

    Args:
        indices: those of the samples. Default: all.
    """
    chosen = range(len(samples)) if indices is None else indices
    mine = [(0, index) for index in chosen[parallel.rank() :: parallel.world_size()]]
    return Batches(
        samples, up_to_cores(num_workers), batch_size=batch_size, sampler=mine, collate_fn=_collate_good,
        pin_memory=pin_memory,
    )  # fmt: skip


def examples(samples: Samples, count: int, num_workers: int = 0) -> Batch:
    """Returns a batch of up to `count` evenly spaced samples of the dataset, the same in every epoch and run.

    With `num_workers`, a worker process reads them: large pictures take no memory of this process.
    """
    if is_stream(samples.source):
        stream = StreamedSamples(samples, samples.source)
        stream.seek(0, 1, min(count, len(samples)))
        return _collate_good(list(stream))
    chosen = [(0, index) for index in evenly_spaced(len(samples), count)]
    batches = Batches(samples, min(1, num_workers), batch_size=count, sampler=chosen, collate_fn=_collate_good)
    return next(iter(batches))


def example_names(samples: Samples, count: int) -> list[str]:
    """Returns the file names of `examples`; of a stream, none."""
    if is_stream(samples.source):
        return []
    return [Path(samples.source.name(index)).name for index in evenly_spaced(len(samples), count)]


def _collate_good(samples: list[Sample] | Batch) -> Batch:
    return _collate(samples)[0]


def _collate(samples: list[Sample] | Batch) -> tuple[Batch, list[Bad]]:
    """Returns a batch, and the images that can't be read."""
    if isinstance(samples, Batch):
        return samples, []
    bad = [image for sample in samples for image in sample.bad]
    noises = [sample.noise for sample in samples if sample.noise is not None]
    return collate([sample.item for sample in samples])._replace(noise=torch.stack(noises) if noises else None), bad


def collate(items: list[Item]) -> Batch:
    """Returns the batch of transformed items.

    Raises:
        RuntimeError, KeyError: the images or the inputs of the items differ in shape or name.
    """
    images = of_one_range([item.image for item in items])  # files with 8 and with 16 bits
    labels = default_collate([item.label for item in items])
    inputs = default_collate([item.inputs for item in items]) if items[0].inputs else {}
    valid = None
    if any(item.valid is not None for item in items):
        valid = torch.stack([
            torch.ones(image.shape[1:], dtype=torch.bool) if item.valid is None else item.valid
            for item, image in zip(items, images, strict=True)
        ])  # fmt: skip
    return Batch(_stack(images), labels, valid, inputs)


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Stacks images to (B, c, H, W).

    The memory format of the images, usually channels last, is preserved, because a conversion takes longer than all
    other operations here. In a worker process, `default_collate` allocates the batch in shared memory.
    """
    if all(image.stride(0) == 1 for image in images):
        return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return default_collate(images)
