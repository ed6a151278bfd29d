"""LARS (You et al. 2017), the optimizer of linear probing with large batches."""

from collections.abc import Iterable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose learning rate is scaled by the norm of each weight. Biases and 1-D weights are not scaled.

    g += wd·w; g *= trust·|w|/|g| (1 if either norm is 0); m = momentum·m + g; w -= lr·m.

    It supports `found_inf` like fused optimizers (`precision.Precision.step`): if `found_inf` is not 0, the update is
    skipped without synchronizing with the host.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        weight_decay: weight decay of weights with more than one dimension.
        momentum: momentum factor.
        trust_coefficient: factor of the ratio of the norms.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient},
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Loads a state. The published code names the momentum `mu`."""
        state = {
            number: {"momentum" if name == "mu" else name: value for name, value in moments.items()}
            for number, moments in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, weight.grad, group)

    def _step_one(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        if weight.ndim > 1:
            gradient = gradient + group["weight_decay"] * weight
            weight_norm = weight.norm()
            gradient_norm = gradient.norm()
            trust = group["trust_coefficient"] * weight_norm / gradient_norm
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, 1.0)
        old = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        new = group["momentum"] * old + gradient
        is_skipped = torch.as_tensor(getattr(self, "found_inf", 0.0), device=weight.device) > 0
        old.copy_(torch.where(is_skipped, old, new))
        weight.sub_(group["lr"] * torch.where(is_skipped, 0.0, new))
