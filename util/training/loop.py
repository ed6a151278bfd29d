"""The training loop. There is one; engines bring what a batch computes."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util import dist
from util.interrupts import Interrupted
from util.training.precision import Precision
from util.training.run_log import Meters, NullLog, Stopwatch

logger = logging.getLogger(__name__)

STEPS_LATE = 4  # how long a step's numbers travel to the host; by then the device has them, and nobody waits
MAX_SKIPS_IN_A_ROW = 20
WITHIN_UPDATE = -1  # in place of a count of batches: the optimizer is changing the weights


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient was infinite or not a number, and the run was told to stop on it."""


class Wish(IntEnum):
    """What a process wants to happen between two steps; the greatest wish of all processes counts."""

    NOTHING, SAVE, STOP = range(3)


class BetweenSteps(Protocol):
    """What must happen between two steps; `saver.Saver` does it, `saver.NullSaver` on processes without files."""

    def wish(self) -> Wish:
        """What this process wants, asked after every step."""

    def save(self, epoch: int, steps_done: int, meters: dict[str, Any], alone: bool = False) -> None:
        """Saves the state after so many batches of an epoch; `alone` if other processes may not do so."""

    def stop(self) -> None:
        """Ends the run, in all processes, once the state is on the disk."""

    def save_emergency(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> str:
        """Saves the state under a name of its own, which it returns, before the run ends on an error."""

    def raise_if_stopping(self, error: Exception) -> None:
        """Raises `Interrupted` in place of an error that came after a signal."""


class Loader(Protocol):
    """Batches of an epoch, or the rest of one; `loader.TrainLoader` gives them."""

    @property
    def images_per_step(self) -> int:
        """Images in the batches of all processes together."""

    def seek(self, epoch: int, first_step: int) -> None:
        """Chooses what the next iteration yields."""

    def seed_step(self, step: int) -> None:
        """Seeds what is drawn for that batch of the epoch as a whole."""

    def __len__(self) -> int:
        """Batches of a whole epoch."""

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Step:
    """An optimizer step whose loss and gradient norm are still on their way to the host."""

    done: int  # batches of the epoch, with this step's
    lr: float


def run_epoch(
    compute_loss: Callable[[Any], Tensor],
    model: nn.Module,
    loader: Loader,
    optimizer: Optimizer,
    *,
    epoch: int,
    schedule: Callable[[float], float],
    precision: Precision,
    guard: "NonFiniteGuard",
    first_step: int = 0,
    accum_iter: int = 1,
    clip_grad: float | None = None,
    meters: Meters,
    log: NullLog,
    saver: BetweenSteps,
) -> None:
    """Trains for an epoch, or the rest of one. No step waits for the device; saving a state does.

    Args:
        compute_loss: a batch, on the device, to its loss.
        loader: can start in the middle of an epoch.
        schedule: sets the learning rate for a fractional epoch and returns it.
        guard: decides what steps mean whose loss or gradient is not finite.
        first_step: batches of this epoch that an earlier run has done; a multiple of `accum_iter`.
        accum_iter: batches of an update, which divides the epoch's batches.
        saver: what it wishes in one process, happens in all after the same step.
        meters: the epoch's sums so far, added to.

    Raises:
        NonFiniteLoss: as the guard decides. The weights are those of before the bad steps.
    """
    num_steps = len(loader)
    num_updates, rest = divmod(num_steps, accum_iter)
    assert not rest, "an epoch is a whole number of updates"
    watch = Stopwatch()
    pending = PendingSteps(epoch, meters, log, guard, saver)
    wishes = torch.eye(len(Wish), device=precision.device)
    model.train()

    def save(done: int, alone: bool = False) -> None:
        saver.save(epoch, done, pending.meters_with_all().state_dict(), alone)

    group_loss = zero = torch.zeros((), device=precision.device)
    whole = first_step  # batches whose gradients are in the weights
    buffers: list[Tensor] = []  # before the update that is under way: a forward pass changes batch norm's statistics
    try:
        loader.seek(epoch, first_step)
        log.begin_epoch(epoch, first_step, num_steps, loader.images_per_step, watch)
        for done, batch in enumerate(prefetch(watch.watch(loader), precision.device), start=first_step + 1):
            if (done - 1) % accum_iter == 0:
                lr = schedule(epoch + (done - 1) // accum_iter / num_updates)
                buffers = [buffer.clone() for buffer in model.buffers()]
            loader.seed_step(done - 1)
            is_last = done % accum_iter == 0
            group_loss = group_loss + _iterate(compute_loss, batch, accum_iter, model, precision, is_last)
            if not is_last:
                continue
            wish = saver.wish()
            # Before the weights change: a process that finds another gone still has the state of whole updates.
            agreed_on = dist.mean_over_processes(torch.cat([group_loss[None], wishes[wish]]))
            whole = WITHIN_UPDATE
            grad_norm = precision.step(optimizer, clip_grad)
            pending.push(Step(done, lr), torch.cat([grad_norm[None], agreed_on]))
            whole, buffers, group_loss = done, [], zero
            agreed = pending.read(STEPS_LATE, done)
            if dist.world_size() == 1:
                agreed = wish  # one process need not wait for an agreement
            if agreed:
                save(done)
            if agreed is Wish.STOP:
                saver.stop()
        watch.stop()
        if pending.read(0, num_steps) and dist.world_size() > 1:
            save(num_steps)
    except (NonFiniteLoss, Interrupted):  # they have saved
        raise
    except Exception as error:  # a bad image, a worker process that was killed, no memory: no update is lost by it
        for buffer, before in zip(model.buffers(), buffers, strict=False):
            buffer.copy_(before)
        if whole != WITHIN_UPDATE and (epoch or whole):
            save(whole, alone=True)
        saver.raise_if_stopping(error)
        raise


def _iterate(
    compute_loss: Callable[[Any], Tensor],
    batch: Any,
    accum_iter: int,
    model: nn.Module,
    precision: Precision,
    is_last: bool,
) -> Tensor:
    """A forward and backward pass; returns its part of the update's loss. The last one of an update averages the
    gradients over the processes."""
    with dist.gradient_sync(model, enabled=is_last):
        with precision.autocast():
            loss = compute_loss(batch) / accum_iter
        precision.backward(loss)
    return loss.detach()


def to_device(batch: list[Tensor], device: torch.device) -> list[Tensor]:
    """A batch of tensors on the device."""
    return [part.to(device, non_blocking=True) for part in batch]


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


def prefetch(batches: Iterator[list[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Batches on the device. On CUDA each is copied there while the step before it is computed."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream, coming = _copying_stream(device), deque[tuple[list[Tensor], torch.cuda.Event]]()

    def arrived() -> list[Tensor]:
        batch, event = coming.popleft()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(event)
        for tensor in batch:
            tensor.record_stream(computing)  # its memory was asked for on the other stream
        return batch

    for batch in batches:
        with torch.cuda.stream(stream):
            coming.append((to_device(batch, device), stream.record_event()))
        if len(coming) > 1:
            yield arrived()
    if coming:
        yield arrived()


class PendingSteps:
    """Losses, gradient norms and wishes on their way from the device, read some steps later."""

    def __init__(self, epoch: int, meters: Meters, log: NullLog, guard: "NonFiniteGuard", saver: BetweenSteps) -> None:
        self.epoch = epoch
        self.meters = meters
        self.log = log
        self.guard = guard
        self.saver = saver
        self.queue: deque[tuple[Step, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: Step, values: Tensor) -> None:
        """Starts the copy of a step's gradient norm, loss and shares of wishes."""
        arrived = None
        if values.is_cuda:
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.queue.append((step, values, arrived))

    def read(self, keep: int, done: int) -> Wish:
        """Takes in the oldest steps, until `keep` are left on their way; returns the greatest wish among them.

        Args:
            done: batches of the epoch whose gradients are in the weights.
        """
        agreed = Wish.NOTHING
        while len(self.queue) > keep:
            step, values, arrived = self.queue.popleft()
            grad_norm, loss, *wished = _numbers(values, arrived)
            agreed = max(agreed, *(wish for wish in Wish if wished[wish] > 0))
            self.meters.add(loss, grad_norm, step.lr)
            self.log.step(step.done, step.lr, loss, grad_norm)
            if not self.guard.accepts(loss, grad_norm):
                place = f"epoch {self.epoch}, batch {step.done - 1}"
                what = f"{place}: loss {loss}, gradient norm {grad_norm}, lr {step.lr:.3g}"
                self.guard.react(what, lambda: self._save_emergency(done))
        return agreed

    def _save_emergency(self, done: int) -> str:
        return self.saver.save_emergency(self.epoch, done, self.meters_with_all().state_dict())

    def meters_with_all(self) -> Meters:
        """A copy of the meters that counts the steps on their way too; they stay, to be read at their time."""
        total = Meters(**self.meters.state_dict())
        for step, values, arrived in self.queue:
            grad_norm, loss, *_ = _numbers(values, arrived)
            total.add(loss, grad_norm, step.lr)
        return total


def _numbers(values: Tensor, arrived: torch.cuda.Event | None) -> list[float]:
    if arrived is not None:
        arrived.synchronize()
    return values.tolist()


class NonFiniteGuard:
    """Decides what a step means whose loss or gradient is not finite. All processes see the same numbers.

    Args:
        policy: "abort" the run at the first one, or "skip" it, up to MAX_SKIPS_IN_A_ROW.
        overflow_is_normal: gradients overflow now and then (fp16), which is nobody's fault while the scaler adapts.
    """

    def __init__(self, policy: str, overflow_is_normal: bool = False) -> None:
        self.policy = policy
        self.overflow_is_normal = overflow_is_normal
        self.in_a_row = 0

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether a step needs no reaction."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        return self.overflow_is_normal and math.isfinite(loss) and self.in_a_row < MAX_SKIPS_IN_A_ROW

    def react(self, what: str, save: Callable[[], str]) -> None:
        """Warns of a skipped step, or saves and ends the run with what to try."""
        if self.policy == "skip" and self.in_a_row < MAX_SKIPS_IN_A_ROW:
            logger.warning(f"{what}; the step is skipped")
            return
        where = save()
        dist.barrier()  # a process that ends earlier would have the launcher kill the one that writes
        saved = f"The weights, which this step did not change, are in {where}. " if where else ""
        raise NonFiniteLoss(
            f"{what} ({self.in_a_row} such in a row). {saved}Try --clip_grad 1.0, a lower learning rate (--lr, or "
            f"--blr where --lr is not given), --amp off (or bf16 in place of fp16), or --on_nonfinite skip if it "
            f"happens rarely."
        )
