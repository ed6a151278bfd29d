"""The weights of models of timm, and the preprocessing of their images.

`timm:NAME` is a model with the weights that timm publishes, `FILE#timm:NAME` one with the weights in a file.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mae.checkpoints.checkpoint import CheckpointError
from mae.settings.choices import TIMM
from mae.sizes import side_or_sides
from models_timm import require_name

logger = logging.getLogger(__name__)

NETWORK = "net."  # before the names of its tensors


def require_other(model: str) -> None:
    """Raises ValueError if a model that is trained, or built for a setting `model`, is one of timm."""
    if model.startswith(TIMM):
        raise ValueError(
            f"{model} is a frozen encoder, for nearest neighbors, probes and features, without `model`; "
            f"docs/migrating.md lists the files of timm that can be trained further"
        )


def load(name: str, tensors: Mapping[str, Tensor] | None, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a model, under the names of `TimmEncoder`, and its settings.

    Args:
        name: name in timm.
        tensors: its weights under timm's names. None: those that timm publishes. The classifier is not read.
        origin: of the tensors, for messages.

    Raises:
        ValueError: timm does not have the model.
        CheckpointError: its weights can't be downloaded, or the tensors are those of another model.
    """
    import timm

    require_name(name)
    try:
        model: Any = timm.create_model(name, pretrained=True) if tensors is None else _with_tensors(name, tensors)
    except Exception as error:  # of timm, of the Hugging Face Hub and of the network
        reason = " ".join(str(error).split())[:200]
        if tensors is not None:
            raise CheckpointError(f"{origin}: its tensors are not those of timm's {name}: {reason}") from error
        raise CheckpointError(
            f"{TIMM}{name}: its weights can't be downloaded: give a file, FILE#{TIMM}{name}, or in a comparison "
            f"timm_weights='{name}=FILE' ({reason})"
        ) from error
    model.reset_classifier(0)
    return {f"{NETWORK}{key}": tensor for key, tensor in model.state_dict().items()}, _settings_of(name, model)


def _with_tensors(name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Returns a model of timm with the tensors of a file. It may have no classifier, or one of other classes."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(tensors)})
    except RuntimeError:
        other: Any = timm.create_model(name)
        names = other.pretrained_cfg["classifier"]
        layers = [names] if isinstance(names, str) else names or []
        head = {key: value for key, value in other.state_dict().items() if key.rpartition(".")[0] in layers}
        overlay = {"state_dict": {**tensors, **head}}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


def _settings_of(name: str, model: Any) -> dict[str, Any]:
    """Returns the settings of a model and of its images."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    is_whole = config["crop_mode"] == "squash" and config["crop_pct"] == 1
    if config["crop_mode"] != "center" and not is_whole:
        logger.warning(f"{TIMM}{name}: its images are cropped by {config['crop_mode']} in timm, and their center here")
    if "quickgelu" not in name and any("quickgelu" in note for note in model.pretrained_cfg.get("notes") or ()):
        logger.warning(f"{TIMM}{name} was trained with QuickGELU: the model of timm for it has quickgelu in its name")
    return {
        "model": f"{TIMM}{name}", "nb_classes": 0, "num_cls_tokens": 1, "in_chans": channels,
        "input_size": side_or_sides(size), "mean": list(config["mean"]), "std": list(config["std"]),
        "crop": "none" if is_whole else "random", "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }  # fmt: skip
