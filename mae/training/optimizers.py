"""The optimizer of a run, one of OPTIMIZERS or of the user's code, and its parameter groups.

Layer-wise learning-rate decay: Clark et al. 2020 (ELECTRA), Bao et al. 2021 (BEiT).
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from mae.registry import Choice, default_name, find, lazily
from mae.user_code import call
from models_vit import get_layer_id_for_vit

# function(model, groups) -> optimizer. The groups are dicts with the keys params, weight_decay and perhaps lr_scale.
MakeOptimizer = Callable[[nn.Module, list[dict[str, Any]]], Optimizer]


class Joined(Optimizer):
    """Several optimizers as one, with the parameter groups and the state of all.

    Args:
        parts: optimizers of different parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.counts = [len(part.param_groups) for part in parts]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        first = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            # `load_state_dict` replaces groups and state.
            part.state = self.state
            part.param_groups = self.param_groups[first : first + count]
            part.step()
            first += count


def adamw(model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    """Returns AdamW."""
    return AdamW(groups, lr=0.0, fused=True, betas=betas)


# function(model, groups, betas) -> optimizer; the betas are those of AdamW
OPTIMIZERS = {
    "adamw": Choice("", adamw, is_default=True),
    "muon": Choice("for the matrices of the blocks, and AdamW for other parameters, with the learning rate of AdamW",
                   lazily("mae.training.muon", "muon_and_adamw")),
}  # fmt: skip


def build(
    name: str | None,
    function: MakeOptimizer | None,
    model: nn.Module,
    groups: list[dict[str, Any]],
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """Returns an entry of OPTIMIZERS, or the result of a function. The schedule sets the learning rate of its groups.

    Args:
        name: the setting `optimizer`, which a checkpoint may record. None: the default.
        function: the user's function of --optimizer, if any.
        groups: parameter groups of the script.
        betas: of AdamW.

    Raises:
        ValueError: OPTIMIZERS has no such name; the resumed run has an optimizer that is not given; the function
            returns an optimizer that contains others; or its groups lack a parameter that requires gradients.
    """
    if function is None:
        name = name or default_name(OPTIMIZERS)
        if ":" in name:  # recorded: a file can't make a program import code
            raise ValueError(f"the resumed run has an optimizer of its own: give optimizer={name}")
        return find("optimizer", OPTIMIZERS, name).function(model, groups, betas)
    found = call(f"optimizer={name}", function, model, groups)
    # A resumed run would have neither the state nor the learning rate of optimizers that another one contains.
    values = [
        part for value in vars(found).values() for part in (value if isinstance(value, list | tuple) else [value])
    ]
    keys = {*found.state_dict()}
    if not isinstance(found, Joined) and (
        any(isinstance(value, Optimizer) for value in values) or keys != {"state", "param_groups"}
    ):
        raise ValueError(
            f"optimizer={name} returns an optimizer that contains others: return "
            f"mae.training.optimizers.Joined([...]) of them"
        )
    trained = {id(parameter) for group in found.param_groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise ValueError(f"optimizer={name} lacks {key}: add it to a group, or set its requires_grad to False")
    return found


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
        model: a model of this library, or a Vision Transformer with the names of timm.
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
