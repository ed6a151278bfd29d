"""Decoding and augmentation of samples in worker processes, and the treatment of images that can't be read.

The random numbers of a sample (crop, flip, mask) depend on (seed, epoch, index) only, and with repeated sampling also
on the number of the repetition. They do not depend on the number of workers or processes.
"""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from mae import errors, parallel
from mae.data.decode import MAX_BAD_IN_A_ROW, decode_item
from mae.data.extra_inputs import original
from mae.data.generators import preserve_generators, seed_generators
from mae.data.item import Batch, Item
from mae.data.pixels import AS_STORED, BadImage, PixelValues, to_tensor
from mae.data.source import Source, Stream, evenly_spaced, is_stream, label_at
from mae.data.stages import RandomFlip
from mae.data.transforms import Transform, flips_of

OF_DATASET = -1  # instead of the number of a repetition: the seed of the dataset's own random numbers
COMPARED = 8  # images of two epochs, to see whether a dataset augments
Bad = tuple[str, str]  # name of a sample, and the reason why it can't be read


class Sample(NamedTuple):
    """One augmented item, before it is collated to a batch."""

    item: Item
    noise: Tensor | None  # (N,)
    bad: list[Bad]  # images that can't be read, which this sample replaces


class Samples(Dataset):
    """Decoded and augmented samples of a source, indexed by (epoch, index).

    Args:
        draw_noise: returns the noise of a sample, from PyTorch's default generator. In pre-training, `masking.sampler`
            returns this function, and the noise determines the masked patches.
        on_bad_image: "error", or "skip": a random image, chosen by (seed, epoch, index), replaces a bad image. None for
            scripts without the flag: an error.
        fast_jpeg: as in `decode`.
        exif: apply the orientation in the EXIF data of files.
        values: as in `decode`.
    """

    def __init__(
        self,
        source: Source | Stream,
        transform: Transform,
        *,
        in_chans: int,
        seed: int,
        draw_noise: Callable[[], Tensor] | None = None,
        on_bad_image: str | None = None,
        fast_jpeg: bool = False,
        exif: bool = False,
        values: PixelValues = AS_STORED,
    ) -> None:
        self.source = source
        self.runs_code = getattr(original(source), "runs_code", False)
        self.transform = transform
        self.seed = seed
        self.draw_noise = draw_noise
        self.on_bad_image = on_bad_image
        self.decode = partial(decode_item, in_chans=in_chans, fast_jpeg=fast_jpeg, upright=exif, values=values)

    def __len__(self) -> int:
        return len(self.source)

    @errors.marked()
    def __getitem__(self, key: tuple[int, int]) -> Sample:
        with preserve_generators():
            return self._augmented(*key, 1)[0]

    @errors.marked()
    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample] | Batch:
        """Returns the samples of a batch. A key that is repeated consecutively is read once and augmented anew.

        Decoded images of one size that need no crop are flipped together, as a batch.
        """
        stacked: Any = getattr(self.source, "stacked", None)
        flips = None if stacked is None else flips_of(self.transform, stacked.shape[1:3])
        if flips is not None:
            return self._flipped(stacked, keys, flips)
        samples: list[Sample] = []
        with preserve_generators():
            for (epoch, index), same in itertools.groupby(keys):
                samples += self._augmented(epoch, index, sum(1 for _ in same))
        return samples

    def read(self, index: int, epoch: int = 0) -> Item:
        """Returns a decoded item.

        A dataset of the user's code may augment. Its random numbers depend on the seed, the epoch and the index only,
        and differ from those of the mask and the transform.

        Raises:
            OSError, BadImage: the sample can't be read.
        """
        assert not is_stream(self.source), "streamed samples come from StreamedSamples"
        if self.runs_code:
            seed_generators(self.seed, epoch, index, OF_DATASET)
        return self.decode(self.source[index])

    def augments(self) -> bool:
        """Whether a dataset of the user's code returns other images in another epoch. It compares a few."""
        if not self.runs_code:
            return False
        with preserve_generators():
            for index in evenly_spaced(len(self), COMPARED):
                with contextlib.suppress(OSError, BadImage):
                    images = [to_tensor(self.read(index, epoch).image) for epoch in (0, 1)]
                    if not torch.equal(*images):
                        return True
        return False

    def augment(self, item: Item, bad: list[Bad], epoch: int, number: int, repeats: int) -> list[Sample]:
        """Returns `repeats` augmented samples of a decoded item, with the random numbers of (seed, epoch, number).

        Raises:
            BadImage: the transform can't be applied to the image.
        """
        samples = []
        for repeat in range(repeats):
            seed_generators(*self._position(epoch, number, repeat))
            # First, so that the mask does not depend on the augmentation.
            noise = self.draw_noise() if self.draw_noise else None
            samples.append(Sample(self.transform(item), noise, [] if repeat else bad))
        return samples

    def _position(self, epoch: int, number: int, repeat: int) -> tuple[int, ...]:
        """Returns what the random numbers of a sample depend on."""
        return (self.seed, epoch, number, repeat) if repeat else (self.seed, epoch, number)

    def _flipped(self, stacked: np.ndarray, keys: list[tuple[int, int]], flips: list[RandomFlip]) -> Batch:
        """Returns the batch of `augment` for the images of keys, which are flipped together.

        Args:
            stacked: all images (n, H, W, c), decoded.
        """
        positions = [
            self._position(epoch, index, repeat)
            for (epoch, index), same in itertools.groupby(keys)
            for repeat, _ in enumerate(same)
        ]
        noises: list[Tensor] = []
        numbers = torch.empty(len(keys), len(flips))
        with preserve_generators():
            for position, of_flips in zip(positions, numbers, strict=True):
                seed_generators(*position)  # also Python's and NumPy's: a mask of the user's may use them
                noises += [self.draw_noise()] if self.draw_noise else []
                of_flips.uniform_()  # as `torch.rand`, in half of its time
        indices = [index for _, index in keys]
        images = torch.from_numpy(stacked[indices]).permute(0, 3, 1, 2)
        for flip, of_images in zip(flips, numbers.unbind(1), strict=True):
            flip.flip_some(images, of_images)
        source: Any = self.source
        labels = default_collate([label_at(source.labels, index) for index in indices])
        return Batch(images, labels, noise=torch.stack(noises) if noises else None)

    def refuse(self, name: str, error: Exception, bad: list[Bad]) -> None:
        """Records a sample that can't be read.

        Raises:
            BadImage: `on_bad_image` is not "skip", or MAX_BAD_IN_A_ROW images in a row can't be read.
        """
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        if self.on_bad_image != "skip":
            # Scripts without the flag have None.
            hint = " (on_bad_image=skip excludes such images)" if self.on_bad_image else ""
            raise BadImage(f"{name}: {reason}{hint}") from error
        bad.append((name, reason))
        if len(bad) >= MAX_BAD_IN_A_ROW:
            raise BadImage(f"{len(bad)} images in a row can't be read; the last is {name}: {reason}") from error

    def _augmented(self, epoch: int, index: int, repeats: int) -> list[Sample]:
        """Returns the samples of an image, or of the first of random replacements that can be read."""
        bad: list[Bad] = []
        chosen = index
        generator = None
        while True:
            try:
                return self.augment(self.read(chosen, epoch), bad, epoch, index, repeats)
            except (BadImage, OSError) as error:
                self.refuse(self.source.name(chosen), error, bad)  # type: ignore[union-attr]  # not Shards
            generator = generator or np.random.default_rng([self.seed, epoch, index])
            chosen = int(generator.integers(len(self.source)))


class StreamedSamples(IterableDataset):
    """Samples of streamed shards. Every worker process reads its own shards and yields complete batches.

    Args:
        samples: decodes and augments the images, and handles bad images.
        repeats: number of consecutive samples of each image.
    """

    def __init__(self, samples: Samples, shards: Stream, repeats: int = 1) -> None:
        self.samples = samples
        self.shards = shards
        self.repeats = repeats
        self.next_pass = torch.zeros(5, dtype=torch.int64)  # the arguments of `seek`, rank and number of processes

    def seek(self, start: int, num_batches: int, batch_size: int) -> None:
        """Sets the next pass over this object.

        Args:
            start: number of images that all processes together have read before.
            num_batches: number of batches of this process.
        """
        # Rank and world size are set here because worker processes of a fork server do not know them.
        self.next_pass.copy_(torch.tensor([start, num_batches, batch_size, parallel.rank(), parallel.world_size()]))

    def __iter__(self) -> Iterator[Sample]:
        start, num_batches, batch_size, rank, world_size = self.next_pass.tolist()
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches = len(range(worker, num_batches, workers))  # workers take turns
        stream = self._stream(start, rank * workers + worker, world_size * workers)
        with errors.marked():
            yield from itertools.islice(stream, batches * batch_size)

    def _stream(self, start: int, part: int, parts: int) -> Iterator[Sample]:
        bad: list[Bad] = []

        def report(name: str, error: Exception) -> None:
            self.samples.refuse(name, error, bad)

        for epoch, name, data, label in self.shards.stream(self.samples.seed, part, parts, report, start):
            try:
                with contextlib.nullcontext() if get_worker_info() else preserve_generators():
                    item = self.samples.decode(Item(data, label))
                    augmented = self.samples.augment(item, bad, epoch, zlib.crc32(data), self.repeats)
            except BadImage as error:
                self.samples.refuse(name, error, bad)
                continue
            yield from augmented
            bad = []
