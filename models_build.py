"""From a run's settings, which stand as `args` in its checkpoints, to its model; heads of probes."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

import models_mae
import models_vit
from models_mae import DECODER_SUFFIX, DECODERS, MaskedAutoencoderViT
from models_vit import SIZES, VisionTransformer, recompute_blocks

Model = TypeVar("Model", bound=nn.Module)

# The settings of a run that rebuild its model and the preprocessing of its images; the others are about training.
MODEL_SETTINGS = (
    "model", "input_size", "patch_size", "in_chans", "mean", "std", "crop_pct", "norm_pix_loss", "mask_ratio",
    "decoder_depth", "global_pool", "nb_classes", "probe", "classes", "label_names",
)  # fmt: skip


def autoencoder(
    settings: Mapping[str, Any], model_class: type[MaskedAutoencoderViT] = MaskedAutoencoderViT
) -> MaskedAutoencoderViT:
    """The masked autoencoder of a run, as `autoencoder_arguments` reads its settings."""
    return _initialize(model_class(**autoencoder_arguments(settings)), settings)


def classifier(settings: Mapping[str, Any]) -> VisionTransformer:
    """The classifier of a run, as `classifier_arguments` reads its settings."""
    return _initialize(VisionTransformer(**classifier_arguments(settings)), settings)


def probe(settings: Mapping[str, Any]) -> VisionTransformer:
    """As `classifier`, frozen, with the linear probe's head."""
    model = classifier({**settings, "nb_classes": 0})
    model.head = probe_head(model.embed_dim, settings["nb_classes"])
    model.freeze()
    return model


def classifier_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's settings makes a classifier of its encoder; nothing, where they name no model of ours."""
    size = size_of(str(settings.get("model")))
    if size not in SIZES:
        return {}
    settings_of_file = {name: settings[name] for name in MODEL_SETTINGS if name in settings}
    if settings_of_file.get("patch_size", 0) is None:
        settings_of_file["patch_size"] = SIZES[size]["patch_size"]
    return {**settings_of_file, "model": f"vit_{size}"}


def size_of(model: str) -> str:
    """The entry of `models_vit.SIZES` that a model's name stands for; another text for other names."""
    return model.removeprefix("mae_").removeprefix("vit_").removesuffix(DECODER_SUFFIX)


def autoencoder_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's.

    Raises:
        ValueError: the run's model is no masked autoencoder.
    """
    if settings["model"] not in models_mae.MODELS:
        raise ValueError(f"{settings['model']} is no masked autoencoder")
    size = size_of(settings["model"])
    decoder: dict[str, Any] = {**DECODERS[size]}
    if settings.get("decoder_depth"):
        decoder["decoder_depth"] = settings["decoder_depth"]
    return {**_shape(size, settings), **decoder, "norm_pix_loss": settings["norm_pix_loss"]}


def classifier_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's.

    Raises:
        ValueError: the run's model is no classifier.
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
    """The linear probe's: features are standardised by the batch's statistics first (appendix A.1)."""
    linear = nn.Linear(embed_dim, num_classes)
    trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6), linear)


def freeze_below(model: VisionTransformer, num_blocks: int) -> None:
    """Leaves the last `num_blocks` blocks, what comes after them, and nothing else to be trained (section 4.3, "Partial
    fine-tuning").

    Raises:
        ValueError: the model has fewer blocks.
    """
    if not 0 <= num_blocks <= len(model.blocks):
        raise ValueError(f"--unfreeze_blocks {num_blocks}: the model has {len(model.blocks)} blocks")
    model.requires_grad_(False)
    trained = [model.head, model.fc_norm if model.global_pool else model.norm]
    for module in [*list(model.blocks)[len(model.blocks) - num_blocks :], *trained]:
        module.requires_grad_(True)


def _initialize(model: Model, settings: Mapping[str, Any]) -> Model:
    if settings.get("grad_checkpointing"):
        recompute_blocks(model)
    return model


def _shape(size: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A size's dimensions with a run's `--input_size`, `--patch_size` and `--in_chans`."""
    dimensions = {"img_size": settings["input_size"], "in_chans": settings["in_chans"]}
    if settings["patch_size"] is not None:
        dimensions["patch_size"] = settings["patch_size"]
    return {**SIZES[size], **dimensions}
