"""The encoders of a comparison, with the settings of their architecture and weights."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from mae.compare.store import Settings
from mae.settings import UNSET, ImageSpec, ModelSpec, names_of, names_with
from mae.settings.choices import TIMM
from mae.settings.fields import HEAD, LABELS
from mae.settings.run import FLIPS
from mae.settings.training import ComparisonSpec
from mae.settings.values import as_yaml
from mae.weights import model_settings, model_zoo, reading

# random weights; baselines on raw pixels
SCRATCH = "scratch"
PIXELS = "pixels"
RESERVED = (SCRATCH, PIXELS, "choices", "features")  # names of encoders and folders in runs/
UPDATES = ("lora", "lora_alpha")
ARCHITECTURE = ("model", "encoder", "encoder_args", *UPDATES)  # settings that a file of --encoders replaces
BY_TIMM = ("input_size", "crop_pct", *names_of(ModelSpec))  # settings that a model of timm determines
READ_BY_SCRIPTS = ("mean", "std", "num_cls_tokens")  # with --finetune, the scripts read them from the file


class Encoder(NamedTuple):
    """An encoder of the comparison."""

    name: str
    settings: Settings  # of its architecture and weights
    architecture: Settings  # complete, without the settings of its weights
    without: Collection[str] = ()  # settings of the comparison that it does not take: those of a model of timm


def open_encoders(spec: ComparisonSpec, given: Settings, explicit: frozenset[str]) -> list[Encoder]:
    """Opens the encoders of a comparison, with the settings that their files record.

    Random weights and baselines have the architecture of the first file, or of `model`.

    Args:
        given: the settings of the comparison.
        explicit: the names of the explicit ones.

    Raises:
        ValueError: two encoders have one name, or an encoder can't be opened.
    """
    settings: dict[str, Settings] = {}
    of_timm: dict[str, Encoder] = {}
    of_first: Settings = {}
    timm_files = _timm_files(spec)
    for text in spec.encoders:
        name, file = (text, "") if text in (SCRATCH, PIXELS) else name_and_file(text)
        if directory_of(name) in map(directory_of, settings):
            directory = directory_of(name)
            raise ValueError(
                f"`encoders`: two have the name {directory}; give names, such as long=runs/b/checkpoint-99.pth"
            )
        settings[name] = {}
        if file:
            path = timm_files.get(file, file)
            weights = reading.read(path)
            if str(weights.settings.get("model")).startswith(TIMM):
                of_timm[name] = _of_timm(given, explicit, name, path, weights.settings)
                continue
            recorded = _recorded_settings(given, explicit, text, weights)
            settings[name] = {key: value for key, value in recorded.items() if key not in READ_BY_SCRIPTS}
            settings[name]["finetune"] = path
            of_first = of_first or recorded | {key: weights.settings.get(key) for key in FLIPS}
    untrained = of_first
    if "model" in explicit or not of_first:  # the images are those of the first file
        untrained = {name: given[name] for name in ARCHITECTURE if given.get(name) is not None}
        untrained |= {name: value for name, value in of_first.items() if name in names_of(ImageSpec)}
    # No layer has pre-trained weights: all are trained, at the same rate.
    untrained = {name: value for name, value in untrained.items() if name not in UPDATES} | {"layer_decay": 1}
    names = [name for name in names_of(ModelSpec, ImageSpec) if name in given and name not in ARCHITECTURE]
    shared = {name: given[name] for name in names}
    fixed = {name: value for name, value in shared.items() if name in explicit}
    return [
        of_timm.get(name) or Encoder(name, of_file or untrained, {**shared, **(of_file or untrained), **fixed})
        for name, of_file in settings.items()
    ]


def _timm_files(spec: ComparisonSpec) -> dict[str, str]:
    """Returns the files of `timm_weights`, as `reading.read` takes them, by the names of the models.

    Raises:
        ValueError: a text is not NAME=FILE, with a model of `encoders`.
    """
    files: dict[str, str] = {}
    for text in spec.timm_weights:
        name, _, path = text.partition("=")
        if not Path(path).is_file() or not any(encoder.endswith(f"{TIMM}{name}") for encoder in spec.encoders):
            raise ValueError(
                f"timm_weights={as_yaml(text)}: give NAME=FILE, the file of a model {TIMM}NAME of `encoders`"
            )
        files[f"{TIMM}{name}"] = f"{path}#{TIMM}{name}"
    return files


def _of_timm(given: Settings, explicit: frozenset[str], name: str, path: str, recorded: Settings) -> Encoder:
    """Returns a model of timm. Images of other channels may have any values, and keep `mean` and `std`."""
    channels = given["in_chans"] if "in_chans" in explicit else recorded["in_chans"]
    without = BY_TIMM if channels != recorded["in_chans"] else (*BY_TIMM, "mean", "std")
    return Encoder(name, {"finetune": path}, recorded | {"in_chans": channels}, without)


def _recorded_settings(given: Settings, explicit: frozenset[str], text: str, weights: Any) -> Settings:
    """Returns the settings of the architecture and the images that a file determines."""
    recorded = model_settings.classifier_settings(weights)
    if not recorded:
        raise ValueError(f"encoders={as_yaml(text)}: no model of this library has its shapes")
    encoder = recorded.get("encoder") or ""
    if ":" in encoder and encoder != given.get("encoder"):  # a file can't make a program import code
        raise ValueError(f"encoders={as_yaml(text)}: it has an encoder of its own: give encoder={recorded['encoder']}")
    if recorded.get("crop_pct") is None and given.get("crop_pct") is None:
        size = given["input_size"] if "input_size" in explicit else recorded.get("input_size") or given["input_size"]
        recorded["crop_pct"] = model_settings.crop_pct_of_earlier_version(weights, size)
    names = [name for name in names_of(ModelSpec, ImageSpec) if name not in names_with(HEAD, LABELS) and name in given]
    return {name: recorded[name] for name in names if recorded.get(name) not in (None, UNSET.get(name))}


def name_and_file(text: str) -> tuple[str, str]:
    """Splits [NAME=]ENCODER. A path may contain an equals sign.

    Raises:
        ValueError: the name has another meaning.
    """
    name, file = text.split("=", 1) if "=" in text and not Path(text).exists() else ("", text)
    if not name and file.startswith(TIMM):
        name = file.removeprefix(TIMM)
    elif not name:  # a dot of a folder or of a model of the hub begins no suffix
        name = Path(file).name if Path(file).is_dir() or model_zoo.is_of_hub(file) else Path(file).stem
    if not file:
        raise ValueError(f"encoders={as_yaml(text)}: give a file or a published name after the equals sign")
    if directory_of(name) in RESERVED:
        raise ValueError(f"encoders={as_yaml(text)}: the name {name} is reserved; give another, such as mine={file}")
    return name, file


def directory_of(name: str) -> str:
    """Returns the name of the folder of an encoder or protocol."""
    return re.sub(r"[^\w.-]|^\.+", "_", name)
