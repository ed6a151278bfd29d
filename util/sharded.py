"""States of sharded runs (`--fsdp`): folders, to which each process writes its part.

    python -m util.sharded runs/giant/checkpoint-799 giant.pth        # makes a plain checkpoint of one

The tensors are written and read by torch.distributed.checkpoint, by any number of processes. The rest stands in the
folder's `state.pth`, and with it the digest of every file. A folder is there when it is complete.
"""

import argparse
import hashlib
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from util import checkpoint, cli, dist
from util.checkpoint import STATE, CheckpointError

# What PyTorch's description of the tensors is made of. Nothing else is loaded, by its full name, so that nothing else
# can run: of whole modules one could reach whatever they import.
DESCRIBED_BY = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("Size", "float32", "float64", "float16", "bfloat16", "int64", "uint8")),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


def write(state: dict[str, Any], folder: Path, *also: Path, group: td.ProcessGroup | None) -> None:
    """Writes a state, in all processes together.

    Args:
        state: as `runstate.collect` has it, on the host, with the run's position.
        also: further names of it, in the same place.
        group: of all processes; nobody else uses it meanwhile.

    Raises:
        OSError: the disk is full, or the place can't be written to. The previous state is as it was.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for number, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    try:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        td.barrier(group)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
        digests: list[dict[str, str]] = [{}] * dist.world_size()
        td.all_gather_object(digests, _digests(sorted(temporary.glob(f"__{dist.rank()}_*"))), group=group)
        if dist.is_main():
            files = {name: digest for part in digests for name, digest in part.items()}
            files |= _digests([temporary / ".metadata"])
            optimizer = {"param_groups": state["optimizer"]["param_groups"]}
            rest = {**state, "optimizer": optimizer, "tensors": list(tensors), "files": files}
            checkpoint.write({name: value for name, value in rest.items() if name != "model"}, temporary / STATE)
            for other in also:
                copy = other.with_name(f".{other.name}.tmp")
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(temporary, copy, copy_function=_link)
                _put_in_place(copy, other)
            _put_in_place(temporary, folder)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        failed = getattr(error, "failures", {})
        reason = next((str(failure[0]) for failure in failed.values()), str(error)).strip().splitlines()[0]
        raise OSError(f"can't write {folder} ({reason}): free space there, or give another --output_dir") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system knows no links
        shutil.copyfile(source, target)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Gives a complete folder its name. A crash on the way leaves the one before as `.NAME.old`, which is found too."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():  # else the one before is `old` itself, and stays until the new one stands
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _digests(files: list[Path]) -> dict[str, str]:
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in DESCRIBED_BY:
            return super().find_class(module, name)
        raise CheckpointError(f"its description holds {module}.{name}, which could run code")


class _Reader(dcp.FileSystemReader):
    """PyTorch's, but that nothing in the description of the tensors is executed."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
        for name, described in metadata.state_dict_metadata.items():
            if not isinstance(described, TensorStorageMetadata):  # bytes, which PyTorch would unpickle
                raise CheckpointError(f"it holds {name}, which is no tensor")
        return metadata

    def read_sizes(self) -> dict[str, torch.Size]:
        """Of all tensors, by name."""
        described = self.read_metadata().state_dict_metadata
        return {name: tensor.size for name, tensor in described.items() if isinstance(tensor, TensorStorageMetadata)}


def _open(folder: Path, state: dict[str, Any], together: bool) -> tuple[_Reader, dict[str, torch.Size]]:
    """What reads a folder's tensors, and how large each is.

    Args:
        together: all processes do this, and share the work of checking files.

    Raises:
        CheckpointError: a file is damaged or missing, or holds anything but tensors.
    """
    files, (part, parts) = state["files"], (dist.rank(), dist.world_size()) if together else (0, 1)
    mine = sorted(files)[part::parts]
    bad = [name for name in mine if not (folder / name).is_file() or _digests([folder / name])[name] != files[name]]
    found = [name for names in (dist.gather(bad) if together else [bad]) for name in names]
    if found:
        raise CheckpointError(f"{folder} is damaged: {found[0]} does not match its digest, or is missing")
    reader = _Reader(folder)
    try:
        sizes = reader.read_sizes()
        return reader, {name: sizes[name] for name in state["tensors"]}
    except (CheckpointError, pickle.UnpicklingError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder} is refused: {error}. Nothing in it was executed.") from error


def fill(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Reads the tensors of a state that `checkpoint.read` has of a folder, each process its part of them.

    Returns:
        The state with `model` and `optimizer`, cut as the model's weights are.

    Raises:
        CheckpointError: it is damaged.
    """
    ours: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        ours[f"optimizer.{number}"] = parameter
    reader, sizes = _open(Path(state["folder"]), state, together=True)

    def room(name: str, size: torch.Size) -> Tensor:
        like = ours.get(name, ours.get(name.rpartition(".")[0]))
        return torch.zeros(size) if like is None or like.shape != size else torch.zeros_like(like)

    return _load(state, reader, {name: room(name, size) for name, size in sizes.items()}, together=True)


def _load(state: dict[str, Any], reader: _Reader, tensors: dict[str, Tensor], together: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is as good
        dcp.load(tensors, storage_reader=reader, no_dist=not together)
    model, moments = {}, dict[int, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            model[rest] = tensor
        else:
            number, _, key = rest.partition(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer = {"state": moments, "param_groups": state["optimizer"]["param_groups"]}
    whole = {"model": model, **state, "optimizer": optimizer}
    return {name: value for name, value in whole.items() if name not in ("folder", "files", "tensors")}


def gather(folder: Path) -> dict[str, Any]:
    """A folder's whole state, as a plain checkpoint holds it, read by this process alone.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    state = checkpoint.read(folder)
    if "folder" not in state:
        raise CheckpointError(f"{folder} is a plain checkpoint already")
    reader, sizes = _open(folder, state, together=False)
    return _load(state, reader, {name: torch.zeros(size) for name, size in sizes.items()}, together=False)


def main(args: argparse.Namespace) -> None:
    """Makes one file of a folder."""
    checkpoint.write(gather(args.folder), args.file)
    print(f"{args.file}: continue it with --resume, or start from its weights with --init_from or --finetune")


if __name__ == "__main__":
    parser = cli.parser("Makes a plain checkpoint of a sharded run's state.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="such as runs/giant/checkpoint-799")
    parser.add_argument("file", type=Path, metavar="FILE", help="such as giant.pth")
    cli.run(main, parser)
