"""The training loop. All engines use it, and add the loss of a batch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae import parallel
from mae.data.batches import prefetch
from mae.data.item import Batch
from mae.training.log import NullLog
from mae.training.meters import Meters, Stopwatch
from mae.training.nonfinite import NonFiniteGuard
from mae.training.precision import Precision
from mae.training.saver import NullSaver
from mae.training.transaction import Transaction

Loss = Tensor | Mapping[str, Tensor]  # (), or its terms by name
RESERVED = {"loss", "lr"}  # train_NAME in log.txt


class Loader(Protocol):
    """Batches of an epoch, such as `loader.TrainLoader`."""

    images_per_iteration: int  # in the batches of all processes together

    def seek(self, epoch: int, first_iteration: int = 0) -> None:
        """Sets the epoch and the first batch of the next iteration over this object."""

    def seed_iteration(self, iteration: int) -> None:
        """Seeds the random numbers of a batch."""

    def __len__(self) -> int:
        """Returns the number of iterations of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of this process."""


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
    compute_loss: Callable[[Any], Loss], model: nn.Module, loader: Loader, optimizer: Optimizer, options: EpochOptions
) -> None:
    """Trains for an epoch, or for the rest of an epoch. It waits for the device only to save a state.

    Args:
        compute_loss: returns the loss () of a batch on the device, or its terms by name, whose sum is the loss.
        model: the module whose gradients are averaged over the processes.
        loader: the batches.
        optimizer: any; the host waits for the gradients of one that does not support `found_inf` (`Precision`).

    Raises:
        ValueError: as in `_forward_backward`.
        NonFiniteLoss: `options.guard` ends the run. The non-finite updates did not change the weights.
        Interrupted: a signal stopped the run, and its state is saved.
    """
    epoch, accum_iter, precision = options.epoch, options.accum_iter, options.precision
    num_updates, rest = divmod(len(loader), accum_iter)
    assert not rest, "an epoch is a whole number of updates"
    stopwatch = Stopwatch(precision.device)
    model.train()
    with Transaction(model, options) as transaction:
        loader.seek(epoch, options.first_iteration)
        options.log.begin_epoch(epoch, options.first_iteration, len(loader), loader.images_per_iteration, stopwatch)
        batches = stopwatch.watch(prefetch(loader, precision.device))
        for iteration, batch in enumerate(batches, start=options.first_iteration):
            update, position = divmod(iteration, accum_iter)
            if position == 0:
                lr = options.schedule(epoch + update / num_updates)
                transaction.begin()
            loader.seed_iteration(iteration)
            is_last = position + 1 == accum_iter
            transaction.add(_forward_backward(compute_loss, batch, accum_iter, model, precision, is_last))
            if is_last:
                transaction.prepare()
                grad_norm = precision.step(optimizer, options.clip_grad)
                transaction.commit(grad_norm, lr, epoch + (update + 1) / num_updates)
        transaction.finish(stopwatch)


def _forward_backward(
    compute_loss: Callable[[Any], Loss],
    batch: Any,
    accum_iter: int,
    model: nn.Module,
    precision: Precision,
    is_last: bool,
) -> dict[str, Tensor]:
    """Runs an iteration, and returns its part of the loss of the update, and of the terms of the loss.

    The last iteration of an update averages the gradients over the processes.

    Raises:
        TypeError: the loss or a term is not a tensor of shape ().
        ValueError: a term has the name of another entry, or a parameter has no gradient (several processes).
    """
    with parallel.gradient_sync(model, enabled=is_last):
        with precision.autocast():
            result = compute_loss(batch)
        terms = result if isinstance(result, Mapping) else {"loss": result}
        for loss in terms.values():
            if not isinstance(loss, Tensor) or loss.ndim:
                kind = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"the loss of a batch is a {kind}; return a tensor of shape (), such as loss.mean()")
        if terms is result:
            if taken := RESERVED & terms.keys():
                raise ValueError(
                    f"the loss has a term {min(taken)}, which is another entry of log.txt: rename the term"
                )
            terms = {"loss": torch.stack([*terms.values()]).sum(), **terms}
        parts = {name: loss / accum_iter for name, loss in terms.items()}
        precision.backward(parts["loss"])
    if is_last:
        parallel.require_gradients(model)
    return {name: part.detach() for name, part in parts.items()}
