"""The folder of a run: refused where it holds another run, and while another process writes to it."""

import contextlib
import fcntl
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
from util.checkpoints.checkpoint import CheckpointError
from util.files import atomic

logger = logging.getLogger(__name__)

LOCK = "run.lock"
RESUMED = ".resumed"  # an empty file: this run has resumed from the file that --resume names, and continues from there
ABANDONED = "abandoned"  # folder of the branches that a run went back from, counted from 1
MOVING = "moving.json"  # in the newest of them: the names of what is to be moved there, until all is


def chosen(output_dir: Path, resume: str) -> str:
    """What to resume from: what `--resume` names, or the newest checkpoint where a launcher starts this run again."""
    if not dist.restarted():
        return resume
    if resume in ("", "auto"):
        return "auto"
    return "auto" if (output_dir / RESUMED).exists() and checkpoint.checkpoints(output_dir) else resume


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
        if dist.is_main() and not dist.restarted():
            (output_dir / RESUMED).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} can't be made ({error.strerror}): give another") from error


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Holds a run's folder while it is open. The system frees it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
        OSError: it can't be written to.
    """
    with contextlib.ExitStack() as stack:
        if dist.is_main():
            try:
                file = stack.enter_context((output_dir / LOCK).open("a+", encoding="utf-8"))
                _take(file, output_dir)
                stack.callback(file.truncate, 0)  # the file stays: whoever waits for it has it open
                _finish_moving(output_dir)
            except OSError as error:
                raise OSError(
                    f"--output_dir {output_dir} can't be written to ({error.strerror or error}): free space there, or "
                    f"give another"
                ) from error
        dist.barrier()
        yield


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
    except OSError as error:  # some network file systems have no locks
        logger.warning(f"{output_dir} can't be locked ({error.strerror}): make sure that no other run writes to it")
    os.register_at_fork(after_in_child=file.close)  # worker processes outlive a killed run for seconds
    if holder:
        logger.info(f"the run before ({holder}) was killed")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def begin_branch(output_dir: Path, resumed: Path) -> None:
    """Sets aside what a run wrote after the checkpoint from which it resumes, which then is the newest.

    Checkpoints of later positions, and those that can't be read, move to a folder `abandoned/N`, which gets a copy of
    log.txt and of TensorBoard's events too. After a crash in between, the next start moves the rest.

    Raises:
        OSError: they can't be moved.
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
        logger.info(f"set aside in {branch}: {', '.join(later)}")
    (output_dir / RESUMED).touch()


def _is_later(path: Path, position: tuple[int, int]) -> bool:
    try:
        return checkpoint.position(path) > position
    except CheckpointError:
        return True


def _finish_moving(output_dir: Path) -> None:
    for names in output_dir.glob(f"{ABANDONED}/*/{MOVING}"):
        for name in json.loads(names.read_text(encoding="utf-8")):
            if (output_dir / name).exists():
                (output_dir / name).rename(names.with_name(name))
        names.unlink()
