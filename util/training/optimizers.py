"""The optimizer of a run: AdamW, or one of the user's code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from util.cli.user_code import call

# function(model, groups) -> optimizer. The groups are dicts with the keys params, weight_decay and perhaps lr_scale.
MakeOptimizer = Callable[[nn.Module, list[dict[str, Any]]], torch.optim.Optimizer]


def build(
    name: str | None, function: MakeOptimizer | None, model: nn.Module, groups: list[dict[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """Returns AdamW, or the optimizer that a function returns. The schedule sets the learning rate of its groups.

    Args:
        name: the setting `optimizer`, which a checkpoint may record.
        function: the function of --optimizer. None: AdamW.
        groups: parameter groups of the script.
        options: of AdamW.

    Raises:
        ValueError: the resumed run has an optimizer that is not given; the function returns something else; its
            state_dict has other keys than an optimizer of PyTorch; or its groups lack a parameter that requires
            gradients.
    """
    if function is None:
        if name:  # recorded: a file can't make a program import code
            raise ValueError(f"the resumed run has an optimizer of its own: give --optimizer {name}")
        return torch.optim.AdamW(groups, lr=0.0, fused=True, **options)
    found = call(f"--optimizer {name}", function, model, groups)
    if not isinstance(found, torch.optim.Optimizer):
        raise ValueError(f"--optimizer {name} returns {type(found).__name__}: return a torch.optim.Optimizer")
    if (keys := {*found.state_dict()}) != {"state", "param_groups"}:
        raise ValueError(
            f"--optimizer {name}: its state_dict has the keys {' '.join(sorted(keys))}, but a checkpoint has state "
            f"and param_groups: an optimizer that contains others keeps their state and groups as its own"
        )
    trained = {id(parameter) for group in found.param_groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise ValueError(f"--optimizer {name} lacks {key}: add it to a group, or set its requires_grad to False")
    return found
