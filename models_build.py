"""Builds models from their settings, which a file may record, and heads of probes."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import models_mae
import models_vit
from models_mae import DECODER_SUFFIX, DECODERS, MaskedAutoencoderViT
from models_segment import Segmenter
from models_vit import SIZES, Block, VisionTransformer, attention_weights, set_grad_checkpointing
from util.checkpoints.checkpoint import CheckpointError
from util.cli.choices import ATTENTIVE, NUM_QUERIES
from util.settings import REBUILDS, ImageSpec, ModelSpec, chosen, names_where
from util.weights import shapes
from util.weights.loading import Weights
from util.weights.model_zoo import CLASSIFIER, FULL, SEGMENTER

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def autoencoder(
    spec: ModelSpec, image: ImageSpec, model_class: Callable[..., MaskedAutoencoderViT] = MaskedAutoencoderViT
) -> MaskedAutoencoderViT:
    """Builds the masked autoencoder of a run."""
    return _set_options(model_class(**autoencoder_arguments(spec, image)), spec)


def classifier(spec: ModelSpec, image: ImageSpec) -> VisionTransformer:
    """Builds the classifier of a run."""
    return _set_options(VisionTransformer(**classifier_arguments(spec, image)), spec)


def probe(spec: ModelSpec, image: ImageSpec) -> VisionTransformer:
    """Builds a frozen classifier with the head of a probe."""
    model = classifier(replace(spec, nb_classes=0), image)
    set_probe_head(model, spec)
    model.freeze()
    return model


def segmenter(spec: ModelSpec, image: ImageSpec) -> Segmenter:
    """Builds the segmentation model of a run. Without trained blocks, the encoder stays in evaluation mode."""
    model = _set_options(Segmenter(**segmenter_arguments(spec, image)), spec)
    if spec.unfreeze_blocks == 0:
        model.freeze()
    elif isinstance(spec.unfreeze_blocks, int):
        freeze_below(model, spec.unfreeze_blocks)
    return model


def classifier_settings(file: Weights | None) -> dict[str, Any]:
    """Returns the settings that build a classifier with the encoder of a file; {} if no model of this library fits.

    For the file of a segmentation model, they build this model.
    """
    if file is None:
        return {}
    try:
        settings = file_settings(file)
    except CheckpointError:
        return {}
    if file.kind not in (CLASSIFIER, SEGMENTER):  # shapes do not determine the head; recorded settings may
        of_task = names_where(lambda one: one["of_task"], ModelSpec)
        settings = {name: settings[name] for name in settings if name in file.settings or name not in of_task}
    result = {name: settings[name] for name in REBUILDS if name in settings}
    return {**result, "model": f"vit_{size_of(settings['model'])}"}


def file_settings(file: Weights, model: str | None = None) -> dict[str, Any]:
    """Returns the settings of the model of a file: the recorded ones, else those that shapes of tensors determine.

    Args:
        model: the name of the model, instead of the recorded name.

    Raises:
        CheckpointError: no size or several sizes have these shapes.
    """
    size = size_of(model or str(file.settings.get("model")))
    if size not in SIZES:
        size = _size_with_shapes(file)
    # Most published models that do not record it were trained with norm_pix_loss.
    determined = {"norm_pix_loss": True, "learned_pos_embed": file.learned_pos_embed} | shapes.determined(file.tensors)
    recorded = {**file.settings, **shapes.certain(file.tensors)}  # earlier versions recorded other values
    settings = chosen({}, recorded, determined, {})
    if settings["patch_size"] == SIZES[size]["patch_size"]:
        settings["patch_size"] = None  # that in the name of the model, as the flag has it
    return {**settings, "model": model or f"{'mae_' * (file.kind == FULL)}vit_{size}"}


def _size_with_shapes(file: Weights) -> str:
    width, depth = shapes.width_and_depth(file.tensors)
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


def autoencoder_arguments(spec: ModelSpec, image: ImageSpec) -> dict[str, Any]:
    """Returns the arguments of `MaskedAutoencoderViT`.

    Raises:
        ValueError: the model of the run is not a masked autoencoder.
    """
    if spec.model not in models_mae.MODELS:
        raise ValueError(f"{spec.model} is not a masked autoencoder")
    decoder: dict[str, Any] = {**DECODERS[size_of(spec.model)]}
    if spec.decoder_depth:
        decoder["decoder_depth"] = spec.decoder_depth
    return {
        **_shape(spec, image),
        **decoder,
        "norm_pix_loss": spec.norm_pix_loss,
        "learned_pos_embed": spec.learned_pos_embed,
        "drop_path_rate": spec.drop_path,
    }


def classifier_arguments(spec: ModelSpec, image: ImageSpec) -> dict[str, Any]:
    """Returns the arguments of `VisionTransformer`.

    Raises:
        ValueError: the model of the run is not a classifier.
    """
    if spec.model not in models_vit.MODELS:
        raise ValueError(f"{spec.model} is not a classifier")
    return {
        **_shape(spec, image),
        "num_classes": spec.nb_classes,
        "drop_path_rate": spec.drop_path,
        "global_pool": spec.global_pool,
    }


def segmenter_arguments(spec: ModelSpec, image: ImageSpec) -> dict[str, Any]:
    """Returns the arguments of `Segmenter`."""
    arguments = classifier_arguments(spec, image)
    return {name: value for name, value in arguments.items() if name != "global_pool"} | {"head": spec.head}


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


def set_probe_head(model: VisionTransformer, spec: ModelSpec) -> None:
    """Replaces the head of a classifier by the head of a probe (`probe`, `num_queries`, `nb_classes`).

    Raises:
        ValueError: `num_queries` does not divide the width, or the model has no norm of tokens.
    """
    model.head_pools = spec.probe == ATTENTIVE
    if not model.head_pools:
        model.head = probe_head(model.embed_dim, spec.nb_classes)
        return
    if model.global_pool:
        raise ValueError(
            "--probe attentive pools patch tokens after the norm of the encoder, which a classifier with --global_pool "
            "does not have: start from pre-trained weights without --global_pool, or give --probe linear --global_pool"
        )
    model.head = attentive_head(model.embed_dim, spec.nb_classes, spec.num_queries or NUM_QUERIES)


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


def _set_options(model: Model, spec: ModelSpec) -> Model:
    if spec.grad_checkpointing and (others := set_grad_checkpointing(model)):
        logger.warning(
            f"--grad_checkpointing has no effect on the blocks of class {', '.join(sorted(others))}: derive them from "
            f"models_vit.Block, and override compute instead of forward"
        )
    return model


def _shape(spec: ModelSpec, image: ImageSpec) -> dict[str, Any]:
    """Returns the entry of SIZES, with the image size, channels and patch size of a run."""
    shape: dict[str, Any] = {
        "img_size": image.input_size,
        "in_chans": image.in_chans,
        "num_cls_tokens": spec.num_cls_tokens,
    }
    if spec.patch_size is not None:
        shape["patch_size"] = spec.patch_size
    if spec.layer_norm_eps:
        shape["norm_layer"] = partial(nn.LayerNorm, eps=spec.layer_norm_eps)
    of_block = {name: getattr(spec, name) for name in names_where(lambda one: one["of_block"])}
    if any(of_block.values()):
        shape["block"] = partial(Block, **of_block)
    return {**SIZES[size_of(spec.model)], **shape}
