"""The user's code that runs after every update and every epoch."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import nn

from mae.training.log import OF_EPOCH, NullLog


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


def after_update(callbacks: Sequence[Callback], model: nn.Module, epoch: float) -> None:
    """Calls the callbacks after an update. `epoch` is fractional."""
    for callback in callbacks:
        callback.after_update(model, epoch)


def entries_after_epoch(
    callbacks: Sequence[Callback], model: nn.Module, epoch: int, log: NullLog, others: Collection[str]
) -> dict[str, Any]:
    """Calls the callbacks that have a method `after_epoch`, and returns their entries of log.txt.

    Args:
        others: the names of the other entries.

    Raises:
        ValueError: a callback returns an entry that exists.
    """
    entries: dict[str, Any] = {}
    for callback in callbacks:
        found = callback.after_epoch(model, epoch, log) if hasattr(callback, "after_epoch") else {}
        values = {name: value.item() if hasattr(value, "item") else value for name, value in found.items()}
        if twice := values.keys() & {*others, *entries, *OF_EPOCH}:
            raise ValueError(
                f"{type(callback).__name__}.after_epoch returns {min(twice)}, which log.txt has: rename it"
            )
        entries |= values
    return entries
