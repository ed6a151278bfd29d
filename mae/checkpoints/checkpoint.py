"""The format of checkpoints: written atomically, verified when read.

A checkpoint contains {model, optimizer, epoch, scaler, args} as in the published code, and `progress`, `rng`, `digest`,
and `callbacks` if there are any. It consists of dicts, lists, tensors and plain values. The checkpoint of a sharded run
is a folder (`sharded_state`); `state.pth` in it has this format, without tensors.
"""

import errno
import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from mae.files import atomic
from mae.files.untrusted import open_file, printable

STATE = "state.pth"  # in the folder of a sharded checkpoint
MAX_PARTS = 1_000_000  # largest number of parts of a state; a part that is referenced twice counts twice
MAX_DEPTH = 30
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN)  # the file may be undamaged
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TEXTS = {  # what a download may leave in place of weights, by its start in lower case
    LFS_POINTER: "a pointer of Git LFS: run git lfs pull in its folder",
    **dict.fromkeys((b"<!doctype", b"<html", b"<?xml"), "a web page: download the file by its own link"),
}
ZIP = b"pk\x03\x04"  # how a zip archive starts, in lower case
# torch.load accepts instances of these types, but not of all their subclasses (weights_only).
PLAIN = {type(None), bool, int, float, str, bytes, list, tuple, dict, OrderedDict, torch.Size, torch.dtype}


class CheckpointError(ValueError):
    """A file can't be used. The message has the reason. Text from the file is made printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Namespace(SimpleNamespace):
    """Stands for the argparse.Namespace in files of the published code."""


def compute_digest(state: Any) -> str:
    """Returns the SHA-256 of the names, types, shapes and values in a nested state, in their order."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            sha.update(f"dict {len(value)} ".encode())
            for key, item in value.items():
                sha.update(f"{key!r}: ".encode())
                feed(item)
        elif isinstance(value, list | tuple):
            sha.update(f"{type(value).__name__} {len(value)} ".encode())
            for item in value:
                feed(item)
        else:
            sha.update(f"{value!r} ".encode())

    feed(state)
    return f"sha256:{sha.hexdigest()}"


def require_plain(value: Any, name: str) -> None:
    """Checks that `read` will accept a state: tensors and plain values only.

    Args:
        name: name of the state, for the message.

    Raises:
        ValueError: the state contains another object, such as a Path or a NumPy number.
    """
    waiting = [(value, name)]
    while waiting:
        value, name = waiting.pop()
        if type(value) not in PLAIN and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, and checkpoints contain tensors and plain values only"
            )
        if isinstance(value, dict):
            waiting += [(key, f"a key of {name}") for key in value]
            waiting += [(item, f"{name}.{key}") for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(item, f"{name}.{number}") for number, item in enumerate(value)]


def write(state: dict[str, Any], path: Path, *also: Path) -> None:
    """Writes a state and its digest atomically: the previous file survives a crash.

    Args:
        state: tensors on the host (`snapshot`). It is not copied and must not change during the call.
        also: further paths of the same file, in the same folder.

    Raises:
        ValueError: `read` would not accept the state (`require_plain`).
        OSError: the disk is full, or the folder can't be written to. The previous file is unchanged.
    """
    for key, value in state.items():
        require_plain(value, key)
    state = {**state, "digest": compute_digest(state)}
    with atomic.replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
        for other in also:
            with atomic.replacing(other) as name:
                link(temporary, name)


def link(file: Path | str, path: Path | str) -> None:
    """Makes a hard link, or a copy if the file system does not support links."""
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)


def require_finite(tensors: Mapping[str, Any], origin: str, remedy: str) -> None:
    """Checks that weights are finite.

    Args:
        tensors: the weights by name.
        origin: the file, for the message.
        remedy: the end of the message.

    Raises:
        CheckpointError: a tensor contains NaN or infinity.
    """
    bad = [
        name for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all()
    ]  # fmt: skip
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise CheckpointError(f"{origin}: NaN or infinite values in {bad[0]}{more}: {remedy}")


def snapshot(value: Any) -> Any:
    """Copies a nested state to the host. Later changes of the state do not affect the copy."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def read(path: Path | str, verify: bool = True) -> dict[str, Any]:
    """Reads a checkpoint without executing code from it. If it contains a digest, the content must match.

    The entry `args`, the settings, is a dict, also of files of the published code. The tensors of a sharded checkpoint
    are not read; the entry `folder` is its path.

    Args:
        verify: False for the names and plain values alone; the tensors stay in the file, and no digest is compared.

    Raises:
        CheckpointError: the file is missing, damaged, or contains anything but tensors and plain values.
        OSError: the system can't read the file, which may be undamaged.
    """
    path = Path(path)
    file = path / STATE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint {file}")
    try:
        with open_file(file) as opened:
            is_zip = check_file(opened)
        with torch.serialization.safe_globals([(Namespace, "argparse.Namespace")]):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip and not verify)
        _check_parts(state)
        digest = state.pop("digest", None)
        if verify and digest is not None and digest != compute_digest(state):
            raise ValueError("the content does not match the digest")
    except pickle.UnpicklingError as error:
        # PyTorch raises the same error for other objects and for damage.
        match = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file} is refused: it is damaged, or it contains objects other than tensors and plain values"
            f"{f' ({match[1]})' if match else ''}, which could run code when loaded. Nothing in it was executed. "
            f"Write its weights in a file of their own with the library that saved it (mmengine: publish_model.py)"
        ) from error
    except Exception as error:  # the zip and pickle readers raise any exception
        if isinstance(error, OSError) and error.errno in NO_ACCESS:
            raise OSError(f"{file} can't be read ({error.strerror})") from error
        raise CheckpointError(f"{file} is not a checkpoint, or is damaged: {error}") from error
    args = state.get("args")
    state["args"] = vars(args) if isinstance(args, Namespace) else args if isinstance(args, dict) else {}
    return {**state, "folder": str(path)} if path.is_dir() else state


def check_file(file: BinaryIO) -> bool:
    """Checks what the readers of files of weights do not check.

    A download may have left a text in place of the weights. torch.load does not verify the checksum of names and plain
    values; without it, damage could rename the key `digest`, and the digest would not be verified.

    Args:
        file: an open file, at its start.

    Returns:
        Whether the file is a zip archive. Files of PyTorch before 1.6 are not.

    Raises:
        ValueError: the file is empty, a text or incomplete, or its parts are compressed.
        zipfile.BadZipFile: it is damaged.
    """
    start = file.read(len(LFS_POINTER)).lower().lstrip()
    if not start:
        raise ValueError("it is empty")
    for text, what in TEXTS.items():
        if start.startswith(text):
            raise ValueError(f"it is {what}")
    if not zipfile.is_zipfile(file):
        if start.startswith(ZIP):  # the list of its parts is at the end
            raise ValueError("its end is missing: copy or download it again")
        return False
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its parts are compressed, which torch.save does not do")  # they could fill the memory
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                archive.read(name)
    return True


def _check_parts(state: Any) -> None:
    """Raises ValueError if a small file expands to a large state, or a tensor has fewer values than its shape."""
    if not isinstance(state, dict):
        raise ValueError(f"it contains a {type(state).__name__}")
    waiting = [(state, 0)]
    parts = 0
    while waiting:
        value, depth = waiting.pop()
        parts += 1
        if parts > MAX_PARTS or depth > MAX_DEPTH:
            raise ValueError("it contains too many or too deeply nested lists")
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list | tuple | set):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                raise ValueError("a tensor is sparse, quantized or without data; save it as a dense tensor")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(
                    f"a tensor of shape {tuple(value.shape)} has fewer values in the file; save its clone()"
                )
