"""Optimizer groups. Layer-wise learning-rate decay: Clark et al. 2020 (ELECTRA), Bao et al. 2021 (BEiT)."""

from collections.abc import Collection
from typing import Any

from torch import nn


def param_groups_weight_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups without and with weight decay, as timm's: biases and 1-D weights have none.

    So the class token and the mask token have weight decay, as published for pre-training.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": weight_decay},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1]["params"].append(parameter)
    return groups


def param_groups_lrd(
    model: nn.Module,
    weight_decay: float = 0.05,
    no_weight_decay_list: Collection[str] = (),
    layer_decay: float = 0.75,
) -> list[dict[str, Any]]:
    """Optimizer groups whose `lr_scale` falls by `layer_decay` with each layer below the head.

    Args:
        model: has `blocks`, and the other names of `models_vit.VisionTransformer`.
        no_weight_decay_list: names of parameters without weight decay, beside biases and 1-D weights.

    Returns:
        Groups in the order in which their first parameter is registered; frozen parameters are in none.
    """
    depth = len(model.blocks)  # type: ignore[arg-type]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = get_layer_id_for_vit(name, depth + 1)
        decays = parameter.ndim > 1 and name not in no_weight_decay_list
        group = groups.setdefault(
            (layer, decays),
            {
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
                "params": [],
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """0 for the embeddings, i + 1 for block i, `num_layers` (depth + 1) for the head and norms."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers
