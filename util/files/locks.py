"""Locks: one process at a time writes to a folder."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


def acquire(file: IO[str], folder: Path) -> bool:
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
