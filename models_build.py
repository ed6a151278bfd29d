"""Builds models from the settings of a run (`args` of its checkpoints) or from a file, and heads of linear probes."""

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import models_mae
import models_vit
from models_mae import DECODER_SUFFIX, DECODERS, MaskedAutoencoderViT
from models_segment import Segmenter
from models_vit import SIZES, VisionTransformer, attention_weights, set_grad_checkpointing
from util.checkpoints.checkpoint import CheckpointError
from util.cli.choices import ATTENTIVE, LINEAR, NUM_QUERIES
from util.weights.loading import DPT_HEAD, PROBE_HEAD, QUERIES, Weights
from util.weights.model_zoo import CLASSIFIER, FULL, SEGMENTER

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# The settings of a run that determine its model and the preprocessing of images.
MODEL_SETTINGS = (
    "model", "input_size", "patch_size", "in_chans", "mean", "std", "crop", "crop_pct", "norm_pix_loss", "mask_ratio",
    "mask_block", "decoder_depth", "global_pool", "nb_classes", "probe", "num_queries", "classes", "label_names",
    "layer_norm_eps", "head", "short_side", "reduce_zero_label", "colors", "num_cls_tokens", "learned_pos_embed",
)  # fmt: skip
HEAD_SETTINGS = {"global_pool", "nb_classes", "probe", "num_queries", "head"}


def autoencoder(
    settings: Mapping[str, Any], model_class: Callable[..., MaskedAutoencoderViT] = MaskedAutoencoderViT
) -> MaskedAutoencoderViT:
    """Builds the masked autoencoder of a run."""
    return _set_options(model_class(**autoencoder_arguments(settings)), settings)


def classifier(settings: Mapping[str, Any]) -> VisionTransformer:
    """Builds the classifier of a run."""
    return _set_options(VisionTransformer(**classifier_arguments(settings)), settings)


def probe(settings: Mapping[str, Any]) -> VisionTransformer:
    """Builds a frozen classifier with the head of a probe."""
    model = classifier({**settings, "nb_classes": 0})
    set_probe_head(model, settings)
    model.freeze()
    return model


def segmenter(settings: Mapping[str, Any]) -> Segmenter:
    """Builds the segmentation model of a run. Without trained blocks, the encoder stays in evaluation mode."""
    model = _set_options(Segmenter(**segmenter_arguments(settings)), settings)
    if settings.get("unfreeze_blocks") == 0:
        model.freeze()
    elif isinstance(settings.get("unfreeze_blocks"), int):
        freeze_below(model, settings["unfreeze_blocks"])
    return model


def classifier_settings(file: Weights) -> dict[str, Any]:
    """Returns the settings that build a classifier with the encoder of a file; {} if no model of this library fits.

    For the file of a segmentation model, they build this model.
    """
    try:
        settings = file_settings(file)
    except CheckpointError:
        return {}
    if file.kind not in (
        CLASSIFIER,
        SEGMENTER,
    ):  # shapes do not determine the settings of a head; recorded settings may have them
        settings = {name: settings[name] for name in settings if name in file.settings or name not in HEAD_SETTINGS}
    result = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
    return {**result, "model": f"vit_{size_of(settings['model'])}"}


def file_settings(file: Weights, model: str | None = None) -> dict[str, Any]:
    """Returns the settings of the model of a file. Shapes of tensors determine settings that are not recorded.

    Args:
        model: the name of the model, instead of the recorded name.

    Raises:
        CheckpointError: no size or several sizes have these shapes.
    """
    tensors, recorded = file.tensors, file.settings
    width, channels, *patch = tensors["patch_embed.proj.weight"].shape
    size = size_of(model or str(recorded.get("model")))
    if size not in SIZES:
        size = _size_with_shapes(file, width)
    settings: dict[str, Any] = {
        "in_chans": channels,
        "patch_size": patch if patch[0] != patch[1] else patch[0],
        "decoder_depth": sum(name.endswith(".norm1.weight") for name in tensors if name.startswith("decoder_blocks."))
        or None,
        "norm_pix_loss": True,  # if a file does not record it: most published models were trained with it
        "global_pool": "fc_norm.weight" in tensors,
        "nb_classes": file.num_classes,
        "learned_pos_embed": file.learned_pos_embed,
    }
    length = tensors["pos_embed"].shape[1]
    # The class tokens have positions, except in timm's models with no_embed_class.
    counts = (length - file.num_cls_tokens, length)
    side = next((math.isqrt(count) for count in counts if math.isqrt(count) ** 2 == count), None)
    if side:
        settings["input_size"] = [side * patch[0], side * patch[1]] if patch[0] != patch[1] else side * patch[0]
    known = {name: value for name, value in recorded.items() if value is not None or name not in settings}
    known["num_cls_tokens"] = file.num_cls_tokens
    # Earlier versions record True or nothing for a linear probe.
    known["probe"] = ATTENTIVE if QUERIES in tensors else LINEAR if PROBE_HEAD in tensors else None
    if QUERIES in tensors:
        known["num_queries"] = len(tensors[QUERIES])
    if file.kind == SEGMENTER:
        known["head"] = "dpt" if DPT_HEAD in tensors else "linear"
    return {**settings, **known, "model": model or f"{'mae_' * (file.kind == FULL)}vit_{size}"}


def _size_with_shapes(file: Weights, width: int) -> str:
    depth = 1 + max(int(match[1]) for name in file.tensors if (match := re.match(r"blocks\.(\d+)\.", name)))
    sizes = [name for name, entry in SIZES.items() if (entry["embed_dim"], entry["depth"]) == (width, depth)]
    sizes = [name for name in sizes if file.settings.get("num_heads") == SIZES[name]["num_heads"]] or sizes
    side = file.tensors["patch_embed.proj.weight"].shape[-1]
    sizes = [name for name in sizes if SIZES[name]["patch_size"] == side] or sizes
    if not sizes:
        raise CheckpointError(f"{file.source}: no model here is {width} wide and {depth} deep")
    if len({SIZES[name]["num_heads"] for name in sizes}) > 1:
        raise CheckpointError(
            f"{file.source} records no model, and {' and '.join(sizes)} have its shapes: use "
            f'get_model("vit_{sizes[0]}", pretrained="{file.source}"), or another of these names'
        )
    return sizes[0]


def size_of(model: str) -> str:
    """Returns the key of `models_vit.SIZES` in the name of a model. Unknown names result in another text."""
    return model.removeprefix("mae_").removeprefix("vit_").removesuffix(DECODER_SUFFIX)


def autoencoder_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `MaskedAutoencoderViT` for the settings of a run.

    Raises:
        ValueError: the model of the run is not a masked autoencoder.
    """
    if settings["model"] not in models_mae.MODELS:
        raise ValueError(f"{settings['model']} is not a masked autoencoder")
    size = size_of(settings["model"])
    decoder: dict[str, Any] = {**DECODERS[size]}
    if settings.get("decoder_depth"):
        decoder["decoder_depth"] = settings["decoder_depth"]
    return {
        **_shape(size, settings),
        **decoder,
        "norm_pix_loss": settings["norm_pix_loss"],
        "learned_pos_embed": bool(settings.get("learned_pos_embed")),
        "drop_path_rate": settings.get("drop_path", 0.0),
    }


def classifier_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `VisionTransformer` for the settings of a run.

    Raises:
        ValueError: the model of the run is not a classifier.
    """
    if settings["model"] not in models_vit.MODELS:
        raise ValueError(f"{settings['model']} is not a classifier")
    size = size_of(settings["model"])
    return {
        **_shape(size, settings),
        "num_classes": settings["nb_classes"],
        "drop_path_rate": settings.get("drop_path", 0.0),
        "global_pool": settings["global_pool"],
    }


def segmenter_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `Segmenter` for the settings of a run."""
    arguments = classifier_arguments({**settings, "global_pool": False})
    return {name: value for name, value in arguments.items() if name != "global_pool"} | {"head": settings["head"]}


class AttentivePool(nn.Module):
    """Learned queries pool the tokens of a frozen encoder: (B, N, D) -> (B, D). Efficient probing (Psomas et al. 2025).

    The keys are the tokens. Query i pools the channels [i·D/Q, (i + 1)·D/Q) of the values.

    Args:
        dim: D, channels of a token.
        num_queries: Q, a divisor of D.

    Raises:
        ValueError: `num_queries` does not divide `dim`.
    """

    def __init__(self, dim: int, num_queries: int) -> None:
        super().__init__()
        if dim % num_queries:
            below = max(count for count in range(1, num_queries) if dim % count == 0)
            above = min((count for count in range(num_queries, dim + 1) if dim % count == 0), default=below)
            fitting = f"{below} or {above}" if above > below else f"{below}"
            raise ValueError(
                f"--num_queries {num_queries} does not divide the {dim} channels of a token: give {fitting}"
            )
        self.queries = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.value = nn.Linear(dim, dim, bias=False)

    def maps(self, tokens: Tensor) -> Tensor:
        """Attention weights of the queries over the tokens: (B, N, D) -> (B, Q, N); they sum to 1 for each query."""
        return attention_weights(self.queries, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        # Pooling and projection are linear, so their order is free. Values of all tokens, (B, N, D) for each of several
        # heads, would take N / Q times the memory of the pooled tokens (B, Q, D), and more operations.
        pooled = self.maps(tokens) @ tokens
        slices = self.value.weight.unflatten(0, (len(self.queries), -1))  # (Q, D/Q, D)
        return torch.einsum("bqd,qcd->bqc", pooled, slices).flatten(1)


class ParallelHeads(nn.ModuleList):
    """Several heads on the same features (B, D) or tokens (B, N, D) -> logits (heads, B, classes)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self])


def probe_head(embed_dim: int, num_classes: int) -> nn.Sequential:
    """Returns the head of a linear probe: batch norm without affine parameters, then a linear layer (appendix A.1)."""
    linear = nn.Linear(embed_dim, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6), linear)


def attentive_head(embed_dim: int, num_classes: int, num_queries: int) -> nn.Sequential:
    """Returns the head of an attentive probe: the pooling of the tokens before the head of a linear probe.

    Its tensors have the names of a linear probe, and `pool.queries` and `pool.value.weight`.

    Raises:
        ValueError: `num_queries` does not divide `embed_dim`.
    """
    pool = AttentivePool(embed_dim, num_queries)
    return nn.Sequential(OrderedDict([("pool", pool), *probe_head(embed_dim, num_classes).named_children()]))


def set_probe_head(model: VisionTransformer, settings: Mapping[str, Any]) -> None:
    """Replaces the head of a classifier by that of a probe, for the settings `probe`, `num_queries`, `nb_classes`.

    Raises:
        ValueError: `num_queries` does not divide the width, or the model has no norm of tokens.
    """
    model.head_pools = settings.get("probe") == ATTENTIVE
    if not model.head_pools:
        model.head = probe_head(model.embed_dim, settings["nb_classes"])
        return
    if model.global_pool:
        raise ValueError(
            "--probe attentive pools patch tokens after the norm of the encoder, which a classifier with --global_pool "
            "does not have: start from pre-trained weights without --global_pool, or give --probe linear --global_pool"
        )
    num_queries = settings.get("num_queries") or NUM_QUERIES
    model.head = attentive_head(model.embed_dim, settings["nb_classes"], num_queries)


def freeze_below(model: VisionTransformer, num_blocks: int) -> None:
    """Freezes everything below the last `num_blocks` blocks (section 4.3, "Partial fine-tuning").

    Raises:
        ValueError: the model has fewer blocks.
    """
    if not 0 <= num_blocks <= len(model.blocks):
        raise ValueError(
            f"--unfreeze_blocks {num_blocks}: the model has {len(model.blocks)} blocks; give 0 to {len(model.blocks)}, "
            f"or all"
        )
    model.requires_grad_(False)
    top = [model.head, model.fc_norm if model.global_pool else model.norm]
    for module in [*list(model.blocks)[len(model.blocks) - num_blocks :], *top]:
        module.requires_grad_(True)


def _set_options(model: Model, settings: Mapping[str, Any]) -> Model:
    if settings.get("grad_checkpointing") and (others := set_grad_checkpointing(model)):
        logger.warning(
            f"--grad_checkpointing has no effect on the blocks of class {', '.join(sorted(others))}: derive them from "
            f"models_vit.Block, and override compute instead of forward"
        )
    return model


def _shape(size: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry of SIZES, with `--input_size`, `--patch_size` and `--in_chans` of a run."""
    shape = {
        "img_size": settings["input_size"],
        "in_chans": settings["in_chans"],
        "num_cls_tokens": settings.get("num_cls_tokens") or 1,
    }
    if settings["patch_size"] is not None:
        shape["patch_size"] = settings["patch_size"]
    if settings.get("layer_norm_eps"):
        shape["norm_layer"] = partial(nn.LayerNorm, eps=settings["layer_norm_eps"])
    return {**SIZES[size], **shape}
