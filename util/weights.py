"""The door for weights: anybody's file into a model of ours."""

import logging
from pathlib import Path

from torch import nn

from util import checkpoint
from util.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

FIXED_TABLES = {"pos_embed", "decoder_pos_embed"}  # recomputed by every model, so that a file's may be of another size


def init_mae(model: nn.Module, path: Path | str) -> None:
    """Starts a masked autoencoder from a file's weights: all of them, or the encoder's alone.

    Raises:
        CheckpointError: the file lacks encoder weights, has others' names, or other shapes than the model's.
    """
    state = checkpoint.read(path)
    weights = {k: v for k, v in state.get("model", state).items() if k not in FIXED_TABLES}
    ours = {k: v for k, v in model.state_dict().items() if k not in FIXED_TABLES}
    decoder = {name for name in ours if name.startswith("decoder_") or name == "mask_token"}
    missing = ours.keys() - weights.keys()
    if missing == decoder:
        logger.warning(f"{path} has an encoder only: the decoder starts untrained")
        missing = set()
    unexpected = weights.keys() - ours.keys()
    reshaped = {name for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape}
    for problem, names in (("lacks", missing), ("holds besides", unexpected), ("has in another shape", reshaped)):
        if names:
            raise CheckpointError(
                f"--init_from {path} {problem} {len(names)} tensors ({', '.join(sorted(names)[:3])}, ...): "
                f"give --model, --patch_size and --in_chans as it was trained with"
            )
    model.load_state_dict(weights, strict=False)
    logger.info(f"weights from {path}")
