"""The training loop. All engines use it, and add the loss of a batch."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util import dist
from util.data.batches import tensors_of
from util.data.loader import FeatureBatches, TrainLoader
from util.interrupts import Interrupted
from util.training.meters import Meters, Stopwatch
from util.training.nonfinite import NonFiniteGuard, NonFiniteLoss
from util.training.precision import Precision, require_found_inf
from util.training.run_log import NullLog
from util.training.saver import NullSaver, Request

Loader = TrainLoader | FeatureBatches
UPDATES_IN_FLIGHT = 4  # updates whose numbers are read later, so that the loop does not wait for the device


class Callback(Protocol):  # not a subclass of Stateful: isinstance checks of torch.distributed.checkpoint would fail
    """Runs after every update, in every process. Checkpoints contain its state, and a resumed run restores it.

    The state is a dict of tensors and plain values. The state of rank 0 is saved. A method `after_epoch(model, epoch,
    log)` is optional. It is called after every epoch and its evaluation, and returns new entries of log.txt. Those
    whose names start with test_ are also in TensorBoard. A run that stops meanwhile repeats the call, which must not
    change the state.
    """

    def after_update(self, model: nn.Module, epoch: float) -> None:
        """Called after the optimizer step; `epoch` is fractional: 1.5 is the middle of the second epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint contains."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""


@dataclass(frozen=True)
class EpochOptions:
    """Arguments of `run_epoch` that do not depend on the engine."""

    epoch: int
    schedule: Callable[[float], float]  # sets the learning rate for a fractional epoch, and returns it
    precision: Precision
    guard: NonFiniteGuard  # handles updates with a loss or gradient that is not finite
    log: NullLog
    saver: NullSaver
    meters: Meters = field(default_factory=Meters)  # sums of the epoch; `run_epoch` adds to them
    first_iteration: int = 0  # iterations of this epoch that an earlier run completed; a multiple of `accum_iter`
    accum_iter: int = 1  # iterations per update; divides the iterations of an epoch
    clip_grad: float | None = None  # maximum global norm of the gradient
    after_update: Callable[[float], None] = lambda epoch: None  # called with the fractional epoch


def run_epoch(
    compute_loss: Callable[[Any], Tensor], model: nn.Module, loader: Loader, optimizer: Optimizer, options: EpochOptions
) -> None:
    """Trains for an epoch, or for the rest of an epoch. It waits for the device only to save a state.

    Args:
        compute_loss: returns the loss () of a batch on the device.
        model: the module whose gradients are averaged over the processes.
        loader: the batches.
        optimizer: supports `found_inf`, as fused optimizers do.

    Raises:
        ValueError: the optimizer does not support `found_inf`.
        NonFiniteLoss: `options.guard` ends the run. The non-finite updates did not change the weights.
        Interrupted: a signal stopped the run, and its state is saved.
    """
    require_found_inf(optimizer)
    epoch, accum_iter, precision, saver = options.epoch, options.accum_iter, options.precision, options.saver
    num_iterations = len(loader)
    num_updates, rest = divmod(num_iterations, accum_iter)
    assert not rest, "an epoch is a whole number of updates"
    updates = options.first_iteration // accum_iter  # completed optimizer steps of this epoch
    in_optimizer_step = False
    buffers: list[Tensor] = []  # copies from before the update: a forward pass changes the statistics of batch norm
    stopwatch, pending = Stopwatch(), PendingUpdates(options)
    zero = torch.zeros((), device=precision.device)
    model.train()

    def save(alone: bool = False) -> None:
        saver.save(epoch, updates * accum_iter, pending.drain(), alone)

    try:
        loader.seek(epoch, options.first_iteration)
        options.log.begin_epoch(epoch, options.first_iteration, num_iterations, loader.images_per_iteration, stopwatch)
        batches = prefetch(stopwatch.watch(loader), precision.device)
        for iteration, batch in enumerate(batches, start=options.first_iteration):
            if iteration % accum_iter == 0:
                lr = options.schedule(epoch + updates / num_updates)
                loss, buffers = zero, [buffer.clone() for buffer in model.buffers()]
            loader.seed_iteration(iteration)
            is_last = (iteration + 1) % accum_iter == 0
            loss = loss + _forward_backward(compute_loss, batch, accum_iter, model, precision, is_last)
            if not is_last:
                continue
            request = saver.request()
            mean_loss_and_requests = share_requests(loss, request)
            in_optimizer_step = True  # the weights are between two updates
            grad_norm = precision.step(optimizer, options.clip_grad)
            _restore_buffers(model, buffers, ~(grad_norm + mean_loss_and_requests[0]).isfinite())
            options.after_update(epoch + (updates + 1) / num_updates)
            pending.push(iteration + 1, lr, torch.cat([grad_norm[None], mean_loss_and_requests]))
            updates, in_optimizer_step, buffers = updates + 1, False, []
            is_heard = request and dist.world_size() == 1  # without the delay
            shared_request = pending.read(0 if is_heard else UPDATES_IN_FLIGHT, iteration + 1)
            if shared_request:
                save()
            if shared_request is Request.STOP:
                saver.stop()
        stopwatch.stop()
        if pending.read(0, num_iterations):
            save()
    except (NonFiniteLoss, Interrupted):  # the state is saved
        raise
    except Exception as error:  # for example a bad image, a killed worker process, or out of memory
        _restore_buffers(model, buffers, torch.ones_like(zero, dtype=torch.bool))
        if not in_optimizer_step and (epoch or updates):
            save(alone=True)
        saver.raise_if_stopping(error)
        raise


def _restore_buffers(model: nn.Module, before: list[Tensor], is_skipped: Tensor) -> None:
    """Restores the buffers of a skipped update, which changes nothing. The decision () is on the device."""
    for buffer, value in zip(model.buffers() if before else (), before, strict=True):
        buffer.copy_(torch.where(is_skipped, value, buffer))


def share_requests(loss: Tensor, request: Request) -> Tensor:
    """Averages the loss of an update over the processes, and shares their requests in the same collective operation.

    It precedes the optimizer step. If a process has ended, this raises an error before the weights change.

    Returns:
        (1 + len(Request),): the mean loss, and for each request the fraction of processes that make it.
    """
    return dist.mean_over_processes(torch.cat([loss[None], _one_hot_requests(loss.device)[request]]))


@cache
def _one_hot_requests(device: torch.device) -> Tensor:
    """Returns a matrix whose row r encodes request r. It is cached, and not created in every update."""
    return torch.eye(len(Request), device=device)


def _forward_backward(
    compute_loss: Callable[[Any], Tensor],
    batch: Any,
    accum_iter: int,
    model: nn.Module,
    precision: Precision,
    is_last: bool,
) -> Tensor:
    """Runs an iteration, and returns its part of the loss of the update.

    The last iteration of an update averages the gradients over the processes.

    Raises:
        TypeError: the loss is not a tensor of shape ().
        ValueError: there are several processes, and a trained parameter has no gradient.
    """
    with dist.gradient_sync(model, enabled=is_last):
        with precision.autocast():
            loss = compute_loss(batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            kind = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the loss of a batch is a {kind}; return a tensor of shape (), such as loss.mean()")
        loss = loss / accum_iter
        precision.backward(loss)
    if is_last:
        dist.require_gradients(model)
    return loss.detach()


def to_device(batch: Any, device: torch.device) -> Any:
    """Copies the tensors of a batch to the device: a tensor, or a dict, list or named tuple of batches."""
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


def prefetch(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yields batches on the device. On CUDA, each batch is copied during the previous iteration."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream, queue = _copying_stream(device), deque[tuple[Any, torch.cuda.Event]]()

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


class PendingUpdates:
    """Losses, gradient norms and requests that are copied from the device and read some updates later."""

    def __init__(self, options: EpochOptions) -> None:
        self.options = options
        self.queue: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, iterations: int, lr: float, values: Tensor) -> None:
        """Starts the copy of the gradient norm, the loss and the requests of an update to the host.

        Args:
            iterations: number of iterations of the epoch, up to the end of the update.
        """
        copied = None
        if values.is_cuda:
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.queue.append((iterations, lr, values, copied))

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
                self.options.guard.react(what, lambda: self._save_emergency(iterations))
        return shared_request

    def drain(self) -> dict[str, Any]:
        """Logs all updates, and returns the sums of the epoch. A resumed run does not log these updates again."""
        while self.queue:
            self._pop()
        self.options.log.flush()
        return self.options.meters.state_dict()

    def _pop(self) -> list[float]:
        iterations, lr, values, copied = self.queue.popleft()
        if copied is not None:
            copied.synchronize()
        grad_norm, loss, *shares = values.tolist()
        self.options.meters.add(loss, grad_norm, lr)
        self.options.log.update(iterations, lr, loss, grad_norm)
        return [grad_norm, loss, *shares]

    def _save_emergency(self, iterations: int) -> str:
        return self.options.saver.save_emergency(self.options.epoch, iterations, self.drain())
