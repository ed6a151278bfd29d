"""Features of a frozen encoder, in memory or in a file. The computation of a file resumes after an interruption."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mae import parallel
from mae.data.batches import prefetch, to_host
from mae.data.item import Batch
from mae.data.labels import Subset
from mae.data.sampler import Epochs
from mae.data.source import Source
from mae.files import atomic, locks
from mae.settings.arguments import changes
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

NOTE = "done.json"  # the progress
SAVE_EVERY = 20  # batches between updates of the progress


class FeatureBatches(Epochs):
    """Batches of stored features for a `loop.Trainer`, with the interface of `TrainLoader`.

    Every process has the features of its part of the images, and permutes them by (seed, epoch, rank). The images of an
    update therefore depend on the number of processes, and a run resumes within an epoch with the same number only.

    Args:
        features: (n, D) or tokens (n, N, D); n differs by at most one between processes.
        labels: (n,).

    Raises:
        ValueError: the features do not fill one effective batch.
    """

    def __init__(self, features: Tensor, labels: Tensor, batch_size: int, seed: int, accum_iter: int = 1) -> None:
        super().__init__(sum(parallel.gather(len(labels))), batch_size, seed, accum_iter)
        self.features = features
        self.labels = labels

    def __iter__(self) -> Iterator[Batch]:
        order = torch.from_numpy(
            np.random.default_rng([self.seed, self.epoch, parallel.rank()]).permutation(len(self.labels))
        )
        for iteration in range(self.first_iteration, self.num_batches):
            mine = order[iteration * self.batch_size : (iteration + 1) * self.batch_size]
            yield Batch(self.features[mine], self.labels[mine], noise=mine)

    def seed_iteration(self, iteration: int) -> None:
        """Does nothing: features are not augmented."""

    def counts(self) -> dict[str, int]:
        """Returns no counts: no images are read."""
        return {}

    def image_names(self) -> bytes:
        """Returns no names: a resumed run compares the `fingerprint`."""
        return b""


@torch.no_grad()  # not inference mode: a head can't be trained on its tensors
def encode(
    forward: Callable[..., Tensor],
    batches: Iterable[Sequence[Any]],
    *,
    normalize: Callable[[Tensor], Tensor],
    precision: Precision,
) -> Iterator[Batch]:
    """Replaces the images in batches by their features, in fp32, on the device.

    Args:
        forward: normalized images (B, c, H, W), and extra inputs by name -> features (B, ...).
    """
    for loaded in prefetch(batches, precision.device):
        batch = Batch(*loaded)
        with precision.autocast():
            features = forward(batch.normalized(normalize), **batch.inputs).float()
        yield Batch(features, batch.labels, noise=batch.noise)


def extract(
    encode_rest: Callable[[Source], Iterable[Batch]],
    source: Source,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Computes the features (n, ...) of the images of this process, and returns them with their labels (n, ...).

    Args:
        encode_rest: returns the batches of `encode` for a dataset, or for the rest of it after an interruption,
            distributed over the processes as in `loader.eval_loader`.
        folder: folder of a file, which is mapped into memory, and of its progress. If it exists with the same settings,
            the computation is resumed. None: the features are in memory, which never contains them twice.
        settings: plain values on which the features depend, for a file.
        dtype: type of the features.

    Raises:
        OSError: the disk is full. The same call resumes the computation.
        ValueError: another process computes the features.
    """
    labels = np.asarray(source.labels)[parallel.rank() :: parallel.world_size()]

    def compute_from(done: int) -> Iterator[np.ndarray]:
        rest = Subset(source, np.arange(done * parallel.world_size(), len(source)))
        bar = tqdm(total=len(labels), initial=done, desc="features", unit="image", leave=False, disable=None)
        for features in to_host(features.to(dtype) for features, *_ in encode_rest(rest)):
            yield features.numpy()
            bar.update(len(features))

    stored = torch.empty(0, dtype=dtype).numpy()
    done = 0
    if folder:
        with locks.locked(folder):
            stored = _write(folder, dict(settings or {}), len(labels), compute_from, stored.dtype)
    else:
        for features in compute_from(0):
            stored = stored if done else np.empty((len(labels), *features.shape[1:]), stored.dtype)
            stored[done : (done := done + len(features))] = features
        assert done == len(labels)
    shape = max(parallel.gather(stored.shape[1:]), key=len)  # of other processes, if this one has no images
    return torch.from_numpy(stored).view(len(labels), *shape), torch.from_numpy(labels)


def _write(
    folder: Path,
    settings: dict[str, Any],
    count: int,
    compute_from: Callable[[int], Iterable[np.ndarray]],
    dtype: np.dtype,
) -> np.ndarray:
    """Computes features (count, ...), appends them to a file, and maps the file into memory.

    Args:
        compute_from: returns the features of the images from a number on, in batches (B, ...).
    """
    rows = folder / f"features.f{8 * dtype.itemsize}"
    done, shape = _progress(folder, rows, settings, dtype.itemsize)
    if done:
        logger.info(f"resuming after {done:,} of {count:,} images")
    with atomic.writing(folder):
        if not done:
            (folder / NOTE).unlink(missing_ok=True)  # of other settings
        file = rows.open("ab", buffering=0)  # not mapped: a full disk would abort the process
        file.truncate(dtype.itemsize * done * math.prod(shape))  # removes features that the progress does not count
    with file:
        for number, features in enumerate(compute_from(done) if done < count else [], start=1):
            shape = list(features.shape[1:])
            done = done + len(features)
            with atomic.writing(folder):
                left = memoryview(features.astype(dtype, copy=False).tobytes())
                while left:
                    left = left[file.write(left) :]
                if number % SAVE_EVERY == 0 or done == count:
                    os.fsync(file.fileno())
                    atomic.write_text(folder / NOTE, json.dumps({"settings": settings, "done": done, "shape": shape}))
    # A shared mapping that may be written to: torch warns of others, and a private one would count as used memory.
    return np.memmap(rows, dtype, "r+", shape=(done, *shape)) if done else np.empty(0, dtype)


def _progress(folder: Path, rows: Path, settings: dict[str, Any], size: int) -> tuple[int, list[int]]:
    """Returns the number of stored images, and the shape of the features of an image."""
    if not (folder / NOTE).exists():
        return 0, []
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        stored = note["settings"]
        done = int(note["done"])
        shape = list(note["shape"])
        complete = rows.stat().st_size >= size * done * math.prod(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        stored = {}
        done = 0
        shape = []
        complete = False
    if complete and stored == settings:
        return done, shape
    reason = changes(stored, settings) if complete else "damaged"
    logger.warning(f"{folder} can't be resumed ({reason}): starting from the beginning")
    return 0, []
