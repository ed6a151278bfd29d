"""Atomic writes: a file or folder is complete or absent, also after a command was killed."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_NAME = 255  # bytes of the name of a file


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Context manager that replaces `path`, a file or a folder, when its block ends without an error.

    It yields a temporary path with the same name, in a hidden folder beside `path`. Other files that the block writes
    to the hidden folder are moved beside `path` too. In an existing folder, files with the same names are replaced, and
    other files are kept. Links are followed. Special files such as /dev/stdout are written directly.

    The block must only write: any OSError in it counts as a failure to write `path`.

    Args:
        sync: wait until the data is on the disk, so that the previous or the new file survives a power failure.

    Raises:
        OSError: `path` can't be written; the message is one line. The previous file is unchanged.
    """
    target = path.resolve() if path.is_symlink() else Path(os.path.abspath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield path
        return
    temporary = (target if target.is_dir() else target.parent) / temporary_name(target.name, ".{}.tmp")
    written = temporary / target.name
    try:
        with writing(path):
            _remove(temporary)  # left by a command that was killed
            temporary.mkdir()
            yield written
            mode = temporary.stat().st_mode & 0o666  # follows the umask; files of safetensors are readable by the owner
            for file in filter(Path.is_file, temporary.rglob("*")):
                file.chmod(mode)
                if sync:
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            for beside in set(temporary.iterdir()) - {written}:
                _move(beside, target.with_name(beside.name))
            _move(written, target)
    finally:
        _remove(temporary)


def temporary_name(name: str, pattern: str) -> str:
    """Returns a pattern such as "{}.partial" with a name in it; with a digest if a file system refuses its length."""
    long = len(os.fsencode(pattern.format(name))) > MAX_NAME
    return pattern.format(hashlib.sha256(os.fsencode(name)).hexdigest() if long else name)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager of a block that only writes to `path`.

    Raises:
        OSError: the block failed to write. The message is one line with path, reason and remedy.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        remedy = "free space there, or write to another folder" if number in FULL else "write to another folder"
        raise OSError(f"can't write {path} ({os.strerror(number)}): {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move(written: Path, path: Path) -> None:
    if written.is_dir() and path.is_dir():
        for part in written.iterdir():
            _move(part, path / part.name)
    else:
        written.replace(path)


def _error_number(error: BaseException | None) -> int | None:
    """Returns the errno of a failure to write, or None for another error.

    PyTorch raises a RuntimeError with an OSError as its context; the message of a SafetensorError contains the number.
    """
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return int(number[1]) if number else None
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__context__
    return None
