"""The folder of a run: refused where it holds another run, and while another process writes to it."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from util import checkpoint, dist

logger = logging.getLogger(__name__)

LOCK = "run.lock"


def chosen(output_dir: Path, resume: str) -> str:
    """What to resume from: as told, but the newest state where a launcher starts this run again."""
    if dist.restarted() and (not resume or checkpoint.checkpoints(output_dir)):
        return "auto"
    return resume


def prepare(output_dir: Path, resume: str) -> None:
    """Makes the folder of a run, and refuses one that holds a run unless that is the one to be continued.

    Raises:
        ValueError: it holds a run, and `resume` is neither "auto" nor a file of it.
        OSError: it can't be made.
    """
    resume = chosen(output_dir, resume)
    continues = resume == "auto" or (resume and Path(resume).resolve().parent == output_dir.resolve())
    if dist.is_main() and not continues:
        files = [path.name for path in output_dir.glob("*") if path.name == "log.txt" or path.suffix == ".pth"]
        holds = sorted({*files, *(path.name for path in checkpoint.checkpoints(output_dir))})
        if holds:
            raise ValueError(
                f"--output_dir {output_dir} already holds a run ({', '.join(holds[:3])}): continue it with "
                f"--resume auto, or give another --output_dir"
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} can't be made ({error.strerror}): give another") from error


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Holds a run's folder while it is open. The system frees it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
        OSError: it can't be written to.
    """
    if not dist.is_main():
        yield
        return
    try:
        file = (output_dir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} can't be written to ({error.strerror}): give another") from error
    with file:
        _take(file, output_dir)
        try:
            yield
        finally:
            file.truncate(0)  # the file stays: whoever waits for it has it open


def _take(file: IO[str], output_dir: Path) -> None:
    file.seek(0)
    holder = file.read()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--output_dir {output_dir} is being written to by another run ({holder}): wait for it, stop it, or give "
            f"another --output_dir"
        ) from None
    except OSError as error:  # some network file systems know no locks
        logger.warning(f"{output_dir} can't be locked ({error.strerror}): see to it that no other run writes to it")
    if holder:
        logger.info(f"the run before ({holder}) ended without goodbye")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
