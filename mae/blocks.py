"""The blocks of a model: what --compile compiles, and --fsdp shards."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of encoder and decoder of a model, or of the models in it."""
    lists = [getattr(model, name, None) for name in ("blocks", "decoder_blocks")]
    found = [block for blocks in lists if isinstance(blocks, nn.Module) for block in blocks.children()]
    return found or [block for part in model.children() for block in blocks_of(part)]
