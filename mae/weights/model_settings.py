"""The settings of the model in a file: those that it records, else those that the shapes of its tensors determine."""

from collections.abc import Mapping
from typing import Any

from torch import Size

from mae.build import size_of
from mae.checkpoints.checkpoint import CheckpointError
from mae.settings import REBUILDS, chosen, names_with
from mae.settings.fields import HEAD, LABELS
from mae.weights import shapes
from mae.weights.model_zoo import CLASSIFIER, FULL, SEGMENTER, row_of
from mae.weights.reading import Weights
from models_vit import SIZES


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
    return {**result, "model": f"vit_{size_of(settings['model'])}"}


def autoencoder_settings(file: Weights) -> dict[str, Any]:
    """Returns what a file records of its model and images, for a pre-training that starts from its weights."""
    names = [*REBUILDS, "min_valid"]  # the latter gives nodata its meaning
    settings = {name: file.settings[name] for name in names if file.settings.get(name) is not None}
    model = settings.pop("model", "")
    name = model if model.startswith("mae_") else f"mae_{model}"
    return settings | ({"model": name} if size_of(name) in SIZES else {})


def file_settings(file: Weights, model: str | None = None) -> dict[str, Any]:
    """Returns the settings of the model of a file: the recorded ones, else those that shapes of tensors determine.

    Args:
        model: the name of the model, instead of the recorded name.

    Raises:
        CheckpointError: no size or several sizes have these shapes.
    """
    size = size_of(model or str(file.settings.get("model")))
    shape_of = {name: tensor.shape for name, tensor in file.tensors.items()}
    determined = shapes.determined(shape_of)
    if size not in SIZES:
        size = _size_with_shapes(shape_of, {**determined, **file.settings}, file.origin)
    # Most published models that do not record it were trained with norm_pix_loss.
    if "norm_pix_loss" not in file.settings:
        determined["norm_pix_loss"] = not (row := row_of(file.origin)) or row.norm_pix_loss
    recorded = {**file.settings, **shapes.certain(determined)}
    settings = chosen({}, recorded, determined, {})
    if settings.get("patch_size") == SIZES[size]["patch_size"]:
        settings["patch_size"] = None  # that in the name of the model, as the flag has it
    return {**settings, "model": model or f"{'mae_' * (file.kind == FULL)}vit_{size}"}


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
