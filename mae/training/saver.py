"""Saves checkpoints in a thread, while training continues.

`checkpoint-{epoch}.pth` is the state after an epoch, counted from 0. `checkpoint-last.pth` is the newest state, also
within an epoch. `checkpoint-best.pth` is the state with the best accuracy. `checkpoint-emergency.pth` is the state of a
run that ended with an error. Checkpoints of sharded runs are folders with these names, without `.pth`.
"""

import logging
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import Any

from mae import parallel
from mae.checkpoints import checkpoint, file_names, sharded
from mae.checkpoints.run_state import Progress
from mae.interrupts import Interrupted, Interrupts

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # after a failed write
MAX_UNWRITTEN = 2  # milestones and best states in memory that could not be written yet


class Request(IntEnum):
    """The request of a process after an update. All processes follow the greatest request among them."""

    NONE, SAVE, STOP = range(3)


class NullSaver:
    """The saver of processes other than rank 0, which saves nothing. It is the interface that `loop.run_epoch` calls.

    Args:
        interrupts: the signals to this process, which stop the run.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.is_ending = False  # a state could not be written, and the run ends with this error

    def request(self) -> Request:
        """Returns the request of this process after an update."""
        return Request.STOP if self.interrupts.pending else Request.NONE

    def save(self, epoch: int, iterations: int, meters: dict[str, Any], alone: bool = False) -> None:
        """Saves the rolling checkpoint.

        Args:
            iterations: number of iterations of the epoch whose gradients are in the weights.
            alone: other processes may have ended, or may not save.
        """

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        """Saves the state after an epoch if the epoch is a milestone or its accuracy is the best."""

    def save_emergency(self, epoch: int, iterations: int, meters: dict[str, Any]) -> str:
        """Saves the state before the run ends with an error. Returns the name of the file."""
        return ""

    def raise_if_stopping(self, error: Exception) -> None:
        """Raises `Interrupted` instead of an error that follows a signal.

        After a signal to all processes, some of them end earlier, which causes errors in the others. An error that a
        state can't be written remains: it names the folder of the state.
        """
        if self.interrupts.pending and not self.is_ending:
            raise Interrupted(self.interrupts.pending) from error

    def close(self) -> None:
        """Waits until all states are written."""

    def stop(self) -> None:
        """Raises `Interrupted` in every process after the state is written."""
        self.close()
        parallel.barrier()  # when one process ends, the launcher ends the others, including one that writes
        raise Interrupted(self.interrupts.pending or signal.SIGTERM)


class Saver(NullSaver):
    """Writes milestones, the best state and a rolling `checkpoint-last.pth`, while training continues.

    A milestone or best state that can't be written is kept in memory, and the saver tries again every minute. If there
    are more than MAX_UNWRITTEN of them, or the run ends, it writes them to the temporary folder of the system.

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
        if not any(path.stem == Path(file_names.BEST).stem for path in file_names.checkpoints(output_dir)):
            progress.best_accuracy = (
                -math.inf
            )  # a later epoch may have overwritten the best state before the resumed one
        self.unwritten: list[tuple[dict[str, Any], list[Path]]] = []  # states and their files, oldest first

    def request(self) -> Request:
        if self.writing and self.writing.done():
            self._finish("The run continues, and tries again in a minute.")
        if time.monotonic() < self.next_save:
            return super().request()
        self.next_save = math.inf  # until the state is saved
        return max(super().request(), Request.SAVE)

    def save(self, epoch: int, iterations: int, meters: dict[str, Any], alone: bool = False) -> None:
        self._write([file_names.LAST], epoch, iterations, meters)

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        names = []
        if epoch % self.save_every == 0 or epoch == self.epochs - 1:
            names.append(file_names.milestone(epoch))
        if accuracy is not None and accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy = accuracy
            names.append(file_names.BEST)
        if names:
            self._write(names, epoch + 1, 0, {})
        if epoch == self.epochs - 1:
            self._settle()  # the run fails if its result can't be written

    def save_emergency(self, epoch: int, iterations: int, meters: dict[str, Any]) -> str:
        try:
            self._write([file_names.EMERGENCY], epoch, iterations, meters)
            return str(self._settle())
        except OSError as error:  # the run ends with the earlier error
            logger.error(str(error))
            return ""

    def close(self) -> None:
        try:
            self._settle()
        except OSError as error:
            if parallel.is_main():
                logger.error(str(error))  # not raised: the run ends with another error, or its result is written

    def stop(self) -> None:
        self._settle()
        super().stop()

    def _write(self, names: list[str], epoch: int, iterations: int, meters: dict[str, Any]) -> None:
        """Copies the state and starts to write it.

        Raises:
            OSError: there are too many states that can't be written.
        """
        if self.is_ending:
            return
        self._finish("The run continues, and tries again with the next state.")
        self.unwritten = [(state, paths) for state, paths in self.unwritten if paths[0].name != file_names.LAST]
        if len(self.unwritten) >= MAX_UNWRITTEN:
            self._begin()
            self._settle()
        position = self.progress.position(epoch, iterations, meters)
        state = checkpoint.snapshot({**self.collect(), "epoch": epoch - 1, "progress": position})
        self.unwritten.append((state, [self.output_dir / name for name in names]))
        self._begin()

    def _begin(self) -> None:
        self.next_save = time.monotonic() + self.save_seconds
        self.writing = self.writer.submit(self._write_all)

    def _write_all(self) -> Path:
        """Writes the unwritten states, in the thread. Returns the file of the last state."""
        while self.unwritten:
            path = self._write_one(*self.unwritten[0])
            del self.unwritten[0]
            self._remove_old()
        return path

    def _write_one(self, state: dict[str, Any], paths: list[Path]) -> Path:
        checkpoint.write(state, *paths)
        return paths[0]

    def _remove_old(self) -> None:
        keep = self.keep_last if parallel.is_main() else None  # all processes of a sharded run write, and one deletes
        for path in file_names.milestones(self.output_dir)[:-keep] if keep else []:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                logger.warning(f"keep_last={keep}: {path} can't be removed ({error.strerror})")

    def _finish(self, otherwise: str) -> None:
        """Waits for the current write. If it fails, a warning ends with `otherwise`."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            logger.info(f"saved {writing.result()}")
        except OSError as error:
            logger.warning(f"{error}. {otherwise}")
            self.next_save = time.monotonic() + RETRY_SECONDS

    def _settle(self) -> Path | None:
        """Waits for the current write, or tries once more to write the unwritten states.

        Returns:
            The file of the last state.

        Raises:
            OSError: a state can't be written. The message contains the folder to which it was written instead.
        """
        writing, self.writing = self.writing, None
        if writing is None and not self.unwritten:
            return None
        try:
            path = writing.result() if writing else self._write_all()
        except OSError as error:
            raise OSError(f"{error}. {self._rescue()}") from error
        logger.info(f"saved {path}")
        return path

    def _rescue(self) -> str:
        """Writes the unwritten states to the temporary folder of the system. Returns a text for the error message."""
        unwritten, self.unwritten, self.is_ending = self.unwritten, [], True
        try:
            place = Path(tempfile.mkdtemp(prefix="mae-"))
            for state, paths in unwritten:
                checkpoint.write(state, *(place / path.name for path in paths))
        except OSError as error:
            return f"The state can't be written to the temporary folder either ({error})"
        return f"The state is in {place}: move its files to {self.output_dir}, and resume=auto resumes the run"


class ShardedSaver(Saver):
    """The saver of each process of a sharded run. All processes write their shards when one of them requests it.

    A process that fails alone can't save. The last checkpoint is unchanged.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = parallel.new_host_group()

    def save(self, epoch: int, iterations: int, meters: dict[str, Any], alone: bool = False) -> None:
        if not alone:
            super().save(epoch, iterations, meters)

    def _write_one(self, state: dict[str, Any], paths: list[Path]) -> Path:
        folders = [path.with_suffix("") for path in paths]
        sharded.write(state, *folders, group=self.group)
        return folders[0]

    def _settle(self) -> Path | None:
        if self.writing is None:
            self.unwritten = []  # writing them needs all processes, and some may have ended
        return super()._settle()

    def _rescue(self) -> str:
        self.unwritten, self.is_ending = [], True
        return "The earlier checkpoints are complete"  # the shards of this state are in the memory of several machines


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
