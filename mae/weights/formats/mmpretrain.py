"""The files of mmpretrain and mmselfsup, which have the names of mmpretrain.

The prefix of the encoder is `backbone.`, and of the decoder `neck.`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Size, Tensor

from mae.weights.formats.format import DECODER, Format, Record, Rows, blocks, to_ours
from mae.weights.model_zoo import row_of

NAME = "mmpretrain"
TO_RGB = re.compile(r"to_rgb['\"]?\s*[=:]\s*True")  # in a configuration of mmpretrain, or bgr_to_rgb of mmselfsup

_BLOCK = {"norm1": "ln1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "ln2",
          "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}  # fmt: skip
ROWS: Rows = [
    *((name, f"backbone.{name}") for name in ("cls_token", "pos_embed")),
    ("patch_embed.proj.", "backbone.patch_embed.projection."),
    *blocks("blocks", "backbone.layers", _BLOCK),
    ("norm.", "backbone.ln1."),
    ("fc_norm.", "backbone.ln2."),
    *((name, f"neck.{name}") for name in DECODER),
    *blocks("decoder_blocks", "neck.decoder_blocks", _BLOCK),
    ("decoder_norm.", "neck.ln1."),
]
# The heads LinearClsHead, VisionTransformerClsHead, and VisionTransformerClsHead after a ClsBatchNormNeck.
HEADS: Rows = [("head.", "head.fc."), ("head.", "head.layers.head.")]
PROBE: Rows = [("head.0.", "neck.bn."), ("head.1.", "head.layers.head.")]


def matches(record: Record, names: Collection[str]) -> bool:
    """A model with a backbone."""
    return any(name.startswith("backbone.") for name in names)


def prefix(prefix: str, names: Collection[str]) -> str:
    """The backbone is a part of the model, whose decoder is in `neck.`."""
    if f"{prefix}patch_embed.projection.weight" in names:
        return re.sub(r"(?<![^.])backbone\.$", "", prefix)
    return prefix


def tensors(record: Record, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights."""
    is_probe = any(name.startswith("neck.bn.") for name in weights)
    return to_ours(weights, [*ROWS, *(PROBE if is_probe else HEADS)])


def settings(record: Record, sizes: Mapping[str, Size]) -> dict[str, Any]:
    """The names of the classes."""
    return {**record.args, **of_meta(record)}


def of_meta(record: Record) -> dict[str, Any]:
    """Returns the names of the classes in the entry `meta`. The configuration is not read.

    Raises:
        ValueError: the model is for BGR images. mmpretrain decodes images to BGR, and converts them to RGB only if its
            configuration says so.
    """
    if not isinstance(record.meta, dict) or record.args or row_of(str(record.path)):  # the released models are for RGB
        return {}
    config = record.meta.get("cfg")
    if config and not TO_RGB.search(str(config)):
        raise ValueError(
            "it has no to_rgb=True, so that the model is for BGR images: convert it as in docs/migrating.md"
        )
    dataset = record.meta.get("dataset_meta")
    classes = dataset.get("classes", dataset.get("CLASSES")) if isinstance(dataset, dict) else None
    if classes and all(isinstance(name, str) for name in classes):
        return {"label_names": list(classes)}
    return {}


FORMAT = Format(NAME, matches, tensors, settings, prefix)
