"""Shared memory, through which worker processes send batches.

PyTorch moves a tensor into shared memory in a thread of the worker process that sends it. If the memory is full, the
thread prints the error, and the training process waits for ever. Here, the tensors of a batch are moved before they are
sent, so that the error reaches the training process.
"""

import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

PLACE = Path("/dev/shm")  # of Linux; containers limit it, Docker's default is 64 MB
SEMAPHORES = 8  # of the queues of a worker process; each takes a page


class Shared:
    """A function of `collate_fn` whose tensors are moved into shared memory if it runs in a worker process."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        if get_worker_info():
            for tensor in _tensors(batch):
                tensor.share_memory_()
        return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield from [batch] if batch.numel() else []
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def require_space(num_workers: int) -> None:
    """Raises OSError if the queues of the worker processes do not fit into the shared memory."""
    if PLACE.is_dir() and shutil.disk_usage(PLACE).free < SEMAPHORES * (1 + num_workers) * mmap.PAGESIZE:
        raise full(num_workers)


def is_full(error: Exception) -> bool:
    """Whether the shared memory was too small for a batch; the error may be of a worker process."""
    text = str(error)
    return ("shared memory" in text and "No space left" in text) or "Bus error" in text


def full(num_workers: int) -> OSError:
    """Returns an error that names the shared memory and the remedies."""
    size = f" ({shutil.disk_usage(PLACE).total / 1e6:,.1f} MB)" if PLACE.is_dir() else ""
    return OSError(
        f"/dev/shm is full{size}, and {num_workers} worker process(es) send batches through it: give --num_workers 0, "
        f"or more shared memory (docker run --shm-size 8g)"
    )
