"""A mask ratio that changes over the epochs, by a buffer of the model and a callback.

    python examples/rising_ratio.py --config recipes/pretrain_fashion_mnist.yaml --model_args first=.5 epochs=20 \\
        --output_dir runs/rising

The ratio changes linearly from `first` to --mask_ratio in the first `epochs` epochs. The buffer is in the checkpoints,
so a resumed run continues it: start it by this script, too. In the same way, a buffer may choose a masking strategy.
The held-out loss of --probe_every, pictures and FLOPs have --mask_ratio. It needs --masking random.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples run from a clone

import torch
from torch import Tensor, nn

import main_pretrain
from mae.cli import entry_point
from mae.masking import ratio_of, require_random
from mae.settings import Run
from models_mae import MaskedAutoencoderViT


class RisingRatio(MaskedAutoencoderViT):
    """A masked autoencoder with this mask ratio in training.

    Args:
        first: mask ratio at the start.
        epochs: number of epochs in which it changes.
    """

    decoder_progress: Tensor  # (), 0 to 1. Fine-tuning ignores entries whose names start with decoder_

    def __init__(self, *, first: float = 0.5, epochs: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.first = first
        self.epochs = epochs
        self.register_buffer("decoder_progress", torch.zeros(()))

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            if noise is not None:
                require_random(noise, "RisingRatio")
            progress = float(self.decoder_progress)  # the host waits for a GPU: the shapes depend on it
            mask_ratio = (1 - progress) * self.first + progress * mask_ratio
            if noise is not None and "valid" in context:  # an image with few valid patches can't show more
                most = int(noise.isfinite().sum(dim=1).min())
                mask_ratio = max(mask_ratio, ratio_of(most, noise.shape[1]))
        return super().random_masking(x, mask_ratio, noise, **context)


class Progress:
    """The callback that sets the buffer after every update. It has no state of its own."""

    def after_update(self, model: nn.Module, epoch: float) -> None:
        assert isinstance(model, RisingRatio)
        model.decoder_progress.fill_(min(1.0, epoch / model.epochs))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def main(run: Run) -> None:
    """Trains the model."""
    main_pretrain.main(run, model_class=RisingRatio, callbacks=[Progress()])


if __name__ == "__main__":
    entry_point.run_script(main, main_pretrain.get_args_parser())
