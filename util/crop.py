"""The random crop of linear probing, which samples area and aspect ratio once."""

from mae.data.crops import CropOnce as RandomResizedCrop

__all__ = ["RandomResizedCrop"]
