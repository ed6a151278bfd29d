"""An exponential moving average of the weights, as a callback of `trainer.run`."""

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Averages the weights after every update: average = decay * average + (1 - decay) * weights.

    The average starts with the weights after the first update. Its state is a `state_dict` of the model.

    Args:
        decay: the weight of the previous average. 0.999 averages over about the last 1,000 updates.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_update(self, model: nn.Module, epoch: float) -> None:
        """Adds the current weights to the average."""
        for name, weight in model.state_dict().items():
            if name in self.weights and weight.is_floating_point():
                self.weights[name] = self.weights[name].to(weight.device).lerp_(weight, 1 - self.decay)
            else:
                self.weights[name] = weight.clone()

    def state_dict(self) -> dict[str, Any]:
        """Returns the averaged weights, by their names in the model."""
        return self.weights

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the average of a checkpoint."""
        self.weights = state_dict
