"""The run directory, its checkpoints and its lock. It must not contain another run; one run at a time writes to it."""

import contextlib
import functools
import gzip
import logging
import math
import os
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mae import parallel
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import STATE, CheckpointError
from mae.files import atomic, locks

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"  # of files, and of folders of sharded runs
LAST = f"{PREFIX}last.pth"
BEST = f"{PREFIX}best.pth"
EMERGENCY = f"{PREFIX}emergency.pth"
LOCK = "run.lock"
SHARED_SECONDS = 5.0  # until a file that one machine wrote must be visible on the others, also with NFS
RESUMED = ".resumed"  # contains the path of the checkpoint from which the run has resumed (--resume FILE)
IMAGES = "train_images.gz"  # the names of the training images, each followed by a zero byte


def checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints in a run directory: files, and folders of sharded runs."""
    paths = [*folder.glob(PREFIX + "*.pth"), *(p.parent for p in folder.glob(f"{PREFIX}*/{STATE}"))]
    return sorted([*paths, *(p.parent for p in folder.glob(f".{PREFIX}*.old/{STATE}"))])  # left by a crash


def milestone(epoch: int) -> str:
    """Returns the file name of the state after an epoch."""
    return f"{PREFIX}{epoch}.pth"


def milestones(folder: Path) -> list[Path]:
    """Lists the milestones of a run, oldest first."""
    numbers = ((path.stem.removeprefix(PREFIX), path) for path in checkpoints(folder))
    return [path for _, path in sorted((int(number), path) for number, path in numbers if number.isdecimal())]


def newest_first(folder: Path) -> list[Path]:
    """Lists the readable checkpoints in a folder, in descending order of their progress.

    File times are ignored, because copying a folder changes them.
    """
    positions = []
    for path in checkpoints(folder):
        try:
            positions.append((position(path), path))
        except CheckpointError as error:
            _warn_once(f"resume=auto skips {path.name}: {error}")
    return [path for _, path in sorted(positions, reverse=True)]


@functools.cache
def _warn_once(text: str) -> None:
    """Logs a warning of a file once, although a run lists its files several times."""
    logger.warning(text)


def best_first(folder: Path) -> list[Path]:
    """Lists the readable checkpoints in a folder: checkpoint-best.pth, if any, and the others as `newest_first`.

    A warning says if the run has selected a best state that can't be read.
    """
    paths = sorted(newest_first(folder), key=lambda path: path.stem != Path(BEST).stem)
    if paths and lacks_best(paths[0]):
        logger.warning(f"{folder / BEST}, the best state of the run, is gone or damaged: {paths[0]} is another one")
    return paths


def readable_best(folder: Path) -> Path | None:
    """Returns checkpoint-best.pth, or the folder of a sharded one; None if it can't be read. Its tensors are not."""
    for path in checkpoints(folder):
        if path.stem == Path(BEST).stem:
            with contextlib.suppress(CheckpointError):
                position(path)
                return path
    return None


def lacks_best(path: Path) -> bool:
    """Whether a readable checkpoint is not the best state, and its run has selected one before it."""
    progress = checkpoint.read(path, verify=False).get("progress") or {}
    has_selected = bool(progress.get("selection")) or math.isfinite(progress.get("best_accuracy", -math.inf))
    return path.stem != Path(BEST).stem and has_selected


def position(path: Path) -> tuple[int, int]:
    """Returns the position from which a checkpoint resumes: epoch, and number of images of that epoch.

    Raises:
        CheckpointError: the checkpoint can't be read.
    """
    state = checkpoint.read(path, verify=False)
    try:
        progress = state.get("progress") or {"epoch": state["epoch"] + 1, "images_done": 0}
        return progress["epoch"], progress["images_done"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not record the position of a run ({error!r})") from error


def refuse(path: Path) -> None:
    """Raises CheckpointError if a path is a run directory. The message names its newest checkpoint."""
    if path.is_dir() and not (path / STATE).is_file() and (files := newest_first(path)):
        raise CheckpointError(f"{path} is a run directory: give its newest checkpoint, {files[0]}")


def chosen(output_dir: Path, resume: str) -> str:
    """Returns the checkpoint to resume from: a path, "auto" for the newest checkpoint in `output_dir`, or "".

    A run that has resumed from a file and has no checkpoint of its own yet resumes from this file again.
    """
    if not _continues(output_dir, resume):
        return resume
    return "auto" if checkpoints(output_dir) else _content(output_dir / RESUMED) or "auto"


def starting_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """Returns the checkpoint from which a run starts; None: it starts anew."""
    resumed = chosen(output_dir, resume)
    if resumed == "auto":
        return next(iter(newest_first(output_dir)), None)
    return Path(resumed) if resumed else None


def _continues(output_dir: Path, resume: str) -> bool:
    """Whether a run continues the run in its directory: --resume auto, or --resume FILE is repeated.

    A person who names a file of the directory wants this file.
    """
    if resume in ("", "auto"):
        return resume == "auto"
    is_recorded = _content(output_dir / RESUMED) == str(Path(resume).resolve())
    return is_recorded and not _is_inside(output_dir, resume)


def _content(path: Path) -> str:
    """Returns the content of a file in the run directory, or "" if there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return path.read_text(encoding="utf-8")
    return ""


def _is_inside(output_dir: Path, resume: str) -> bool:
    return bool(resume) and Path(resume).resolve().parent == output_dir.resolve()


def prepare(output_dir: Path, resume: str) -> None:
    """Creates the run directory.

    Raises:
        ValueError: the run would overwrite a run in the directory: its checkpoints, or those after `resume`.
        OSError: the directory can't be created.
    """
    _require_unused(output_dir, resume)
    output_dir.mkdir(parents=True, exist_ok=True)


def _require_unused(output_dir: Path, resume: str) -> None:
    if not parallel.is_main() or _continues(output_dir, resume):
        return
    if _is_inside(output_dir, resume):
        if later := _later(output_dir, Path(resume)):
            raise ValueError(
                f"resume={resume}: output_dir={output_dir} contains later checkpoints ({', '.join(later[:3])}): "
                f"give another `output_dir`, or continue the run with resume=auto"
            )
        return
    files = [path.name for path in output_dir.glob("*") if path.name == "log.txt" or path.suffix == ".pth"]
    existing = sorted({*files, *(path.name for path in checkpoints(output_dir))})
    if existing:
        raise ValueError(
            f"output_dir={output_dir} already contains a run ({', '.join(existing[:3])}): resume it with "
            f"resume=auto, or give another `output_dir`"
        )


def _later(output_dir: Path, file: Path) -> list[str]:
    """Returns the names of the checkpoints after `file`; none if the file can't be read, which ends the run later."""
    with contextlib.suppress(CheckpointError):
        start = position(file)
        return sorted(p.name for p in newest_first(output_dir) if position(p) > start)
    return []


@contextlib.contextmanager
def locked(output_dir: Path, resume: str = "auto") -> Iterator[None]:
    """Context manager that locks a run directory. The system releases the lock when the process ends for any reason.

    Args:
        resume: as in `prepare`, whose check is repeated: another run may have ended in the meantime.

    Raises:
        ValueError: another run has locked the directory, or has trained in it; or the processes have different
            directories of this path.
        OSError: the directory can't be written to.
    """
    with contextlib.ExitStack() as stack:
        if parallel.is_main():
            try:
                # Without a buffer: closing the file on a full disk would raise a second error, without a name.
                file = stack.enter_context((output_dir / LOCK).open("ab+", buffering=0))
                _take(file, output_dir)
                stack.callback(file.truncate, 0)  # the file is not deleted, because another process may have it open
                _require_unused(output_dir, resume)
                if not (_continues(output_dir, resume) or _is_inside(output_dir, resume)):
                    (output_dir / RESUMED).unlink(missing_ok=True)  # of a run that was killed before it wrote a file
            except OSError as error:
                raise OSError(f"output_dir={output_dir} can't be written to ({error.strerror or error})") from error
        _require_shared(output_dir)
        yield


def _require_shared(output_dir: Path) -> None:
    """Raises ValueError if a process does not find the lock file of rank 0: it would resume without its checkpoints."""
    expected = parallel.gather(_content(output_dir / LOCK) if parallel.is_main() else "")[0]
    ends = time.monotonic() + SHARED_SECONDS
    while not (found := _content(output_dir / LOCK) == expected) and time.monotonic() < ends:
        time.sleep(0.2)
    hosts = parallel.gather("" if found else socket.gethostname())
    if others := [f"process {rank} on {host}" for rank, host in enumerate(hosts) if host]:
        raise ValueError(f"output_dir={output_dir} of {others[0]} is another directory than that of process 0")


def _take(file: IO[bytes], output_dir: Path) -> None:
    file.seek(0)
    holder = file.read().decode()
    if not locks.acquire(file, output_dir):
        raise ValueError(f"output_dir={output_dir} is being written to by another run ({holder})")
    if holder:
        logger.info(f"the previous run ({holder}) was killed")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    os.fsync(file.fileno())  # with NFS, other machines see it


def record_start(output_dir: Path, resumed: Path) -> None:
    """Records the checkpoint from which the run has resumed, so that the same command continues the run.

    Raises:
        OSError: the record can't be written.
    """
    atomic.write_text(output_dir / RESUMED, str(resumed.resolve()))


def record_images(output_dir: Path, names: bytes) -> None:
    """Records the names of the training images for `interrupted_images`, unless they are empty. Rank 0 writes them.

    Raises:
        OSError: the record can't be written.
    """
    if not names or not parallel.is_main():
        return
    with atomic.replacing(output_dir / IMAGES) as temporary:
        temporary.write_bytes(gzip.compress(names, compresslevel=1))


def interrupted_images(output_dir: Path, resume: str) -> list[str]:
    """Returns the names of the training images of a run that resumes within an epoch; none if they are not recorded.

    Args:
        resume: as in `prepare`.
    """
    file = starting_checkpoint(output_dir, resume)
    with contextlib.suppress(CheckpointError):  # of the file, which ends the run later
        if file and (file.parent / IMAGES).is_file() and position(file)[1]:
            return _read_names(file.parent / IMAGES)
    return []


def _read_names(file: Path) -> list[str]:
    try:
        return os.fsdecode(gzip.decompress(file.read_bytes())).split("\0")[:-1]
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it") from error
