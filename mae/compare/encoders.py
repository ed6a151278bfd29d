"""The encoders of a comparison, with the settings of their architecture and weights."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from mae.compare.store import Settings
from mae.files import locks
from mae.settings import UNSET, ImageSpec, ModelSpec, Run, names_of, names_with
from mae.settings.fields import HEAD, LABELS
from mae.settings.run import FLIPS
from mae.suggestions import did_you_mean
from mae.weights import model_settings, reading

SCRATCH, PIXELS, TIMM = "scratch", "pixels", "timm:"  # random weights; baselines on raw pixels; a model of timm
RESERVED = (SCRATCH, PIXELS, "choices")  # names of encoders and folders in runs/
ARCHITECTURE = ("model", "encoder", "encoder_args")  # settings that a file of --encoders replaces
READ_BY_SCRIPTS = ("mean", "std", "num_cls_tokens")  # with --finetune, the scripts read them from the file


class Encoder(NamedTuple):
    """An encoder of the comparison."""

    name: str
    settings: Settings  # of its architecture and weights


def open_encoders(run: Run, folder: Path) -> list[Encoder]:
    """Opens the encoders of --encoders, with the settings that their files record.

    Random weights and baselines have the architecture of the first file, or of --model.

    Args:
        folder: folder of the models of timm.

    Raises:
        ValueError: two encoders have one name, or an encoder can't be opened.
    """
    settings: dict[str, Settings] = {}
    of_first: Settings = {}
    for text in run.comparison.encoders:
        name, file = (text, "") if text in (SCRATCH, PIXELS) else name_and_file(text)
        if directory_of(name) in map(directory_of, settings):
            directory = directory_of(name)
            raise ValueError(
                f"`encoders`: two have the name {directory}; give names, such as long=runs/b/checkpoint-99.pth"
            )
        settings[name] = {}
        if file:
            path = _timm_folder(file.removeprefix(TIMM), folder) if file.startswith(TIMM) else file
            weights = reading.read(path)
            recorded = _recorded_settings(run, text, weights)
            settings[name] = {key: value for key, value in recorded.items() if key not in READ_BY_SCRIPTS}
            settings[name]["finetune"] = path
            of_first = of_first or recorded | {key: weights.settings.get(key) for key in FLIPS}
    untrained = of_first
    if "model" in run.explicit or not of_first:  # the images are those of the first file
        untrained = {name: run[name] for name in ARCHITECTURE if run[name] is not None}
        untrained |= {name: value for name, value in of_first.items() if name in names_of(ImageSpec)}
    untrained["layer_decay"] = 1  # no layer has pre-trained weights
    return [Encoder(name, own or untrained) for name, own in settings.items()]


def _recorded_settings(run: Run, text: str, weights: Any) -> Settings:
    """Returns the settings of the architecture and the images that a file determines."""
    recorded = model_settings.classifier_settings(weights)
    if not recorded:
        raise ValueError(f"encoders={text!r}: no model of this library has its shapes")
    if recorded.get("encoder") not in (None, run.model.encoder):  # a file can't make a program import code
        raise ValueError(f"encoders={text!r}: it has an encoder of its own: give encoder={recorded['encoder']}")
    if recorded.get("crop_pct") is None and run.images.crop_pct is None:
        is_explicit = "input_size" in run.explicit
        size = run.images.input_size if is_explicit else recorded.get("input_size", run.images.input_size)
        recorded["crop_pct"] = model_settings.crop_pct_of_earlier_version(weights, size)
    names = [name for name in names_of(ModelSpec, ImageSpec) if name not in names_with(HEAD, LABELS) and name in run]
    return {name: recorded[name] for name in names if recorded.get(name) not in (None, UNSET.get(name))}


def name_and_file(text: str) -> tuple[str, str]:
    """Splits [NAME=]ENCODER. A path may contain an equals sign.

    Raises:
        ValueError: the name has another meaning.
    """
    name, file = text.split("=", 1) if "=" in text and not Path(text).exists() else ("", text)
    if not name and file.startswith(TIMM):
        name = file.removeprefix(TIMM)
    elif not name:  # a dot of a folder begins no suffix
        name = Path(file).name if Path(file).is_dir() else Path(file).stem
    if not file:
        raise ValueError(f"encoders={text!r}: give a file or a published name after the equals sign")
    if directory_of(name) in RESERVED:
        raise ValueError(f"encoders={text!r}: the name {name} is reserved; give another, such as mine={file}")
    return name, file


def directory_of(name: str) -> str:
    """Returns the name of the folder of an encoder or protocol."""
    return re.sub(r"[^\w.-]|^\.+", "_", name)


def _timm_folder(name: str, folder: Path) -> str:
    """Saves a model of timm with its weights as a folder; returns the folder, which `reading.read` reads.

    Raises:
        ValueError: timm does not have the model, or its weights can't be downloaded.
    """
    import timm  # takes more than a second
    from timm.models import save_for_hf

    path = folder / name
    try:
        with locks.locked(path.parent, f"{path.name}.lock", waits=True):
            if not (path / "config.json").exists():
                save_for_hf(timm.create_model(name, pretrained=True), str(path))
    except Exception as error:  # of timm, of the Hugging Face Hub and of the network
        near = "" if timm.is_model(name) else did_you_mean(name, timm.list_models("*vit*"))
        raise ValueError(f"encoders={TIMM + name!r}: {str(error).splitlines()[0]}{near}") from error
    return str(path)
