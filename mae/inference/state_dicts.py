"""Exports weights and settings to other libraries."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

import mae.build
import models_mae
from mae import encoders, user_code
from mae.data import transforms
from mae.inference.graphs import crop_of, interpolation_of, library
from mae.inference.model import (
    Autoencoder,
    Classifier,
    Model,
    Segmenter,
    TimmClassifier,
    is_uncropped,
    settings_of,
    with_encoder,
)
from mae.settings.arguments import in_words
from mae.settings.choices import BOTH, TIMM
from mae.weights.formats import transformers as layouts
from mae.weights.reading import SETTINGS
from models_vit import Encoder

logger = logging.getLogger(__name__)

# Settings of images and model that no format of other libraries has
ONLY_OURS = ("learned_pos_embed", "mask_block", "crop", "exif", "hflip", "nodata", "value_range", "channels_last")

TIMM_EPS = 1e-6
FOR_ALL = "to=safetensors, onnx or torch_export"  # formats that have all models
GRAY = (  # classifiers of gray images; pipeline("image-classification") raises an error
    "the pipelines of transformers convert images to RGB, and this model has one channel; use processor and model: "
    "processor = transformers.AutoImageProcessor.from_pretrained({folder!r}, backend='pil'); model = "
    "transformers.AutoModelForImageClassification.from_pretrained({folder!r}); "
    "model(**processor(image.convert('L'), return_tensors='pt')).logits"
)
MASKS = (  # the encoder of ViTMAEForPreTraining
    "AutoModel of transformers masks {ratio:g} of the patches: for features of all patches, give `encoder_only`, or "
    "AutoModel.from_pretrained({folder!r}, mask_ratio=0.0), whose tokens are in random order without "
    "noise=torch.arange({patches}).expand(len(images), -1)"
)


def encoder_of(model: Model, pool: str | None = None) -> Classifier:
    """Returns the encoder of a model. Its features are the normalized class token.

    A classifier that pools patch tokens has no norm of single tokens: the features are those of its head.

    Args:
        pool: BOTH for the class token and the mean of the patch tokens.

    Raises:
        ValueError: BOTH of a classifier that pools patch tokens.
    """
    architecture = model.settings["model"].removeprefix("mae_")
    pools = bool(model.settings.get("global_pool")) and not isinstance(model, Autoencoder)
    if pools and pool == BOTH:
        raise ValueError("pool=both: a classifier with `global_pool` has no norm of the class token; omit `pool`")
    settings = {**model.settings, "model": architecture, "nb_classes": 0, "global_pool": pools, "probe": False,
                "pool": pool}  # fmt: skip
    kind = TimmClassifier if architecture.startswith(TIMM) else Classifier
    encoder = with_encoder(kind, model.encoder)(settings)
    names = encoder.state_dict().keys()
    encoder.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    encoder.initial = {name: values for name, values in model.initial.items() if name in names}
    return encoder


def without_adapters(model: Model) -> Model:
    """Returns a model with the updates of its adapters merged into its weights. Its class has no adapters."""
    if not model.adapters:
        return model
    plain = user_code.plain_encoder(model.encoder or Encoder)
    encoder = None if plain is Encoder else plain
    known = mae.build.own_parameters(plain)
    texts = [text for text in model.settings.get("encoder_args") or [] if text.partition("=")[0] in known]
    names = {"encoder": encoder and encoders.name_of(encoder), "encoder_args": texts or None, "lora": None,
             "lora_alpha": None}  # fmt: skip
    kind: Any = next(kind for kind in (Autoencoder, Classifier, Segmenter) if isinstance(model, kind))
    merged: Model = with_encoder(kind, encoder)({**model.settings, **names})
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(model.adapters)}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    state |= {f"{name}.weight": module.merged() for name, module in modules if hasattr(module, "merged")}
    merged.load_state_dict(state)
    merged.initial = {name: values for name, values in model.initial.items() if name in state}
    return merged


def write_reference(model: Model, out: Path) -> None:
    settings = settings_of(model)
    _save({"model": model.state_dict(), "args": settings}, out)
    _log_of_pixels(model, "the published code")
    if not has_plain_head(model):
        logger.info("the published code has no %s probe; this library reads the file", model.settings["probe"])
    if (settings["mean"], settings["std"]) != transforms.channel_statistics(3):
        logger.info("the published code normalizes with ImageNet's mean and std, and this model has others: %s, %s",
                    settings["mean"], settings["std"])  # fmt: skip
    side = max(model.patch_embed.img_size)
    if is_uncropped(model) or settings["crop_pct"] != (1.0 if side > 224 else 224 / 256):
        logger.info("the evaluation of the published code crops otherwise; this model takes %s", crop_of(model))


def write_safetensors(model: Model, out: Path) -> None:
    save_file(_contiguous(model.state_dict()), out, {"format": "pt", SETTINGS: json.dumps(settings_of(model))})


def _log_of_pixels(model: Model, reader: str) -> None:
    found = {name: model.settings.get(name) for name in ("value_range", "nodata")}
    if given := in_words({name: value for name, value in found.items() if value is not None}):
        logger.info(f"{reader} does not apply {given}: prepare the pixels in this way, before its normalization")
    if not model.normalize.fits_bytes:
        logger.info(f"{reader} divides pixels by 255, and mean and std of this model are in the units of its training "
                    f"data: give the model normalized tensors (B, c, H, W)")  # fmt: skip


def write_timm(model: Model, out: Path) -> None:
    """Writes a folder from which timm rebuilds the model, or with a suffix a file of the weights only."""
    classifier = model if isinstance(model, Classifier) else encoder_of(model)
    _log_of_pixels(model, "timm")
    block: Any = classifier.blocks[0]
    if (eps := block.norm1.eps) != TIMM_EPS:
        logger.warning(f"timm's LayerNorm has eps {TIMM_EPS:g}, and the model has {eps:g}")
    settings = settings_of(classifier) | {"probe": False}
    state = _contiguous(plain_head(classifier))
    if classifier.num_prefix_tokens > 1:  # without pooling of tokens, class tokens and register tokens are the same
        state |= {"cls_token": state["cls_token"][:, :1].clone(), "reg_token": state["cls_token"][:, 1:].clone()}
    metadata = {"format": "pt", SETTINGS: json.dumps(settings)}
    if not out.suffix:
        out.mkdir()
        (out / "config.json").write_text(json.dumps(timm_config(classifier), indent=2), encoding="utf-8")
        save_file(state, out / "model.safetensors", metadata)
        return
    if out.suffix == ".safetensors":
        save_file(state, out, metadata)
    else:
        _save({"state_dict": state, "args": settings}, out)
    config = timm_config(classifier)
    overlay = config["pretrained_cfg"]
    arguments = {"num_classes": config["num_classes"], **config["model_args"], "pretrained_cfg_overlay": overlay}
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    logger.info(f"timm reads only the weights from this file: export to a folder, or call "
                f"timm.create_model({config['architecture']!r}, checkpoint_path={out.name!r}, {text})")  # fmt: skip


def timm_config(model: Classifier) -> dict[str, Any]:
    """Returns the config.json of a folder of timm. `model_args` describes the model in full."""
    from timm import is_model  # takes more than a second

    settings = settings_of(model)
    block: Any = model.blocks[0]
    pooled = bool(model.settings["global_pool"])
    registers = model.num_prefix_tokens - 1
    height, width = model.patch_embed.img_size
    name = f"vit_{models_mae.size_of(model.settings['model'])}_224"
    labels = {"label_names": model.classes} if model.classes and model.settings["nb_classes"] else {}
    return {
        **labels,  # at the top, where transformers reads them, too
        "architecture": name if is_model(name) else "vit_base_patch16_224",
        "num_classes": model.settings["nb_classes"],
        "global_pool": "avg" if pooled else "token",
        "model_args": {
            "img_size": [height, width], "patch_size": list(model.patch_embed.patch_size), "in_chans": model.in_chans,
            "embed_dim": model.embed_dim, "depth": len(model.blocks), "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim, "global_pool": "avg" if pooled else "token",
            "fc_norm": pooled, **({"reg_tokens": registers} if registers else {}),
        },
        "pretrained_cfg": {
            "input_size": [model.in_chans, height, width], "fixed_input_size": True,
            "interpolation": interpolation_of(model),
            "crop_pct": settings["crop_pct"], "crop_mode": "squash" if is_uncropped(model) else "center",
            "mean": settings["mean"], "std": settings["std"], "num_classes": model.settings["nb_classes"],
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def write_transformers(model: Model, out: Path) -> None:
    """Writes a folder with weights, config.json, and preprocessor_config.json for the preprocessing of the model."""
    converted = _of_transformers(model)
    converted.load_state_dict(layouts.to_transformers(plain_head(model), set(converted.state_dict())))
    converted.config.settings = {
        name: model.settings[name] for name in ONLY_OURS if model.settings.get(name) is not None
    }
    converted.save_pretrained(out)
    _write_processor(model, out)
    _log_of_pixels(model, "transformers")
    if model.in_chans not in (1, 3):
        logger.info(f"the image processors of transformers read images of 1 or 3 channels, and this model has "
                    f"{model.in_chans}: give the model normalized tensors (B, c, H, W)")  # fmt: skip
    if isinstance(model, Autoencoder):
        ratio = model.settings["mask_ratio"]
        block = model.settings.get("mask_block") or 1
        logger.info(MASKS.format(ratio=ratio, folder=out.name, patches=model.num_patches))
        if block > 1:
            logger.info(f"transformers masks single patches, and this model has mask_block {block}")
    elif model.in_chans == 1 and model.settings["nb_classes"]:
        logger.info(GRAY.format(folder=out.name))


def _of_transformers(model: Model) -> Any:
    """Returns a model of transformers with the architecture of a model.

    Raises:
        ValueError: transformers has no such model, or is not installed.
    """
    transformers = library("transformers")
    block: Any = model.blocks[0]
    same = {
        "hidden_size": model.pos_embed.shape[-1], "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads, "intermediate_size": block.mlp.fc1.out_features,
        # Its processors scale the short side of a picture to a fixed length. Its decoder interpolates positions in one
        # dimension.
        "image_size": _square(model.patch_embed.img_size, "images"), "num_channels": model.in_chans,
        "patch_size": _square(model.patch_embed.patch_size, "patches"), "layer_norm_eps": block.norm1.eps,
    }  # fmt: skip
    if model.num_prefix_tokens > 1:
        return _pixio(model, **same)
    if isinstance(model, Autoencoder):
        decoder: Any = model.decoder_blocks
        return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
            **same, mask_ratio=model.settings["mask_ratio"], norm_pix_loss=model.norm_pix_loss,
            decoder_hidden_size=model.decoder_pos_embed.shape[-1], decoder_num_hidden_layers=len(decoder),
            decoder_num_attention_heads=decoder[0].attn.num_heads,
            decoder_intermediate_size=decoder[0].mlp.fc1.out_features,
        ))  # fmt: skip
    if model.settings.get("global_pool"):
        raise ValueError(
            "to=transformers: its ViT uses the class token, and this model pools patch tokens; give to=timm, whose "
            "folder transformers reads, too (AutoModelForImageClassification and AutoModel.from_pretrained)"
        )
    if not model.settings["nb_classes"]:
        return transformers.ViTModel(transformers.ViTConfig(**same), add_pooling_layer=False)
    names = model.classes or [f"class {label}" for label in range(model.settings["nb_classes"])]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**same, **labels))


def _write_processor(model: Model, out: Path) -> None:
    """Writes preprocessor_config.json. A log line says where its crop differs."""
    used = settings_of(model)
    side = model.patch_embed.img_size[0]
    edge = int(side / used["crop_pct"])
    if not is_uncropped(model):  # transformers rounds half of the difference down, torchvision to an even number
        of_long_side = "" if (edge - side) % 4 == 3 else " where 3, 7, 11, ... pixels of the longer side remain"
        logger.info(f"transformers scales images to {edge} pixels, and its center crop of {side} pixels begins one "
                    f"pixel before that of this library{of_long_side}, which matters for small images")  # fmt: skip
    square = {"height": side, "width": side}
    library("transformers").ViTImageProcessor(
        size=square if is_uncropped(model) else {"shortest_edge": edge},
        resample=Image.Resampling[interpolation_of(model).upper()].value,
        do_center_crop=not is_uncropped(model), crop_size=square, do_convert_rgb=model.in_chans == 3,
        image_mean=used["mean"], image_std=used["std"],
    ).save_pretrained(out)  # fmt: skip


def _pixio(model: Model, intermediate_size: int, **same: Any) -> Any:
    """Returns a PixioModel of transformers: an encoder with several class tokens.

    Args:
        same: arguments of its configuration.

    Raises:
        ValueError: transformers has no such model.
    """
    transformers = library("transformers")
    if isinstance(model, Autoencoder) or model.settings["nb_classes"] or model.settings.get("global_pool"):
        raise ValueError(
            f"to=transformers: PixioModel, for several class tokens, has no decoder and no head: give "
            f"`encoder_only`, or {FOR_ALL}"
        )
    ratio, rest = divmod(intermediate_size, model.embed_dim)
    if rest:
        raise ValueError(f"to=transformers: PixioModel needs a whole number as MLP ratio: give {FOR_ALL}")
    config = transformers.PixioConfig(**same, mlp_ratio=ratio, n_cls_tokens=model.num_prefix_tokens)
    return transformers.PixioModel(config)


def has_plain_head(model: Model) -> bool:
    """Whether a model has no probe, or one that `plain_head` converts."""
    if not (model.settings.get("probe") and model.settings["nb_classes"]):
        return True
    return [type(layer) for layer in model.head] == [torch.nn.BatchNorm1d, torch.nn.Linear]  # type: ignore[union-attr]


def plain_head(model: Model) -> dict[str, torch.Tensor]:
    """Returns the state dict. The batch norm of a linear probe is merged into its linear layer.

    Other libraries have no head with a batch norm.
    """
    state = dict(model.state_dict())
    if not (model.settings.get("probe") and model.settings["nb_classes"]):
        return state
    norm, linear = model.head  # type: ignore[misc]
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    weight = linear.weight / (norm.running_var + norm.eps).sqrt()
    return {**state, "head.weight": weight.detach(), "head.bias": (linear.bias - weight @ norm.running_mean).detach()}


def _save(state: dict[str, Any], out: Path) -> None:
    with out.open("wb") as file:  # with a path, the error of torch.save has no reason
        torch.save(state, file)


def _square(sides: tuple[int, int], what: str) -> int:
    if sides[0] != sides[1]:
        raise ValueError(
            f"to=transformers supports only square {what}, and these are {sides[0]} x {sides[1]}: give {FOR_ALL}"
        )
    return sides[0]


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.contiguous().clone() for name, value in state.items()}
