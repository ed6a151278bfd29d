"""Data loaders whose worker processes send batches through shared memory.

PyTorch moves a tensor into shared memory in a thread of the worker process that sends it. If the memory is full, the
thread prints the error, and the training process waits for ever. Here, the tensors of a batch are moved before they are
sent, so that the error reaches the training process.
"""

import logging
import mmap
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mae import interrupts, parallel
from mae.plurals import counted
from mae.settings.choices import DEFAULT_WORKERS

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")  # of Linux; containers limit it, Docker's default is 64 MB
SEMAPHORES = 8  # of the queues of a worker process; each takes a page


def _shared(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """Collates samples to a batch, whose tensors are moved into shared memory in a worker process."""
    batch = collate(samples)
    if get_worker_info():
        for tensor in tensors_of(batch):
            tensor.share_memory_()
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors in a batch that are not empty."""
    if isinstance(batch, Tensor):
        yield from [batch] if batch.numel() else []
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(part)


def to_device(batch: Any, device: torch.device) -> Any:
    """Copies the tensors of a batch to the device: a tensor, None, or a dict, list or named tuple of batches."""
    if batch is None:
        return None
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    parts = [to_device(part, device) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else parts


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns one stream for all epochs, because the allocator does not share memory between streams."""
    return torch.cuda.Stream(device)


def prefetch(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yields batches on the device. On CUDA, each batch is copied during the previous iteration."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream = _copying_stream(device)
    queue = deque[tuple[Any, torch.cuda.Event]]()

    def next_batch() -> Any:
        batch, event = queue.popleft()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(event)
        for tensor in tensors_of(batch):
            tensor.record_stream(computing)  # it was allocated on the other stream
        return batch

    for batch in batches:
        with torch.cuda.stream(stream):
            queue.append((to_device(batch, device), stream.record_event()))
        if len(queue) > 1:
            yield next_batch()
    if queue:
        yield next_batch()


def to_host(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields tensors on the host. Those on CUDA are yielded after the next one is launched, so that the device computes
    it meanwhile.
    """
    queue = deque[tuple[Tensor, torch.cuda.Event]]()

    def oldest() -> Tensor:
        copy, event = queue.popleft()
        event.synchronize()
        return copy

    for tensor in tensors:
        if not tensor.is_cuda:
            yield tensor
            continue
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # waiting for it takes no core from the worker processes
        queue.append((copy, torch.cuda.current_stream(tensor.device).record_event(event)))
        if len(queue) > 1:
            yield oldest()
    if queue:
        yield oldest()


def require_space(num_workers: int) -> None:
    """Raises OSError if the queues of the worker processes do not fit into the shared memory."""
    if SHM.is_dir() and shutil.disk_usage(SHM).free < SEMAPHORES * (1 + num_workers) * mmap.PAGESIZE:
        raise _full(num_workers)


def _full(num_workers: int) -> OSError:
    """Returns an error that names the shared memory and the remedies."""
    size = f" ({shutil.disk_usage(SHM).total / 1e6:,.1f} MB)" if SHM.is_dir() else ""
    return OSError(
        f"/dev/shm is full{size}, and the batches of {counted(num_workers, 'worker process')} pass it: give fewer "
        f"`num_workers` (0 sends none), or more shared memory (docker run --shm-size 8g)"
    )


class Batches(DataLoader):
    """A data loader whose worker processes ignore the signals that stop a run, and which raises errors between updates.

    Worker processes send batches through shared memory, also if it is too small for them: the loader raises an error.

    If a worker process dies, PyTorch raises an error from a signal handler, at any time: also between an update of the
    weights and its bookkeeping. This class installs that handler only while it waits for a batch.

    Raises (while iterating):
        RuntimeError: a worker process was killed.
        OSError: the shared memory is full.
    """

    _raise_if_dead: Any = staticmethod(lambda *_: None)  # PyTorch's handler of SIGCHLD, installed once per process

    def __init__(self, dataset: Any, num_workers: int, **options: Any) -> None:
        prepare = partial(interrupts.ignore_from_others, os.getpid())
        collate = partial(_shared, options.pop("collate_fn"))
        super().__init__(dataset, num_workers=num_workers, worker_init_fn=prepare, collate_fn=collate, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers:
            require_space(self.num_workers)
        try:
            yield from self._batches()
        except RuntimeError as error:
            text = str(error)  # may be of a worker process
            if ("shared memory" in text and "No space left" in text) or "Bus error" in text:
                raise _full(self.num_workers) from error
            raise

    def _batches(self) -> Iterator[Any]:
        with interrupts.blocked():
            iterator = super().__iter__()
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            yield from iterator
            return
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if callable(handler):
            Batches._raise_if_dead = staticmethod(handler)
        while True:
            signal.signal(signal.SIGCHLD, self._raise_if_dead)
            try:
                self._raise_if_dead(signal.SIGCHLD, None)
                batch = next(iterator)
            except StopIteration:
                return
            except (EOFError, ConnectionError) as error:
                if "Original Traceback" in str(error):  # raised in a worker process by a file
                    raise
                raise RuntimeError("DataLoader worker was killed while it sent a batch") from error
            finally:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield batch


def up_to_cores(num_workers: int) -> int:
    """Limits the number of worker processes to this process's share of the cores."""
    cores = parallel.cores_of_process()
    if num_workers > cores and num_workers != DEFAULT_WORKERS:  # the default is reduced silently
        _notice_cores(num_workers, cores)
    return min(num_workers, cores)


@cache  # once per process, not once per loader
def _notice_cores(num_workers: int, cores: int) -> None:
    logger.info(f"num_workers={num_workers}: this process has {cores} CPU cores and uses {cores} worker processes")
