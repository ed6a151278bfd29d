"""The optimizer of a run: AdamW, or one of the user's code."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from mae.user_code import call

# function(model, groups) -> optimizer. The groups are dicts with the keys params, weight_decay and perhaps lr_scale.
MakeOptimizer = Callable[[nn.Module, list[dict[str, Any]]], Optimizer]


class Joined(Optimizer):
    """Several optimizers as one, with the parameter groups and the state of all.

    Args:
        parts: optimizers of different parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts, self.counts = parts, [len(part.param_groups) for part in parts]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        first = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            # `load_state_dict` replaces groups and state.
            part.state, part.param_groups = self.state, self.param_groups[first : first + count]
            part.step()
            first += count


def build(
    name: str | None,
    function: MakeOptimizer | None,
    model: nn.Module,
    groups: list[dict[str, Any]],
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """Returns AdamW, or the optimizer that a function returns. The schedule sets the learning rate of its groups.

    Args:
        name: the setting `optimizer`, which a checkpoint may record.
        function: the function of --optimizer. None: AdamW.
        groups: parameter groups of the script.
        betas: of AdamW.

    Raises:
        ValueError: the resumed run has an optimizer that is not given; the function returns an optimizer that contains
            others; or its groups lack a parameter that requires gradients.
    """
    if function is None:
        if name:  # recorded: a file can't make a program import code
            raise ValueError(f"the resumed run has an optimizer of its own: give optimizer={name}")
        return AdamW(groups, lr=0.0, fused=True, betas=betas)
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
