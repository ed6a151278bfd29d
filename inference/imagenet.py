"""Classifiers of ImageNet-1K, ours and timm's, to be compared."""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.model import get_model, imagenet_classes
from util.data.transforms import Normalize, Transform, eval_transform
from util.evaluation.robustness import NUM_CLASSES, synsets

logger = logging.getLogger(__name__)

TIMM = "timm:"
ALIKE = 0.9  # so many of the names must be ImageNet's in its order; other libraries call some classes otherwise


class ImageNetClassifier(NamedTuple):
    """What is evaluated."""

    model: nn.Module  # images (B, 3, H, W) to logits (B, 1000)
    transform: Transform
    normalize: nn.Module
    data_config: dict[str, Any]  # what the transform and the normalisation were made of, plain values
    recorded: dict[str, Any]  # those of them that a run of ours recorded with its model; of others nothing


class RestrictedClassifier(nn.Module):
    """Restricts a classifier to some of its classes: logits (B, 1000) to theirs (B, number of them)."""

    classes: Tensor

    def __init__(self, model: nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", torch.tensor(classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits[:, self.classes]


def load(name: str, crop_pct: float | None, device: torch.device) -> ImageNetClassifier:
    """A classifier with what belongs to it.

    Args:
        name: as for `get_model`, or timm:NAME, any model of timm, with the transform of timm's validation.
        crop_pct: side of the centre crop, as a share of the scaled image's; None: the model's own.

    Raises:
        ValueError: there is none, or its classes are not ImageNet-1K's.
    """
    classifier = _load_timm(name, crop_pct) if name.startswith(TIMM) else _load_ours(name, crop_pct)
    num_classes = getattr(classifier.model, "num_classes", 0)
    if num_classes != NUM_CLASSES:
        what = f"answers with {num_classes} classes" if num_classes else "has no classes: it is no classifier"
        raise ValueError(f"--model {name} {what}; these suites are for classifiers of ImageNet-1K, which have 1000")
    return classifier._replace(model=classifier.model.to(device), normalize=classifier.normalize.to(device))


def _load_ours(name: str, crop_pct: float | None) -> ImageNetClassifier:
    model = get_model(name, pretrained=True)
    if model.in_chans != 3:
        raise ValueError(f"--model {name} has in_chans {model.in_chans}, and the suites' images have 3 channels")
    classes = model.settings.get("classes")
    if model.num_classes == NUM_CLASSES and classes:
        _check_order(name, classes)
    recorded: dict[str, Any] = {
        key: model.settings[key] for key in ("input_size", "crop_pct", "mean", "std") if key in model.settings
    }
    data_config: dict[str, Any] = {
        "crop_pct": None,
        "mean": None,
        "std": None,
        **recorded,
        **({"crop_pct": crop_pct} if crop_pct else {}),
    }
    transform = eval_transform(data_config["input_size"], data_config["crop_pct"])
    return ImageNetClassifier(model, transform, model.normalize, data_config, recorded)


def _check_order(name: str, classes: list[str]) -> None:
    """Classes are called by their folders, by numbers (of lists), or by names (of torchvision and Hugging Face)."""
    if classes == synsets():
        return
    if classes == [str(number) for number in range(NUM_CLASSES)]:
        logger.warning(f"--model {name} has numbers as class names; they are assumed to be ImageNet's labels")
        return
    pairs = zip(classes, imagenet_classes(), strict=True)
    if sum(_first_name(ours) == _first_name(theirs) for ours, theirs in pairs) < ALIKE * NUM_CLASSES:
        raise ValueError(
            f"--model {name} was trained on other classes than ImageNet-1K's, or in another order: the first of them "
            f"is {classes[0]}, and not {synsets()[0]} (or {imagenet_classes()[0]}, or 0)"
        )


def _first_name(described: str) -> str:
    return described.partition(",")[0].strip().casefold()


def _load_timm(name: str, crop_pct: float | None) -> ImageNetClassifier:
    import timm  # takes more than a second
    from timm.data import create_transform, resolve_model_data_config

    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True).eval()
    except Exception as error:  # unknown names, files that are missing, no network
        reason = " ".join(str(error).split())
        raise ValueError(f"--model {name}: timm says: {reason} (timm.list_pretrained() has all names)") from error
    data_config = resolve_model_data_config(model, use_test_size=True) | ({"crop_pct": crop_pct} if crop_pct else {})
    transform: Any = create_transform(**data_config, is_training=False, normalize=False)  # to bytes
    return ImageNetClassifier(
        model, transform, Normalize(data_config["mean"], data_config["std"]), data_config, recorded={}
    )
