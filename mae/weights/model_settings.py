"""The settings of model and images in a file: those that it records, else those that shapes of tensors determine."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Size

from mae.checkpoints.checkpoint import CheckpointError
from mae.data.transforms import channel_statistics
from mae.settings import REBUILDS, chosen, names_with
from mae.settings.arguments import in_words
from mae.settings.choices import TIMM, default_crop_pct, published_crop_pct
from mae.settings.fields import HEAD, LABELS
from mae.sizes import Size as ImageSize
from mae.weights import shapes
from mae.weights.candidates import warn_once
from mae.weights.model_zoo import CLASSIFIER, FULL, SEGMENTER, row_settings
from mae.weights.reading import Weights
from models_mae import size_of
from models_vit import SIZES

logger = logging.getLogger(__name__)


def classifier_settings(file: Weights | None) -> dict[str, Any]:
    """Returns the settings that build a classifier with the encoder of a file; {} if no model of this library fits.

    For the file of a segmentation model, they build this model.
    """
    if file is None:
        return {}
    try:
        settings = file_settings(file)
    except CheckpointError:
        return {}
    if file.kind not in (CLASSIFIER, SEGMENTER):  # shapes do not determine the head; recorded settings may
        of_task = names_with(HEAD, LABELS)
        settings = {name: settings[name] for name in settings if name in file.settings or name not in of_task}
    result = {name: settings[name] for name in REBUILDS if name in settings}
    model = settings["model"]
    return {**result, "model": model if model.startswith(TIMM) else f"vit_{size_of(model)}"}


def autoencoder_settings(file: Weights) -> dict[str, Any]:
    """Returns what a file records of its model and images, for a pre-training that starts from its weights.

    A file that records no model of this library has the one with the shapes of its tensors.
    """
    names = [*REBUILDS, "min_valid"]  # the latter gives nodata its meaning
    settings = {name: file.settings[name] for name in names if file.settings.get(name) is not None}
    if file.kind == FULL and "norm_pix_loss" not in settings:
        published = row_settings(file.origin)
        if published:
            settings["norm_pix_loss"] = published["norm_pix_loss"]
        else:
            warn_once(f"{file.origin} does not record norm_pix_loss, for which its decoder was trained: the run has "
                      f"that of its flag")  # fmt: skip
    model = settings.pop("model", "")
    if model.startswith(TIMM):
        return settings
    if size_of(model) not in SIZES:
        try:
            model = file_settings(file)["model"]
        except CheckpointError:  # no size or several sizes
            return settings
    return settings | {"model": model if model.startswith("mae_") else f"mae_{model}"}


def file_settings(file: Weights, model: str | None = None) -> dict[str, Any]:
    """Returns the settings of the model of a file: the recorded ones, else those that shapes of tensors determine.

    Args:
        model: the name of the model, instead of the recorded name.

    Raises:
        CheckpointError: no size or several sizes have these shapes.
    """
    if str(file.settings.get("model")).startswith(TIMM):
        return file.settings
    size = size_of(model or str(file.settings.get("model")))
    shape_of = {name: tensor.shape for name, tensor in file.tensors.items()}
    # Published files record nothing. Most models that do not record norm_pix_loss were trained with it.
    published = {} if "norm_pix_loss" in file.settings else row_settings(file.origin)
    determined = {"norm_pix_loss": True, **published, **shapes.determined(shape_of)}
    if size not in SIZES:
        size = _size_with_shapes(shape_of, {**determined, **file.settings}, file.origin)
    settings = chosen({}, {**file.settings, **shapes.certain(determined)}, determined, {})
    if settings.get("patch_size") == SIZES[size]["patch_size"]:
        settings["patch_size"] = None  # that in the name of the model, as the flag has it
    prefix = "mae_" if file.kind == FULL else ""
    return {**settings, "model": model or f"{prefix}vit_{size}"}


def _size_with_shapes(shape_of: Mapping[str, Size], settings: Mapping[str, Any], origin: str) -> str:
    width, depth = shapes.width_and_depth(shape_of)
    sizes = [name for name, entry in SIZES.items() if (entry["embed_dim"], entry["depth"]) == (width, depth)]
    sizes = [name for name in sizes if settings.get("num_heads") == SIZES[name]["num_heads"]] or sizes
    side = shape_of["patch_embed.proj.weight"][-1]
    sizes = [name for name in sizes if SIZES[name]["patch_size"] == side] or sizes
    if not sizes:
        raise CheckpointError(f"{origin}: no model here is {width} wide and {depth} deep")
    if len({SIZES[name]["num_heads"] for name in sizes}) > 1:
        size = "" if settings.get("input_size") else ", input_size=(HEIGHT, WIDTH)"
        remedy = (
            f"{' and '.join(sizes)} have its shapes; use "
            f'get_model("vit_{sizes[0]}", pretrained="{origin}"{size}), or another of these names'
        )
        shapes.require_settings({**settings, "model": None}, ("model", "input_size"), origin, remedy)
    return sizes[0]


def statistics(
    file: Weights | None, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Returns `mean` and `std`. If one is None, it is taken from the run of a file with the same number of channels.

    A warning names each value that differs from the value of that run.

    Raises:
        CheckpointError: as in `require_statistics`.
    """
    if file and file.needs_statistics:
        require_statistics(file, mean, std)
    records = file is not None and file.settings.keys() & {"in_chans", "mean", "std"}
    if not file or not records:
        return mean, std
    patches = file.tensors.get(shapes.PATCHES)  # an encoder of the user's code may have none
    of_file = file.settings.get("mean"), file.settings.get("std")
    if str(file.settings.get("model")).startswith(TIMM) and in_chans != file.settings["in_chans"]:
        means = [[sum(values) / len(values)] * in_chans for values in of_file if values]
        return mean or means[0], std or means[1]
    if in_chans != (file.settings.get("in_chans") if patches is None else patches.shape[1]):
        return mean, std
    chosen = mean or of_file[0], std or of_file[1]
    pairs = zip(channel_statistics(in_chans, *chosen), channel_statistics(in_chans, *of_file), strict=True)
    for name, (used, recorded) in zip(("mean", "std"), pairs, strict=True):
        if used != recorded:
            now, then = (
                in_words({name: values[0] if len(values) == 1 else values}) for values in (list(used), list(recorded))
            )
            logger.warning(f"{now} is used, and {file.origin} was made with {then}")
    return chosen


def require_scale(file: Weights, alpha: float | None) -> None:
    """Raises ValueError if the low-rank updates of a file would have another scale: its features would change."""
    rank = file.settings.get("lora")
    if rank and alpha not in (None, recorded := file.settings.get("lora_alpha") or rank):
        raise ValueError(f"lora_alpha={alpha:g}: the updates of {file.origin} have lora_alpha={recorded:g}; omit it")


def require_statistics(file: Weights, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises CheckpointError if a file may have been made with any statistics, and they are not given."""
    if file.needs_statistics and (mean is None or std is None):
        raise CheckpointError(
            f"{file.origin} is of mmpretrain, whose configuration is not read: give mean and std of RGB images from 0 "
            f"to 1, which are those of its data_preprocessor divided by 255; a model without to_rgb=True is converted "
            f"as in docs/migrating.md"
        )


def crop_pct_of_earlier_version(file: Weights, input_size: ImageSize) -> float | None:
    """Returns the crop ratio of the evaluation of a trained head whose file records none: the published default.

    For other files it returns None. A file is named once, if the default has changed since.
    """
    if file.kind not in (CLASSIFIER, SEGMENTER) or file.settings.get("crop_pct") is not None:
        return None
    crop_pct = published_crop_pct(input_size)
    if crop_pct != default_crop_pct(input_size):
        warn_once(f"{file.origin} records no crop ratio, and {crop_pct} is used, the default of its time")
    return crop_pct
