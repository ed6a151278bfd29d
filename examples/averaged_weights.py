"""An exponential moving average of the weights (Polyak and Juditsky 1992), by a callback.

    python examples/averaged_weights.py --config recipes/pretrain_fashion_mnist.yaml --output_dir runs/averaged

The script takes the flags of main_pretrain.py. Checkpoints contain the average, so that a resumed run continues it.
average.pth of the run directory has the average as its weights, for --finetune of all scripts and for `mae.inference`.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples run from a clone

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import main_pretrain
from mae import parallel
from mae.checkpoints import checkpoint, run_directory
from mae.cli import entry_point
from mae.settings import Run


class EMA:
    """Averages the weights after every update.

    Args:
        decay: factor of the average in each update.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self.average: AveragedModel | None = None
        self.state: dict[str, Any] = {}

    def after_update(self, model: nn.Module, epoch: float) -> None:
        if self.average is None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
            self.average.load_state_dict(self.state or self.average.state_dict())
        self.average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict() if self.average else self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def main(run: Run) -> None:
    """Trains, and writes the averaged weights of the last checkpoint."""
    main_pretrain.main(run, callbacks=[EMA()])
    if parallel.is_main():
        output_dir = Path(run.machine.output_dir)
        state = checkpoint.read(next(iter(run_directory.newest_first(output_dir))))
        average = state["callbacks"][0]
        weights = {name: average[f"module.{name}"] for name in state["model"]}
        checkpoint.write({"model": weights, "args": state["args"]}, output_dir / "average.pth")


if __name__ == "__main__":
    entry_point.run_script(main, main_pretrain.get_args_parser())
