"""Checks of untrusted files: they reject file names with escape sequences, and files that never end."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

MAX_BYTES = 1 << 30  # of an image file, and of an unpacked member of an archive


def printable(text: str) -> str:
    """Converts an untrusted text, such as a file name, to one printable line for messages.

    Backslash escapes replace terminal escape sequences, line breaks, and bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_file(path: str | Path) -> FileIO:
    """Opens a regular file for reading, or a link to one.

    Raises:
        OSError: the file does not exist, or is a pipe, a socket or a device, which may never end.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    file = FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def require_files(paths: Iterable[str]) -> None:
    """Raises FileNotFoundError, before work that takes long, if a file does not exist."""
    for path in paths:
        os.stat(path)


def require_outside(name: str, outputs: Iterable[Path | None], images: Iterable[str | Path | None]) -> None:
    """Raises ValueError if an output is one of the images or in a folder of them: the next command would read it.

    Args:
        name: the setting of the outputs.
        outputs, images: files and folders; None for one that is not given.
    """
    given = {Path(image).resolve() for image in images if image is not None}
    for path in outputs:
        if path is not None and (read := given & {path.resolve(), *path.resolve().parents}):
            raise ValueError(f"{name}={path} is within {min(read)}, whose images are read: give another path")


def read_file(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a regular file.

    Args:
        limit: maximum size in bytes.

    Raises:
        OSError: as `open_file`, or the file is too large.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, and at most {limit:,} are read", str(path))
        return file.read()


def file_digest(path: str | Path, kind: str = "sha256") -> str:
    """Returns the digest of a regular file, in hexadecimal.

    Raises:
        OSError: as `open_file`.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, kind).hexdigest()
