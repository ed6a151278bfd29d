"""What must hold around the updates of an epoch: each changes the state as a whole, or not at all."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mae import parallel
from mae.checkpoints.run_state import Progress
from mae.data.batches import prefetch
from mae.data.item import Batch
from mae.interrupts import Interrupted
from mae.training.log import NullLog
from mae.training.meters import Meters, Stopwatch
from mae.training.nonfinite import NonFiniteGuard, NonFiniteLoss
from mae.training.saver import NullSaver, Request

UPDATES_IN_FLIGHT = 4  # updates whose numbers are read later, so that the loop does not wait for the device


class Loader(Protocol):
    """Batches of an epoch, such as `loader.TrainLoader`."""

    images_per_iteration: int  # in the batches of all processes together
    num_images: int  # of the dataset, including repetitions

    def seek(self, epoch: int, first_iteration: int = 0) -> None:
        """Sets the epoch and the first batch of the next iteration over this object."""

    def seed_iteration(self, iteration: int) -> None:
        """Seeds the random numbers of a batch."""

    def counts(self) -> dict[str, int]:
        """Returns further entries of the last epoch in log.txt."""

    def image_names(self) -> bytes:
        """Returns the names of image files, each followed by a zero byte."""

    def __len__(self) -> int:
        """Returns the number of iterations of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of this process."""


class Transaction:
    """The context manager around the updates of an epoch: an update changes the state as a whole, or not at all.

    A forward pass changes the statistics of batch norm, which are restored if the update is skipped. If a batch raises
    an error, the state after the last update is saved. The processes share their losses and requests before the weights
    change.

    Args:
        model: the module whose gradients are averaged over the processes.
        batches: an epoch of them is a whole number of updates.
        device: of the losses.
        progress: the position of the run. An epoch that was interrupted starts after the last update of it.
        guard: handles updates with a loss or gradient that is not finite.
        accum_iter: iterations per update.
        after_update: called with the fractional epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Loader,
        device: torch.device,
        progress: Progress,
        log: NullLog,
        saver: NullSaver,
        guard: NonFiniteGuard,
        accum_iter: int,
        after_update: Callable[[float], None],
    ) -> None:
        self.model = model
        self.loader = batches
        self.device = device
        self.progress = progress
        self.log = log
        self.saver = saver
        self.guard = guard
        self.accum_iter = accum_iter
        self.after_update = after_update
        self.updates_per_epoch, rest = divmod(len(batches), accum_iter)
        assert not rest, "an epoch is a whole number of updates"

    def __enter__(self) -> "Transaction":
        self.meters = Meters(**self.progress.meters)  # sums of the epoch
        self.stopwatch = Stopwatch(self.device, self.meters.seconds)
        self.completed = self.progress.first_iteration // self.accum_iter  # updates of this epoch
        self.iteration = self.progress.first_iteration  # of this epoch
        self.pending = PendingUpdates(self.progress.epoch, self.meters, self.log, self.saver, self.guard)
        self.losses: dict[str, Tensor] = {}  # of the update
        self.shared = torch.zeros(0)  # as `share_requests` returns
        self.request = Request.NONE
        self.changing = [module for module in self.model.modules() if any(True for _ in module.buffers(recurse=False))]
        self.buffers: list[Tensor] = []  # copies from before the update
        self.is_changing = False  # the weights are between two updates
        return self

    @property
    def epoch(self) -> float:
        """The fractional epoch of the completed updates."""
        return self.progress.epoch + self.completed / self.updates_per_epoch

    def batches(self) -> Iterator[Any]:
        """Yields the batches of the rest of the epoch on the device, and then reads the numbers of the last updates."""
        self.loader.seek(self.progress.epoch, self.progress.first_iteration)
        self.log.begin_epoch(
            self.progress.epoch, self.progress.first_iteration, len(self.loader), self.loader.images_per_iteration,
            self.stopwatch,
        )  # fmt: skip
        yield from self.stopwatch.watch(prefetch(self.loader, self.device))
        request = self.pending.read(0, self.completed * self.accum_iter)  # it waits for the device
        self.stopwatch.stop()
        self.meters.seconds = self.stopwatch.all_seconds
        if request:
            self._save()

    def begin(self) -> None:
        """Begins an update."""
        self.losses = {}
        self.buffers = [buffer.clone() for buffer in self._buffers()]

    def seed(self) -> None:
        """Seeds the random numbers of the next iteration."""
        self.loader.seed_iteration(self.iteration)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Adds the parts of an iteration to the losses of the update."""
        self.losses |= {name: self.losses.get(name, 0) + part.detach() for name, part in parts.items()}
        self.iteration += 1

    def prepare(self) -> None:
        """Shares losses and requests with the other processes. If one of them has ended, this raises an error."""
        self.request = self.saver.request()
        self.shared = share_requests(torch.stack([*self.losses.values()]), self.request)
        self.is_changing = True

    def commit(self, grad_norm: Tensor, lr: float) -> None:
        """Completes an update after the optimizer step, and follows the requests of all processes.

        Args:
            grad_norm: () on the device; not finite if the weights did not change.
        """
        self._restore_buffers(~(grad_norm + self.shared[0]).isfinite())
        self.after_update(self.progress.epoch + (self.completed + 1) / self.updates_per_epoch)
        iterations = (self.completed + 1) * self.accum_iter
        self.pending.push(iterations, lr, [*self.losses], torch.cat([grad_norm[None], self.shared]))
        self.completed += 1
        self.is_changing = False
        self.buffers = []
        is_heard = self.request and parallel.world_size() == 1  # without the delay
        request = self.pending.read(0 if is_heard else UPDATES_IN_FLIGHT, iterations)
        if request:
            self._save()
        if request is Request.STOP:
            self.saver.stop()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, NonFiniteLoss | Interrupted):
            return  # no error, or the state is saved
        # For example a bad image, a killed worker process, or out of memory.
        self._restore_buffers(torch.ones((), dtype=torch.bool, device=self.device))
        if not self.is_changing and (self.progress.epoch or self.completed):
            self._save(only_this_rank=True)
        self.saver.raise_if_stopping(error)

    def _save(self, only_this_rank: bool = False) -> None:
        iterations = self.completed * self.accum_iter
        self.meters.seconds = self.stopwatch.all_seconds
        self.saver.save(self.progress.epoch, iterations, self.pending.drain(), only_this_rank)

    def _restore_buffers(self, is_skipped: Tensor) -> None:
        """Restores the buffers of a skipped update, which changes nothing. The decision () is on the device."""
        for buffer, value in zip(self._buffers() if self.buffers else (), self.buffers, strict=True):
            buffer.copy_(torch.where(is_skipped, value, buffer))

    def _buffers(self) -> Iterator[Tensor]:
        """Yields the buffers of the model. A search through all modules in every update takes 150 µs."""
        for module in self.changing:
            yield from module.buffers(recurse=False)


def share_requests(losses: Tensor, request: Request) -> Tensor:
    """Averages the losses (n,) of an update over the processes, and shares their requests in the same operation.

    It precedes the optimizer step. If a process has ended, this raises an error before the weights change.

    Returns:
        (n + len(Request),): the mean losses, and for each request the fraction of processes that make it.
    """
    return parallel.mean_over_processes(torch.cat([losses, _one_hot_requests(losses.device)[request]]))


@cache
def _one_hot_requests(device: torch.device) -> Tensor:
    """Returns a matrix whose row r encodes request r. It is cached, and not created in every update."""
    return torch.eye(len(Request), device=device)


class PendingUpdates:
    """Losses, gradient norms and requests that are copied from the device and read some updates later."""

    def __init__(self, epoch: int, meters: Meters, log: NullLog, saver: NullSaver, guard: NonFiniteGuard) -> None:
        self.epoch = epoch
        self.meters = meters
        self.log = log
        self.saver = saver
        self.guard = guard
        self.queue: deque[tuple[int, float, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, iterations: int, lr: float, names: list[str], values: Tensor) -> None:
        """Starts the copy of the gradient norm, the losses and the requests of an update to the host.

        Args:
            iterations: number of iterations of the epoch, up to the end of the update.
            names: "loss", and the names of its terms.
        """
        copied = None
        if values.is_cuda:
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # waiting for it takes no core from the worker processes
            copied.record()
        self.queue.append((iterations, lr, names, values, copied))

    def read(self, max_pending: int, iterations: int) -> Request:
        """Logs the oldest updates until `max_pending` remain, and returns the greatest request among them.

        If there is a request, no update remains, so that the guard has seen all updates of a state that is saved.

        Args:
            iterations: number of iterations of the epoch whose gradients are in the weights.
        """
        shared_request = Request.NONE
        while len(self.queue) > (0 if shared_request else max_pending):
            batch = self.queue[0][0] - 1
            lr = self.queue[0][1]
            grad_norm, loss, *shares = self._pop()
            shared_request = max(shared_request, *(request for request in Request if shares[request] > 0))
            if not self.guard.accepts(loss, grad_norm):
                what = f"epoch {self.epoch}, batch {batch}: loss {loss}, gradient norm {grad_norm}, lr {lr:.3g}"
                self.guard.react(what, lambda: self.saver.save_emergency(self.epoch, iterations, self.drain()))
        return shared_request

    def drain(self) -> dict[str, Any]:
        """Logs all updates, and returns the sums of the epoch. A resumed run does not log these updates again."""
        while self.queue:
            self._pop()
        self.log.flush()
        return self.meters.state_dict()

    def _pop(self) -> list[float]:
        iterations, lr, names, values, copied = self.queue.popleft()
        if copied is not None:
            copied.synchronize()
        grad_norm, *numbers = values.tolist()
        losses = dict(zip(names, numbers, strict=False))
        shares = numbers[len(names) :]
        loss = losses.pop("loss")
        self.meters.add(loss, grad_norm, lr, losses)
        self.log.update(iterations, lr, loss, grad_norm, losses)
        return [grad_norm, loss, *shares]


@contextmanager
def saved_if_it_raises(saver: NullSaver, epoch: int, iterations: int, meters: Meters) -> Iterator[None]:
    """The context manager after the updates of an epoch: an error leaves its state, and the resumed run evaluates it.

    For example, an image of the evaluation can't be read.
    """
    try:
        yield
    except Interrupted:  # the state was saved before the evaluation
        raise
    except Exception as error:
        saver.save(epoch, iterations, meters.state_dict(), only_this_rank=True)
        saver.raise_if_stopping(error)
        raise
