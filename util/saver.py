"""Saves a run's state between steps, beside the training.

`checkpoint-{epoch}.pth` is the state after an epoch, counted from 0; `checkpoint-last.pth` the newest one, also in the
middle of an epoch; `checkpoint-best.pth` that of the best accuracy; `checkpoint-emergency.pth` that of a run that ended
on an error. Those of a sharded run are folders, named without `.pth`.
"""

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from util import checkpoint, dist, sharded
from util.interrupts import Interrupted, Interrupts
from util.loop import Wish
from util.runstate import Progress

logger = logging.getLogger(__name__)

LAST, BEST, EMERGENCY = "checkpoint-last.pth", "checkpoint-best.pth", "checkpoint-emergency.pth"
RETRY_SECONDS = 60.0  # after a state that could not be written


class NullSaver:
    """Saves nothing: what processes other than rank 0 have.

    Args:
        interrupts: a signal to this process stops the run.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def wish(self) -> Wish:
        """What this process wants to happen after this step."""
        return Wish.STOP if self.interrupts.pending else Wish.NOTHING

    def save(self, epoch: int, steps_done: int, meters: dict[str, Any], alone: bool = False) -> None:
        """Saves the rolling state after so many batches of an epoch.

        Args:
            alone: other processes may be gone, or do something else.
        """

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        """Saves the milestone of a finished epoch, if it is one, and the best state, if its accuracy is that."""

    def save_emergency(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> str:
        """Saves the state of a run that is about to end on an error, and returns the file's name."""
        return ""

    def raise_if_stopping(self, error: Exception) -> None:
        """Raises `Interrupted` in place of an error that came after a signal: one signal to all of a run's processes
        ends some of them earlier than others, which must not look like a failure of this one."""
        if self.interrupts.pending:
            raise Interrupted(self.interrupts.pending) from error

    def close(self) -> None:
        """Waits until everything is on the disk."""

    def stop(self) -> None:
        """Raises `Interrupted` in every process, once the state is on the disk."""
        self.close()
        dist.barrier()  # the launcher ends all when one process ends, and one of them was writing
        raise Interrupted(self.interrupts.pending or signal.SIGTERM)


class Saver(NullSaver):
    """Writes a run's states: milestones that stay, and a rolling `checkpoint-last.pth`. The run goes on meanwhile.

    Args:
        collect: gives the state, without the run's position.
        save_every: epochs between milestones; the last epoch is one too.
        save_minutes: minutes between rolling states.
        keep_last: milestones that are kept, the newest; all of them by default.
    """

    def __init__(
        self,
        interrupts: Interrupts,
        output_dir: Path,
        collect: Callable[[], dict[str, Any]],
        progress: Progress,
        *,
        epochs: int,
        save_every: int,
        save_minutes: float,
        keep_last: int | None = None,
    ) -> None:
        super().__init__(interrupts)
        self.output_dir = output_dir
        self.collect = collect
        self.progress = progress
        self.epochs = epochs
        self.save_every = save_every
        self.save_seconds = 60 * save_minutes
        self.keep_last = keep_last
        self.next_save = time.monotonic() + self.save_seconds
        self.writer = ThreadPoolExecutor(1, "saver")
        self.writing: Future[Path] | None = None

    def wish(self) -> Wish:
        if self.writing and self.writing.done():
            self._finish("The run goes on and tries again in a minute.")
        if time.monotonic() < self.next_save:
            return super().wish()
        self.next_save = math.inf  # until that wish is fulfilled
        return max(super().wish(), Wish.SAVE)

    def save(self, epoch: int, steps_done: int, meters: dict[str, Any], alone: bool = False) -> None:
        self._write([LAST], epoch, steps_done, meters)

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        names = []
        if epoch % self.save_every == 0 or epoch == self.epochs - 1:
            names.append(f"checkpoint-{epoch}.pth")
        if accuracy is not None and accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy = accuracy
            names.append(BEST)
        if names:
            self._write(names, epoch + 1, 0, {})
        if epoch == self.epochs - 1:
            self._finish()  # without the run's result, it has failed

    def save_emergency(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> str:
        self._write([EMERGENCY], epoch, steps_done, meters)
        return str(self._finish("There is no state of this step.") or "")

    def close(self) -> None:
        self._finish("The state before it stands.")

    def _write(self, names: list[str], epoch: int, steps_done: int, meters: dict[str, Any]) -> None:
        """Copies the state, and begins to write it."""
        self._finish("The run goes on with the next state.")
        position = {
            "epoch": epoch,
            "images_done": steps_done * self.progress.global_batch_size,
            "effective_batch_size": self.progress.effective_batch_size,
            "meters": meters,
            "best_accuracy": self.progress.best_accuracy,
            "num_images": self.progress.num_images,
        }
        state = checkpoint.snapshot({**self.collect(), "epoch": epoch - 1, "progress": position})
        self.next_save = time.monotonic() + self.save_seconds
        self.writing = self.writer.submit(self._put_down, state, [self.output_dir / name for name in names])

    def _put_down(self, state: dict[str, Any], paths: list[Path]) -> Path:
        """Runs beside the training."""
        checkpoint.write(state, *paths)
        self._remove_old()
        return paths[0]

    def _remove_old(self) -> None:
        for path in milestones(self.output_dir)[: -self.keep_last] if self.keep_last else []:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _finish(self, otherwise: str | None = None) -> Path | None:
        """Waits for what is being written. If it failed, `otherwise` ends the warning; without it, it is an error."""
        writing, self.writing = self.writing, None
        if writing is None:
            return None
        try:
            path = writing.result()
        except OSError as error:
            if otherwise is None:
                raise
            logger.warning(f"{error}. {otherwise}")
            self.next_save = time.monotonic() + RETRY_SECONDS
            return None
        logger.info(f"saved {path}")
        return path


class ShardedSaver(Saver):
    """The saver of each process of a sharded run: all write their part, beside the training, when rank 0 wishes so.

    A process that fails on its own can't save: the state of the last save stands.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = dist.new_host_group()

    def wish(self) -> Wish:
        if not dist.is_main():
            self.next_save = math.inf
        return super().wish()

    def save(self, epoch: int, steps_done: int, meters: dict[str, Any], alone: bool = False) -> None:
        if not alone:
            super().save(epoch, steps_done, meters)

    def _put_down(self, state: dict[str, Any], paths: list[Path]) -> Path:
        folders = [path.with_suffix("") for path in paths]
        sharded.write(state, *folders, group=self.group)
        if dist.is_main():
            self._remove_old()
        return folders[0]


def milestones(output_dir: Path) -> list[Path]:
    """The checkpoints of whole epochs, oldest first."""
    found = [(int(path.stem[11:]), path) for path in checkpoint.checkpoints(output_dir) if path.stem[11:].isdecimal()]
    return [path for _, path in sorted(found)]


def open_saver(
    interrupts: Interrupts,
    output_dir: Path,
    collect: Callable[[], dict[str, Any]],
    progress: Progress,
    is_sharded: bool,
    **options: Any,
) -> NullSaver:
    """The saver of this process: a `Saver` on rank 0, a `NullSaver` elsewhere; each has its part of a sharded run."""
    if is_sharded:
        return ShardedSaver(interrupts, output_dir, collect, progress, **options)
    return Saver(interrupts, output_dir, collect, progress, **options) if dist.is_main() else NullSaver(interrupts)
