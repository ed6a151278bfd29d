"""Loads models by a name or from a file, with their preprocessing and class names.

>>> import torch
>>> from mae import get_model
>>> model = get_model("vit_mini_patch4", nb_classes=10)
>>> model.predict(torch.zeros(3, 40, 40, dtype=torch.uint8))["pred_scores"].shape
(10,)
"""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import mae.build
import models_mae
import models_vit
from mae import encoders
from mae.checkpoints.checkpoint import CheckpointError
from mae.data import transforms
from mae.data.pixels import to_tensor
from mae.evaluate import pictures
from mae.inference.classes import Autoencoder, Classifier, Images, Model, ModelMixin, Segmenter, TimmClassifier
from mae.pooling import pooling_of
from mae.settings import EXPORTED, REBUILDS, chosen
from mae.settings.choices import BOTH, TIMM
from mae.weights import loading, model_settings, model_zoo, reading
from mae.weights.candidates import warn_once

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=ModelMixin)

ARCHITECTURES = {**models_mae.MODELS, **models_vit.MODELS}


def to_rgb(model: Model, image: torch.Tensor) -> torch.Tensor:
    """Input of a model (c, H, W) -> its colors for display (3, H, W), in 0 to 1, on the host.

    They are the first three channels. Of fewer channels, the first is repeated.
    """
    return colors_of(model.normalize.displayed(image.to(model.normalize.mean)).cpu())


def colors_of(pixels: torch.Tensor) -> torch.Tensor:
    """Returns the first three channels of an image (c, H, W). Of fewer channels, the first is repeated."""
    return pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)


def picture_of(model: Model, path: str | Path) -> np.ndarray:
    """Decodes an image file as the model gets it, in its own size -> a picture for display, uint8 (H, W, 3).

    Raises:
        BadImage, OSError: as in `ModelMixin.prepare`.
    """
    pixels = to_tensor(model.open(path)).to(model.normalize.mean.device)
    return to_bytes(to_rgb(model, model.normalize(pixels)))


def pictures_of(model: Model, paths: Sequence[str | Path]) -> list[np.ndarray]:
    """Decodes image files as `picture_of`. Those of more than 8 bits are shown in the range of their values."""
    pictures.show_range(model.normalize, (model.decode(path).image for path in paths))
    return [picture_of(model, path) for path in paths]


def to_bytes(colors: torch.Tensor) -> np.ndarray:
    """Colors (3, H, W) in 0 to 1 -> uint8 (H, W, 3). Invalid pixels, which are NaN, are black."""
    return (255 * colors.nan_to_num(0).permute(1, 2, 0).numpy()).round().astype(np.uint8)


def settings_of(model: Model) -> dict[str, Any]:
    """Returns the settings that rebuild a model and its preprocessing, or that a training takes from its file."""
    mean, std = transforms.channel_statistics(model.in_chans, model.settings.get("mean"), model.settings.get("std"))
    default = model.settings.get("crop_pct") or transforms.default_crop_pct(model.settings["input_size"])
    names = [name for name in EXPORTED if model.settings.get(name) is not None]
    used = {"mean": mean, "std": std, "crop_pct": 1.0 if is_uncropped(model) else default}
    return {**{name: model.settings[name] for name in names}, **used}


def is_uncropped(model: Model) -> bool:
    """Whether the input is the whole picture, scaled to its size."""
    return model.settings.get("crop") == transforms.NO_CROP


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names that `get_model` accepts: architectures and published weights, including unreleased weights.

    Args:
        pattern: a pattern with *, such as "vit-*_mae-*".
    """
    return [name for name in sorted({*ARCHITECTURES, *model_zoo.TABLE}) if fnmatchcase(name, pattern)]


def get_model(
    name: str | Path,
    pretrained: bool | str | Path = False,
    device: str | torch.device = "cpu",
    encoder: type[models_vit.Encoder] | None = None,
    **settings: Any,
) -> Model:
    """Returns a model in evaluation mode.

    Args:
        name: an architecture, a published name (`list_models` lists both), a checkpoint file, a folder of
            transformers, or a model of timm (`timm_models`). A file is always loaded, and determines the architecture.
        pretrained: for a name, whether to load its weights; results of random weights have a warning. The published
            weights of an architecture are the fine-tuned weights for vit_*, and those with a decoder for mae_vit_*. Or
            the weights to load: a published name or a file.
        device: device of the model.
        encoder: a mix-in of the user's code, derived from `models_vit.Encoder`. The file of such a model needs it.
        settings: settings of the model to change, by the names of the flags: input_size, patch_size, in_chans,
            nb_classes, global_pool, norm_pix_loss, mean, std, channels_last, classes, encoder_args.

    Raises:
        ValueError: a name or setting is unknown, or the weights were never released or can't be downloaded.
        CheckpointError: the file is damaged, or does not contain the requested model.
    """
    if encoder:
        settings["encoder"] = encoders.name_of(encoder)
    unknown = settings.keys() - set(REBUILDS)
    if unknown:
        known = ", ".join(name for name in REBUILDS if name != "model")
        raise ValueError(f"get_model has no setting {min(unknown)}; it has {known}")
    name = str(name)
    if name in ARCHITECTURES:
        name = ARCHITECTURES[name].__name__  # the published code has aliases
    file = reading.path_and_model(name)[0]
    if name.startswith(TIMM) or file.exists() or model_zoo.is_of_hub(file):
        return _load(loading.read(name), None, settings, encoder).to(device)
    if name not in ARCHITECTURES and name not in model_zoo.TABLE:
        raise ValueError(f"there is no file, model or published weights {name}{model_zoo.advice(name, list_models())}")
    architecture = name if name in ARCHITECTURES else model_zoo.TABLE[name].model
    if pretrained is False:
        kind = with_encoder(_class_of(architecture), encoder)
        return kind(merged_settings(architecture, settings, model_zoo.row_settings(name))).to(device)
    weights = _published_for(name) if pretrained is True else str(pretrained)
    return _load(loading.read(weights), None if weights == name else architecture, settings, encoder).to(device)


def inference_model(
    model: str | Path | Classifier, image: Images, device: str | torch.device = "cpu", topk: int = 5
) -> Any:
    """Classifies an image or a list of images with a model or its name. Returns the result of `ModelMixin.predict`."""
    if isinstance(model, str | Path):
        model = get_model(model, pretrained=True, device=device)  # type: ignore[assignment]
    return model.predict(image, topk)  # type: ignore[union-attr]


def with_encoder(kind: type[Kind], encoder: type[models_vit.Encoder] | None) -> type[Kind]:
    """Returns the class of a model with its preprocessing and a mix-in of `models_vit.Encoder`.

    Raises:
        ValueError: the class is no mix-in.
    """
    if encoder is None:
        return kind
    bases = (kind, mae.build.combined(encoder, kind.network))
    return type(kind.__name__, bases, {"encoder": encoder, "__module__": kind.__module__})


def _class_of(architecture: str) -> type[Autoencoder] | type[Classifier]:
    if architecture.startswith(TIMM):
        return TimmClassifier
    return Autoencoder if architecture.startswith("mae_") else Classifier


def merged_settings(architecture: str, explicit: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a model: the arguments of `get_model`, else the record of a file, else the defaults."""
    size = models_vit.SIZES.get(models_mae.size_of(architecture), {})
    usual = {"input_size": size.get("img_size", 224), "patch_size": None, "in_chans": 3, "norm_pix_loss": False,
             "global_pool": architecture.startswith("vit_"), "nb_classes": 1000, "mask_ratio": 0.75}  # fmt: skip
    settings = chosen(explicit, recorded, {}, usual)
    return {**{key: value for key, value in settings.items() if key in EXPORTED}, "model": architecture}


def _published_for(name: str) -> str:
    """Returns the name of the published weights for an architecture or a published name."""
    if name in model_zoo.TABLE:
        return name
    size = models_mae.size_of(name).partition("_")[0]
    best = f"mae_pretrain_vit_{size}_full" if name.startswith("mae_") else f"mae_finetuned_vit_{size}"
    if best not in model_zoo.TABLE or models_mae.size_of(model_zoo.TABLE[best].model) != models_mae.size_of(name):
        raise ValueError(f"no weights were published for {name}: give the path of a file")
    return best


def _load(
    file: loading.Weights, architecture: str | None, settings: dict[str, Any], encoder: type[models_vit.Encoder] | None
) -> Model:
    """Returns a model with the weights of a file. If `architecture` is None, the file determines it."""
    model_settings.require_statistics(file, settings.get("mean"), settings.get("std"))
    model_settings.require_scale(file, settings.get("lora_alpha"))
    recorded = model_settings.file_settings(file, architecture)
    architecture = recorded["model"]
    if architecture.startswith(TIMM) and "in_chans" in settings:  # the file has the statistics of its colors
        mean, std = model_settings.statistics(file, settings["in_chans"], None, None)
        recorded = {**recorded, "mean": mean, "std": std}
    if (
        file.kind == model_zoo.CLASSIFIER
        and "nb_classes" in settings
        and settings["nb_classes"] != recorded["nb_classes"]
    ):
        recorded = {name: value for name, value in recorded.items() if name not in ("classes", "label_names")}
    merged = merged_settings(architecture, settings, recorded)
    if merged.get("crop_pct") is None:
        merged["crop_pct"] = model_settings.crop_pct_of_earlier_version(file, merged["input_size"])
    of_encoder = {"nb_classes": 0, "global_pool": False} if architecture.startswith("mae_") else {}
    pooling = pooling_of({"uniformity": file.settings.get("uniformity"), **merged, **of_encoder}, file.trained_by)
    if pooling.name == BOTH:
        merged["pool"] = BOTH  # what is built from the settings again has no settings of the pre-training
    encoder = encoder or encoders.class_of(merged.get("encoder"))
    segments = file.kind == model_zoo.SEGMENTER and not architecture.startswith("mae_")
    kind: Any = with_encoder(Segmenter if segments else _class_of(architecture), encoder)
    model: Model = kind(merged)
    if isinstance(model, Autoencoder):
        if file.kind != model_zoo.FULL:
            raise CheckpointError(f"{file.origin} contains no decoder of pixels and can't reconstruct ({file.kind})")
        if (name := file.settings.get("model_class")) and not loading.has_decoder_for(model, file):
            warn_once(f"{file.origin}: {name} has a decoder of its own, which is not loaded; the encoder is")
            return _load(file, architecture.removeprefix("mae_"), settings, encoder)
        if "norm_pix_loss" not in {*file.settings, *settings, *model_zoo.row_settings(file.origin)}:
            warn_once(f"{file.origin} does not record norm_pix_loss, and it is assumed. If its reconstructions "
                              f"are wrong, give get_model norm_pix_loss=False")  # fmt: skip
        loading.init_mae(model, file)
    elif (segments or file.kind == model_zoo.CLASSIFIER) and merged["nb_classes"] == recorded["nb_classes"]:
        if file.kind == model_zoo.CLASSIFIER and model.classes and len(model.classes) != merged["nb_classes"]:
            raise CheckpointError(
                f"{file.origin}: {len(model.classes)} names of classes for a head of {merged['nb_classes']} classes: "
                f"give classes, a list of {merged['nb_classes']} names"
            )
        loading.load_classifier(model, file)
    else:
        loading.load_encoder(model, file)
    model.pooling = pooling
    return model
