"""Processes, meters, loss scaling and checkpoints, for training scripts in the style of the published code.

Our own scripts do not use this module: `mae.parallel`, `mae.training` and `mae.checkpoints` save and resume to the bit.
"""

import builtins
import datetime
import functools
import inspect
import time
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae import parallel
from mae.checkpoints import checkpoint
from mae.parallel import is_main as is_main_process
from mae.parallel import rank as get_rank
from mae.parallel import world_size as get_world_size

__all__ = [
    "MetricLogger",
    "NativeScalerWithGradNormCount",
    "SmoothedValue",
    "all_reduce_mean",
    "get_grad_norm_",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "load_model",
    "save_model",
    "save_on_master",
    "setup_for_distributed",
]


def setup_for_distributed(is_master: bool) -> None:
    """Silences `print` of this process, except `print(..., force=True)`. What it prints has the time in front.

    Args:
        is_master: print without `force`, too. True on rank 0.
    """
    original = inspect.unwrap(builtins.print)  # of a second call

    @functools.wraps(original)
    def timed_print(*values: Any, force: bool = False, **options: Any) -> None:
        if is_master or force:
            original(f"[{datetime.datetime.now().time()}] ", end="", file=options.get("file"))
            original(*values, **options)

    builtins.print = timed_print


def is_dist_avail_and_initialized() -> bool:
    """Whether this process is in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def init_distributed_mode(args: Namespace) -> None:
    """Joins the processes that torchrun or srun has started. Sets `rank`, `world_size`, `gpu` and `distributed`.

    With several processes, only rank 0 prints, as `setup_for_distributed`.

    Args:
        args: may have `device`, "cuda" or "cpu", and `dist_url`.
    """
    parallel.init(getattr(args, "device", "auto"), getattr(args, "dist_url", "env://"))
    args.rank = get_rank()
    args.world_size = get_world_size()
    args.gpu = parallel.local_rank()
    args.distributed = args.world_size > 1
    if args.distributed:
        setup_for_distributed(args.rank == 0)


def all_reduce_mean(x: float) -> float:
    """Returns the mean of a number over the processes."""
    return parallel.mean_over_processes(torch.tensor(float(x), device=_device())).item()


def _device() -> torch.device:
    """The device of collective operations."""
    is_nccl = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda" if is_nccl else "cpu")


class SmoothedValue:
    """A series of numbers: the median and the mean of the last ones, and the mean of all.

    Args:
        window_size: number of last values.
        fmt: format of `str`, with `median`, `avg`, `global_avg`, `max` and `value`.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"

    def update(self, value: float, n: int = 1) -> None:
        """Adds a value, which counts `n` times."""
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self) -> None:
        """Makes `global_avg` the mean over all processes. The last values stay those of this process."""
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device=_device())
        count, self.total = (parallel.mean_over_processes(sums) * get_world_size()).tolist()
        self.count = round(count)

    @property
    def median(self) -> float:
        return torch.tensor([*self.deque]).median().item()

    @property
    def avg(self) -> float:
        return torch.tensor([*self.deque], dtype=torch.float32).mean().item()

    @property
    def global_avg(self) -> float:
        return self.total / max(1, self.count)

    @property
    def max(self) -> float:
        return max(self.deque)

    @property
    def value(self) -> float:
        return self.deque[-1]

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names}) if self.deque else "-"


class MetricLogger:
    """Meters by name, and a line of them at intervals. A meter `loss` is also the attribute `loss`."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, **values: float | Tensor | None) -> None:
        """Adds a value to each meter. None is ignored."""
        for name, value in values.items():
            if value is not None:
                self.meters[name].update(float(value))

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Sets a meter."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(f"there is no meter {name}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Synchronizes all meters. All processes must have the same ones."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable: Iterable[Any], print_freq: int, header: str | None = None) -> Iterator[Any]:
        """Yields the items. Rank 0 prints the meters every `print_freq` items, and the time at the end."""
        count = len(iterable)  # type: ignore[arg-type]
        started = time.perf_counter()
        header = header or ""
        for number, item in enumerate(iterable):
            yield item
            if is_main_process() and (number % print_freq == 0 or number == count - 1):
                seconds = (time.perf_counter() - started) / (number + 1)
                left = datetime.timedelta(seconds=int(seconds * (count - number - 1)))
                parts = (f"{header} [{number}/{count}]", f"eta: {left}", str(self), f"time: {seconds:.4f}")
                print(self.delimiter.join(part for part in parts if part), flush=True)
        if is_main_process():
            total = time.perf_counter() - started
            print(f"{header} Total time: {datetime.timedelta(seconds=int(total))} ({total / max(1, count):.4f} s / it)")


class NativeScalerWithGradNormCount:
    """Backward pass and optimizer step with the loss scaling of fp16. Without a GPU, the loss is not scaled."""

    state_dict_key = "amp_scaler"

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cuda", enabled=torch.cuda.is_available())

    def __call__(
        self,
        loss: Tensor,
        optimizer: Optimizer,
        clip_grad: float | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        create_graph: bool = False,
        update_grad: bool = True,
    ) -> Tensor | None:
        """Adds the gradients of a loss; with `update_grad`, also updates the weights.

        Args:
            clip_grad: maximum global norm of the gradient.
            parameters: parameters whose norm is computed. Default: those of the optimizer.

        Returns:
            The global norm of the gradient (), before clipping; None without an update.
        """
        self.scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        self.scaler.unscale_(optimizer)
        if parameters is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parameters = [*parameters]
        norm = get_grad_norm_(parameters) if clip_grad is None else nn.utils.clip_grad_norm_(parameters, clip_grad)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the loss scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of the loss scale."""
        self.scaler.load_state_dict(state_dict)


def get_grad_norm_(parameters: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Returns the global norm () of the gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients, norm_type)


def save_on_master(*args: Any, **kwargs: Any) -> None:
    """`torch.save` in rank 0."""
    if is_main_process():
        torch.save(*args, **kwargs)


def save_model(
    args: Namespace,
    epoch: int,
    model: nn.Module,
    model_without_ddp: nn.Module,
    optimizer: Optimizer,
    loss_scaler: NativeScalerWithGradNormCount | None,
) -> None:
    """Writes `args.output_dir`/checkpoint-EPOCH.pth, which `load_model` and our scripts read."""
    state = {"model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "args": args}
    if loss_scaler is not None:
        state["scaler"] = loss_scaler.state_dict()
    save_on_master(state, Path(args.output_dir, f"checkpoint-{epoch}.pth"))


def load_model(
    args: Namespace, model_without_ddp: nn.Module, optimizer: Optimizer, loss_scaler: NativeScalerWithGradNormCount
) -> None:
    """Resumes from the file `args.resume`, if there is one, and sets `args.start_epoch`. With `args.eval`, it loads the
    weights only.
    """
    if not args.resume:
        return
    state = checkpoint.read(Path(args.resume))
    model_without_ddp.load_state_dict(state["model"])
    if "optimizer" in state and "epoch" in state and not getattr(args, "eval", False):
        optimizer.load_state_dict(state["optimizer"])
        args.start_epoch = state["epoch"] + 1
        if "scaler" in state:
            loss_scaler.load_state_dict(state["scaler"])
