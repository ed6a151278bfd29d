"""What must hold around the updates of an epoch: each changes the state as a whole, or not at all."""

from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mae import parallel
from mae.interrupts import Interrupted
from mae.training.meters import Stopwatch
from mae.training.nonfinite import NonFiniteLoss
from mae.training.saver import Request

if TYPE_CHECKING:
    from mae.training.loop import EpochOptions

UPDATES_IN_FLIGHT = 4  # updates whose numbers are read later, so that the loop does not wait for the device


class Transaction:
    """The context manager around the updates of an epoch: an update changes the state as a whole, or not at all.

    A forward pass changes the statistics of batch norm, which are restored if the update is skipped. If a batch raises
    an error, the state after the last update is saved. The processes share their losses and requests before the weights
    change.
    """

    def __init__(self, model: nn.Module, options: "EpochOptions") -> None:
        self.model, self.options = model, options
        self.completed = options.first_iteration // options.accum_iter  # updates of this epoch
        self.pending = PendingUpdates(options)
        self.losses: dict[str, Tensor] = {}  # of the update
        self.shared = torch.zeros(0)  # as `share_requests` returns
        self.request = Request.NONE
        self.buffers: list[Tensor] = []  # copies from before the update
        self.is_changing = False  # the weights are between two updates

    def begin(self) -> None:
        """Begins an update."""
        self.losses, self.buffers = {}, [buffer.clone() for buffer in self.model.buffers()]

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Adds the parts of an iteration to the losses of the update."""
        self.losses |= {name: self.losses.get(name, 0) + part for name, part in parts.items()}

    def prepare(self) -> None:
        """Shares losses and requests with the other processes. If one of them has ended, this raises an error."""
        self.request = self.options.saver.request()
        self.shared = share_requests(torch.stack([*self.losses.values()]), self.request)
        self.is_changing = True

    def commit(self, grad_norm: Tensor, lr: float, epoch: float) -> None:
        """Completes an update after the optimizer step, and follows the requests of all processes.

        Args:
            grad_norm: () on the device; not finite if the weights did not change.
            epoch: the fractional epoch after the update.
        """
        self._restore_buffers(~(grad_norm + self.shared[0]).isfinite())
        self.options.after_update(epoch)
        iterations = (self.completed + 1) * self.options.accum_iter
        self.pending.push(iterations, lr, [*self.losses], torch.cat([grad_norm[None], self.shared]))
        self.completed, self.is_changing, self.buffers = self.completed + 1, False, []
        is_heard = self.request and parallel.world_size() == 1  # without the delay
        request = self.pending.read(0 if is_heard else UPDATES_IN_FLIGHT, iterations)
        if request:
            self._save()
        if request is Request.STOP:
            self.options.saver.stop()

    def finish(self, stopwatch: Stopwatch) -> None:
        """Reads the numbers of the last updates, for which it waits, and ends the measurement of the time."""
        request = self.pending.read(0, self.completed * self.options.accum_iter)
        stopwatch.stop()
        if request:
            self._save()

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, NonFiniteLoss | Interrupted):
            return  # no error, or the state is saved
        # For example a bad image, a killed worker process, or out of memory.
        self._restore_buffers(torch.ones((), dtype=torch.bool, device=self.options.precision.device))
        if not self.is_changing and (self.options.epoch or self.completed):
            self._save(alone=True)
        self.options.saver.raise_if_stopping(error)

    def _save(self, alone: bool = False) -> None:
        iterations = self.completed * self.options.accum_iter
        self.options.saver.save(self.options.epoch, iterations, self.pending.drain(), alone)

    def _restore_buffers(self, is_skipped: Tensor) -> None:
        """Restores the buffers of a skipped update, which changes nothing. The decision () is on the device."""
        for buffer, value in zip(self.model.buffers() if self.buffers else (), self.buffers, strict=True):
            buffer.copy_(torch.where(is_skipped, value, buffer))


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

    def __init__(self, options: "EpochOptions") -> None:
        self.options = options
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
            batch, lr = self.queue[0][0] - 1, self.queue[0][1]
            grad_norm, loss, *shares = self._pop()
            shared_request = max(shared_request, *(request for request in Request if shares[request] > 0))
            if not self.options.guard.accepts(loss, grad_norm):
                place = f"epoch {self.options.epoch}, batch {batch}"
                what = f"{place}: loss {loss}, gradient norm {grad_norm}, lr {lr:.3g}"
                self.options.guard.react(
                    what, lambda: self.options.saver.save_emergency(self.options.epoch, iterations, self.drain())
                )
        return shared_request

    def drain(self) -> dict[str, Any]:
        """Logs all updates, and returns the sums of the epoch. A resumed run does not log these updates again."""
        while self.queue:
            self._pop()
        self.options.log.flush()
        return self.options.meters.state_dict()

    def _pop(self) -> list[float]:
        iterations, lr, names, values, copied = self.queue.popleft()
        if copied is not None:
            copied.synchronize()
        grad_norm, *numbers = values.tolist()
        losses, shares = dict(zip(names, numbers, strict=False)), numbers[len(names) :]
        loss = losses.pop("loss")
        self.options.meters.add(loss, grad_norm, lr, losses)
        self.options.log.update(iterations, lr, loss, grad_norm, losses)
        return [grad_norm, loss, *shares]
