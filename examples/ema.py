"""A callback: the exponential moving average of the weights, which the checkpoints contain.

python examples/ema.py --config recipes/pretrain_fashion_mnist.yaml --output_dir runs/average

The script has the flags of main_pretrain.py.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples run from a clone

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import main_pretrain
from util.checkpoints import checkpoint
from util.cli import entry_point


class EMA:
    """The average of the weights after every update, and in log.txt its distance from the weights."""

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self.average: AveragedModel | None = None
        self.state: dict[str, Any] = {}

    def after_update(self, model: nn.Module, epoch: float) -> None:
        if self.average is None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
            self.average.load_state_dict(self.state or self.average.state_dict())
        self.average.update_parameters(model)

    def after_epoch(self, model: nn.Module, epoch: int, log: dict[str, Any]) -> dict[str, Any]:
        assert self.average is not None
        pairs = zip(model.parameters(), self.average.module.parameters(), strict=True)
        return {"ema_distance": sum(float((w - a).detach().square().sum()) for w, a in pairs) ** 0.5}

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict() if self.average else self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def write(file: str | Path, out: str | Path) -> None:
    """Writes a checkpoint of this script with the averaged weights, for --finetune."""
    state = checkpoint.read(Path(file))
    average = state["callbacks"][0]
    state["model"] = {name: average[f"module.{name}"] for name in state["model"]}
    checkpoint.write(state, Path(out))


if __name__ == "__main__":
    entry_point.run(partial(main_pretrain.main, callbacks=[EMA()]), main_pretrain.get_args_parser())
