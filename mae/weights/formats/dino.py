"""Reads the encoders of DINOv2 (Oquab et al. 2024) and DINOv3 (Siméoni et al. 2025): their names and their sizes.

The layouts are those of the released code, of timm and of transformers. `models_dino.py` has the models. The weights
of DINOv2 have the Apache license. Those of DINOv3 have a license of their own, and their files are gated.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Size, Tensor

from mae.sizes import side_or_sides
from mae.weights import shapes
from mae.weights.candidates import warn_once
from mae.weights.foreign_settings import recorded
from mae.weights.formats.format import Format, Record
from models_vit import SIZES

logger = logging.getLogger(__name__)

NAME = "dino"
REGISTERS = "register_tokens"
NAMES = {  # patterns of their names -> ours; those of the gated MLP are those of timm's SwiGLU
    r"^embeddings\.patch_embeddings\.(projection\.)?": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^(embeddings\.)?(register_tokens|storage_tokens|reg_token)$": REGISTERS,
    r"^embeddings\.": "",
    r"^layernorm\.": "norm.",
    r"^((encoder|model)\.)?layer\.(?=\d)": "blocks.",
    r"^blocks\.\d+\.(?=\d)": "blocks.",  # a chunk of blocks, in checkpoints of a training
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.attention\.(attention\.)?": ".attn.",
    r"\.attn\.(query|q_proj)\.": ".attn.q.",
    r"\.attn\.(key|k_proj)\.": ".attn.k.",
    r"\.attn\.(value|v_proj)\.": ".attn.v.",
    r"\.attn\.([qv])_bias$": r".attn.\1.bias",
    r"\.(layer_scale|ls|gamma_)([12])(\.lambda1|\.gamma)?$": r".ls\2.gamma",
    r"\.mlp\.(gate_proj|w1)\.": ".mlp.fc1_g.",
    r"\.mlp\.(up_proj|w2)\.": ".mlp.fc1_x.",
    r"\.mlp\.(weights_in|w12)\.": ".mlp.fc1.",
    r"\.mlp\.(weights_out|down_proj|w3)\.": ".mlp.fc2.",
}
# The features do not depend on these. The norm of local crops is only in files of the largest models.
UNUSED = re.compile(r"mask_token|rope(_embed|_embeddings)?\.(periods|inv_freq)|.*\.bias_mask|local_cls_norm\..*")
HEAD_WIDTH = 64  # channels of a head; state dicts do not show it


def matches(record: Record, names: Collection[str]) -> bool:
    """A model with layer scale, and a position table or registers. Our own files record the encoder."""
    ours = {_our_name(name) for name in names}
    is_dino = "blocks.0.ls1.gamma" in ours and bool({"pos_embed", REGISTERS} & ours)
    return is_dino and not record.is_ours and record.args.get("encoder") is None


def tensors(record: Record, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights. Registers follow the class token, and have positions of zeros.

    A line names the patterns of the names that are not used; # is a number.
    """
    ours = {name: _our_name(name) for name in weights}
    unused = [name for name in weights if UNUSED.fullmatch(ours[name])]
    found = {ours[name]: weights[name] for name in weights if name not in unused}
    _, depth = shapes.width_and_depth({name: tensor.shape for name, tensor in found.items()})
    for number in range(depth):
        _join_qkv(found, f"blocks.{number}.attn", any(name.endswith(".bias_mask") for name in unused))
        _split_gate(found, f"blocks.{number}.mlp")
    if REGISTERS in found:
        found["cls_token"] = torch.cat([found["cls_token"], found.pop(REGISTERS)], dim=1)
    if "pos_embed" in found:
        table = found["pos_embed"]
        count = found["cls_token"].shape[1]
        first = int(math.isqrt(table.shape[1]) ** 2 != table.shape[1])  # timm's models with registers have none
        zeros = table.new_zeros(1, count - first, table.shape[2])
        found["pos_embed"] = torch.cat([table[:, :first], zeros, table[:, first:]], dim=1)
    if unused:
        patterns = sorted({re.sub(r"\d+", "#", name) for name in unused})
        logger.info(f"{record.path}: the features do not depend on {', '.join(patterns)}")
    return found


def settings(record: Record, sizes: Mapping[str, Size]) -> dict[str, Any]:
    """What a folder of transformers or timm records, and what the shapes of the tensors say."""
    known = recorded(record)
    width, depth = shapes.width_and_depth(sizes)
    count = sizes["cls_token"][1]
    _, channels, *patch = sizes[shapes.PATCHES]
    hidden = sizes["blocks.0.mlp.fc2.weight"][1]
    is_gated = "blocks.0.mlp.fc1_g.weight" in sizes
    heads = width // (128 if width == 4096 else HEAD_WIDTH)  # the model of 7B has wider heads
    arguments = {
        "embed_dim": width, "depth": depth, "num_heads": known.get("num_heads") or max(1, heads),
        "mlp_ratio": (1.5 if is_gated else 1) * hidden / width, "swiglu": is_gated,
    }  # fmt: skip
    has_table = "pos_embed" in sizes
    nearest = min(SIZES, key=lambda name: [abs(SIZES[name]["embed_dim"] - width), abs(SIZES[name]["depth"] - depth)])
    found: dict[str, Any] = {
        "model": f"vit_{nearest}",  # the arguments determine the encoder, and this name the decoder
        "encoder": f"dinov{2 if has_table else 3}",
        "encoder_args": [f"{name}={value}" for name, value in arguments.items()],
        "patch_size": side_or_sides(patch),
        "in_chans": channels,
        "num_cls_tokens": count,
        "learned_pos_embed": has_table,
        "layer_norm_eps": 1e-6 if has_table else 1e-5,
    }
    if has_table:
        side = math.isqrt(sizes["pos_embed"][1] - count)
        found["input_size"] = side_or_sides([side * length for length in patch])
    if "num_heads" not in known:
        warn_once(f"{record.path} records no heads. Assumed are: {found['encoder']}, {HEAD_WIDTH} channels a head")
    return found | {name: value for name, value in known.items() if value is not None}


def _our_name(name: str) -> str:
    for pattern, ours in NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def _join_qkv(found: dict[str, Tensor], prefix: str, lacks_key_bias: bool) -> None:
    """Makes one matrix of queries, keys and values, in place. A bias that is missing or masked is zero."""
    if f"{prefix}.q.weight" in found:
        found[f"{prefix}.qkv.weight"] = torch.cat([found.pop(f"{prefix}.{part}.weight") for part in "qkv"])
    weight = found[f"{prefix}.qkv.weight"]
    zeros = weight.new_zeros(len(weight) // 3)
    whole = found.get(f"{prefix}.qkv.bias")
    parts = [found.pop(f"{prefix}.{part}.bias", zeros) for part in "qkv"] if whole is None else list(whole.chunk(3))
    if lacks_key_bias:
        parts[1] = zeros
    found[f"{prefix}.qkv.bias"] = torch.cat(parts)


def _split_gate(found: dict[str, Tensor], prefix: str) -> None:
    """Splits the packed matrix of a gated MLP, whose first half is the gate. Without a gate, `up_proj` is `fc1`."""
    hidden = found[f"{prefix}.fc2.weight"].shape[1]
    for kind in ("weight", "bias"):
        first, gate, value = (f"{prefix}.{name}.{kind}" for name in ("fc1", "fc1_g", "fc1_x"))
        if first in found and len(found[first]) == 2 * hidden:
            found[gate], found[value] = found.pop(first).chunk(2)
        elif value in found and gate not in found:
            found[first] = found.pop(value)


FORMAT = Format(NAME, matches, tensors, settings, trained_by="DINO")
