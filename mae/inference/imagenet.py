"""Loads classifiers of ImageNet-1K, of this library and of timm, for evaluation."""

import logging
from typing import Any, NamedTuple

import torch

from mae.data.decode import AS_STORED, PixelValues, to_pillow
from mae.data.item import Item
from mae.data.transforms import Normalize, Transform, eval_transform
from mae.evaluate.robustness import NUM_CLASSES, imagenet_classes, synsets
from mae.inference.model import get_model

logger = logging.getLogger(__name__)

TIMM = "timm:"
ALIKE = 0.9  # minimum fraction of equal class names; other libraries have other names for some classes


class ImageNetClassifier(NamedTuple):
    """A classifier with its preprocessing."""

    model: torch.nn.Module  # images (B, 3, H, W) -> logits (B, 1000)
    transform: Transform
    normalize: torch.nn.Module
    data_config: dict[str, Any]  # settings of transform and normalization, as plain values
    recorded: dict[str, Any]  # those settings that the file records; {} for models of timm
    values: PixelValues = AS_STORED


class RestrictedClassifier(torch.nn.Module):
    """Restricts a classifier to some of its classes: logits (B, 1000) -> logits (B, len(classes))."""

    classes: torch.Tensor

    def __init__(self, model: torch.nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", torch.tensor(classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images)
        return logits[:, self.classes]


def load(name: str, crop_pct: float | None, device: torch.device, **settings: Any) -> ImageNetClassifier:
    """Loads a classifier with its preprocessing.

    Args:
        name: as in `get_model`, or timm:NAME for a model of timm, with the validation transform of timm.
        crop_pct: side of the center crop, as a fraction of the scaled image; None: the model's.
        device: device of the model.
        settings: further arguments of `get_model`.

    Raises:
        ValueError: the name is unknown, or the classes are not those of ImageNet-1K.
    """
    classifier = _load_timm(name, crop_pct) if name.startswith(TIMM) else _load_ours(name, crop_pct, **settings)
    num_classes = getattr(classifier.model, "num_classes", 0)
    if num_classes != NUM_CLASSES:
        what = f"has {num_classes} classes" if num_classes else "is not a classifier"
        raise ValueError(f"model={name} {what}; the suites need a classifier with the 1000 classes of ImageNet-1K")
    return classifier._replace(model=classifier.model.to(device), normalize=classifier.normalize.to(device))


def _load_ours(name: str, crop_pct: float | None, **settings: Any) -> ImageNetClassifier:
    model = get_model(name, pretrained=True, **settings)
    classes = model.settings.get("classes") or model.settings.get("label_names")
    if model.num_classes == NUM_CLASSES and classes:
        _check_order(name, classes)
    recorded: dict[str, Any] = {
        key: model.settings[key]
        for key in ("input_size", "crop", "crop_pct", "mean", "std", "exif")
        if key in model.settings
    }
    recorded |= {key: model.settings[key] for key in ("nodata", "value_range") if model.settings.get(key) is not None}
    data_config: dict[str, Any] = {
        "crop": None,
        "crop_pct": None,
        "mean": None,
        "std": None,
        **recorded,
        **({"crop_pct": crop_pct} if crop_pct else {}),
    }
    transform = eval_transform(data_config["input_size"], data_config["crop_pct"], data_config["crop"])
    return ImageNetClassifier(model, transform, model.normalize, data_config, recorded, model.values)


def _check_order(name: str, classes: list[str]) -> None:
    """Raises ValueError if the classes are not those of ImageNet-1K in the order of its labels.

    They have the names of folders, numbers (lists), or the names of classes (torchvision and Hugging Face).
    """
    if classes == synsets():
        return
    if classes == [str(number) for number in range(NUM_CLASSES)]:
        logger.warning(f"model={name} has numbers as class names; they are assumed to be ImageNet's labels")
        return
    pairs = zip(classes, imagenet_classes(), strict=True)
    if sum(_first_name(ours) == _first_name(theirs) for ours, theirs in pairs) < ALIKE * NUM_CLASSES:
        raise ValueError(
            f"model={name} was not trained on the classes of ImageNet-1K, or on another order of them: its first "
            f"class is {classes[0]}, and not {synsets()[0]} (or {imagenet_classes()[0]}, or 0)"
        )


def _first_name(described: str) -> str:
    return described.partition(",")[0].strip().casefold()


def _load_timm(name: str, crop_pct: float | None) -> ImageNetClassifier:
    import timm  # takes more than a second
    from timm.data import create_transform, resolve_model_data_config

    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True).eval()
    except Exception as error:  # an unknown name, a missing file, or no network
        reason = " ".join(str(error).split())
        raise ValueError(f"model={name}: timm reports: {reason} (timm.list_pretrained() lists all names)") from error
    data_config = resolve_model_data_config(model, use_test_size=True) | ({"crop_pct": crop_pct} if crop_pct else {})
    transform: Any = create_transform(**data_config, is_training=False, normalize=False)  # returns uint8

    def preprocess(item: Item) -> Item:
        return item._replace(image=transform(to_pillow(item.image)))  # the pixels of a tensor would differ

    return ImageNetClassifier(
        model, preprocess, Normalize(data_config["mean"], data_config["std"]), data_config, recorded={}
    )
