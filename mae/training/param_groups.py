"""Parameter groups with weight decay, and with layer-wise learning-rate decay.

Layer-wise learning-rate decay: Clark et al. 2020 (ELECTRA), Bao et al. 2021 (BEiT).
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn

from models_vit import get_layer_id_for_vit


def param_groups_weight_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two parameter groups, without and with weight decay, like timm: biases and 1-D weights have none.

    The class token and the mask token have weight decay, as in published pre-training.
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
    """Returns parameter groups with layer-wise learning-rate decay.

    The factor `lr_scale` of a group is `layer_decay` to the power of the number of layers above it.

    Args:
        model: a `models_vit.VisionTransformer`, or a Vision Transformer with the names of timm.
        weight_decay: weight decay of the parameters that have it.
        no_weight_decay_list: names of parameters without weight decay, in addition to biases and 1-D weights.
        layer_decay: factor from each layer to the layer below.

    Returns:
        The groups, in the order in which their first parameter is registered. Frozen parameters are omitted.
    """
    depth = len(model.blocks)  # type: ignore[arg-type]
    layer_id = getattr(model, "layer_id", partial(get_layer_id_for_vit, num_layers=depth + 1))
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name)
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
