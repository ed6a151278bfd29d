"""Captures the arguments of training and evaluation: a script runs in this process up to `trainer.run`."""

import inspect
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

import models_vit
from util import datasets, dist
from util.checkpoints import run_directory
from util.cli import entry_point
from util.data import loader
from util.training import loop, precision, trainer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(root: Path, **splits: Mapping[str, int]) -> Path:
    """SPLIT/CLASS/NUMBER.png: for each class so many copies of one small picture."""
    generator = np.random.default_rng(0)
    pictures: dict[str, bytes] = {}
    for split, counts in splits.items():
        for name, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            if name not in pictures:
                pixels = generator.integers(0, 256, size=(24, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "0.png")
                pictures[name] = (folder / "0.png").read_bytes()
            for number in range(count):
                (folder / f"{number}.png").write_bytes(pictures[name])
    return root


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces the width of the published models to 16. Names, depths and patches stay the same."""
    for name, size in models_vit.SIZES.items():
        if not name.startswith("mini"):
            width = {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0}
            monkeypatch.setitem(models_vit.SIZES, name, {**size, **width})


def recorder(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: bool = True) -> list[dict[str, Any]]:
    """Records the arguments of each call by name, including defaults, and makes the call unless it is disabled."""
    original, calls = getattr(module, name), []
    signature = inspect.signature(original)

    def record(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return original(*args, **options) if call else None

    monkeypatch.setattr(module, name, record)
    return calls


def parse(script: Any, **flags: Any) -> Any:
    argv: list[str] = []
    for flag, value in flags.items():
        argv += [f"--{flag}"] if value is True else [f"--{flag}", *str(value).split()]
    return entry_point.parse(script.get_args_parser(), argv)


def capture(monkeypatch: pytest.MonkeyPatch, script: Any, **flags: Any) -> SimpleNamespace:
    """Captures the arguments of a run.

    Returns:
        The arguments of `trainer.run` by name, and the arguments of calls of other functions: joined (`dist.init`),
        precisions (`Precision`), opened (`datasets.open_source`), prepared (`run_directory.prepare`), evaluation
        (`loader.eval_loader`).
    """
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more processes than cores
        narrow(patch)
        patch.setattr(loader, "up_to_cores", lambda num_workers: num_workers)
        calls = {
            "joined": recorder(patch, dist, "init"),
            "precisions": recorder(patch, precision.Precision, "__init__"),
            "opened": recorder(patch, datasets, "open_source"),
            "prepared": recorder(patch, run_directory, "prepare"),
            "evaluation": recorder(patch, loader, "eval_loader"),
        }
        runs = recorder(patch, trainer, "run", call=False)
        script.main(parse(script, **({"device": "cpu"} | flags)))
    (arguments,) = runs
    return SimpleNamespace(**arguments, **calls)


class Reached(BaseException):
    """Raised when the script calls the captured function."""


def loop_arguments(monkeypatch: pytest.MonkeyPatch, script: Any, **flags: Any) -> dict[str, Any]:
    """The arguments of the first call of `loop.run_epoch`, which ends the script."""
    signature, found = inspect.signature(loop.run_epoch), {}

    def stop(*args: Any, **options: Any) -> None:
        found.update(signature.bind(*args, **options).arguments)
        found.update(vars(found.pop("options")))
        raise Reached

    with monkeypatch.context() as patch, pytest.raises(Reached):
        narrow(patch)
        patch.setattr(loop, "run_epoch", stop)
        script.main(parse(script, **({"device": "cpu", "num_workers": 0} | flags)))
    return found


def loss_function(monkeypatch: pytest.MonkeyPatch, run: SimpleNamespace, model: Any) -> Callable[[Any], torch.Tensor]:
    """The loss function of a run, with another model."""
    with monkeypatch.context() as patch:
        calls = recorder(patch, loop, "run_epoch", call=False)
        run.train_one_epoch(model, run.batches, run.optimizer, None)
    return calls[0]["compute_loss"]


def seed_all(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def seeded(transform: Callable[[Any], torch.Tensor], picture: Image.Image, seed: int) -> torch.Tensor:
    """Applies a transform to a picture with seeded random number generators."""
    seed_all(seed)
    return transform(picture)


def photo(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, size=(height, width, 3), dtype=np.uint8))


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Normalizes uint8 images with the statistics of ImageNet."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def center_crop(file: Path, size: int = 16, scaled: int = 16) -> torch.Tensor:
    """The evaluation transform of a picture, normalized: (1, 3, size, size)."""
    with Image.open(file) as picture:
        resized = tv.functional.resize(picture, [scaled], tv.InterpolationMode.BICUBIC)
        return normalized(tv.functional.pil_to_tensor(tv.functional.center_crop(resized, [size]))[None])


def constant_head(linear: torch.nn.Linear, label: int) -> None:
    """Sets the head of a classifier so that it predicts one class for all features."""
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        linear.bias[label] = 9.0
