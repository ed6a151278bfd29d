"""Checkpoints of sharded runs (`--fsdp`): folders, to which each process writes its shards.

The tensors are written and read by torch.distributed.checkpoint, by any number of processes. The file
`state.pth` contains everything else, and the digest of every file. Folders are written atomically.
"""

import contextlib
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as td

from mae import parallel
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import STATE, CheckpointError
from mae.files.untrusted import file_digest

T = TypeVar("T")


def write(state: dict[str, Any], folder: Path, *also: Path, group: td.ProcessGroup | None) -> None:
    """Writes a state. All processes call this together.

    Args:
        state: from `run_state.collect`, on the host, with the position of the run.
        also: further paths of the checkpoint, in the same folder.
        group: a group of all processes, without other communication during the call.

    Raises:
        ValueError: the state of the optimizer has a list or dict.
        OSError: the disk is full, or the folder can't be written to. If one process fails, all processes raise the same
            error. The previous checkpoint is unchanged, and the incomplete files are removed.
    """
    from mae.checkpoints import shard_files

    temporary = _temporary(folder)
    tensors, plain = _tensors_and_values(state)

    def remove_temporary() -> None:
        if parallel.is_main():
            for path in map(_temporary, (folder, *also)):
                shutil.rmtree(path, ignore_errors=True)

    def write_tensors() -> dict[str, str]:
        shard_files.write(tensors, temporary, group)
        return digests_of(sorted(temporary.glob(f"__{parallel.rank()}_*")))

    def complete(files: dict[str, str]) -> None:
        if not parallel.is_main():
            return
        optimizer = {"state": plain, "param_groups": state["optimizer"]["param_groups"]}
        files |= digests_of([temporary / ".metadata"])
        rest = {**state, "optimizer": optimizer, "tensors": list(tensors), "files": files}
        checkpoint.write({name: value for name, value in rest.items() if name != "model"}, temporary / STATE)
        for other in also:
            shutil.copytree(temporary, _temporary(other), copy_function=checkpoint.link)
            replace_folder(_temporary(other), other)
        replace_folder(temporary, folder)

    try:
        _in_all(remove_temporary, group)
        files = {name: digest for digests in _in_all(write_tensors, group) for name, digest in digests.items()}
        _in_all(partial(complete, files), group)
    except OSError as error:
        with contextlib.suppress(OSError):
            _in_all(remove_temporary, group)
        raise OSError(f"can't write {folder} ({error})") from error


def _tensors_and_values(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[Any, dict[str, Any]]]:
    """Returns the tensors of a state by name, and the other values of the state of its optimizer, such as a step."""
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    plain: dict[Any, dict[str, Any]] = {}
    for number, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            elif isinstance(value, list | tuple | dict):  # it may contain shards, of which this process has one
                raise ValueError(f"`fsdp` can't save {name} in the state of the optimizer, a {type(value).__name__}")
            else:
                plain.setdefault(number, {})[name] = value
    return tensors, plain


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _in_all(function: Callable[[], T], group: td.ProcessGroup | None) -> list[T]:
    """Calls a function in all processes, and returns the results of all of them.

    Raises:
        OSError: the function failed in a process. All processes raise it, with the reason of the first that failed.
    """
    from mae.checkpoints import shard_files

    result: T | None = None
    reason = ""
    try:
        result = function()
    except shard_files.ERRORS as error:
        reason = shard_files.reason(error)
    try:
        results = parallel.gather((result, reason), group)
    except RuntimeError as error:  # a process ended
        raise OSError(shard_files.reason(error)) from error
    for first in filter(None, (reason for _, reason in results)):
        raise OSError(first)
    return [result for result, _ in results]


def replace_folder(temporary: Path, folder: Path) -> None:
    """Renames a complete folder. After a crash, the previous folder is `.NAME.old`, which `checkpoints` lists too."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():  # otherwise `old` is the previous checkpoint, and is kept until the new one is complete
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def digests_of(files: list[Path]) -> dict[str, str]:
    return {file.name: file_digest(file) for file in files}


def read(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint, a file or a folder, in all processes together. Each process verifies a part of the files.

    Returns:
        As `checkpoint.read`. The tensors of a folder are not read; `fill` reads them.

    Raises:
        CheckpointError: as in `checkpoint.read`, or a file of the folder is damaged. If one process finds damage, all
            processes raise the same error.
    """
    state = dict[str, Any]()
    error = ""
    try:
        state = checkpoint.read(path)
        if "folder" in state:
            _check(state, parallel.rank(), parallel.world_size())
    except CheckpointError as exception:
        error = str(exception)
    for first in filter(None, parallel.gather(error)):
        raise CheckpointError(first)
    return state


def _check(state: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Verifies the digests of a part of the files, and reads the metadata of the tensors.

    Raises:
        CheckpointError: a file is damaged or missing, or the folder contains anything but tensors.
    """
    folder = Path(state["folder"])
    try:
        for group in state["optimizer"]["param_groups"]:
            list(group["params"])
        files = state["files"]
        if any(Path(name).name != name for name in files):
            raise ValueError(f"its {STATE} names files outside of the folder")
        for name in sorted(files)[part::parts]:
            if file_digest(folder / name) != files[name]:
                raise ValueError(f"{name} does not match its digest")
        _sizes(state)
    except Exception as error:  # pickle raises any exception on damaged bytes
        raise CheckpointError(f"{folder} is refused, or is damaged: {error}. Nothing in it was executed.") from error


def _sizes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """Returns the shapes of all tensors of a folder, by name.

    Raises:
        Exception: the metadata of the tensors is damaged, or contains anything but tensors.
    """
    from mae.checkpoints import shard_files

    described: Any = shard_files.ShardReader(state["folder"]).read_metadata().state_dict_metadata
    sizes = {name: tensor.size for name, tensor in described.items()}
    num_bytes = sum(file.stat().st_size for file in Path(state["folder"]).iterdir() if file.is_file())
    if sum(math.prod(size) for size in sizes.values()) > num_bytes:
        raise CheckpointError("its tensors are larger than its files")
    return {name: sizes[name] for name in state["tensors"]}


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state of an optimizer with parameter names instead of numbers.

    `get_optimizer_state_dict` of PyTorch returns the same names, but changes an optimizer before its first step.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[number]: moments for number, moments in state["state"].items()}, "param_groups": groups}


def fill(state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Reads the tensors of a folder that `read` returned. Each process reads its shards.

    Returns:
        The state with `model` and `optimizer`, sharded like the weights of the model. The parameters of the optimizer
        have the numbers of this run.

    Raises:
        CheckpointError: the tensors can't be read.
    """
    saved = state["optimizer"]["param_groups"]
    groups = optimizer_state(model, optimizer)["param_groups"]
    if len(saved) == len(groups):  # else of another architecture: `resume.restore_model` raises an error
        groups = [{**saved_group, "params": group["params"]} for saved_group, group in zip(saved, groups, strict=True)]
    state = {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
    ours: dict[str, torch.Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    ours |= {f"optimizer.{name}": parameter for name, parameter in model.named_parameters()}

    def room(name: str, size: torch.Size) -> torch.Tensor:
        like = ours.get(name, ours.get(name.rpartition(".")[0]))
        return torch.zeros(size) if like is None or like.shape != size else torch.zeros_like(like)

    return _load(state, {name: room(name, size) for name, size in _sizes(state).items()}, together=True)


def _load(state: dict[str, Any], tensors: dict[str, torch.Tensor], together: bool) -> dict[str, Any]:
    from mae.checkpoints import shard_files

    shard_files.read(tensors, state["folder"], together)
    groups = state["optimizer"]["param_groups"]
    names = [str(name) for group in groups for name in group["params"]]
    number = {name: number for number, name in enumerate(names)}  # a plain checkpoint numbers the parameters
    plain = state["optimizer"].get("state", {})  # checkpoints of earlier versions have tensors only
    model = {}
    moments = {number[name]: dict(values) for name, values in plain.items() if name in number}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        key, _, moment = rest.rpartition(".")
        if kind == "model":
            model[rest] = tensor
        elif key in number:  # other names are of another architecture, and `resume.restore_model` raises an error
            moments.setdefault(number[key], {})[moment] = tensor
    groups = [{**group, "params": [number[str(name)] for name in group["params"]]} for group in groups]
    complete = {"model": model, **state, "optimizer": {"state": dict(sorted(moments.items())), "param_groups": groups}}
    return {name: value for name, value in complete.items() if name not in ("folder", "files", "tensors")}


def gather(folder: Path) -> dict[str, Any]:
    """Reads the complete state of a folder in one process, as in a plain checkpoint.

    Raises:
        CheckpointError: the folder is not a sharded checkpoint, or is damaged.
    """
    state = checkpoint.read(folder)
    if "folder" not in state:
        raise CheckpointError(f"{folder} is already a plain checkpoint")
    _check(state)
    return _load(state, {name: torch.zeros(size) for name, size in _sizes(state).items()}, together=False)
