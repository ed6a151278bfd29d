"""Processes and devices: the only reader of the launcher's environment variables.

One process needs no launcher. Several are started by torchrun, which sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Every function here works in one process too, where it does nothing.
"""

import contextlib
import gc
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is CUDA where there is one, else Apple's MPS, else the CPU.

    Under a launcher, "cuda" is the GPU of this process's place on its machine.

    Raises:
        ValueError: the device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise ValueError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}, but PyTorch sees no MPS device here; give --device cpu or auto")
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}, but PyTorch sees no CUDA device here; give --device cpu or auto")
    number, count = int(index or _launched("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"this process needs CUDA device {number}, and there are {count} here: lower torchrun's --nproc_per_node, "
            f"or the number in --device"
        )
    return torch.device("cuda", number)


def _launched(variable: str, default: int | None = None) -> int:
    value = os.environ.get(variable, default)
    if value is None:
        raise ValueError(
            f"WORLD_SIZE is set in the environment and {variable} is not: start several processes with torchrun, "
            f"or unset WORLD_SIZE for one"
        )
    return int(value)


def init(device_name: str, dist_url: str = "env://", timeout: float = 600) -> torch.device:
    """Joins the process group if a launcher started several processes; returns this process's device.

    Args:
        timeout: seconds that a process waits for the others, before it takes one of them for dead and ends.
    """
    device = choose_device(device_name)
    world_size = _launched("WORLD_SIZE", 1)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        td.init_process_group(
            backend,
            init_method=dist_url,
            timeout=timedelta(seconds=timeout),
            rank=_launched("RANK"),
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def teardown() -> None:
    """Leaves the process group. A wrapped model must be gone by then: its threads would abort the process at exit."""
    if td.is_initialized():
        gc.collect()
        td.destroy_process_group()


def rank() -> int:
    """This process's number among all."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and logs."""
    return rank() == 0


def processes_here() -> int:
    """How many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def barrier() -> None:
    """Waits until every process has come here."""
    if td.is_initialized():
        td.barrier()


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, the same tensor in each."""
    if world_size() == 1:
        return value
    value = value.clone()
    td.all_reduce(value)
    return value / world_size()


def gather(value: Any) -> list[Any]:
    """Every process's `value` (any small object), in the order of ranks, in each process."""
    values = [value] * world_size()
    if td.is_initialized():
        td.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Gives every process the buffers of rank 0, which are those that are saved."""
    if td.is_initialized():
        for buffer in model.buffers():
            td.broadcast(buffer, 0)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as DistributedDataParallel where there are several processes, else itself."""
    if world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Around a backward pass: whether gradients are averaged over the processes (once an accumulation group)."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
