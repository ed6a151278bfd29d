"""Opens a training: the run directory, the state of a checkpoint, the log and the saver; and closes them again."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mae.build
from mae import parallel
from mae.checkpoints import checkpoint, run_directory, run_state
from mae.interrupts import Interrupts
from mae.plurals import counted
from mae.settings import MachineSpec, OptimSpec
from mae.training import costs, environment, lr_sched
from mae.training.callbacks import Callback
from mae.training.log import NullLog, RunLog, next_x
from mae.training.loop import Loss, Trainer
from mae.training.nonfinite import NonFiniteGuard
from mae.training.precision import Precision
from mae.training.saver import open_saver

logger = logging.getLogger(__name__)


@contextmanager
def opened(
    loss: Callable[[nn.Module, Any], Loss], model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any,
    precision: Precision, record: Mapping[str, Any], optim: OptimSpec, machine: MachineSpec,
    fingerprint: Mapping[str, str], *, callbacks: Sequence[Callback] = (), lr_schedule: lr_sched.Schedule | None = None,
    trained: nn.Module | None = None, forward: Callable[[], Any] | None = None, loss_tag: str = "train_loss",
    is_locked: bool = False, further_entries: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Iterator[Trainer]:  # fmt: skip
    """The context manager of a training: yields a `Trainer` at the position from which the run resumes.

    It locks the run directory, restores the state of a checkpoint, and opens the log and the saver of checkpoints.
    Signals stop the run after an update.

    Args:
        loss: as in `Trainer`.
        optimizer: its learning rate is set before every update. A group may have an `lr_scale`.
        batches: a `loader.TrainLoader` or `feature_files.FeatureBatches`.
        record: the settings and facts of the run, which checkpoints contain as `args`.
        fingerprint: the `fingerprint` of the training images, which a resumed run compares.
        callbacks: called after every update and every epoch, in this order. Checkpoints contain their states, under
            the key `callbacks`.
        lr_schedule: function(progress) that returns the factor of the learning rate after the warm-up. Default: the
            decay of `lr_sched`.
        trained: the module that the loss calls. Default: the model.
        forward: computes one image, so that its FLOPs are counted. Default: log.txt has no TFLOP/s.
        loss_tag: name of the loss in TensorBoard.
        is_locked: the caller has locked the run directory.
        further_entries: function(means of an epoch) that returns further entries of log.txt.

    Raises:
        ValueError: the model is sharded and there are callbacks, whose states would not be saved; a setting or the
            state of a callback is not a plain value; the settings of the processes differ; or the resumed run has a
            schedule that is not given, or that returns no number.
    """
    record = dict(record)
    _require_usable(model, record, callbacks, lr_schedule)
    if lr_schedule is None and optim.poly_power is None:
        lr_schedule = lr_sched.named(optim.lr_schedule)
    run_state.require_same_settings(record, batches.num_images)
    output_dir = Path(machine.output_dir)
    progress = _start_of(optim, machine.start_epoch, batches.num_images, fingerprint)
    optim = replace(optim, lr=lr_sched.scaled_lr(optim.lr, optim.blr, progress.effective_batch_size))
    lr_sched.check_warmup(optim.warmup_epochs, optim.epochs)
    processes = counted(parallel.world_size(), "process")
    logger.info(f"{record['model']} on {precision.device} in {precision.name}, {processes}")
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if is_locked else run_directory.locked(output_dir, machine.resume))
        if parallel.is_main():
            environment.record(output_dir, precision.device, record)
        _restore(machine, model, optimizer, precision, record, progress, callbacks)
        run_directory.record_images(output_dir, batches.image_names())
        saver = open_saver(
            Interrupts(), output_dir, partial(run_state.collect, model, optimizer, precision.scaler, record, callbacks),
            progress, parallel.is_sharded(model), epochs=optim.epochs, save_every=machine.save_every,
            save_minutes=machine.save_minutes, keep_last=machine.keep_last,
        )  # fmt: skip
        trained = trained or model
        flops = costs.training_flops(trained, forward, precision) if forward else None
        wrapped = _prepared(trained, precision.device, machine.compile)
        if progress.epoch >= optim.epochs:
            logger.info(f"nothing to do: the run has completed its {counted(optim.epochs, 'epoch')}")
        log = _open_log(record, optim, machine, loss_tag, progress, batches, flops, precision)
        for resource in (saver.interrupts, closing_log(log), closing(saver)):  # a signal takes effect after the others
            stack.enter_context(resource)
        yield Trainer(
            loss, wrapped, model, optimizer, batches, precision,
            schedule=partial(lr_sched.adjust_learning_rate, optimizer, args=optim, schedule=lr_schedule),
            progress=progress, log=log, saver=saver, epochs=optim.epochs, accum_iter=optim.accum_iter,
            guard=NonFiniteGuard(optim.on_nonfinite, precision.overflow_is_normal), clip_grad=optim.clip_grad,
            callbacks=callbacks, further_entries=further_entries,
        )  # fmt: skip


def _start_of(
    optim: OptimSpec, start_epoch: int, num_images: int, fingerprint: Mapping[str, str]
) -> run_state.Progress:
    """Returns the position of a run that does not resume."""
    global_batch_size = optim.batch_size * parallel.world_size()
    return run_state.Progress(
        global_batch_size * optim.accum_iter, global_batch_size, start_epoch, num_images, fingerprint
    )


def _restore(
    machine: MachineSpec, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision,
    record: dict[str, Any], progress: run_state.Progress, callbacks: Sequence[Callback],
) -> None:  # fmt: skip
    """Restores the state of a checkpoint, if the run resumes. Every process accepts the start of the run."""
    if machine.resume:
        from mae.training import resume

        output_dir = Path(machine.output_dir)
        resume.restore_run(machine.resume, output_dir, model, optimizer, precision.scaler, record, progress, callbacks)
    if not (machine.init_from or machine.finetune or progress.epoch or progress.first_iteration):
        mae.build.warn_of_frozen(model, record.get("unfreeze_blocks"))
    parallel.barrier()


def _prepared(trained: nn.Module, device: torch.device, compiles: bool) -> nn.Module:
    """Returns the module that the loss calls: compiled in place, and wrapped for several processes."""
    if compiles:
        from mae.training.compiling import compile_model

        compile_model(trained, device)
    return parallel.wrap(trained, device)


def _open_log(
    record: dict[str, Any], optim: OptimSpec, machine: MachineSpec, loss_tag: str, progress: run_state.Progress,
    batches: Any, flops: int | None, precision: Precision,
) -> NullLog:  # fmt: skip
    if not parallel.is_main():
        return NullLog()

    def remedies() -> list[str]:
        from mae.training.loading_advice import faster_loading

        return faster_loading(batches, record, precision.device)

    return RunLog(
        Path(machine.output_dir), Path(machine.log_dir), optim.epochs, first_epoch=progress.epoch, loss_tag=loss_tag,
        first_x=next_x(progress.epoch, progress.first_iteration, len(batches)),
        measure_costs=costs.measurement(precision, flops), remedies=remedies,
    )  # fmt: skip


def _require_usable(
    model: nn.Module, record: dict[str, Any], callbacks: Sequence[Callback], lr_schedule: lr_sched.Schedule | None
) -> None:
    name = record.get("lr_schedule") or ""
    if ":" in name and lr_schedule is None:  # a file can't make a program import code
        raise ValueError(f"the resumed run has a schedule of its own: give lr_schedule={name}")
    if callbacks and parallel.is_sharded(model):
        raise ValueError("`fsdp` can't save the state of callbacks: omit `fsdp` or the callbacks")
    checkpoint.require_plain(record, "args")
    for callback in callbacks:
        checkpoint.require_plain(callback.state_dict(), f"the state of {type(callback).__name__}")


@contextmanager
def closing_log(log: NullLog) -> Iterator[None]:
    """Closes a log. An error that ends the run takes precedence over an error of the log, which is logged instead."""
    try:
        yield
    except BaseException:
        try:
            log.close()
        except OSError as error:
            logger.error(str(error))
        raise
    log.close()
