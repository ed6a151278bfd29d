"""The blocks of a model: what --compile compiles, and --fsdp shards."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of encoder and decoder of a model, or of the models in it."""
    lists = [module for name, module in model.named_modules() if name.split(".")[-1] in ("blocks", "decoder_blocks")]
    return [block for blocks in lists for block in blocks.children()]
