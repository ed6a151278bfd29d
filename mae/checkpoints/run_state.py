"""The state of a run, which checkpoints contain. `saver.py` writes it to files, and `resume.py` restores it."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from mae import parallel
from mae.settings import differs
from mae.settings import fields as roles
from mae.settings.run import names_resumed

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

# A resumed run may change these settings without a warning.
FREE = {*names_resumed(roles.FREE), "distributed", "gpu", "rank"}  # published


class Progress:
    """The position of a run: epoch, and iterations of that epoch.

    Args:
        effective_batch_size: images per update: batch size per process x accum_iter x processes.
        global_batch_size: images per iteration: batch size per process x processes.
        num_images: images of an epoch, including repetitions.
        images: the `fingerprint` of the images.
    """

    def __init__(
        self, effective_batch_size: int, global_batch_size: int, start_epoch: int = 0, num_images: int | None = None,
        images: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.num_images = num_images
        self.images = images
        self.effective_batch_size = effective_batch_size
        self.global_batch_size = global_batch_size
        self.epoch = start_epoch
        self.first_iteration = 0
        self.meters: dict[str, Any] = {}  # state of `meters.Meters`
        self.best_accuracy = -math.inf  # best score of the epochs so far
        self.selection: dict[str, Any] = {}  # of the start and of the best state (`gate.Gate`)

    def next_epoch(self) -> None:
        """Moves to the start of the next epoch."""
        self.epoch = self.epoch + 1
        self.first_iteration = 0
        self.meters = {}

    def forget_best(self) -> None:
        """Makes the start the best state again: there is no file of a later one, or its score can't be compared."""
        self.best_accuracy = -math.inf
        if self.selection:
            self.selection = {**self.selection, "best": self.selection["start"], "epoch": -1}

    def position(self, epoch: int, iterations: int, meters: dict[str, Any]) -> dict[str, Any]:
        """Returns the entry `progress` of a checkpoint, which `resume.restore_progress` reads.

        Args:
            iterations: number of iterations of the epoch whose gradients are in the weights.
            meters: state of `meters.Meters`, the sums of the epoch so far.
        """
        return {
            "epoch": epoch,
            "images_done": iterations * self.global_batch_size,
            "effective_batch_size": self.effective_batch_size,
            "meters": meters,
            "best_accuracy": self.best_accuracy,
            **({"selection": self.selection} if self.selection else {}),
            "num_images": self.num_images,
            "images": dict(self.images),
        }


def collect(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: dict,
    callbacks: Sequence["Stateful"] = (),
) -> dict[str, Any]:
    """Returns the state of a run without its position."""
    weights = model.state_dict()  # first: FSDP2 shards weights again that a pass without gradients has gathered
    if parallel.is_sharded(model):
        from mae.checkpoints import sharded_state

        states = sharded_state.optimizer_state(model, optimizer)
    else:
        states = optimizer.state_dict()
    rng = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        rng["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": weights,
        "optimizer": states,
        "scaler": scaler.state_dict(),
        "args": settings,
        "rng": rng,
        **({"callbacks": [callback.state_dict() for callback in callbacks]} if callbacks else {}),
    }


def require_same_settings(settings: dict[str, Any], num_images: int) -> None:
    """Compares the settings of the processes. Each applies its own learning rate, and draws its own order of images.

    Args:
        num_images: images of an epoch.

    Raises:
        ValueError: a process has other settings or another number of images than process 0.
    """
    local = {name: settings[name] for name in settings.keys() - FREE} | {"images of an epoch": num_images}
    local |= {name: settings[name] for name in ("batch_size", "accum_iter")}
    first = parallel.from_rank_0(lambda: local)
    names = sorted(first.keys() | local.keys())
    different = [name for name in names if differs(name, first.get(name), local.get(name))]
    texts = parallel.gather(", ".join(f"{name} {local.get(name)} instead of {first.get(name)}" for name in different))
    for rank, text in enumerate(texts):
        if text:
            raise ValueError(
                f"process {rank} has {text[:200]}: start all processes with the same command, code and images"
            )
