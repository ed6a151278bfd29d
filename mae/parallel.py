"""Processes and devices. Only this module reads the environment variables of launchers.

One process needs no launcher. torchrun starts several and sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; the variables of srun are converted to these. All functions also work in one process.
"""

import contextlib
import copy
import gc
import os
import pickle
import re
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

EXCHANGE_SECONDS = 10.0  # between the exchanges of processes that wait for another
T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """Returns the device of `--device`. `auto` is CUDA if available, else MPS, else the CPU.

    With a launcher, "cuda" is the GPU with the local rank of this process.

    Raises:
        ValueError: the name is unknown, or this machine does not have the device.
    """
    exists = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in exists if exists[kind])
    kind, _, index = name.partition(":")
    if not exists.get(kind) or (index and not index.isdecimal()):
        available = ", ".join(one for one in exists if exists[one])
        raise ValueError(f"device={name} is not available: give auto, {available}")
    if kind != "cuda":
        return torch.device(kind)
    number = int(index or os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if not index and _has_own_gpus():
        number %= count
    if number >= count:
        raise ValueError(
            f"this process needs CUDA device {number}, and this machine has {count}: start fewer processes on it, or "
            f"give device=cuda:0 if each process has a GPU of its own"
        )
    return torch.device("cuda", number)


def _has_own_gpus() -> bool:
    """Whether Slurm binds GPUs to this task of srun.

    If GPUs are bound to tasks, SLURM_STEP_GPUS lists the GPUs of this task, else the GPUs of all tasks of the node.
    """
    slurm = os.environ
    if slurm.get("SLURM_LOCALID") != slurm.get("LOCAL_RANK"):  # torchrun within a task
        return False
    ranges = re.findall(r"(\d+)(?:-(\d+))?", slurm.get("SLURM_STEP_GPUS", ""))
    num_visible = sum(int(last or first) - int(first) + 1 for first, last in ranges)
    return "SLURM_GPUS_PER_TASK" in slurm or 0 < num_visible < int(slurm.get("SLURM_GPUS_ON_NODE", 0))


def translate_srun() -> None:
    """Sets the variables of torchrun from the variables of an srun step with several tasks.

    A program in a batch script or a shell of salloc is a single process, and nothing is set.

    Raises:
        ValueError: a variable of srun is missing, for example in a container.
    """
    slurm = os.environ
    if "WORLD_SIZE" in slurm or slurm.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    formats = dict.fromkeys(("STEP_NUM_TASKS", "PROCID", "LOCALID", "JOB_ID", "STEP_ID", "STEP_TASKS_PER_NODE"), r"\d+")
    formats["STEP_NODELIST"] = r"([^\[,]+)(?:\[(\d+))?"  # "n[03-04,7]" or "a1,b2"; rank 0 runs on the first node
    matches = {name: re.match(pattern, slurm.get(f"SLURM_{name}", "")) for name, pattern in formats.items()}
    parsed = {name: match for name, match in matches.items() if match}
    if missing := [f"SLURM_{name}" for name in formats if name not in parsed]:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS is in the environment without {', '.join(missing)}, which srun sets: pass all "
            f"SLURM_* variables on to the processes, or unset SLURM_STEP_NUM_TASKS for a single process"
        )
    translated = {
        "RANK": parsed["PROCID"][0],
        "LOCAL_RANK": parsed["LOCALID"][0],
        "WORLD_SIZE": parsed["STEP_NUM_TASKS"][0],
        "LOCAL_WORLD_SIZE": parsed["STEP_TASKS_PER_NODE"][0],
        "MASTER_ADDR": parsed["STEP_NODELIST"][1] + (parsed["STEP_NODELIST"][2] or ""),
        # below the ephemeral ports of Linux
        "MASTER_PORT": str(20000 + (int(parsed["JOB_ID"][0]) + int(parsed["STEP_ID"][0])) % 12000),
    }
    for variable, value in translated.items():
        slurm.setdefault(variable, value)


def launched_processes() -> int:
    """Returns the number of processes that torchrun or srun started."""
    translate_srun()
    return int(os.environ.get("WORLD_SIZE", 1))


def is_requeued() -> bool:
    """Whether Slurm has started this job before: after a requeue, or the failure of a node."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def init(
    device_name: str, dist_url: str = "env://", timeout: float = 600, backend: str = "auto", needs_group: bool = False
) -> torch.device:
    """Joins the process group if a launcher started several processes. Returns the device of this process.

    Args:
        device_name: as in `choose_device`.
        dist_url: address at which the processes connect; env:// reads MASTER_ADDR and MASTER_PORT.
        timeout: seconds that a process waits for the other processes before it fails.
        backend: nccl, gloo or auto; auto is nccl for GPUs, else gloo.
        needs_group: a single process has a process group, too, as FSDP2 requires.

    Raises:
        ValueError: the variables of the launcher are incomplete, or the other processes can't be reached.
        RuntimeError: the backend is nccl without a GPU.
    """
    world_size = launched_processes()
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything is allocated, which would be on the first GPU
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size > 1:
        _join(dist_url, world_size, backend, timeout, device)
    elif needs_group and not td.is_initialized():
        device_id = device if backend == "nccl" else None
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1, device_id=device_id)
    return device


def _join(dist_url: str, world_size: int, backend: str, timeout: float, device: torch.device) -> None:
    """Joins the process group, which waits for all processes."""
    waits = timedelta(seconds=timeout)
    where = dist_url
    number = int(os.environ.get("RANK", -1))  # -1: PyTorch names the missing variable
    if dist_url == "env://":
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        if dist_url == "env://" and number > 0:
            _wait_for_rank_0(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
        store, number, world_size = next(td.rendezvous(dist_url, number, world_size, timeout=waits))
        # The store of torchrun outlives its processes; after a restart, the addresses of dead processes are invalid.
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
        raise ValueError(
            f"process {number} of {world_size} did not reach all others at {where} within dist_timeout={timeout:g} "
            f"seconds: {str(error).splitlines()[0]}"
        ) from error


def _wait_for_rank_0(host: str, port: int, timeout: float) -> None:
    """Waits for the port of rank 0. PyTorch would wait several times as long, and print a backtrace.

    Raises:
        OSError: after the timeout.
    """
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
    return isinstance(error, OSError | td.DistError) or "gloo" in str(error).lower()  # gloo raises RuntimeError


def lost_process(error: RuntimeError) -> str | None:
    """Returns an error message if a collective operation failed because another process ended, else None."""
    if world_size() == 1 or not _is_of_connection(error):
        return None
    other = f"process {1 - rank()}" if world_size() == 2 else "another process"
    reason = f" ({str(error).splitlines()[0]})" if isinstance(error, td.DistError) else ""
    return f"process {rank()} of {world_size()} lost {other}{reason}; its log has the reason"


def teardown() -> None:
    """Leaves the process group.

    A model in DistributedDataParallel must be deleted before, because its threads would abort the process at exit.
    """
    if td.is_initialized():
        gc.collect()
        td.destroy_process_group()


def rank() -> int:
    """Returns the rank of this process."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and logs."""
    return rank() == 0


def processes_here() -> int:
    """Returns the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def cores_of_process() -> int:
    """Returns the number of CPU cores that this process may use: its share of those of the machine or container."""
    import joblib  # with scikit-learn, which torch.hub does not need

    cores = joblib.cpu_count()
    of_task = os.environ.get("SLURM_CPUS_PER_TASK")
    is_task = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "TORCHELASTIC_RUN_ID" not in os.environ
    if is_task and of_task:  # srun gives each process cores of its own
        return min(cores, int(of_task))
    return max(1, cores // processes_here())


def local_rank() -> int:
    """Returns the number of this process among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def barrier() -> None:
    """Waits for all processes."""
    if td.is_initialized():
        td.barrier()


def mean_over_processes(value: Tensor) -> Tensor:
    """Returns the mean of `value` over all processes, equal in all of them."""
    if world_size() == 1:
        return value
    value = value.clone()
    td.all_reduce(value)
    return value / world_size()


def gather(value: Any, group: td.ProcessGroup | None = None) -> list[Any]:
    """Returns the `value` of each process, in the order of ranks. It is small, and its tensors are on the CPU.

    Args:
        group: a group of all processes. Default: the default process group.
    """
    if not td.is_initialized():
        return [value]
    values = [None] * world_size()
    td.all_gather_object(values, value, group)
    return values


def interleave(parts: list[np.ndarray]) -> np.ndarray:
    """Merges the arrays of all processes with samples. Sample n is from rank n modulo the number of processes.

    If a process has no sample, there are fewer samples than processes, and each of the others has one.
    """
    result = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        result[rank :: len(parts)] = part
    return result


def from_rank_0(compute: Callable[[], T]) -> T:
    """Returns the result of a function that only rank 0 calls. The other processes get a copy.

    They wait as long as the function takes.

    Raises:
        Exception: the exception of the function, in all processes.
    """
    if not td.is_initialized():
        return compute()
    future = _call_while_waiting(compute, is_main())
    message: list[Any] = [None, None]  # the exception, the result
    if future:
        error = future.exception()
        message = [_can_be_sent(error), None] if error else [None, future.result()]
    td.broadcast_object_list(message, 0)
    if future:
        return future.result()
    error, result = message
    if error:
        raise error
    return cast(T, result)


def once_per_machine(compute: Callable[[], None]) -> None:
    """Calls a function in one process of each machine. The other processes wait as long as the function takes.

    Raises:
        Exception: the exception of the function, in all processes; of several, that of the first machine.
    """
    if not td.is_initialized():
        return compute()
    future = _call_while_waiting(compute, local_rank() == 0)
    error = future.exception() if future else None
    for raised in (error, *gather(error and _can_be_sent(error))):
        if raised:
            raise raised


def _call_while_waiting(compute: Callable[[], T], calls: bool) -> "Future[T] | None":
    """Calls a function in some processes, and returns when it has ended in all of them.

    Each exchange between the processes ends before the timeout of the process group.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(compute) if calls else None
        while not all(gather(not future or bool(wait([future], EXCHANGE_SECONDS).done))):
            pass
    return future


def _can_be_sent(error: BaseException) -> BaseException:
    """Returns the exception, or one of a built-in class if it can't be pickled: the other processes would hang."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # calls the constructor as the other processes do
        return error
    except Exception:
        kinds = (OSError, ValueError, ArithmeticError, MemoryError, RuntimeError, Exception)
        return next(kind for kind in kinds if isinstance(error, kind))(str(error))


def new_host_group() -> td.ProcessGroup | None:
    """Creates another group of all processes, for threads that communicate while training does."""
    return cast(td.ProcessGroup, td.new_group(backend="gloo")) if td.is_initialized() else None


def share_buffers(model: nn.Module) -> None:
    """Copies the buffers of rank 0 to all processes. Checkpoints contain the buffers of rank 0."""
    if td.is_initialized():
        for buffer in model.buffers():
            td.broadcast(buffer, 0)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fsdp.shard` sharded the model. It does not import FSDPModule, which takes a second."""
    return hasattr(model, "set_requires_gradient_sync")


def placed_as(tensor: Tensor, like: Any) -> Tensor:
    """Shards a full tensor, equal in all processes, like `like`. Returns it unchanged if `like` is not sharded."""
    if not hasattr(like, "placements") or hasattr(tensor, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensor: Any) -> Tensor:
    """Returns a full tensor from its shards in all processes. Returns it unchanged if it is not sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Wraps the model in DistributedDataParallel, unless it is sharded or there is one process."""
    if world_size() == 1 or is_sharded(model):
        return model
    # With one channel, the gradient of the patch projection has other strides than its bucket. The copy is small.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def require_gradients(model: nn.Module) -> None:
    """Checks that all trained parameters of a DistributedDataParallel have a gradient. It accepts any other model.

    Call it after a backward pass with `gradient_sync`. Without this check, the gradients of some parameters would not
    be averaged, and the next forward pass would fail with an error that does not name the unused parameters.

    Raises:
        ValueError: a trained parameter has no gradient.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    unused = [name for name, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        names = ", ".join(unused[:5]) + more
        raise ValueError(
            f"the loss does not depend on the parameters {names}, and several processes average their gradients only "
            f"if every parameter has one: freeze them (requires_grad_(False)), or remove them"
        )


def gradient_sync(model: Any, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Context manager of a backward pass. If enabled, the pass averages gradients over the processes."""
    if is_sharded(model):
        model.set_requires_gradient_sync(enabled)
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
