"""Extra inputs of images, such as place and date: tensors by name, from datasets and lists to the model."""

import keyword
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from mae.context import RESERVED, extra_inputs, needed_inputs
from mae.files.untrusted import printable

logger = logging.getLogger(__name__)

ROUNDED = 1 / 16  # the largest difference of an extra input to its value in fp32
FP32 = "finite numbers that fp32 changes by up to 1/16; split large numbers, such as dates"


def check_name(name: Any) -> None:
    """Raises ValueError if an extra input can't have a name, which is the name of a parameter of a model."""
    if not str(name).isidentifier() or keyword.iskeyword(str(name)) or name in RESERVED:
        names = ", ".join(RESERVED)
        raise ValueError(f"rename the extra input {printable(str(name))}: no Python name, or one of {names}")


def fit_fp32(values: np.ndarray) -> np.ndarray:
    """Whether each number is finite in fp32, and changes by up to ROUNDED; a larger number may be a date."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = values.astype(np.float32)
        if values.dtype.kind in "iu":
            return converted.astype(values.dtype) == values
        return np.abs(converted - values) <= ROUNDED


def to_tensor(value: Any) -> torch.Tensor:
    """Converts a number, array or tensor to fp32.

    Raises:
        ValueError: it is no number, or one that fp32 does not represent, as `fit_fp32` says.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    array = np.asarray(value)
    if array.dtype.kind in "biuf" and fit_fp32(array).all():
        return torch.from_numpy(array.astype(np.float32))
    raise ValueError(f"is not of {FP32}")


def original(source: Any) -> Any:
    """Returns the source of a subset, or of images in memory."""
    return original(source.source) if hasattr(source, "source") else source


def shapes_of(source: Any) -> dict[str, str]:
    """Returns the names and shapes of the extra inputs that come with the images of a source, or of a subset of it."""
    return getattr(original(source), "input_shapes", None) or {}


def require_fitting(model: Any, train: Any, val: Any = None, steps: Iterable[str] = ("tokenize",)) -> None:
    """Checks that datasets have the extra inputs that a model takes. Those with a default may be missing.

    Args:
        model: a model whose base is `models_vit.Encoder`.
        val: a second dataset.
        steps: the steps that the images reach.

    Raises:
        ValueError: the model needs or the images have other extra inputs, or the datasets differ.
    """
    shapes = shapes_of(train)
    if val is not None and shapes_of(val) != shapes:
        texts = [
            ", ".join(f"{name} {some[name]}" for name in sorted(some)) or "none" for some in (shapes, shapes_of(val))
        ]
        raise ValueError(f"the extra inputs of training images are {texts[0]}, and of validation images {texts[1]}")
    model.check_extra_inputs(shapes, needed_inputs(type(model), steps))
    for name in sorted(extra_inputs(type(model), steps).keys() - shapes.keys()):
        logger.warning(f"the images have no extra input {name}: the model uses the default of this parameter")


def by_name(inputs: Mapping[str, Any], count: int, several: bool) -> dict[str, torch.Tensor]:
    """Returns the extra inputs of `count` images as tensors (B, ...).

    Args:
        inputs: with `several`, a value for each image; else the value of the only image.

    Raises:
        ValueError: an extra input is no number, or does not have a value for each image.
    """
    tensors = {}
    for name, value in inputs.items():
        try:
            tensor = to_tensor(value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} {error}") from error
        tensors[name] = tensor if several else tensor[None]
        if not tensors[name].ndim or len(tensors[name]) != count:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}: give a value for each of the {count} images")
    return tensors
