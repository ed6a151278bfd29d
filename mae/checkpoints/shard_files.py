"""The tensor files of sharded checkpoints, written and read by torch.distributed.checkpoint without executing code.

`sharded_state.py` imports this module inside functions, because the import takes most of a second.
"""

import io
import pickle
import warnings
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch.distributed as td
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mae.checkpoints.checkpoint import CheckpointError
from mae.files.untrusted import read_file

ERRORS = (OSError, RuntimeError, dcp.CheckpointException)  # that `write` raises

# The types in the tensor metadata of PyTorch, by their full names. Nothing else is loaded, so that no code can run. A
# module name as a prefix would allow everything that the module imports.
DESCRIBED_BY = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in (
        "Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


def write(tensors: dict[str, Tensor], folder: Path, group: td.ProcessGroup | None) -> None:
    """Writes tensors to a new folder. All processes of the group call this together, and each writes its shards.

    Raises:
        Exception: one of `ERRORS`; `reason` returns its message.
    """
    dcp.save(tensors, storage_writer=_Writer(folder), process_group=group)


def read(tensors: dict[str, Tensor], folder: Path, together: bool) -> None:
    """Reads values into the given tensors, sharded or not, by name.

    Args:
        together: whether all processes call this.

    Raises:
        CheckpointError: a tensor can't be read. All processes raise it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected in a single process
        try:
            dcp.load(tensors, storage_reader=ShardReader(folder), no_dist=not together)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{folder} can't be read: {reason(error)}") from error


class _Writer(dcp.FileSystemWriter):
    """The writer of PyTorch. Its errors contain the reason in all processes."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            raise OSError(reason(error)) from error


def reason(error: BaseException) -> str:
    """Returns the first line of the original error in a chain of errors, or in the errors of several processes."""
    if isinstance(error, dcp.CheckpointException):
        return reason(next(iter(error.failures.values()))[0])
    earlier = error.__cause__ or error.__context__
    return reason(earlier) if earlier else (str(error).strip() or type(error).__name__).splitlines()[0]


def _enum_member(kind: Any, name: str) -> Enum:
    """Returns a member of an enumeration. Python 3.11.0 to 3.11.3 pickles it as a call of getattr."""
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind.__members__[name]
    raise CheckpointError(f"its metadata reads {name!r} of {kind!r}, which could run code")


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in DESCRIBED_BY:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise CheckpointError(f"its metadata contains {module}.{name}, which could run code")


class ShardReader(dcp.FileSystemReader):
    """The reader of PyTorch. It does not execute code in the tensor metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = MetadataUnpickler(io.BytesIO(read_file(Path(self.path) / ".metadata"))).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"its metadata is a {type(metadata).__name__}")
        for name, described in metadata.state_dict_metadata.items():
            if not isinstance(described, TensorStorageMetadata):  # bytes, which PyTorch would unpickle
                raise CheckpointError(f"it contains {name}, which is not a tensor")
        for info in (metadata.storage_data or {}).values():
            name = info.relative_path
            if Path(name).name != name or not (Path(self.path) / name).is_file():
                raise CheckpointError(f"its metadata names a file {name}, which is not in the folder")
        return metadata
