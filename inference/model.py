"""A model from a file, with what belongs to it."""

from pathlib import Path
from typing import NamedTuple

import models_mae
from models_mae import MaskedAutoencoderViT
from util import checkpoint, runstate, transforms
from util.checkpoint import CheckpointError
from util.transforms import Normalize, Transform


class LoadedMAE(NamedTuple):
    """A pre-trained masked autoencoder in evaluation mode."""

    model: MaskedAutoencoderViT
    transform: Transform  # a decoded picture -> uint8 (c, H, W)
    normalize: Normalize  # a batch of those -> the model's input
    settings: dict  # of the run that trained it


def load_mae(path: Path | str) -> LoadedMAE:
    """Rebuilds a masked autoencoder from one of our checkpoints alone.

    Raises:
        CheckpointError: the file is not whole, or does not tell how its model was built.
    """
    state = checkpoint.read(path)
    settings = state.get("args")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} does not tell how its model was built; it is none of our checkpoints")
    model = models_mae.build(settings)
    runstate.restore_model(model, state)
    statistics = transforms.channel_statistics(settings["in_chans"], settings["mean"], settings["std"])
    transform = transforms.eval_transform(settings["input_size"])
    return LoadedMAE(model.eval(), transform, transforms.Normalize(*statistics), settings)
