"""Our own files: written whole or not at all, verified when read, enough to continue a run exactly.

`checkpoint-{epoch}.pth` (the last finished epoch, counted from 0) and `checkpoint-last.pth` (the newest state, also in
the middle of an epoch) hold {model, optimizer, epoch, scaler, args} as the published code's files do, and beside them
`progress`, `rng` and `digest`. There is nothing but dicts, lists, tensors and plain values in them.
"""

import argparse
import hashlib
import logging
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util import dist

logger = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"


class CheckpointError(ValueError):
    """A file that can't be used, in a sentence that says why."""


# ------------------------------------------------------------------------------------------------------- one file


def compute_digest(state: Any) -> str:
    """The sha256 of a nested state: names, types, shapes and values of all that is in it, in order."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
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


def write(state: dict[str, Any], path: Path) -> None:
    """Writes a state with its digest. The file is there when it is complete; a crash leaves the previous one."""
    state = state | {"digest": compute_digest(state)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint of anybody's; nothing in it is executed, and ours must match their digest.

    Files of the published code are read too, whose `args` are an argparse.Namespace.

    Raises:
        CheckpointError: no such file, damaged, or holding anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        _check_names(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch says so for foreign objects and for damage alike; both are refused.
        raise CheckpointError(
            f"{path} is refused: it is damaged, or it holds objects other than tensors and plain values, "
            f"which could run code when loaded. Nothing in it was executed."
        ) from error
    except Exception as error:  # whatever the zip and pickle readers raise on damaged bytes
        raise CheckpointError(f"{path} is damaged or no checkpoint (a download or copy cut short?): {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    digest = state.pop("digest", None)
    if digest is not None and digest != compute_digest(state):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return state


def _check_names(path: Path) -> None:
    """Compares the part that holds names and plain values with its checksum, which torch.load does not.

    Damage in it could rename `digest` itself, and ours would pass for a foreign file, which has none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    archive.read(name)


# -------------------------------------------------------------------------------------------------------- one run


def prepare_output_dir(output_dir: Path, resume: str) -> None:
    """Makes the folder of a run, and refuses one that already holds a run unless that is to be continued.

    Raises:
        ValueError: it holds a run, and `--resume` is not given.
    """
    if dist.is_main() and not resume:
        holds = sorted(p.name for p in output_dir.glob("*") if p.name == "log.txt" or p.suffix == ".pth")
        if holds:
            raise ValueError(
                f"--output_dir {output_dir} already holds a run ({', '.join(holds[:3])}): continue it with "
                f"--resume auto, or give another --output_dir"
            )
    output_dir.mkdir(parents=True, exist_ok=True)


def find(resume: str, output_dir: Path) -> dict[str, Any] | None:
    """The state that `--resume` names: a file's, or for "auto" the newest in the folder that verifies, if any."""
    if not resume:
        return None
    if resume != "auto":
        return read(resume)
    candidates = sorted(output_dir.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in candidates:
        try:
            state = read(path)
        except CheckpointError as error:
            logger.warning(f"--resume auto skips a file: {error}")
            continue
        logger.info(f"resuming from {path}")
        return state
    logger.info(f"--resume auto: no checkpoint in {output_dir}, starting from the beginning")
    return None


def restore_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads a checkpoint's weights, all of them.

    Raises:
        CheckpointError: the file is of another architecture.
    """
    weights = state.get("model", state)
    ours = model.state_dict()
    if weights.keys() != ours.keys() or any(weights[name].shape != ours[name].shape for name in ours):
        args = state.get("args", {})
        args = args if isinstance(args, dict) else vars(args)
        told = [
            f"--{flag} {args[flag]}" for flag in ("model", "input_size", "patch_size", "in_chans") if args.get(flag)
        ]
        differing = [n for n in ours if n not in weights or weights[n].shape != ours[n].shape]
        differing += [n for n in weights if n not in ours]
        raise CheckpointError(
            f"the checkpoint is of another architecture than this run's model: {len(differing)} tensors differ "
            f"({', '.join(differing[:3])}, ...). It was made with {' '.join(told) or 'untold settings'}; "
            f"--resume needs the same, --init_from takes over what fits."
        )
    model.load_state_dict(weights)


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Loads an optimizer's state, also one of the published code's, written by a PyTorch without fused optimizers."""
    implementation = ("fused", "foreach", "capturable", "differentiable", "maximize")
    groups = [
        {**group, **{option: ours[option] for option in implementation if option in ours}}
        for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})


class Progress:
    """Where a run stands: the epoch it is in, and how many images of it are done, by all processes together.

    Args:
        effective_batch_size: images to an optimizer step: batch size x accumulation x processes.
        global_batch_size: images to a batch of all processes: batch size x processes.
    """

    def __init__(self, effective_batch_size: int, global_batch_size: int, start_epoch: int = 0) -> None:
        self.effective_batch_size = effective_batch_size
        self.global_batch_size = global_batch_size
        self.epoch = start_epoch
        self.first_step = 0
        self.meters: dict[str, Any] = {}  # of `runlog.Meters`

    def next_epoch(self) -> None:
        """An epoch is finished."""
        self.epoch, self.first_step, self.meters = self.epoch + 1, 0, {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the position of a checkpoint; a file of the published code stands at the end of its epoch.

        Raises:
            CheckpointError: the run had another effective batch.
        """
        saved = state.get("progress")
        if saved is None:
            self.epoch = state["epoch"] + 1
            return
        if saved["effective_batch_size"] != self.effective_batch_size:
            accum_iter, rest = divmod(saved["effective_batch_size"], self.global_batch_size)
            remedy = f"--accum_iter {accum_iter}" if accum_iter and not rest else "another --batch_size"
            raise CheckpointError(
                f"the checkpoint's run took {saved['effective_batch_size']} images to a step, this one would take "
                f"{self.effective_batch_size}: {remedy} restores that"
            )
        if saved["images_done"] % self.global_batch_size:
            raise CheckpointError(
                f"the checkpoint stands {saved['images_done']} images into its epoch, which is no multiple of the "
                f"{self.global_batch_size} images that --batch_size and the number of processes make"
            )
        self.epoch = saved["epoch"]
        self.first_step = saved["images_done"] // self.global_batch_size
        self.meters = saved["meters"]


def training_state(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, args: dict) -> dict[str, Any]:
    """What a checkpoint holds beside the position of its run."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": dist.unwrap(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in args.items()},
        "rng": rng,
    }


def restore_training(
    state: dict[str, Any], model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, progress: Progress
) -> None:
    """Puts model, optimizer, scaler, random generators and position back to where a checkpoint's run stood.

    Raises:
        CheckpointError: the file is of another architecture, holds weights only, or another effective batch.
    """
    missing = {"model", "optimizer", "epoch"} - state.keys()
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {' and no '.join(sorted(missing))}: it can't be resumed, give it to --init_from"
        )
    progress.restore(state)
    restore_model(model, state)
    restore_optimizer(optimizer, state["optimizer"])
    if scaler.is_enabled() and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    rng = state.get("rng", {})
    if "cpu" in rng:
        torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


class NullSaver:
    """Saves nothing: what processes other than rank 0 have."""

    def due(self) -> bool:
        """Whether a rolling state is to be saved now."""
        return False

    def save(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> None:
        """Saves the rolling state after so many batches of an epoch."""

    def save_epoch(self, epoch: int) -> None:
        """Saves the milestone of a finished epoch, if it is one."""

    def save_emergency(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> str:
        """Saves the state of a run that is about to end on an error, and returns the file's name."""
        return ""


class Saver(NullSaver):
    """Writes a run's states: milestones that stay, and a rolling `checkpoint-last.pth`.

    Args:
        collect: gives the state, without the run's position.
        save_every: epochs between milestones; the last epoch is one too.
        save_minutes: minutes between rolling states.
    """

    def __init__(
        self,
        output_dir: Path,
        collect: Callable[[], dict[str, Any]],
        progress: Progress,
        *,
        epochs: int,
        save_every: int,
        save_minutes: float,
    ) -> None:
        self.output_dir = output_dir
        self.collect = collect
        self.progress = progress
        self.epochs = epochs
        self.save_every = save_every
        self.save_seconds = 60 * save_minutes
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.save_seconds

    def save(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> None:
        self._write(LAST, epoch, steps_done, meters)

    def save_epoch(self, epoch: int) -> None:
        if epoch % self.save_every == 0 or epoch == self.epochs - 1:
            self._write(f"checkpoint-{epoch}.pth", epoch + 1, 0, {})

    def save_emergency(self, epoch: int, steps_done: int, meters: dict[str, Any]) -> str:
        return str(self._write("checkpoint-emergency.pth", epoch, steps_done, meters))

    def _write(self, name: str, epoch: int, steps_done: int, meters: dict[str, Any]) -> Path:
        position = {
            "epoch": epoch,
            "images_done": steps_done * self.progress.global_batch_size,
            "effective_batch_size": self.progress.effective_batch_size,
            "meters": meters,
        }
        path = self.output_dir / name
        write({**self.collect(), "epoch": epoch - 1, "progress": position}, path)
        self.saved_at = time.monotonic()
        logger.info(f"saved {path}")
        return path


def open_saver(
    output_dir: Path, collect: Callable[[], dict[str, Any]], progress: Progress, **options: Any
) -> Saver | NullSaver:
    """The saver of this process: a `Saver` on rank 0, a `NullSaver` elsewhere."""
    return Saver(output_dir, collect, progress, **options) if dist.is_main() else NullSaver()
