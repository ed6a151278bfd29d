"""Settings of a run as values. `fields.py` says what a setting is, and `resolve.py` which value it has."""

from mae.settings.data import DataSpec
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.resolve import DATASETS, EXPORTED, REBUILDS, SIZES, chosen, differs, fits, names_of, names_with, specs
from mae.settings.training import RunSpec

__all__ = [
    "DATASETS", "EXPORTED", "REBUILDS", "SIZES", "AugmentationSpec", "DataSpec", "ImageSpec", "ModelSpec", "RunSpec",
    "chosen", "differs", "fits", "names_of", "names_with", "specs",
]  # fmt: skip
