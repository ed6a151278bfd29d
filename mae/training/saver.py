"""Saves checkpoints in a thread, while training continues.

`checkpoint-{epoch}.pth` is the state after an epoch, counted from 0. `checkpoint-last.pth` is the newest state, also
within an epoch. `checkpoint-best.pth` is the state with the best accuracy. `checkpoint-emergency.pth` is the state of a
run that ended with an error. Checkpoints of sharded runs are folders with these names, without `.pth`.
"""

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import Any

from mae import parallel
from mae.checkpoints import checkpoint, run_directory
from mae.checkpoints.run_state import Progress
from mae.interrupts import Interrupted, Interrupts

logger = logging.getLogger(__name__)


class Request(IntEnum):
    """The request of a process after an update. All processes follow the greatest request among them."""

    NONE, SAVE, STOP = range(3)


class NullSaver:
    """The saver of processes other than rank 0, which saves nothing. It is the interface that a `loop.Trainer` calls.

    Args:
        interrupts: the signals to this process, which stop the run.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.is_saved = True  # the last write has succeeded

    def request(self) -> Request:
        """Returns the request of this process after an update."""
        return Request.STOP if self.interrupts.pending else Request.NONE

    def save(self, epoch: int, iterations: int, meters: dict[str, Any], only_this_rank: bool = False) -> None:
        """Saves the rolling checkpoint.

        Args:
            iterations: number of iterations of the epoch whose gradients are in the weights.
            only_this_rank: other processes may have ended, or may not save.
        """

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        """Saves the state after an epoch if the epoch is a milestone or its accuracy is the best."""

    def save_start(self, accuracy: float) -> None:
        """Saves the state before the first update as the best one."""

    def save_emergency(self, epoch: int, iterations: int, meters: dict[str, Any]) -> str:
        """Saves the state before the run ends with an error. Returns the name of the file."""
        return ""

    def raise_if_stopping(self, error: Exception) -> None:
        """Raises `Interrupted` instead of an error that follows a signal.

        After a signal to all processes, some of them end earlier, which causes errors in the others. If the last state
        could not be written, the error remains.
        """
        if self.interrupts.pending:
            self.close()
        if self.interrupts.pending and self.is_saved:
            raise Interrupted(self.interrupts.pending) from error

    def close(self) -> None:
        """Waits for the current write, and logs its result."""

    def stop(self) -> None:
        """Raises `Interrupted` in every process after the state is written."""
        self.close()
        parallel.barrier()  # when one process ends, the launcher ends the others, including one that writes
        raise Interrupted(self.interrupts.pending or signal.SIGTERM)


class Saver(NullSaver):
    """Writes milestones, the best state and a rolling `checkpoint-last.pth`, while training continues.

    A write that fails is logged as an error. The last complete checkpoint is unchanged, and the next save tries again.
    The run ends with the error if the state at a signal or after the last epoch can't be written.

    Args:
        collect: returns the state without the position in the run.
        save_every: epochs between milestones. The last epoch is a milestone too.
        save_minutes: minutes between rolling checkpoints.
        keep_last: number of milestones on the disk; older ones are deleted. None: all.
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
        if not run_directory.readable_best(output_dir):
            # A later epoch may have overwritten the best state before the resumed one.
            progress.forget_best()
        self.best_written = (progress.best_accuracy, progress.selection)

    def request(self) -> Request:
        if self.writing and self.writing.done():
            self.close()
        if time.monotonic() < self.next_save:
            return super().request()
        self.next_save = math.inf  # until the state is saved
        return max(super().request(), Request.SAVE)

    def save(self, epoch: int, iterations: int, meters: dict[str, Any], only_this_rank: bool = False) -> None:
        self._write([run_directory.LAST], epoch, iterations, meters)

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        self.close()  # which may change `best_accuracy`
        names = []
        if epoch % self.save_every == 0 or epoch == self.epochs - 1:
            names.append(run_directory.milestone(epoch))
        if accuracy is not None and accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy = accuracy
            names.append(run_directory.BEST)
        if names:
            self._write(names, epoch + 1, 0, {})
        if epoch == self.epochs - 1:
            self._wait()  # the run fails if its result can't be written

    def save_start(self, accuracy: float) -> None:
        self.progress.best_accuracy = accuracy
        self._write([run_directory.BEST], 0, 0, {})
        self._wait()  # a run that fails in its first update leaves it

    def save_emergency(self, epoch: int, iterations: int, meters: dict[str, Any]) -> str:
        try:
            self._write([run_directory.EMERGENCY], epoch, iterations, meters)
            return str(self._wait())
        except OSError as error:  # the run ends with the earlier error
            logger.error(str(error))
            return ""

    def close(self) -> None:
        try:
            self._wait()
        except OSError as error:
            if parallel.is_main():  # the error is the same in all processes of a sharded run
                logger.error(f"{error}. The last complete checkpoint is unchanged, and the next save tries again.")

    def stop(self) -> None:
        self._wait()
        super().stop()

    def _write(self, names: list[str], epoch: int, iterations: int, meters: dict[str, Any]) -> None:
        """Copies the state and starts to write it."""
        self.close()
        position = self.progress.position(epoch, iterations, meters)
        state = checkpoint.snapshot({**self.collect(), "epoch": epoch - 1, "progress": position})
        self.next_save = time.monotonic() + self.save_seconds
        self.writing = self.writer.submit(self._write_files, state, [self.output_dir / name for name in names])

    def _write_files(self, state: dict[str, Any], paths: list[Path]) -> Path:
        """Writes a state, in the thread. Returns its first file."""
        checkpoint.write(state, *paths)
        self._remove_old()
        return paths[0]

    def _remove_old(self) -> None:
        keep = self.keep_last if parallel.is_main() else None  # all processes of a sharded run write, and one deletes
        for path in run_directory.milestones(self.output_dir)[:-keep] if keep else []:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                logger.warning(f"keep_last={keep}: {path} can't be removed ({error.strerror})")

    def _wait(self) -> Path | None:
        """Waits for the current write. Returns its first file.

        Raises:
            OSError: the state can't be written.
        """
        writing = self.writing
        self.writing = None
        if writing is None:
            return None
        try:
            path = writing.result()
        except OSError:
            self.is_saved = False
            # A later epoch may have the best state on the disk.
            self.progress.best_accuracy, self.progress.selection = self.best_written
            raise
        self.is_saved = True
        self.best_written = (self.progress.best_accuracy, self.progress.selection)
        logger.info(f"saved {path}")
        return path


class ShardedSaver(Saver):
    """The saver of each process of a sharded run. All processes write their shards when one of them requests it.

    A process that fails alone can't save. The last checkpoint is unchanged.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = parallel.new_host_group()

    def save(self, epoch: int, iterations: int, meters: dict[str, Any], only_this_rank: bool = False) -> None:
        if not only_this_rank:
            super().save(epoch, iterations, meters)

    def _write_files(self, state: dict[str, Any], paths: list[Path]) -> Path:
        folders = [path.with_suffix("") for path in paths]
        from mae.checkpoints import sharded_state

        sharded_state.write(state, *folders, group=self.group)
        self._remove_old()
        return folders[0]


def open_saver(
    interrupts: Interrupts,
    output_dir: Path,
    collect: Callable[[], dict[str, Any]],
    progress: Progress,
    is_sharded: bool,
    **options: Any,
) -> NullSaver:
    """Returns the saver of this process: `Saver` on rank 0, else `NullSaver`; `ShardedSaver` for a sharded run."""
    if is_sharded:
        return ShardedSaver(interrupts, output_dir, collect, progress, **options)
    return Saver(interrupts, output_dir, collect, progress, **options) if parallel.is_main() else NullSaver(interrupts)
