"""Processes and devices: the only reader of the launcher's environment variables.

One process needs no launcher. Several are started by torchrun, which sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, or by Slurm's srun, whose variables are translated to these. Every function here works in one process too,
where it does nothing.
"""

import contextlib
import gc
import os
import re
import socket
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

BACKENDS = ("auto", "nccl", "gloo")


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
    if not index and _has_own_gpus():
        number %= count
    if number >= count:
        raise ValueError(
            f"this process needs CUDA device {number}, and there are {count} here: start fewer processes on this "
            f"machine (torchrun's --nproc_per_node, submitit_pretrain.py --ngpus), or give --device cuda:0 if each one "
            f"sees its own GPU"
        )
    return torch.device("cuda", number)


def _has_own_gpus() -> bool:
    """Whether Slurm shows this process, a task of srun, other GPUs than it shows the node's other tasks.

    SLURM_STEP_GPUS lists the GPUs of a task where they are bound to tasks, else those of all tasks of the node.
    """
    slurm = os.environ
    if slurm.get("SLURM_LOCALID") != slurm.get("LOCAL_RANK"):  # torchrun within a task
        return False
    ranges = re.findall(r"(\d+)(?:-(\d+))?", slurm.get("SLURM_STEP_GPUS", ""))
    num_gpus = sum(int(last or first) - int(first) + 1 for first, last in ranges)
    return "SLURM_GPUS_PER_TASK" in slurm or 0 < num_gpus < int(slurm.get("SLURM_GPUS_ON_NODE", 0))


def _launched(variable: str, default: int | None = None) -> int:
    value = os.environ.get(variable, default)
    if value is None:
        raise ValueError(
            f"WORLD_SIZE is set in the environment and {variable} is not: start several processes with torchrun, "
            f"or unset WORLD_SIZE for one"
        )
    if not str(value).isdecimal():
        raise ValueError(f"{variable}={value} in the environment is no number: torchrun and srun set it, or unset it")
    return int(value)


def _translate_srun() -> None:
    """Sets torchrun's variables from those of an srun step of several tasks.

    A batch script, or a shell that salloc opened, is no such step, and its program stays one process.

    Raises:
        ValueError: a variable that srun sets is missing, as in a container that passes only some of them on.
    """
    slurm = os.environ
    if "WORLD_SIZE" in slurm or slurm.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    formats = dict.fromkeys(("STEP_NUM_TASKS", "PROCID", "LOCALID", "JOB_ID", "STEP_ID", "STEP_TASKS_PER_NODE"), r"\d+")
    formats["STEP_NODELIST"] = r"([^\[,]+)(?:\[(\d+))?"  # "n[03-04,7]" or "a1,b2": where rank 0 runs
    read = {name: re.match(pattern, slurm.get(f"SLURM_{name}", "")) for name, pattern in formats.items()}
    matches = {name: match for name, match in read.items() if match}
    if missing := [f"SLURM_{name}" for name in formats if name not in matches]:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={slurm['SLURM_STEP_NUM_TASKS']} in the environment, but {', '.join(missing)} (which "
            f"srun sets) are missing: pass all SLURM_* variables on to the processes, or unset SLURM_STEP_NUM_TASKS "
            f"for a single process"
        )
    translated = {
        "RANK": matches["PROCID"][0],
        "LOCAL_RANK": matches["LOCALID"][0],
        "WORLD_SIZE": matches["STEP_NUM_TASKS"][0],
        "LOCAL_WORLD_SIZE": matches["STEP_TASKS_PER_NODE"][0],
        "MASTER_ADDR": matches["STEP_NODELIST"][1] + (matches["STEP_NODELIST"][2] or ""),
        # below the ports that Linux gives away by itself
        "MASTER_PORT": str(20000 + (int(matches["JOB_ID"][0]) + int(matches["STEP_ID"][0])) % 12000),
    }
    for variable, value in translated.items():
        slurm.setdefault(variable, value)


def restarted() -> bool:
    """Whether a launcher starts this run again: torchrun after a failure (--max-restarts), Slurm after a requeue."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def init(device_name: str, dist_url: str = "env://", timeout: float = 600, backend: str = "auto") -> torch.device:
    """Joins the process group if a launcher started several processes; returns this process's device.

    Args:
        timeout: seconds that a process waits for the others, before it takes one of them for dead and ends.
        backend: of BACKENDS; auto is nccl for GPUs, else gloo.

    Raises:
        ValueError: nccl without a GPU; the launcher's variables are incomplete; the other processes were not found.
    """
    _translate_srun()
    device = choose_device(device_name)
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"--dist_backend nccl connects GPUs, and the device is {device.type}: give gloo or auto")
    world_size = _launched("WORLD_SIZE", 1)
    if world_size > 1:
        if _launched("RANK") >= world_size:
            raise ValueError(f"RANK={_launched('RANK')} in the environment must be below WORLD_SIZE={world_size}")
        if backend == "auto":
            backend = "nccl" if device.type == "cuda" else "gloo"
        _join(dist_url, world_size, backend, timeout, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _join(dist_url: str, world_size: int, backend: str, timeout: float, device: torch.device) -> None:
    """Joins the process group, once all processes have come."""
    waits, number, where = timedelta(seconds=timeout), _launched("RANK"), dist_url
    if dist_url == "env://":
        if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
            raise ValueError(
                f"WORLD_SIZE={world_size} in the environment without {' and '.join(sorted(missing))}: start several "
                f"processes with torchrun, or unset WORLD_SIZE for one"
            )
        where = f"{os.environ['MASTER_ADDR']}:{_launched('MASTER_PORT')}"
    try:
        if dist_url == "env://" and number > 0:
            _wait_for_rank_0(os.environ["MASTER_ADDR"], _launched("MASTER_PORT"), timeout)
        store, number, world_size = next(td.rendezvous(dist_url, number, world_size, timeout=waits))
        # torchrun's store outlives its processes: those of another start must not find the addresses of dead ones.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        td.init_process_group(
            backend,
            store=td.PrefixStore(f"start{attempt}", store),
            timeout=waits,
            rank=number,
            world_size=world_size,
            device_id=device if backend == "nccl" else None,
        )
    except (OSError, RuntimeError) as error:
        if not _is_of_connection(error):
            raise
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise ValueError(f"{where} is in use: give torchrun another --master_port, or set MASTER_PORT") from error
        raise ValueError(
            f"process {number} of {world_size} did not reach all others at {where} within --dist_timeout {timeout:g} "
            f"seconds ({reason}): start all processes, with the same address, and let no firewall stand between them"
        ) from error


def _wait_for_rank_0(host: str, port: int, timeout: float) -> None:
    """Raises the system's own error if nobody listens there in time; PyTorch's is a backtrace and hides the reason."""
    ends = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, ends - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)


def _is_of_connection(error: OSError | RuntimeError) -> bool:
    return (
        isinstance(error, OSError | td.DistError) or "gloo" in str(error).lower()
    )  # which has no class for its errors


def lost_process(error: RuntimeError) -> str | None:
    """What an error means that a collective operation raised because another process is gone; None for other errors."""
    if world_size() == 1 or not _is_of_connection(error):
        return None
    other = f"process {1 - rank()}" if world_size() == 2 else "another process"
    reason = f" ({str(error).splitlines()[0]})" if isinstance(error, td.DistError) else ""
    return f"process {rank()} of {world_size()} lost {other}{reason}, whose log has the reason"


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


def gather(value: Any, group: td.ProcessGroup | None = None) -> list[Any]:
    """Every process's `value` (any small object), in the order of ranks, in each process.

    Args:
        group: of all processes; the one that they joined at the start by default.
    """
    values = [value] * world_size()
    if td.is_initialized():
        td.all_gather_object(values, value, group=group)
    return values


def new_host_group() -> td.ProcessGroup | None:
    """A group of all processes for what a thread of each has to tell the others, whatever the training says."""
    group = td.new_group(backend="gloo") if td.is_initialized() else None
    return group if isinstance(group, td.ProcessGroup) else None


def share_buffers(model: nn.Module) -> None:
    """Gives every process the buffers of rank 0, which are those that are saved."""
    if td.is_initialized():
        for buffer in model.buffers():
            td.broadcast(buffer, 0)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fsdp.shard` has had the model."""
    return isinstance(model, FSDPModule)


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut as another one is; itself where it is cut, or that is whole."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as DistributedDataParallel where there are several processes, else itself; it may be sharded."""
    if world_size() == 1 or is_sharded(model):
        return model
    # Of one channel, the patch projection's gradient has another order than its bucket: a small tensor is copied.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Around a backward pass: whether gradients are averaged over the processes (once an accumulation group)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
