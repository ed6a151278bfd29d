"""The order of samples: which images a batch has.

An epoch is floor(images / effective batch size) updates, or a given number of updates. The samples of an update depend
on (seed, epoch) and on the effective batch size, not on the number of workers, the number of processes or the
accumulation. The random numbers of a batch depend on (seed, epoch, iteration, rank). Streamed shards are an exception:
each sample is the same, but the composition of the batches depends on the number of workers and processes. So are
stored features, whose order depends on the number of processes.
"""

import logging
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mae import parallel
from mae.plurals import counted

logger = logging.getLogger(__name__)

MAX_LEFT_OUT = 0.1  # fraction of the images of an epoch that may be left out without a warning


def updates_per_epoch(num_images: int, batch_size: int, accum_iter: int) -> int:
    """floor(images / effective batch size): the same for every split of the effective batch size.

    Args:
        num_images: images of an epoch, including repetitions.
        batch_size: batch size per process.

    Raises:
        ValueError: the images do not fill one effective batch.
    """
    processes = parallel.world_size()
    effective_batch_size = batch_size * accum_iter * processes
    updates, left_out = divmod(num_images, effective_batch_size)
    if not updates:
        fitting = num_images // (batch_size * processes)
        even = num_images // processes // 2 * 2 or 1  # mixup mixes pairs
        remedy = f"accum_iter={fitting}" if fitting else f"batch_size={even} accum_iter=1"
        if num_images < processes:
            remedy = f"at most {counted(num_images, 'process')}"
        raise ValueError(
            f"an epoch has {counted(num_images, 'image')}, fewer than one effective batch of {effective_batch_size:,} "
            f"(batch_size={batch_size} x accum_iter={accum_iter} x {counted(processes, 'process')}): give {remedy}"
        )
    if left_out > MAX_LEFT_OUT * num_images and parallel.is_main():
        logger.warning(
            f"each epoch leaves out {left_out:,} of {num_images:,} images, which do not fill an effective batch of "
            f"{effective_batch_size:,}; they differ from epoch to epoch"
        )
    return updates


class Epochs:
    """Epochs of complete updates, and the position in them: the epoch and the first batch of the next iteration.

    Args:
        num_images: images of the dataset in all processes, including repetitions.
        updates: updates of an epoch. Default: those of one pass over the images.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, accum_iter: int, updates: int | None = None
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = self.first_iteration = 0
        self.num_batches = accum_iter * (updates or updates_per_epoch(num_images, batch_size, accum_iter))

    @property
    def images_per_iteration(self) -> int:
        """Images in the batches of all processes together."""
        return self.batch_size * parallel.world_size()

    def seek(self, epoch: int, first_iteration: int = 0) -> None:
        """Sets the epoch and the first batch of the next iteration over this object."""
        self.epoch = epoch
        self.first_iteration = first_iteration

    def __len__(self) -> int:
        return self.num_batches


class EpochBatches(Epochs, Sampler[list[tuple[int, int]]]):
    """Batches of (pass, index) for this process. `seek` sets the epoch and the first batch.

    With `repeats`, every image occurs `repeats` times in a row and is decoded once, and an epoch is `repeats` times as
    long (repeated sampling, Hoffer et al. 2020).

    Every pass is a permutation of the dataset that depends on (seed, pass). Consecutive images form the batches of
    all processes, and `accum_iter` consecutive batches form an update. Every split of the effective batch size into
    batches, accumulation and processes therefore uses the same images in the same update. Every
    epoch is a pass, and leaves out the images that do not fill its last update; they differ from epoch to epoch. With
    `updates`, an epoch continues where the epoch before it ended, and passes leave out nothing.

    Raises:
        ValueError: the images do not fill one effective batch, or `batch_size` is not a multiple of `repeats`.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        accum_iter: int = 1,
        updates: int | None = None,
    ) -> None:
        if batch_size % repeats:
            raise ValueError(f"batch_size={batch_size} must be a multiple of repeated_sampling={repeats}")
        super().__init__(num_images * repeats, batch_size, seed, accum_iter, updates)
        self.repeats = repeats
        self.continues = updates is not None

    def images_before(self, iteration: int) -> int:
        """Returns the number of images of all passes before an iteration of the epoch, without repetitions."""
        num_images = self.num_images // self.repeats
        count = self.images_per_iteration // self.repeats
        return self.epoch * (count * len(self) if self.continues else num_images) + iteration * count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        num_images = self.num_images // self.repeats
        count = self.images_per_iteration // self.repeats
        pass_number = -1
        order = np.arange(0)
        for iteration in range(self.first_iteration, len(self)):
            batch: list[tuple[int, int]] = []
            first = self.images_before(iteration)
            for position in range(first + parallel.rank(), first + count, parallel.world_size()):
                if position // num_images != pass_number:
                    pass_number = position // num_images
                    order = np.random.default_rng([self.seed, pass_number]).permutation(num_images)
                batch += [(pass_number, int(order[position % num_images]))] * self.repeats
            yield batch
