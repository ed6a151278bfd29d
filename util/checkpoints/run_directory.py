"""The run directory. It must not contain another run, and only one run at a time writes to it."""

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from util import dist
from util.checkpoints import checkpoint
from util.files import atomic, locks

logger = logging.getLogger(__name__)

LOCK = "run.lock"
RESUMED = ".resumed"  # contains the path of the checkpoint from which the run has resumed (--resume FILE)
ABANDONED = "abandoned"  # folder of the checkpoints after the resumed one, numbered from 1
MOVING = "moving.json"  # the names of the files that are not moved yet


def chosen(output_dir: Path, resume: str) -> str:
    """Returns the checkpoint to resume from: `resume`, or "auto" if a launcher restarted the run.

    A run that has resumed from a file and has no checkpoint of its own yet resumes from this file again.
    """
    source, has_checkpoints = output_dir / RESUMED, bool(checkpoint.checkpoints(output_dir))
    if dist.restarted() and (resume == "" or (source.exists() and has_checkpoints)):
        resume = "auto"
    if resume == "auto" and source.exists() and not has_checkpoints:
        return source.read_text(encoding="utf-8") or "auto"
    return resume


def prepare(output_dir: Path, resume: str) -> None:
    """Creates the run directory.

    Raises:
        ValueError: the directory contains a run, and `resume` is neither "auto" nor a checkpoint in it.
        OSError: the directory can't be created.
    """
    _require_new(output_dir, resume)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--output_dir {output_dir} can't be created ({error.strerror}): give another --output_dir"
        ) from error


def _require_new(output_dir: Path, resume: str) -> None:
    continues = resume == "auto" or (resume and Path(resume).resolve().parent == output_dir.resolve())
    continues = continues or (dist.restarted() and (resume == "" or (output_dir / RESUMED).exists()))
    if dist.is_main() and not continues:
        files = [path.name for path in output_dir.glob("*") if path.name == "log.txt" or path.suffix == ".pth"]
        existing = sorted({*files, *(path.name for path in checkpoint.checkpoints(output_dir))})
        if existing:
            raise ValueError(
                f"--output_dir {output_dir} already contains a run ({', '.join(existing[:3])}): resume it with "
                f"--resume auto, or give another --output_dir"
            )


@contextlib.contextmanager
def locked(output_dir: Path, resume: str = "auto") -> Iterator[None]:
    """Context manager that locks a run directory. The system releases the lock when the process ends for any reason.

    Args:
        resume: as in `prepare`, whose check is repeated: another run may have ended in the meantime.

    Raises:
        ValueError: another run has locked the directory, or has trained in it.
        OSError: the directory can't be written to.
    """
    with contextlib.ExitStack() as stack:
        if dist.is_main():
            try:
                file = stack.enter_context((output_dir / LOCK).open("a+", encoding="utf-8"))
                _take(file, output_dir)
                stack.callback(file.truncate, 0)  # the file is not deleted, because another process may have it open
                _finish_moving(output_dir)
                _require_new(output_dir, resume)
                if resume != "auto" and not dist.restarted():
                    (output_dir / RESUMED).unlink(missing_ok=True)  # of an earlier job
            except OSError as error:
                raise OSError(
                    f"--output_dir {output_dir} can't be written to ({error.strerror or error}): free space there, or "
                    f"give another --output_dir"
                ) from error
        dist.barrier()
        yield


def _take(file: IO[str], output_dir: Path) -> None:
    file.seek(0)
    holder = file.read()
    if not locks.acquire(file, output_dir):
        raise ValueError(
            f"--output_dir {output_dir} is being written to by another run ({holder}): wait for it, stop it, or give "
            f"another --output_dir"
        )
    if holder:
        logger.info(f"the previous run ({holder}) was killed")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def begin_branch(output_dir: Path, resumed: Path) -> None:
    """Moves the checkpoints after the resumed one to `abandoned/N`, so that the resumed one is the newest.

    Checkpoints that can't be read are moved too. log.txt and the TensorBoard events are copied to the folder. After a
    crash in this function, the next start moves the remaining files.

    Raises:
        OSError: the files can't be moved.
    """
    position = checkpoint.position(resumed)
    later = [path.name for path in checkpoint.checkpoints(output_dir) if _is_later(path, position)]
    if later:
        above = output_dir / ABANDONED
        above.mkdir(exist_ok=True)
        numbers = [int(path.name) for path in above.iterdir() if path.name.isdecimal()]
        branch = above / str(max(numbers, default=0) + 1)
        branch.mkdir()
        for path in (output_dir / "log.txt", *output_dir.glob("events.out.tfevents.*")):
            if path.exists():
                shutil.copy2(path, branch)
        atomic.write_text(branch / MOVING, json.dumps(later))
        _finish_moving(output_dir)
        logger.info(f"moved to {branch}: {', '.join(later)}")
    atomic.write_text(output_dir / RESUMED, str(resumed.resolve()))


def _is_later(path: Path, position: tuple[int, int]) -> bool:
    try:
        return checkpoint.position(path) > position
    except checkpoint.CheckpointError:
        return True


def _finish_moving(output_dir: Path) -> None:
    for names in output_dir.glob(f"{ABANDONED}/*/{MOVING}"):
        for name in json.loads(names.read_text(encoding="utf-8")):
            if (output_dir / name).exists():
                (output_dir / name).rename(names.with_name(name))
        names.unlink()
