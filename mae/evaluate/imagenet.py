"""The classes of ImageNet-1K, in the order of its labels."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from mae.settings.choices import CLASSIFICATION

logger = logging.getLogger(__name__)

NUM_CLASSES = 1000
ALIKE = 0.9  # minimum fraction of equal class names; other libraries have other names for some classes


@cache
def synsets() -> list[str]:
    """Returns the WordNet ids of the classes, which are the names of ImageNet's folders."""
    from timm.data import ImageNetInfo  # takes more than a second

    return ImageNetInfo("imagenet-1k").label_names()


@cache
def imagenet_classes() -> list[str]:
    """Returns the names of the classes in words."""
    from timm.data import ImageNetInfo  # takes more than a second

    return list(ImageNetInfo("imagenet-1k").label_descriptions())


def require_imagenet(settings: Mapping[str, Any], num_classes: int | None, origin: str) -> None:
    """Checks that a classifier has the classes of ImageNet-1K, in the order of its labels.

    Files name classes by folders, by numbers (lists), or in words (torchvision and Hugging Face).

    Args:
        settings: the settings that the file of the classifier records.
        origin: the file.

    Raises:
        ValueError: the classifier has other classes, or another order of them.
    """
    if num_classes != NUM_CLASSES or settings.get("task", CLASSIFICATION) != CLASSIFICATION:
        raise ValueError(f"{origin} has {num_classes} outputs, and not the {NUM_CLASSES} classes of ImageNet-1K")
    classes = settings.get("classes") or settings.get("label_names") or synsets()
    if classes == [str(number) for number in range(NUM_CLASSES)]:
        logger.warning(f"{origin} has numbers as class names; they are assumed to be ImageNet's labels")
    elif classes != synsets() and _share_of_equal_words(classes) < ALIKE:
        raise ValueError(
            f"{origin} was not trained on the classes of ImageNet-1K, or on another order of them: its first class is "
            f"{classes[0]}, and not {synsets()[0]} (or {imagenet_classes()[0]}, or 0)"
        )


def _share_of_equal_words(classes: list[str]) -> float:
    first_words = [[name.partition(",")[0].strip().casefold() for name in names]
                   for names in (classes, imagenet_classes())]  # fmt: skip
    return sum(name == expected for name, expected in zip(*first_words, strict=True)) / NUM_CLASSES
