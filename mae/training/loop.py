"""The training loop: epochs, updates and evaluations. It takes the loss of a batch, which the engines have."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae import parallel
from mae.checkpoints.run_state import Progress
from mae.training.callbacks import Callback, after_update, entries_after_epoch
from mae.training.log import NullLog
from mae.training.nonfinite import NonFiniteGuard
from mae.training.precision import Precision
from mae.training.saver import NullSaver
from mae.training.transaction import Loader, Transaction, saved_if_it_raises

if TYPE_CHECKING:
    from mae.training.gate import Gate

Loss = Tensor | Mapping[str, Tensor]  # (), or its terms by name
RESERVED = {"loss", "lr"}  # train_NAME in log.txt


@dataclass
class Trainer:
    """Trains a model with a loss. `trainer.opened` makes one from the settings of a run.

    Args:
        loss: function(model, batch) -> the loss () of a batch on the device, or its terms by name, whose sum is the
            loss. It runs under autocast.
        model: the module that `loss` calls. Its gradients are averaged over the processes.
        model_without_ddp: the module that callbacks get, and whose weights checkpoints contain.
        optimizer: any; the host waits for the gradients of one that does not support `found_inf` (`Precision`).
        schedule: sets the learning rate for a fractional epoch, and returns it.
        progress: the position of the run.
        guard: handles updates with a loss or gradient that is not finite.
        epochs: number of epochs of the run.
        accum_iter: iterations per update; divides the iterations of an epoch.
        clip_grad: maximum global norm of the gradient.
        callbacks: called after every update and every epoch, in this order.
        further_entries: function(means of an epoch) that returns further entries of log.txt.
    """

    loss: Callable[[nn.Module, Any], Loss]
    model: nn.Module
    model_without_ddp: nn.Module
    optimizer: Optimizer
    batches: Loader
    precision: Precision
    schedule: Callable[[float], float]
    progress: Progress
    log: NullLog
    saver: NullSaver
    guard: NonFiniteGuard
    epochs: int
    accum_iter: int = 1
    clip_grad: float | None = None
    callbacks: Sequence[Callback] = ()
    further_entries: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.transaction = Transaction(
            self.model, self.batches, self.precision.device, self.progress, self.log, self.saver, self.guard,
            self.accum_iter, partial(after_update, self.callbacks, self.model_without_ddp),
        )  # fmt: skip

    def fit(
        self,
        evaluate: Callable[[int, NullLog], dict[str, Any]],
        eval_every: int = 1,
        selects: str = "",
        lower_is_better: bool = False,
        saves_first: bool = False,
        gate: "Gate | None" = None,
    ) -> None:
        """Trains to the end of the last epoch. It waits for the device only to save a state.

        Args:
            evaluate: called with epoch and log every `eval_every` epochs, and after the last epoch. It returns entries
                of log.txt.
            selects: the entry of log.txt whose best state is saved as checkpoint-best.pth.
            gate: measures the start, which is saved as the first best state, and decides which later states replace it.
            saves_first: the evaluation takes long and does not change the state. The state is saved before it, and a
                signal ends it at once; a resumed run repeats it.

        Raises:
            TypeError, ValueError: as in `terms_of`.
            NonFiniteLoss: `guard` ends the run. The non-finite updates did not change the weights.
            Interrupted: a signal stopped the run, and its state is saved.
        """
        if gate and not gate.has_start:
            with self.saver.interrupts.at_once():
                self.saver.save_start(gate.measure_start(self.model_without_ddp))
        for epoch in range(self.progress.epoch, self.epochs):
            is_last = epoch + 1 == self.epochs
            self.model.train()
            with self.transaction:
                batches = self.transaction.batches()
                for batch in batches:
                    self.update(chain([batch], islice(batches, self.accum_iter - 1)))
            meters = self.transaction.meters
            with saved_if_it_raises(self.saver, epoch, len(self.batches), meters):
                self.progress.next_epoch()
                parallel.share_buffers(self.model_without_ddp)  # the statistics of batch norm differ between processes
                results: dict[str, Any] = {}
                if (epoch + 1) % eval_every == 0 or is_last:
                    if saves_first:
                        self.log.flush()
                        self.saver.save(epoch, len(self.batches), meters.state_dict())
                    with self.saver.interrupts.at_once() if saves_first else nullcontext():
                        results = evaluate(epoch, self.log)
                # The log is first: a run that stops between the two trains this epoch again, and replaces its line.
                entries = meters.means() | results | self.batches.counts()
                if self.further_entries:
                    entries |= self.further_entries(entries)
                further = entries_after_epoch(self.callbacks, self.model_without_ddp, epoch, self.log, entries)
                self.log.end_epoch(entries | further)
                score = results.get(selects)
                if gate and score is not None:
                    self.saver.close()  # a write that fails takes the best state back
                    score = score if gate.accepts(epoch) else None
                self.saver.save_epoch(epoch, -score if score is not None and lower_is_better else score)
                # A signal may have arrived during the evaluation or a write in one process.
                stops = not is_last and any(parallel.gather(self.saver.interrupts.pending))
            if stops:
                self.saver.save(epoch + 1, 0, {})
                self.saver.stop()
            if gate and is_last:
                gate.log_end()

    def update(self, batches: Iterable[Any]) -> None:
        """Runs an update: the forward and backward passes of `accum_iter` batches, and the optimizer step."""
        lr = self.schedule(self.transaction.epoch)
        self.transaction.begin()
        for number, batch in enumerate(batches, start=1):
            self.transaction.seed()
            with parallel.gradient_sync(self.model, enabled=number == self.accum_iter):
                with self.precision.autocast():
                    loss = self.loss(self.model, batch)
                parts = {name: term / self.accum_iter for name, term in terms_of(loss).items()}
                self.precision.backward(parts["loss"])
            self.transaction.add(parts)
        parallel.require_gradients(self.model)
        self.transaction.prepare()
        grad_norm = self.precision.step(self.optimizer, self.clip_grad)
        self.transaction.commit(grad_norm, lr)


def terms_of(loss: Loss) -> dict[str, Tensor]:
    """Returns the loss () as "loss", and its terms by name, if it has any.

    Raises:
        TypeError: the loss or a term is not a tensor of shape ().
        ValueError: a term has the name of another entry of log.txt.
    """
    terms = loss if isinstance(loss, Mapping) else {"loss": loss}
    for term in terms.values():
        if not isinstance(term, Tensor) or term.ndim:
            kind = f"tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(f"the loss of a batch is a {kind}; return a tensor of shape (), such as loss.mean()")
    if terms is not loss:
        return {**terms}
    if taken := RESERVED & terms.keys():
        raise ValueError(f"the loss has a term {min(taken)}, which is another entry of log.txt: rename the term")
    return {"loss": torch.stack([*terms.values()]).sum(), **terms}
