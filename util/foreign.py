"""Other people's names for the same weights: mmpretrain's (mmselfsup's) and those of transformers. timm's are ours.

mmpretrain puts the encoder under `backbone.`, the decoder under `neck.`. transformers has had three layouts: that of
its files (`vit.encoder.layer.0.attention.attention.query`), the decoder's of 5.x (`decoder.decoder_encoder.layer.0`),
and that of 5.x in memory (`vit.layers.0.attention.q_proj`). It splits what is one matrix `qkv` here.
"""

import re

import torch
from torch import Tensor

Renames = list[tuple[str, str]]  # patterns and what replaces them, applied one after the other

MMPRETRAIN: Renames = [
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^(backbone|neck)\.", ""),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^head\.fc\.", "head."),
]
TRANSFORMERS: Renames = [
    (r"^vit\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def to_ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, whoever named them; names that nobody knows stay as they are."""
    for prefix in ("module.", "_orig_mod."):  # left by wrappers
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    if any(name.startswith("backbone.") for name in weights):
        return _renamed(weights, MMPRETRAIN)
    if any(name.endswith("embeddings.cls_token") for name in weights):
        return _with_qkv(_renamed(weights, TRANSFORMERS))
    return weights


def _renamed(weights: dict[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    result = {}
    for name, value in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def _with_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts query, key and value, each (D, D) or (D,), into one (3D, D) or (3D,)."""
    result = {}
    for name, value in weights.items():
        if ".attn.query." in name:
            parts = [weights[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            result[name.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif ".attn.key." not in name and ".attn.value." not in name:
            result[name] = value
    return result
