"""Runs training from the first or the resumed epoch to the last: resume, train, evaluate, log, save."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae import parallel
from mae.checkpoints import checkpoint, run_directory, run_state
from mae.interrupts import Interrupted, Interrupts
from mae.position_tables import to_pair
from mae.settings import ImageSpec, Run
from mae.training import costs, environment, lr_sched
from mae.training.log import OF_EPOCH, NullLog, RunLog, next_x
from mae.training.loop import Callback, EpochOptions, Loader
from mae.training.meters import Meters
from mae.training.nonfinite import NonFiniteGuard
from mae.training.precision import Precision
from mae.training.saver import open_saver

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a run trains, evaluates and logs.

    Args:
        train_one_epoch: the function of an engine, with its own arguments bound (`functools.partial`).
        after_epoch: called with epoch and log every `eval_every` epochs, and after the last epoch. It returns entries
            of log.txt. The state with the best `metric` is saved as checkpoint-best.pth.
        loss_tag: name of the loss in TensorBoard.
        trained: the module that is called with a batch. Default: the model.
        evaluates: `after_epoch` takes long and does not change the state. The state is saved before it, and a signal
            ends it at once; a resumed run repeats it.
        metric: the entry of log.txt that selects the best state, which has the highest or the lowest value.
        callbacks: called after every update and every epoch, in this order. Checkpoints contain their states, under
            the key `callbacks`.
        lr_schedule: function(progress) that returns the factor of the learning rate after the warm-up. Default: the
            decay of `lr_sched`.
        forward: calls the model with images, so that its FLOPs are counted. Default: log.txt has no TFLOP/s.
    """

    train_one_epoch: Callable[[nn.Module, Loader, torch.optim.Optimizer, EpochOptions], None]
    after_epoch: Callable[[int, NullLog], dict[str, Any]]
    loss_tag: str = "train_loss"
    trained: nn.Module | None = None
    evaluates: bool = False
    metric: str = "test_acc1"
    lower_is_better: bool = False
    callbacks: Sequence[Callback] = ()
    lr_schedule: lr_sched.Schedule | None = None
    forward: Callable[[torch.Tensor], Any] | None = None


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, precision: Precision, task: Task, run: Run,
    fingerprint: Mapping[str, str], is_locked: bool = False,
) -> None:  # fmt: skip
    """Trains to the end of the last epoch.

    Args:
        optimizer: its learning rate is set before every update. A group may have an `lr_scale`.
        batches: a `loader.TrainLoader` or `feature_files.FeatureBatches`.
        run: the settings, which checkpoints contain as `args`.
        fingerprint: the `fingerprint` of the training images, which a resumed run compares.
        is_locked: the caller has locked the run directory.

    Raises:
        ValueError: the model is sharded and there are callbacks, whose states would not be saved; a setting or the
            state of a callback is not a plain value; the settings of the processes differ; or the resumed run has a
            schedule that is not given, or that returns no number.
    """
    record = run.record()
    _require_usable(model, record, task)
    run_state.require_same_settings(record, batches.num_images)
    optim, machine, output_dir = run.optim, run.machine, Path(run.machine.output_dir)
    global_batch_size = optim.batch_size * parallel.world_size()
    progress = run_state.Progress(
        global_batch_size * optim.accum_iter, global_batch_size, machine.start_epoch, batches.num_images, fingerprint
    )  # fmt: skip
    optim = replace(optim, lr=lr_sched.scaled_lr(optim.lr, optim.blr, progress.effective_batch_size))
    lr_sched.check_warmup(optim.warmup_epochs, optim.epochs)
    logger.info(f"{run.model.model} on {precision.device} in {precision.name}, {parallel.world_size()} process(es)")
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if is_locked else run_directory.locked(output_dir, machine.resume))
        if parallel.is_main():
            environment.record(output_dir, precision.device, record)
        _resume(run, model, optimizer, precision, record, progress, task.callbacks)
        parallel.barrier()  # every process has accepted the start of the run
        run_directory.record_images(output_dir, getattr(batches, "image_names", bytes)())
        interrupts = Interrupts()
        saver = open_saver(
            interrupts, output_dir,
            partial(run_state.collect, model, optimizer, precision.scaler, record, task.callbacks),
            progress, parallel.is_sharded(model), epochs=optim.epochs,
            save_every=machine.save_every, save_minutes=machine.save_minutes, keep_last=machine.keep_last,
        )  # fmt: skip
        trained = task.trained or model
        measure_costs = partial(costs.of_epoch, precision, _flops(task, trained, precision, run.images))
        if machine.compile:
            from mae.training.compiling import compile_model

            compile_model(trained, precision.device)
        train = partial(task.train_one_epoch, parallel.wrap(trained, precision.device), batches, optimizer)
        if progress.epoch >= optim.epochs:
            logger.info(f"nothing to do: the run has completed its {optim.epochs} epochs")
        log = _open_log(run, task.loss_tag, progress, batches, measure_costs, precision.device)
        for resource in (interrupts, closing_log(log), closing(saver)):  # a signal takes effect after they are closed
            stack.enter_context(resource)
        schedule = partial(lr_sched.adjust_learning_rate, optimizer, args=optim, schedule=task.lr_schedule)
        guard = NonFiniteGuard(optim.on_nonfinite, precision.overflow_is_normal)
        after_update = partial(_run_callbacks, task.callbacks, model)
        options = EpochOptions(
            progress.epoch, schedule, precision, guard, log, saver, accum_iter=optim.accum_iter,
            clip_grad=optim.clip_grad, after_update=after_update,
        )  # fmt: skip
        _train_epochs(
            train, options, task, optim.epochs, run.evaluation.eval_every, model, batches, progress, interrupts
        )


def _resume(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, record: dict[str, Any],
    progress: run_state.Progress, callbacks: Sequence[Callback],
) -> None:  # fmt: skip
    machine = run.machine
    if machine.resume:
        from mae.training import resume

        resume.restore_run(
            machine.resume, Path(machine.output_dir), model, optimizer, precision.scaler, record, progress, callbacks
        )
    if not (machine.init_from or machine.finetune or progress.epoch or progress.first_iteration):
        _warn_of_frozen(model)


def _warn_of_frozen(model: nn.Module) -> None:
    """Logs a warning if the model starts without a file, and has frozen weights besides fixed position tables."""
    frozen = [name for name, weight in model.named_parameters() if not (weight.requires_grad or "pos_embed" in name)]
    if frozen:
        logger.warning(f"no `finetune` or `init_from`: {len(frozen)} frozen weights stay random, such as {frozen[0]}")


def _flops(task: Task, trained: nn.Module, precision: Precision, images: ImageSpec) -> int | None:
    """Returns the FLOPs of an image, as `costs.training_flops`. The model is not compiled yet."""
    if task.forward is None:
        return None
    image = torch.zeros(1, images.in_chans, *to_pair(images.input_size), device=precision.device)
    return costs.training_flops(trained, partial(task.forward, image), precision)


def _open_log(
    run: Run,
    loss_tag: str,
    progress: run_state.Progress,
    batches: Any,
    measure_costs: Callable[[float], dict[str, float]],
    device: torch.device,
) -> NullLog:
    if not parallel.is_main():
        return NullLog()

    def remedies() -> list[str]:
        from mae.training.loading_advice import faster_loading

        return faster_loading(batches, run.record(), device)

    return RunLog(
        Path(run.machine.output_dir), Path(run.machine.log_dir), run.optim.epochs, first_epoch=progress.epoch,
        loss_tag=loss_tag,
        first_x=next_x(progress.epoch, progress.first_iteration, len(batches)),
        measure_costs=measure_costs, remedies=remedies,
    )  # fmt: skip


def _require_usable(model: nn.Module, record: Mapping[str, Any], task: Task) -> None:
    name = record.get("lr_schedule") or ""
    if ":" in name and task.lr_schedule is None:  # a file can't make a program import code
        raise ValueError(f"the resumed run has a schedule of its own: give lr_schedule={name}")
    if task.callbacks and parallel.is_sharded(model):
        raise ValueError("`fsdp` can't save the state of callbacks: omit `fsdp` or the callbacks")
    checkpoint.require_plain({**record}, "args")
    for callback in task.callbacks:
        checkpoint.require_plain(callback.state_dict(), f"the state of {type(callback).__name__}")


def _run_callbacks(callbacks: Sequence[Callback], model: nn.Module, epoch: float) -> None:
    for callback in callbacks:
        callback.after_update(model, epoch)


def _entries_of(
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
        own = {name: value.item() if hasattr(value, "item") else value for name, value in found.items()}
        if twice := own.keys() & {*others, *entries, *OF_EPOCH}:
            raise ValueError(
                f"{type(callback).__name__}.after_epoch returns {min(twice)}, which log.txt has: rename it"
            )
        entries |= own
    return entries


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


def _train_epochs(
    train: Callable[[EpochOptions], None],
    options: EpochOptions,
    task: Task,
    num_epochs: int,
    eval_every: int,
    model: nn.Module,
    batches: Any,
    progress: run_state.Progress,
    interrupts: Interrupts,
) -> None:
    saver, log = options.saver, options.log
    for epoch in range(progress.epoch, num_epochs):
        meters = Meters(**progress.meters)
        train(replace(options, epoch=epoch, first_iteration=progress.first_iteration, meters=meters))
        try:
            progress.next_epoch()
            parallel.share_buffers(model)  # the statistics of batch norm differ between processes
            results: dict[str, Any] = {}
            if (epoch + 1) % eval_every == 0 or epoch + 1 == num_epochs:
                if task.evaluates:
                    log.flush()
                    saver.save(epoch, len(batches), meters.state_dict())
                with interrupts.at_once() if task.evaluates else nullcontext():
                    results = task.after_epoch(epoch, log)
            # The log is first: a run that stops between the two trains this epoch again, and replaces its line.
            entries = meters.means() | results | batches.counts()
            log.end_epoch(entries | _entries_of(task.callbacks, model, epoch, log, entries))
            score = results.get(task.metric)
            saver.save_epoch(epoch, -score if score is not None and task.lower_is_better else score)
            # A signal may have arrived during the evaluation or a write in one process.
            stops = epoch + 1 < num_epochs and any(parallel.gather(interrupts.pending))
        except Interrupted:  # the state was saved before the evaluation
            raise
        except Exception as error:
            # For example, an image can't be read: the epoch is saved, and the resumed run evaluates it.
            saver.save(epoch, len(batches), meters.state_dict(), alone=True)
            saver.raise_if_stopping(error)
            raise
        if stops:
            saver.save(epoch + 1, 0, {})
            saver.stop()
