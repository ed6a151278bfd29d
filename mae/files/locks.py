"""Locks: one process at a time writes to a folder."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mae.files import atomic

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # between two attempts


class Busy(ValueError):
    """Another process has locked a folder."""


@contextmanager
def locked(folder: Path, name: str = "lock", waits: bool = False) -> Iterator[None]:
    """Context manager that creates a folder and locks it.

    Args:
        name: name of the lock file. It stays in the folder, because another process may have it open.
        waits: wait until no other process has locked the folder.

    Raises:
        Busy: another process has locked the folder.
        OSError: the folder can't be written to.
    """
    with atomic.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a")
    with file:
        while not acquire(file, folder):
            if not waits:
                raise Busy(f"{folder} is being written to by another process: wait for it, or stop it")
            time.sleep(WAIT_SECONDS)
        yield


def acquire(file: IO[Any], folder: Path) -> bool:
    """Locks an open file in `folder`. The system releases the lock when the process ends for any reason.

    Some network file systems have no locks; a warning names `folder`.

    Returns:
        False if another process has locked the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(f"{folder} can't be locked ({error.strerror}): make sure that no other process writes to it")
    os.register_at_fork(after_in_child=file.close)  # worker processes run for seconds after their parent was killed
    return True
