"""Files and folders that are complete, or not there: whatever stops a command, no part of one lies under its name."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Gives a path to write a file or a folder to. When the block ends, what was written takes the place of `path`.

    The given path has the same name, in a hidden folder beside `path`; other files that the block writes there move
    along. Of a folder that exists already, files of the same names are replaced, and the others stay. A link is
    followed. What is neither file nor folder, such as /dev/stdout, is written to directly.

    The block should do nothing but write: an OSError of it is taken for a failure to write `path`.

    Args:
        sync: wait until the data is on the disk, so that even a power cut leaves the previous file or the new one.

    Raises:
        OSError: the disk is full, or the place can't be written to, in one line. The previous file is as it was.
    """
    target = path.resolve() if path.is_symlink() else Path(os.path.abspath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield path
        return
    temporary = (target if target.is_dir() else target.parent) / f".{target.name}.tmp"
    written = temporary / target.name
    try:
        with writing(path):
            _remove(temporary)  # of a command that was killed
            temporary.mkdir()
            yield written
            mode = temporary.stat().st_mode & 0o666  # by the umask; safetensors writes files for their owner alone
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
            if sync:
                _sync(temporary)
            for beside in set(temporary.iterdir()) - {written}:
                _move(beside, target.with_name(beside.name))
            _move(written, target)
    finally:
        _remove(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that does nothing but write to `path`.

    Raises:
        OSError: it failed to, in one line that names the path, the reason, and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        remedy = "free space there, or write to another place" if number in FULL else "write to another place"
        raise OSError(f"can't write {path} ({os.strerror(number)}): {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _move(written: Path, path: Path) -> None:
    if written.is_dir() and path.is_dir():
        for part in written.iterdir():
            _move(part, path / part.name)
    else:
        written.replace(path)


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of a failure to write, if it is one.

    PyTorch raises a RuntimeError from it when it writes to an open file, safetensors has it in its text.
    """
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return int(number[1]) if number else None
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__context__
    return None
