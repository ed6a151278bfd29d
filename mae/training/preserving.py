"""Opens the loss that keeps a continued encoder near its start (`mae.preservation`)."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mae.data import transforms
from mae.data.generators import preserve_generators
from mae.settings import ImageSpec
from models_mae import MaskedAutoencoderViT

if TYPE_CHECKING:
    from mae.weights.reading import Weights

logger = logging.getLogger(__name__)


def open_term(
    model: MaskedAutoencoderViT, weight: float, images: ImageSpec, file: "Weights | None", device: torch.device,
    is_sharded: bool, build_sharded: Callable[[], MaskedAutoencoderViT],
) -> dict[str, Any]:  # fmt: skip
    """Sets the loss `preserve` of a model. Returns what the run records of the file.

    The weights of the model are those of the start. A resumed run restores its own after it.

    Args:
        weight: of the loss; 0: none.
        file: the weights from which the model starts.
        build_sharded: returns the start of a sharded model, with shards of its own: it can't share those of the model.

    Raises:
        ValueError: there is no file.
    """
    if not weight:
        return {}
    if file is None:
        raise ValueError(f"preserve={weight:g} keeps the features of a file: give init_from=FILE")
    from mae import preservation
    from mae.checkpoints.checkpoint import compute_digest
    from mae.weights import model_settings

    with preserve_generators():
        start = build_sharded() if is_sharded else preservation.frozen_copy(model)
    shared = {id(parameter) for parameter in model.parameters()}
    copied = sum(parameter.numel() for parameter in start.parameters() if id(parameter) not in shared)
    logger.info(f"preserve={weight:g}: the start sees each image whole; {copied:,} of its weights are copies")
    of_run = images.mean, images.std
    of_start = of_run if file.needs_statistics else model_settings.statistics(file, images.in_chans, None, None)
    scale, shift = transforms.renormalization(images.in_chans, of_run, of_start)
    model.preserve = preservation.Preservation(start, weight, scale.to(device), shift.to(device))
    return {"start_digest": compute_digest(dict(sorted(file.tensors.items())))}
