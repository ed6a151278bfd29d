"""`--cache_images`: the images of a small dataset, decoded once, in a file that the processes of a machine map."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from functools import partial
from importlib import metadata
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from mae import errors, parallel
from mae.data import decode, jpeg, large, pixels, tiff
from mae.data.batches import Batches, up_to_cores
from mae.data.generators import preserve_generators
from mae.data.item import Item
from mae.data.pixels import BadImage, to_tensor
from mae.data.samples import Samples
from mae.data.source import Source, label_at, require_random_access, versions
from mae.files import atomic

logger = logging.getLogger(__name__)

BATCH = 16  # images that a worker process decodes at a time
SAMPLE = 512  # decoded images, evenly spaced, from which the size of all is estimated
DECODERS = ("pillow", "tifffile", "imagecodecs", "torchcodec", "torchvision")  # packages that determine the pixels


def folder() -> Path:
    """Returns the folder of the files: `$MAE_CACHE`, or `mae` in the cache folder of the user."""
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MAE_CACHE") or Path(above, "mae")) / "images"


class ImageCache:
    """A source whose images are uint8 tensors (c, H, W) in a file.

    The file has the bytes of all images and then int64 (5, n): the start, height and width of each image, and the
    height and width in its file, of which a large picture has a quarter. The height of an image that is not in the file
    is 0. It is read from the source at each access.

    Args:
        source: the encoded images.
        path: the file, which `cached` writes.

    Attributes:
        stacked: all images (n, H, W, c), if they are in the file and have one size; else None.
    """

    def __init__(self, source: Source, path: Path) -> None:
        self.source = source
        self.path = path
        self.classes = source.classes
        self.labels = source.labels
        self.name = source.name
        self.version = source.version
        data = np.asarray(np.memmap(path, np.uint8, "c"))  # tensors can't be read-only
        self.num_bytes = len(data) - 5 * 8 * len(source)
        self.pixels = data[: self.num_bytes]
        table = np.frombuffer(data[self.num_bytes :].tobytes(), np.int64)
        self.starts, self.heights, self.widths, *self.stored_sizes = table.reshape(5, -1)
        height = int(self.heights[0])
        width = int(self.widths[0])
        are_equal = height and np.all(self.heights == height) and np.all(self.widths == width)
        self.stacked = self.pixels.reshape(len(source), height, width, -1) if are_equal else None

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, (self.source, self.path)  # another process maps the file

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        start, height, width = (int(values[index]) for values in (self.starts, self.heights, self.widths))
        if not height:
            return self.source[index]
        end = self.starts[index + 1] if index + 1 < len(self) else self.num_bytes
        pixels = torch.from_numpy(self.pixels[start:end]).view(height, width, -1).permute(2, 0, 1)
        rows, columns = (int(sides[index]) for sides in self.stored_sizes)
        return Item(large.with_stored_size(pixels, (rows, columns)), label_at(self.labels, index))


def cached(samples: Samples, num_workers: int) -> ImageCache:
    """Returns a dataset whose decoded images are in a file. One process of each machine writes it if it is missing.

    The name of the file is a digest of all that the pixels depend on. A file of a dataset of the user's code, which may
    depend on anything, is of this run only, and is removed at its end.

    Args:
        samples: decodes the images, without a transform.
        num_workers: worker processes of each process. The process that decodes uses those of all.

    Raises:
        BadImage: an image can't be read, and is not skipped.
        ValueError: the disk has no space for the images, or the source has no random access.
        OSError: the folder can't be written to.
    """
    source = require_random_access(samples.source)
    name = parallel.gather(f"run-{secrets.token_hex(8)}")[0] if samples.runs_code else _digest(source, samples)
    path = folder() / f"{name}.bin"
    parallel.once_per_machine(partial(_write, path, _Decoded(source, samples), num_workers))
    cache = ImageCache(source, path)
    if samples.runs_code and parallel.local_rank() == 0:
        Finalize(cache, path.unlink, kwargs={"missing_ok": True}, exitpriority=0)
    logger.info(f"`cache_images`: {len(source):,} decoded images take {cache.num_bytes / 1e6:,.0f} MB in {path}")
    return cache


def _digest(source: Source, samples: Samples) -> str:
    """Returns a digest of all that the decoded images of a source depend on."""
    decoders = (decode, pixels, tiff, jpeg, large)
    code = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in decoders]
    packages = [[one.version for one in metadata.distributions(name=name)] for name in DECODERS]
    names = (os.getcwd(), versions(source))  # names may be relative
    return hashlib.sha256(json.dumps([code, packages, samples.decode.keywords, names]).encode()).hexdigest()[:32]


def _write(path: Path, decoded: "_Decoded", num_workers: int) -> None:
    """Decodes all images into a file, unless it exists. A failed or interrupted attempt leaves no file of this name.

    Raises:
        BadImage: an image can't be read.
        ValueError: the images take more than the free space, which is estimated after SAMPLE of them.
        OSError: the file can't be written.
    """
    if path.exists():
        return
    with atomic.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=path.parent)  # another job may write the same file
    total = len(decoded)
    done = 0
    num_bytes = 0
    sizes = np.zeros((5, total), np.int64)
    batches = Batches(
        decoded, up_to_cores(num_workers) * parallel.processes_here(), batch_size=BATCH, collate_fn=list,
        generator=torch.Generator(),  # the random numbers of the run are not affected
    )  # fmt: skip
    bar = tqdm(total=total, desc="decoding", unit="image", disable=None if parallel.is_main() else True)
    with temporary, bar, Path(temporary.name, path.name).open("wb") as file:
        for images in batches:
            for image, stored_size in images:
                sizes[:, done] = num_bytes, *image.shape[1:], *stored_size
                with atomic.writing(path):
                    file.write(image.permute(1, 2, 0).contiguous().numpy())
                num_bytes += image.numel()
                done += 1
            bar.update(len(images))
            missing = num_bytes * (total / done - 1)
            free = shutil.disk_usage(path.parent).free
            if done >= SAMPLE and missing > free:
                raise ValueError(
                    f"`cache_images`: {total:,} images take about {num_bytes * total / done / 1e6:,.0f} MB in "
                    f"{path.parent}, and {free / 1e6:,.0f} MB are free: free space, name another folder in the "
                    f"environment variable MAE_CACHE, or write smaller images with examples/resize_folder.py"
                )
        with atomic.writing(path):
            file.write(sizes.tobytes())
            file.flush()
            os.fsync(file.fileno())  # after a power failure, the file is complete or absent
            os.replace(file.name, path)


class _Decoded(Dataset):
    """The decoded images of a source, uint8 (c, H, W), and their sizes (height, width) in their files.

    Images are empty (0, 0, 0) if a file can't replace them.

    These are images with more than 8 bits, invalid pixels or extra inputs, images that can't be read and are skipped,
    and images whose label is not that of the source's `labels`.
    """

    def __init__(self, source: Source, samples: Samples) -> None:
        self.source = source
        self.samples = samples

    def __len__(self) -> int:
        return len(self.source)

    @errors.marked()
    def __getitem__(self, index: int) -> tuple[torch.Tensor, tuple[int, int]]:
        nothing = torch.empty(0, 0, 0, dtype=torch.uint8), (0, 0)
        try:
            with preserve_generators():
                item = self.samples.read(index)
                pixels = to_tensor(item.image)
                label = item.label
                is_listed = type(label) in (int, np.ndarray) and np.array_equal(label, self.source.labels[index])
                if pixels.dtype != torch.uint8 or item.inputs or item.valid is not None or not is_listed:
                    return nothing
                again = to_tensor(self.samples.read(index, epoch=1).image) if self.samples.runs_code else pixels
        except (BadImage, OSError) as error:
            self.samples.refuse(self.source.name(index), error, [])
            return nothing
        if not torch.equal(pixels, again):
            raise ValueError(
                f"`cache_images`: the dataset returns another image {self.source.name(index)} in each epoch, and all "
                f"epochs would have the first; give cache_images=false"
            )
        return pixels, large.stored_size(item.image)
