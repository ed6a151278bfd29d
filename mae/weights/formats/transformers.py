"""Converts the names of weights in mmpretrain (mmselfsup) and transformers. timm has the names of this library.

In mmpretrain, the prefix of the encoder is `backbone.`, and of the decoder `neck.`. transformers has three layouts: its
files (`vit.encoder.layer.0.attention.attention.query`), the decoder in files of 5.x (`decoder.decoder_encoder`),
and models of 5.x in memory (`vit.layers.0.attention.q_proj`). Query, key and value are separate there, and one matrix
`qkv` here.

The tables contain pairs (ours, theirs) of names, or of prefixes that end with a dot; # is a number.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

Rows = list[tuple[str, str]]

DECODER = ["mask_token", "decoder_pos_embed", "decoder_embed.", "decoder_pred."]
SPLIT = ("query", "key", "value")  # of `attn.qkv`


def _blocks(ours: str, theirs: str, parts: dict[str, str]) -> Rows:
    return [(f"{ours}.#.{part}.", f"{theirs}.#.{name}.") for part, name in parts.items()]


_MMPRETRAIN_BLOCK = {"norm1": "ln1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "ln2",
                     "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}  # fmt: skip
MMPRETRAIN: Rows = [
    *((name, f"backbone.{name}") for name in ("cls_token", "pos_embed")),
    ("patch_embed.proj.", "backbone.patch_embed.projection."),
    *_blocks("blocks", "backbone.layers", _MMPRETRAIN_BLOCK),
    ("norm.", "backbone.ln1."),
    ("fc_norm.", "backbone.ln2."),
    *((name, f"neck.{name}") for name in DECODER),
    *_blocks("decoder_blocks", "neck.decoder_blocks", _MMPRETRAIN_BLOCK),
    ("decoder_norm.", "neck.ln1."),
]


# The heads LinearClsHead, VisionTransformerClsHead, and VisionTransformerClsHead after a ClsBatchNormNeck.
_MMPRETRAIN_POOLED: Rows = [("head.", "head.fc.")]
_MMPRETRAIN_TOKEN: Rows = [("head.", "head.layers.head.")]
_MMPRETRAIN_PROBE: Rows = [("head.0.", "neck.bn."), ("head.1.", "head.layers.head.")]


def _transformers(layers: str, decoder_layers: str, block: dict[str, str]) -> Rows:
    block = {"norm1": "layernorm_before", "norm2": "layernorm_after", **block}
    return [
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        *_blocks("blocks", layers, block),
        ("norm.", "layernorm."),
        ("head.", "classifier."),
        *((name, f"decoder.{name}") for name in [*DECODER, "decoder_norm."]),
        *_blocks("decoder_blocks", f"decoder.{decoder_layers}", block),
    ]


_IN_FILES = {
    **{f"attn.{part}": f"attention.attention.{part}" for part in SPLIT},
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
# Of Pixio; the names of its MLP are those of _IN_FILES in the files that the installed version writes.
_IN_PIXIO_FILES = _IN_FILES | {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_IN_MEMORY = {
    **{f"attn.{part}": f"attention.{part[0]}_proj" for part in SPLIT},
    "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
TRANSFORMERS: list[Rows] = [
    _transformers("encoder.layer", "decoder_layers", _IN_FILES),
    _transformers("encoder.layer", "decoder_encoder.layer", _IN_FILES),
    _transformers("encoder.layer", "decoder_layers", _IN_PIXIO_FILES),
    _transformers("layers", "decoder_layers", _IN_MEMORY),
]


def to_ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights of any known format to our names. Unknown names are kept."""
    if any(name.startswith("backbone.") for name in weights):
        is_probe = any(name.startswith("neck.bn.") for name in weights)
        head = _MMPRETRAIN_PROBE if is_probe else [*_MMPRETRAIN_POOLED, *_MMPRETRAIN_TOKEN]
        return _renamed(weights, ((theirs, ours) for ours, theirs in [*MMPRETRAIN, *head]))
    if any(name.endswith("embeddings.cls_token") for name in weights):
        weights = {name.removeprefix("vit."): value for name, value in weights.items()}
        # The features do not depend on the pooler.
        weights = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
        return _joined(_renamed(weights, ((theirs, ours) for rows in TRANSFORMERS for ours, theirs in rows)))
    return _with_registers(weights) if "reg_token" in weights else weights


def to_transformers(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Converts our weights to the names of a model of transformers.

    Args:
        names: the names in the state dict of that model.

    Raises:
        ValueError: no known layout has exactly these names.
    """
    split: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = zip(SPLIT, value.chunk(3), strict=True) if ".attn.qkv." in name else [("qkv", value)]
        split |= {name.replace(".qkv.", f".{part}."): own for part, own in parts}
    for rows in TRANSFORMERS:
        renamed = _renamed(split, rows)
        for prefix in ("vit.", ""):
            complete = {k if k.startswith(("decoder.", "classifier.")) else prefix + k: v for k, v in renamed.items()}
            if complete.keys() == names:
                return complete
    differing = sorted(names ^ renamed.keys())
    raise ValueError(f"the installed transformers has unknown names of weights: {', '.join(differing[:4])}")


def _renamed(weights: dict[str, Tensor], rows: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    patterns = [
        (re.compile(re.escape(old).replace(r"\#", r"(\d+)") + ("" if old.endswith(".") else "$")), new)
        for old, new in rows
    ]

    def rename(name: str) -> str:
        for pattern, new in patterns:
            if match := pattern.match(name):
                return new.replace("#", match[1] if match.groups() else "") + name[match.end() :]
        return name

    return {rename(name): value for name, value in weights.items()}


def _with_registers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Appends the register tokens of timm to the class tokens, if the head pools patches and uses neither."""
    if "fc_norm.weight" not in weights:
        return weights
    tokens = [weights[name] for name in ("cls_token", "reg_token") if name in weights]
    rest = {name: value for name, value in weights.items() if name != "reg_token"}
    return {**rest, "cls_token": torch.cat(tokens, dim=1)}


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenates query, key and value, (D, D) or (D,) each, to (3D, D) or (3D,)."""
    result = {}
    for name, value in weights.items():
        if ".attn.query." in name:
            result[name.replace(".query.", ".qkv.")] = torch.cat(
                [weights[name.replace(".query.", f".{part}.")] for part in SPLIT]
            )
        elif ".attn.key." not in name and ".attn.value." not in name:
            result[name] = value
    return result
