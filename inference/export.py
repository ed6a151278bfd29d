"""Exports a model to other libraries.

    python -m inference.export --model runs/tuned/checkpoint-best.pth --to onnx --out model.onnx
    python -m inference.export --model runs/mine/checkpoint-last.pth --to transformers --out folder

| --to | output | read by |
|---|---|---|
| reference | .pth, {model: ...} | the published code, this library |
| safetensors | .safetensors | this library |
| timm | a folder; or a state dict, .pth or .safetensors | timm.create_model("local-dir:FOLDER", pretrained=True) |
| transformers | a folder | ViTMAEForPreTraining, ViTModel, ViTForImageClassification, PixioModel |
| mmpretrain | .pth, {state_dict: ...} | mmpretrain, mmselfsup |
| onnx | .onnx of any batch size | onnxruntime and others |
| torch_export | .pt2 of any batch size | torch.export.load |

Each format contains the normalization, the crop and the class names of the model. A log line names the settings that
the other library does not read from the file. Graphs of classifiers return logits, graphs of encoders return features,
and graphs of autoencoders return prediction and mask, from images and noise. timm has no decoder, so that the encoder
is exported. --encoder exports the encoder of any model.
"""

import argparse
import importlib
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models_build
from inference.model import Autoencoder, Classifier, Model, Segmenter, get_model
from util.cli import entry_point, options
from util.data import transforms
from util.files import atomic
from util.settings import REBUILDS, ModelSpec, names_where
from util.training.run_log import start_logging
from util.weights import conversion, foreign_settings
from util.weights.reading import SETTINGS

logger = logging.getLogger(__name__)

# The suffixes of the files of each format; "" is a folder.
SUFFIXES = {
    "reference": (".pth",), "safetensors": (".safetensors",), "timm": ("", ".pth", ".safetensors"),
    "transformers": ("",), "mmpretrain": (".pth",), "onnx": (".onnx",), "torch_export": (".pt2",),
}  # fmt: skip
WITHOUT_OTHER_HEADS = ("mmpretrain", "timm", "transformers")
FOR_ALL = "--to safetensors, onnx or torch_export"  # formats that have all models
GRAY = (  # classifiers of gray images; pipeline("image-classification") raises an error
    "the pipelines of transformers convert images to RGB, and this model has one channel; use processor and model: "
    "processor = transformers.AutoImageProcessor.from_pretrained({folder!r}, backend='pil'); model = "
    "transformers.AutoModelForImageClassification.from_pretrained({folder!r}); "
    "model(**processor(image.convert('L'), return_tensors='pt')).logits"
)
CLOSE = 1e-4  # largest difference between the outputs of the exported model and of our model


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Exports a model to other libraries.")
    options.add_inference_options(parser, images=False)
    parser.add_argument(
        "--to", required=True, choices=sorted(WRITERS), metavar="FORMAT", help=", ".join(sorted(WRITERS))
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="output file; a folder for transformers, and for timm if PATH has no suffix",
    )
    parser.add_argument("--encoder", action="store_true", help="export the encoder only, without decoder or head")
    return parser


def main(args: argparse.Namespace) -> None:
    """Exports the model."""
    start_logging()
    check_suffix(args.to, args.out)
    model = get_model(args.model, pretrained=True)
    if args.encoder:
        model = encoder_of(model)
    export(model, args.to, args.out)
    logger.info(f"{args.out}: {model.settings['model']} for {args.to}")


def export(model: Model, to: str, out: Path) -> None:
    """Exports a model. The file or folder is written atomically.

    Args:
        to: one of WRITERS.
        out: output path.

    Raises:
        ValueError: the format does not support this model or the suffix of `out`, or its library is not installed.
        OSError: the disk is full, or the folder can't be written to.
    """
    pools_patches = isinstance(model, Classifier) and model.global_pool
    if model.num_prefix_tokens > 1 and (to == "mmpretrain" or (to == "timm" and not pools_patches)):
        raise ValueError(
            f"--to {to}: {to} uses a single class token, and this model the mean of {model.num_prefix_tokens}; give "
            f"--to transformers, safetensors, onnx or torch_export"
        )
    if (model.head_pools or isinstance(model, Segmenter)) and to in WITHOUT_OTHER_HEADS:
        head = "attentive probe" if model.head_pools else "head for segmentation that this library uses"
        raise ValueError(f"--to {to}: {to} has no {head}; give --encoder, or {FOR_ALL}")
    for name in names_where(lambda one: one["of_block"]):
        if to in WITHOUT_OTHER_HEADS and model.settings.get(name):
            raise ValueError(f"--to {to}: models with --{name} are not exported to {to}; give {FOR_ALL}")
    check_suffix(to, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as written:
        WRITERS[to](model, written)


def check_suffix(to: str, out: Path) -> None:
    """Raises ValueError if the name of an output file or folder has another suffix than those of its format."""
    suffixes = SUFFIXES[to]
    others = {suffix for known in SUFFIXES.values() for suffix in known} - {""}
    if out.suffix not in suffixes and (suffixes != ("",) or out.suffix in others):  # a folder may be named v1.5
        kind = "a folder" if suffixes == ("",) else " or ".join(suffix or "a folder" for suffix in suffixes)
        raise ValueError(f"--out {out}: --to {to} writes {kind}; give --out {out.with_suffix(suffixes[0])}")


def encoder_of(model: Model) -> Classifier:
    """Returns the encoder of a model. Its features are the normalized class token.

    Raises:
        ValueError: the model is a classifier that pools patch tokens.
    """
    if model.settings.get("global_pool") and not isinstance(model, Autoencoder):
        raise ValueError("--encoder: this classifier pools patch tokens, and has no norm for single tokens")
    architecture = model.settings["model"].removeprefix("mae_")
    encoder = Classifier(
        {**model.settings, "model": architecture, "nb_classes": 0, "global_pool": False, "probe": False}
    )
    names = encoder.state_dict().keys()
    encoder.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    return encoder


# ----------------------------------------------------------------------------------------------------- state dicts


def settings_of(model: Model) -> dict[str, Any]:
    """Returns the settings that rebuild a model and its preprocessing, including the defaults that it uses."""
    mean, std = transforms.channel_statistics(model.in_chans, model.settings.get("mean"), model.settings.get("std"))
    default = model.settings.get("crop_pct") or transforms.default_crop_pct(model.settings["input_size"])
    names = [name for name in REBUILDS if model.settings.get(name) is not None]
    used = {"mean": mean, "std": std, "crop_pct": 1.0 if _is_uncropped(model) else default}
    return {**{name: model.settings[name] for name in names}, **used}


def _is_uncropped(model: Model) -> bool:
    """Whether the input is the whole picture, scaled to its size."""
    return model.settings.get("crop") == transforms.NO_CROP


def write_reference(model: Model, out: Path) -> None:
    settings = settings_of(model)
    _save({"model": model.state_dict(), "args": settings}, out)
    if model.head_pools:
        logger.info("the published code has no attentive probe; this library reads the file")
    if (settings["mean"], settings["std"]) != transforms.channel_statistics(3):
        logger.info("the published code normalizes with ImageNet's mean and std, and this model has others: %s, %s",
                    settings["mean"], settings["std"])  # fmt: skip


def write_safetensors(model: Model, out: Path) -> None:
    save_file(_contiguous(model.state_dict()), out, {"format": "pt", SETTINGS: json.dumps(settings_of(model))})


def write_timm(model: Model, out: Path) -> None:
    """Writes a folder from which timm rebuilds the model, or with a suffix a file of the weights only."""
    classifier = model if isinstance(model, Classifier) else encoder_of(model)
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
    overlay = {name: value for name, value in config["pretrained_cfg"].items() if name != "label_names"}
    arguments = {"num_classes": config["num_classes"], **config["model_args"], "pretrained_cfg_overlay": overlay}
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    logger.info(f"timm reads only the weights from this file: export to a folder, or call "
                f"timm.create_model({config['architecture']!r}, checkpoint_path={out.name!r}, {text})")  # fmt: skip


def timm_config(model: Classifier) -> dict[str, Any]:
    """Returns the config.json of a folder of timm. `model_args` describes the model in full."""
    from timm import is_model  # takes more than a second

    settings = settings_of(model)
    block: Any = model.blocks[0]
    pooled, registers = bool(model.settings["global_pool"]), model.num_prefix_tokens - 1
    height, width = model.patch_embed.img_size
    name = f"vit_{models_build.size_of(model.settings['model'])}_224"
    labels = {"label_names": model.classes} if model.classes else {}
    return {
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
            "input_size": [model.in_chans, height, width], "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": settings["crop_pct"], "crop_mode": "squash" if _is_uncropped(model) else "center",
            "mean": settings["mean"], "std": settings["std"], "num_classes": model.settings["nb_classes"],
            "first_conv": "patch_embed.proj", "classifier": "head", **labels,
        },
    }  # fmt: skip


def write_mmpretrain(model: Model, out: Path) -> None:
    """Writes the weights under the names of mmpretrain. Its `get_model` and `init_model` read the class names."""
    assert not isinstance(model, Segmenter)
    config = f"model = {mmpretrain_config(model)}"
    meta: dict[str, Any] = {"cfg": config}
    if isinstance(model, Classifier) and model.classes:
        meta["dataset_meta"] = {"classes": model.classes}
    _save({"meta": meta, "state_dict": conversion.to_mmpretrain(model.state_dict()), "args": settings_of(model)}, out)
    logger.info(f"mmpretrain reads model and normalization from a configuration file; its content is: {config}")


def mmpretrain_config(model: Autoencoder | Classifier) -> dict[str, Any]:
    """Returns the `model` of a configuration of mmpretrain. It describes the model and its normalization in full."""
    settings = settings_of(model)
    block: Any = model.blocks[0]
    width = model.pos_embed.shape[-1]
    norm = {"type": "LN", "eps": block.norm1.eps}
    size, patch = (sides[0] if sides[0] == sides[1] else tuple(sides)
                   for sides in (model.patch_embed.img_size, model.patch_embed.patch_size))  # fmt: skip
    backbone: dict[str, Any] = {
        "arch": {"embed_dims": width, "num_layers": len(model.blocks), "num_heads": block.attn.num_heads,
                 "feedforward_channels": block.mlp.fc1.out_features},
        "img_size": size, "patch_size": patch, "patch_cfg": {"in_channels": model.in_chans}, "norm_cfg": norm,
    }  # fmt: skip
    # mmpretrain reverses the channels of the BGR images that OpenCV decodes.
    config: dict[str, Any] = {"data_preprocessor": {
        **{name: [255 * value for value in settings[name]] for name in ("mean", "std")}, "to_rgb": model.in_chans == 3,
    }}  # fmt: skip
    if isinstance(model, Autoencoder):
        decoder: Any = model.decoder_blocks
        decoder_width = model.decoder_pos_embed.shape[-1]
        neck = {
            "type": "MAEPretrainDecoder", "num_patches": model.num_patches, "patch_size": patch,
            "in_chans": model.in_chans, "embed_dim": width, "decoder_embed_dim": decoder_width,
            "decoder_depth": len(decoder), "decoder_num_heads": decoder[0].attn.num_heads,
            "mlp_ratio": decoder[0].mlp.fc1.out_features / decoder_width, "norm_cfg": norm,
            "predict_feature_dim": model.decoder_pred.out_features,
        }  # fmt: skip
        loss = {"type": "PixelReconstructionLoss", "criterion": "L2"}
        head = {"type": "MAEPretrainHead", "norm_pix": model.norm_pix_loss, "patch_size": patch,
                "in_channels": model.in_chans, "loss": loss}  # fmt: skip
        backbone |= {"type": "MAEViT", "mask_ratio": model.settings["mask_ratio"]}
        return {"type": "MAE", "backbone": backbone, "neck": neck, "head": head, **config}
    pooled = bool(model.global_pool)
    backbone |= {"type": "VisionTransformer", "out_type": "avg_featmap" if pooled else "cls_token",
                 "final_norm": not pooled}  # fmt: skip
    is_probe = bool(model.settings.get("probe"))
    if model.num_classes:
        config["head"] = {"type": "LinearClsHead" if pooled and not is_probe else "VisionTransformerClsHead",
                          "num_classes": model.num_classes, "in_channels": width}  # fmt: skip
        if is_probe:
            config["neck"] = {"type": "ClsBatchNormNeck", "input_features": width}
    return {"type": "ImageClassifier", "backbone": backbone, **config}


def write_transformers(model: Model, out: Path) -> None:
    """Writes a folder with weights, config.json, and preprocessor_config.json for the preprocessing of the model."""
    transformers = _library("transformers")
    settings, used = model.settings, settings_of(model)
    block: Any = model.blocks[0]
    # Its processors scale the short side of a picture to a fixed length. Its decoder interpolates positions in one
    # dimension.
    side = _square(model.patch_embed.img_size, "images")
    same = {
        "hidden_size": model.pos_embed.shape[-1], "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads, "intermediate_size": block.mlp.fc1.out_features,
        "image_size": side, "num_channels": model.in_chans,
        "patch_size": _square(model.patch_embed.patch_size, "patches"), "layer_norm_eps": block.norm1.eps,
    }  # fmt: skip
    if model.num_prefix_tokens > 1:
        theirs = _pixio(model, **same)
    elif isinstance(model, Autoencoder):
        decoder: Any = model.decoder_blocks
        theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
            **same, mask_ratio=settings["mask_ratio"], norm_pix_loss=model.norm_pix_loss,
            decoder_hidden_size=model.decoder_pos_embed.shape[-1], decoder_num_hidden_layers=len(decoder),
            decoder_num_attention_heads=decoder[0].attn.num_heads,
            decoder_intermediate_size=decoder[0].mlp.fc1.out_features,
        ))  # fmt: skip
        if (settings.get("mask_block") or 1) > 1:
            logger.info(f"transformers masks single patches, and this model has mask_block {settings['mask_block']}")
    elif settings.get("global_pool"):
        raise ValueError(
            "--to transformers: its classifier uses the class token, and this classifier pools patch tokens; give --to "
            "timm, onnx or torch_export"
        )
    elif not settings["nb_classes"]:
        theirs = transformers.ViTModel(transformers.ViTConfig(**same), add_pooling_layer=False)
    else:
        names = model.classes or [f"class {label}" for label in range(settings["nb_classes"])]
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**same, **labels))
        if model.in_chans == 1:
            logger.info(GRAY.format(folder=out.name))
    theirs.load_state_dict(conversion.to_transformers(plain_head(model), set(theirs.state_dict())))
    only_ours = names_where(lambda one: one["only_ours"], ModelSpec)
    theirs.config.settings = {name: settings[name] for name in only_ours if settings.get(name) is not None}
    theirs.save_pretrained(out)
    if model.in_chans not in (1, 3):
        logger.info(f"the image processors of transformers read images of 1 or 3 channels, and this model has "
                    f"{model.in_chans}: give the model normalized tensors (B, c, H, W)")  # fmt: skip
    edge = int(side / used["crop_pct"])
    if (edge - side) % 4 == 3:  # transformers rounds half of the difference down, torchvision to an even number
        logger.info(f"transformers scales images to {edge} pixels, and its center crop of {side} pixels begins one "
                    f"pixel before that of this library, which matters for small images")  # fmt: skip
    square = {"height": side, "width": side}
    transformers.ViTImageProcessor(
        size=square if _is_uncropped(model) else {"shortest_edge": edge}, resample=foreign_settings.BICUBIC,
        do_center_crop=not _is_uncropped(model), crop_size=square, do_convert_rgb=model.in_chans == 3,
        image_mean=used["mean"], image_std=used["std"],
    ).save_pretrained(out)  # fmt: skip


def _pixio(model: Model, intermediate_size: int, **same: Any) -> Any:
    """Returns a PixioModel of transformers: an encoder with several class tokens.

    Args:
        same: arguments of its configuration.

    Raises:
        ValueError: transformers has no such model.
    """
    transformers = _library("transformers")
    if isinstance(model, Autoencoder) or model.settings["nb_classes"] or model.settings.get("global_pool"):
        raise ValueError(
            f"--to transformers: PixioModel, for several class tokens, has no decoder and no head: give --encoder, or "
            f"{FOR_ALL}"
        )
    ratio, rest = divmod(intermediate_size, model.embed_dim)
    if rest:
        raise ValueError(f"--to transformers: PixioModel needs a whole number as MLP ratio: give {FOR_ALL}")
    config = transformers.PixioConfig(**same, mlp_ratio=ratio, n_cls_tokens=model.num_prefix_tokens)
    return transformers.PixioModel(config)


def plain_head(model: Model) -> dict[str, Tensor]:
    """Returns the state dict. The batch norm of a linear probe is merged into its linear layer.

    Other libraries have no head with a batch norm.
    """
    state = dict(model.state_dict())
    if not model.settings.get("probe"):
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
            f"--to transformers supports only square {what}, and these are {sides[0]} x {sides[1]}: give {FOR_ALL}"
        )
    return sides[0]


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in state.items()}


# ---------------------------------------------------------------------------------------------------------- graphs


class Graph(nn.Module):
    """The exported module: normalized images (B, c, H, W) -> logits or features.

    For an autoencoder: images and noise (B, N) -> prediction (B, N, p·p·c) and mask (B, N). The patches with the
    smallest noise are visible.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Any:
        if noise is None:
            return self.model(images)
        return self.model(images, self.model.settings["mask_ratio"], noise=noise)[1:3]


def _graph(model: Model) -> tuple[Graph, dict[str, Tensor], dict[str, Any], list[str]]:
    """Returns a graph, example inputs by name, their dynamic shapes, and the names of the outputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"images": torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator)}
    outputs = ["logits" if model.settings["nb_classes"] else "features"]
    if isinstance(model, Autoencoder):
        inputs["noise"], outputs = torch.rand(2, model.num_patches, generator=generator), ["prediction", "mask"]
    batch = torch.export.Dim("batch", min=1)
    return Graph(model).eval(), inputs, {name: {0: batch} for name in inputs}, outputs


def write_torch_export(model: Model, out: Path) -> None:
    """Writes the graph. The extra file "settings" contains the settings as JSON."""
    graph, inputs, dynamic, _ = _graph(model)
    stream = io.BytesIO()  # torch.export.save would abort the process if the disk is full
    with torch.no_grad():
        program = torch.export.export(graph, (), kwargs=inputs, dynamic_shapes=dynamic)
    torch.export.save(program, stream, extra_files={"settings": json.dumps(settings_of(model))})
    out.write_bytes(stream.getbuffer())


def _onnx_sort(values: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort along the last of two dimensions, as TopK of all values, which keeps the order of equal values."""
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values, start=dim, end=dim + 1), axis=dim, largest=int(descending))


def write_onnx(model: Model, out: Path) -> None:
    """Writes the graph, and checks it with onnxruntime and another batch size. Its metadata has the settings as JSON.

    Raises:
        ValueError: the outputs differ from those of the model by more than CLOSE.
    """
    onnx, runtime = _library("onnx"), _library("onnxruntime", "onnx")
    _library("onnxscript", "onnx")
    for name in ("onnx_ir", "onnxscript"):  # they log each change of the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    graph, inputs, dynamic, outputs = _graph(model)
    with torch.no_grad():
        program = torch.onnx.export(
            graph, (), kwargs=inputs, dynamo=True, dynamic_shapes=dynamic, input_names=list(inputs),
            output_names=outputs, custom_translation_table={torch.ops.aten.sort.stable: _onnx_sort}, verbose=False,
        )  # fmt: skip
        assert program
        program.save(out)
        exported = onnx.load(out, load_external_data=False)
        for key, value in {**settings_of(model), "classes": model.classes}.items():
            exported.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(exported, out)
        batch = {name: value[:1].repeat(3, *(1,) * (value.ndim - 1)) for name, value in inputs.items()}
        theirs = runtime.InferenceSession(out).run(None, {name: value.numpy() for name, value in batch.items()})
        ours = graph(**batch)
        pairs = zip([ours] if isinstance(ours, Tensor) else ours, theirs, strict=True)
        difference = max(float((torch.from_numpy(their) - our).abs().max()) for our, their in pairs)
    if difference > CLOSE:
        raise ValueError(
            f"--to onnx: {out.name} is not written: its outputs differ from the model's by {difference:.2g}"
        )


def _library(name: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'--to: this format needs the package {name}, which is not installed: pip install ".[{extra or name}]"'
        ) from error


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "reference": write_reference,
    "safetensors": write_safetensors,
    "timm": write_timm,
    "transformers": write_transformers,
    "mmpretrain": write_mmpretrain,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
