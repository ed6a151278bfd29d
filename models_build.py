"""Builds the model of a run from its settings (`args` of its checkpoints); heads of probes."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import models_mae
import models_vit
from models_mae import DECODER_SUFFIX, DECODERS, MaskedAutoencoderViT
from models_vit import SIZES, VisionTransformer, set_grad_checkpointing

Model = TypeVar("Model", bound=nn.Module)

# The settings of a run that determine its model and the preprocessing of images.
MODEL_SETTINGS = (
    "model", "input_size", "patch_size", "in_chans", "mean", "std", "crop_pct", "norm_pix_loss", "mask_ratio",
    "decoder_depth", "global_pool", "nb_classes", "probe", "classes", "label_names",
)  # fmt: skip


def autoencoder(
    settings: Mapping[str, Any], model_class: type[MaskedAutoencoderViT] = MaskedAutoencoderViT
) -> MaskedAutoencoderViT:
    """Builds the masked autoencoder of a run."""
    return _set_options(model_class(**autoencoder_arguments(settings)), settings)


def classifier(settings: Mapping[str, Any]) -> VisionTransformer:
    """Builds the classifier of a run."""
    return _set_options(VisionTransformer(**classifier_arguments(settings)), settings)


def probe(settings: Mapping[str, Any]) -> VisionTransformer:
    """Builds a frozen classifier with the head of a linear probe."""
    model = classifier({**settings, "nb_classes": 0})
    model.head = probe_head(model.embed_dim, settings["nb_classes"])
    model.freeze()
    return model


def classifier_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that build a classifier with its encoder; none if it has no model of this library."""
    size = size_of(str(settings.get("model")))
    if size not in SIZES:
        return {}
    result = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
    if result.get("patch_size", 0) is None:
        result["patch_size"] = SIZES[size]["patch_size"]
    return {**result, "model": f"vit_{size}"}


def size_of(model: str) -> str:
    """The key of `models_vit.SIZES` in the name of a model; another text for other names."""
    return model.removeprefix("mae_").removeprefix("vit_").removesuffix(DECODER_SUFFIX)


def autoencoder_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `MaskedAutoencoderViT` for the settings of a run.

    Raises:
        ValueError: the model of the run is no masked autoencoder.
    """
    if settings["model"] not in models_mae.MODELS:
        raise ValueError(f"{settings['model']} is no masked autoencoder")
    size = size_of(settings["model"])
    decoder: dict[str, Any] = {**DECODERS[size]}
    if settings.get("decoder_depth"):
        decoder["decoder_depth"] = settings["decoder_depth"]
    return {**_shape(size, settings), **decoder, "norm_pix_loss": settings["norm_pix_loss"]}


def classifier_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `VisionTransformer` for the settings of a run.

    Raises:
        ValueError: the model of the run is no classifier.
    """
    if settings["model"] not in models_vit.MODELS:
        raise ValueError(f"{settings['model']} is no classifier")
    size = size_of(settings["model"])
    return {
        **_shape(size, settings),
        "num_classes": settings["nb_classes"],
        "drop_path_rate": settings.get("drop_path", 0.0),
        "global_pool": settings["global_pool"],
    }


class ParallelHeads(nn.ModuleList):
    """Several heads on the same features (B, D) -> logits (heads, B, classes)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self])


def probe_head(embed_dim: int, num_classes: int) -> nn.Sequential:
    """The head of a linear probe: batch norm without affine parameters, then a linear layer (appendix A.1)."""
    linear = nn.Linear(embed_dim, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6), linear)


def freeze_below(model: VisionTransformer, num_blocks: int) -> None:
    """Freezes everything below the last `num_blocks` blocks (section 4.3, "Partial fine-tuning").

    Raises:
        ValueError: the model has fewer blocks.
    """
    if not 0 <= num_blocks <= len(model.blocks):
        raise ValueError(f"--unfreeze_blocks {num_blocks}: the model has {len(model.blocks)} blocks")
    model.requires_grad_(False)
    top = [model.head, model.fc_norm if model.global_pool else model.norm]
    for module in [*list(model.blocks)[len(model.blocks) - num_blocks :], *top]:
        module.requires_grad_(True)


def _set_options(model: Model, settings: Mapping[str, Any]) -> Model:
    if settings.get("grad_checkpointing"):
        set_grad_checkpointing(model)
    return model


def _shape(size: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of SIZES with `--input_size`, `--patch_size` and `--in_chans` of a run."""
    shape = {"img_size": settings["input_size"], "in_chans": settings["in_chans"]}
    if settings["patch_size"] is not None:
        shape["patch_size"] = settings["patch_size"]
    return {**SIZES[size], **shape}
