"""Settings of a run as values: `fields.py` says what a setting is, and `run.py` where its value comes from."""

from mae.settings.data import DataSpec
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.settings.model import ModelSpec
from mae.settings.names import DATASETS, EXPORTED, REBUILDS, SIZES, differs, fits, names_of, names_with, specs
from mae.settings.run import EVALUATE, RESUME, TRAIN, UNSET, Run, chosen, effective, resolve
from mae.settings.training import EvaluationSpec, MachineSpec, OptimSpec

__all__ = [
    "DATASETS", "EVALUATE", "EXPORTED", "REBUILDS", "RESUME", "SIZES", "TRAIN", "UNSET", "AugmentationSpec", "DataSpec",
    "EvaluationSpec", "ImageSpec", "MachineSpec", "ModelSpec", "OptimSpec", "Run", "chosen", "differs", "effective",
    "fits", "names_of", "names_with", "resolve", "specs",
]  # fmt: skip
