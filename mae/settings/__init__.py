"""Settings of a run as values: `fields.py` says what a setting is, and `run.py` where its value comes from."""

from mae.settings.data import DataSpec
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.run import (
    DATASETS,
    EVALUATE,
    EXPORTED,
    REBUILDS,
    RESUME,
    SIZES,
    TRAIN,
    UNSET,
    Run,
    chosen,
    differs,
    effective,
    fits,
    names_of,
    names_with,
    specs,
    taken_from,
)  # fmt: skip
from mae.settings.training import EvaluationSpec, MachineSpec, OptimSpec

__all__ = [
    "DATASETS", "EVALUATE", "EXPORTED", "REBUILDS", "RESUME", "SIZES", "TRAIN", "UNSET", "AugmentationSpec", "DataSpec",
    "EvaluationSpec", "ImageSpec", "MachineSpec", "ModelSpec", "OptimSpec", "Run", "chosen", "differs", "effective",
    "fits", "names_of", "names_with", "specs", "taken_from",
]  # fmt: skip
