"""The loss of a batch in masked pre-training (He et al. 2021, section 3)."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data.transforms import Normalize
from mae.training import loop


def train_one_epoch(
    model: nn.Module,
    data_loader: loop.Loader,
    optimizer: Optimizer,
    options: loop.EpochOptions,
    *,
    mask_ratio: float,
    normalize: Normalize,
) -> None:
    """Trains a masked autoencoder for an epoch.

    Args:
        model: a `MaskedAutoencoderViT`, possibly wrapped.
        data_loader: batches, of which the labels are not used.
        mask_ratio: fraction of masked patches.
        normalize: images -> the input of the model, on the device.
    """

    def compute_loss(batch: Any) -> Tensor:
        return model(normalize(batch.images), mask_ratio, noise=batch.noise, **batch.extras)[0]

    loop.run_epoch(compute_loss, model, data_loader, optimizer, options)
