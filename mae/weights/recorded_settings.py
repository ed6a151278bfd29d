"""Settings of a run that starts from a file of weights, or evaluates it."""

import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from mae import settings
from mae.cli import advice, entry_point
from mae.cli.flags import runs_code, warn_without_crops
from mae.data import transforms
from mae.settings.fields import HEAD, LABELS, SPLIT
from mae.weights import preprocessing, reading

logger = logging.getLogger(__name__)


def with_recorded_settings(
    args: Namespace, file: reading.Weights | None, recorded: Mapping[str, Any], trains: bool = False
) -> Namespace:
    """Returns the settings of a run that uses a file: explicit flags, else the settings of the file, else defaults.

    Mean, std, crop ratio and number of class tokens have their final values. A warning names each explicit flag that
    differs from the file. The head and the data determine the number of classes.

    Args:
        file: the file to start from or to evaluate, if any.
        recorded: the settings of the file that determine its model, by the names of the flags.
        trains: a new head is trained. The settings of the task are not taken from the file, and its crops only if it is
            a file of this library; the crops of other libraries are about evaluation.
    """
    if file:
        dataset = str(file.settings.get("dataset"))
        if runs_code(dataset) and not any(getattr(args, name, None) for name in settings.DATASETS):
            raise ValueError(
                f"{file.origin} records a --dataset that runs code: give --dataset '{dataset}', or other data"
            )
        args = with_settings_of(file, args, recorded, trains)
    crop_pct = getattr(args, "crop_pct", None) or transforms.default_crop_pct(args.input_size)
    num_cls_tokens = args.num_cls_tokens or (file.num_cls_tokens if file else 1)
    return entry_point.changed(args, {"crop_pct": crop_pct, "num_cls_tokens": num_cls_tokens})


def with_settings_of(file: reading.Weights, args: Namespace, recorded: Mapping[str, Any], trains: bool) -> Namespace:
    """Returns settings as `with_recorded_settings`, without those that the model of a classifier determines."""
    also = ["hflip"] if trains else []
    if getattr(args, "eval", False) and getattr(args, "val_fraction", None) and "val_fraction" in file.settings:
        # The images that were held out from the training of the file, or a warning that it held out none.
        also = settings.names_with(SPLIT) if file.settings["val_fraction"] else ["val_fraction"]
    recorded = {**recorded, **{name: file.settings[name] for name in also if name in file.settings}}
    names = (recorded.keys() & vars(args).keys()) - {"nb_classes", "mean", "std"}
    if trains:
        names -= {*settings.names_with(HEAD, LABELS)}
        names -= set() if "model" in file.settings else {"crop", "crop_pct"}
    warn_of_changes(file.origin, args, names, recorded)
    taken = {name: recorded[name] for name in sorted(names - entry_point.explicit(args))}
    default = {**settings.ModelSpec().record(), **settings.ImageSpec().record()}  # of the flags whose default is None
    changed = {
        name: value
        for name, value in taken.items()
        if settings.differs(name, value, default.get(name) if getattr(args, name) is None else getattr(args, name))
    }
    if changed:
        logger.info(f"settings of {file.origin}: {' '.join(advice.arguments(changed))}")
    if "crop" in changed:
        warn_without_crops(Namespace(**taken), entry_point.explicit(args))
    args = entry_point.changed(args, taken)
    if not trains and "crop_pct" in args and args.crop_pct is None:
        args.crop_pct = preprocessing.crop_pct_of_earlier_version(file, args.input_size)
    if recorded.get("layer_norm_eps"):  # of foreign models; there is no flag
        args.layer_norm_eps = recorded["layer_norm_eps"]
    mean, std = preprocessing.statistics(file, args.in_chans, args.mean, args.std)
    return entry_point.changed(args, {"mean": mean, "std": std})


def warn_of_changes(source: str, args: Namespace, names: Iterable[str], recorded: Mapping[str, Any]) -> None:
    """Logs a warning for each explicit flag among `names` that differs from the recorded setting of a file."""
    for name in sorted(entry_point.explicit(args) & recorded.keys() & set(names)):
        current, value = getattr(args, name), recorded[name]
        if settings.differs(name, current, value):
            used, recorded_flag = (" ".join(advice.arguments({name: setting})) for setting in (current, value))
            origin = f"with {recorded_flag}" if recorded_flag else f"without --{name}"
            logger.warning(f"{used} is used, and {source} was made {origin}")
