"""The random crop of the published code, in linear probing."""

from torchvision import transforms

from mae.data.augment import sample_once

__all__ = ["RandomResizedCrop"]


class RandomResizedCrop(transforms.RandomResizedCrop):
    """Samples area and aspect ratio once, and clips the crop to the image."""

    get_params = staticmethod(sample_once)  # type: ignore[assignment]
