"""Images of a small dataset, decoded once and kept in memory (--cache_images)."""

import copy
import logging
import os
import secrets
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from mae import parallel
from mae.data.batches import Batches, up_to_cores
from mae.data.decode import AS_STORED, BadImage, PixelValues, to_tensor
from mae.data.generators import preserve_generators
from mae.data.item import Item
from mae.data.samples import Samples
from mae.data.sources import Source, label_at
from mae.data.webdataset_shards import Shards, require_random_access

logger = logging.getLogger(__name__)

SHARE = 0.5  # of the memory of this machine, for the images of all its processes; the rest is for the training
CAN_SHARE = hasattr(os, "memfd_create")  # Linux; elsewhere each process has its own images
BATCH = 16  # images that a worker process decodes at a time
SAMPLE = 512  # decoded images, evenly spaced, from which the size of all is estimated
PROCESS_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux; limits are in the latter


class ImageCache:
    """A source whose images are decoded at the start and kept in memory, as uint8 tensors (c, H, W).

    The processes of a machine decode a part each, and share the memory with each other and with their worker processes.
    Images with more than 8 bits, invalid pixels or extra inputs, and images that can't be read and are skipped, are not
    kept. They are read from the source, with its result, at each access. The labels are those that the source returned
    with the images.

    Args:
        source: the encoded images.
        limit: bytes that the images may take.
        in_chans: as in `decode`.
        fast_jpeg: as in `decode`.
        exif: as in `Samples`.
        num_workers: worker processes that decode the images.
        on_bad_image: as in `Samples`.
        values: as in `decode`.

    Raises:
        BadImage: an image can't be read, and `on_bad_image` is not "skip".
        ValueError: the images take more than `limit` bytes, which is estimated after SAMPLE of them.
    """

    def __init__(
        self,
        source: Source,
        limit: float,
        *,
        in_chans: int,
        fast_jpeg: bool,
        exif: bool = False,
        num_workers: int,
        on_bad_image: str | None = None,
        values: PixelValues = AS_STORED,
    ) -> None:
        self.source = source
        self.classes = source.classes
        self.labels = source.labels
        self.name, self.version = source.name, source.version
        self.in_chans = in_chans
        count = -(-len(source) // BATCH)
        batches = [list(range(number, len(source), count)) for number in range(count)]
        processes = parallel.processes_here() if CAN_SHARE else 1
        mine = range(parallel.local_rank() % processes, count, processes)
        decoded = Batches(
            _Decoded(source, in_chans, fast_jpeg, exif, on_bad_image, values), up_to_cores(num_workers),
            batch_sampler=[batches[number] for number in mine], collate_fn=_flatten,
            generator=torch.Generator(),  # the random numbers of the run are not affected
        )  # fmt: skip
        parts, num_bytes, num_images = list[_Part](), 0, 0
        bar = tqdm(total=len(source), desc="decoding", unit="image", disable=None if parallel.is_main() else True)
        with bar:
            for number, (pixels, sizes, labels) in zip(mine, decoded, strict=True):
                others = {
                    index: copy.deepcopy(label)  # tensors are in the shared memory of the worker process
                    for index, label in zip(batches[number], labels, strict=True)
                    if type(label) not in (int, np.ndarray) or not np.array_equal(label, self.labels[index])
                }
                parts.append(_Part(number, pixels.numpy().copy(), sizes.numpy(), others))
                bar.update(len(batches[number]) * processes)
                num_bytes += len(pixels)
                num_images += len(batches[number])
                estimate = num_bytes * len(source) / num_images
                if num_images >= min(SAMPLE, len(source)) // processes and estimate > limit:
                    raise ValueError(
                        f"`cache_images`: {len(source):,} images take about {estimate / 1e6:,.0f} MB of memory, and "
                        f"{limit / 1e6:,.0f} MB are available ({SHARE:.0%} of the memory): omit it, or write smaller "
                        f"images with examples/resize_folder.py"
                    )
        # Two nodes of a job may be one machine, whose processes find each part twice.
        by_number = {part.number: part for part in (_shared(parts) if processes > 1 else parts)}
        parts = [by_number[number] for number in sorted(by_number)]
        self.parts = [part.pixels for part in parts]  # the bytes of the images n, n + len(parts), ...
        self.num_bytes = sum(map(len, self.parts))
        self.sizes = np.zeros((len(source), 2), dtype=np.int64)  # height, width; 0 for images that are not kept
        self.starts = np.zeros(len(source), dtype=np.int64)
        self.other_labels: dict[int, Any] = {}  # those that differ from `labels`, such as labels with metadata
        for part, batch in zip(parts, batches, strict=True):
            lengths = in_chans * part.sizes.prod(axis=1)
            self.sizes[batch], self.starts[batch] = part.sizes, lengths.cumsum() - lengths
            self.other_labels |= part.other_labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        height, width = self.sizes[index].tolist()
        if not height:
            return self.source[index]
        start = self.starts[index]
        pixels = self.parts[index % len(self.parts)][start : start + height * width * self.in_chans]
        label = self.other_labels[index] if index in self.other_labels else label_at(self.labels, index)
        return Item(torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1), label)


class _Part(NamedTuple):
    """Decoded images of a source."""

    number: int
    pixels: np.ndarray  # the bytes of all images
    sizes: np.ndarray  # (n, 2): height and width
    other_labels: dict[int, Any]  # by the index of the image


def _shared(parts: list[_Part]) -> list[_Part]:
    """Returns the parts of all processes of this machine. They are in memory that the processes share.

    The memory is an anonymous file of Linux. It needs no space in /dev/shm, and no process has to remove it.
    """
    key = secrets.token_bytes(16)  # a process of the same number on another machine has another file
    shared = os.memfd_create("images")
    with open(shared, "wb", closefd=False) as file:
        for data in (key, *(part.pixels.tobytes() for part in parts)):
            file.write(data)
    lengths = [len(part.pixels) for part in parts]
    index = [(part.number, part.sizes, list(part.other_labels.items())) for part in parts]
    found = []
    for path, expected, own_lengths, own_index in parallel.gather(
        (f"/proc/{os.getpid()}/fd/{shared}", key.hex(), lengths, index)
    ):
        memory: np.ndarray = np.memmap(path, np.uint8, "c") if os.path.isfile(path) else np.zeros(0, np.uint8)
        if memory[: len(key)].tobytes().hex() != expected:
            continue
        ends = np.cumsum([len(key), *own_lengths]).tolist()
        for start, end, (number, sizes, labels) in zip(ends, ends[1:], own_index, strict=False):
            found.append(_Part(number, memory[start:end], sizes, dict(labels)))
    parallel.barrier()
    os.close(shared)  # the other processes have opened it
    return found


def cached(
    sources: Sequence[Source | Shards],
    *,
    in_chans: int,
    fast_jpeg: bool,
    exif: bool = False,
    num_workers: int,
    on_bad_image: Sequence[str | None] = (),
    values: PixelValues = AS_STORED,
) -> list[ImageCache]:
    """Decodes the images of datasets, and keeps them in up to SHARE of the memory.

    Args:
        in_chans: as in `decode`.
        fast_jpeg: as in `decode`.
        exif: as in `Samples`.
        num_workers: worker processes that decode the images.
        on_bad_image: as in `Samples`, for the first sources; None for the others.

    Raises:
        BadImage: an image can't be read, and `on_bad_image` of its source is not "skip".
        ValueError: the images take more memory, or the source has no random access.
    """
    limit = SHARE * memory_bytes() / (1 if CAN_SHARE else parallel.processes_here())
    caches: list[ImageCache] = []
    for source, on_bad in zip_longest(sources, on_bad_image):
        left = limit - sum(cache.num_bytes for cache in caches)
        caches.append(
            ImageCache(
                require_random_access(source), left, in_chans=in_chans, fast_jpeg=fast_jpeg, exif=exif,
                num_workers=num_workers, on_bad_image=on_bad, values=values,
            )
        )  # fmt: skip
    images, size = sum(map(len, caches)), sum(cache.num_bytes for cache in caches)
    logger.info(f"`cache_images`: {images:,} images are decoded and take {size / 1e6:,.0f} MB of memory")
    return caches


def memory_bytes() -> int:
    """Returns the memory of this machine, or of the container or Slurm job if their limit is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in PROCESS_GROUPS.read_text().splitlines() if PROCESS_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        folder = GROUPS / ("memory" if controllers else "") / path.strip("/")
        name = "memory.limit_in_bytes" if controllers else "memory.max"  # version 1 or 2 of control groups
        files = [parent / name for parent in (folder, *folder.parents)] if controllers in ("", "memory") else []
        texts = [file.read_text().strip() for file in files if file.exists()]
        limits += [int(text) for text in texts if text.isdecimal()]  # or "max"
    return min(limits)


class _Decoded(Dataset):
    """The decoded images of a source, uint8 (c, H, W), and their labels; (c, 0, 0) for those that are not kept."""

    def __init__(
        self, source: Source, in_chans: int, fast_jpeg: bool, exif: bool, on_bad_image: str | None, values: PixelValues
    ) -> None:
        self.source = source
        self.samples = Samples(
            source,
            lambda item: item._replace(image=to_tensor(item.image)),
            in_chans=in_chans,
            seed=0,
            on_bad_image=on_bad_image,
            fast_jpeg=fast_jpeg,
            exif=exif,
            values=values,
        )
        self.in_chans = in_chans

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        nothing = torch.zeros(self.in_chans, 0, 0, dtype=torch.uint8)
        try:
            with preserve_generators():
                item = self.samples.read(index)
                pixels, label = to_tensor(item.image), item.label
                if pixels.dtype != torch.uint8 or item.inputs or item.valid is not None:
                    return nothing, label
                again = to_tensor(self.samples.read(index, epoch=1).image) if self.samples.runs_code else pixels
        except (BadImage, OSError) as error:
            self.samples.refuse(self.source.name(index), error, [])
            return nothing, label_at(self.source.labels, index)
        if not torch.equal(pixels, again):
            raise ValueError(
                f"`cache_images`: the dataset returns another image {self.source.name(index)} in each epoch, and all "
                f"epochs would have the first; omit `cache_images`"
            )
        return pixels, label


def _flatten(samples: list[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Returns the bytes of all images, their heights and widths (n, 2), and their labels."""
    images, labels = zip(*samples, strict=True)
    sizes = torch.tensor([image.shape[1:] for image in images])
    return torch.cat([image.permute(1, 2, 0).reshape(-1) for image in images]), sizes, list(labels)
