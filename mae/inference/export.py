"""Exports a model to other libraries.

    python -m mae.inference.export --model runs/tuned/checkpoint-best.pth --to onnx --out model.onnx
    python -m mae.inference.export --model runs/mine/checkpoint-last.pth --to transformers --out folder

| --to | output | read by |
|---|---|---|
| reference | .pth, {model: ...} | the published code, this library |
| safetensors | .safetensors | this library |
| timm | a folder; or a state dict, .pth or .safetensors | timm.create_model("local-dir:FOLDER", pretrained=True) |
| transformers | a folder | ViTMAEForPreTraining, ViTModel, ViTForImageClassification, PixioModel |
| onnx | .onnx of any batch size | onnxruntime and others |
| torch_export | .pt2 of any batch size | torch.export.load |

Graphs take pixels of 0 to 1 and normalize them. Models of float data in their own units take values in these units.
Graphs of classifiers and segmentation models return logits, graphs of encoders return features, and graphs of
autoencoders return the prediction of normalized pixels and the mask, from images and noise. Their metadata (the extra
file "settings" of a .pt2) has shape, order of the channels, units, crop, mean, std and class names, as JSON. The inputs
of the function in a .pt2 are positional: torch.export.load("model.pt2").module()(images).

The other formats are weights for normalized images. The file or folder has mean, std, crop and class names. A log line
names the settings that the other library does not read from it. timm has no decoder, so that the encoder is exported.
The Auto classes of transformers read the folder for timm, too: the models of transformers do not pool patches.
--encoder_only exports the encoder of any model.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae.cli import entry_point, options
from mae.files import atomic
from mae.inference.graphs import write_onnx, write_torch_export
from mae.inference.model import Autoencoder, Classifier, Model, Segmenter, TimmClassifier, get_model
from mae.inference.state_dicts import (
    encoder_of,
    has_plain_head,
    without_adapters,
    write_reference,
    write_safetensors,
    write_timm,
    write_transformers,
)
from mae.pooling import OF_PROBE, TITLES
from mae.settings import ModelSpec
from mae.settings.choices import BOTH, CLASS_TOKEN, CLASSIFICATION
from mae.settings.model import BLOCK_ARGUMENTS, OF_AUTOENCODER
from mae.training.log import start_logging

logger = logging.getLogger(__name__)

# The suffixes of the files of each format; "" is a folder.
SUFFIXES = {
    "reference": (".pth",), "safetensors": (".safetensors",), "timm": ("", ".pth", ".safetensors"),
    "transformers": ("",), "onnx": (".onnx",), "torch_export": (".pt2",),
}  # fmt: skip
KEEP_TASK = ("reference", "safetensors")  # formats that record the meaning of the outputs
TRANSLATED = ("norm_pix_loss", "uniformity", "learned_pos_embed")  # settings that the writers of all formats heed
WITHOUT_OTHER_HEADS = ("timm", "transformers")
GRAPHS = ("onnx", "torch_export")
WITH_POOLING = (*GRAPHS, "safetensors")  # formats of encoders that have any pooling


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
    parser.add_argument("--encoder_only", action="store_true", help="export the encoder only, without decoder or head")
    parser.add_argument(
        "--pool", choices=(CLASS_TOKEN, BOTH),
        help=f"features of --encoder_only: {CLASS_TOKEN}: {TITLES[CLASS_TOKEN]}; {BOTH}: {TITLES[BOTH]} (default: what "
        f"the file is for, in {', '.join(sorted(WITH_POOLING))}; {CLASS_TOKEN} in other formats)",
    )  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    """Exports the model.

    Raises:
        ValueError: `pool` without `encoder_only`; or `encoder_only` without `pool` of a probe that pools tokens; or as
            in `export`.
        OSError: as in `export`.
    """
    start_logging()
    check_suffix(args.to, args.out)
    model = get_model(args.model, pretrained=True, **options.chosen_settings(args))
    if args.encoder_only:
        if model.pooling.name == OF_PROBE and not args.pool and args.to in WITH_POOLING:
            raise ValueError(
                f"model={args.model}: its features are those of the pooling of its probe, which no encoder alone has; "
                f"give pool={CLASS_TOKEN} or pool={BOTH}, or omit `encoder_only`"
            )
        by_rule = BOTH if model.pooling.name == BOTH and args.to in WITH_POOLING else None
        model = encoder_of(model, args.pool or by_rule)
        logger.info(f"features: {TITLES[model.pooling.name]}")
    elif args.pool:
        raise ValueError("`pool` has no effect without `encoder_only`: a head has its own pooling")
    export(model, args.to, args.out)
    logger.info(f"{args.out}: {model.settings['model']} for {args.to}")


def export(model: Model, to: str, out: Path) -> None:
    """Exports a model. The file or folder is written atomically. Adapters are merged into the weights.

    Args:
        to: one of WRITERS.
        out: output path.

    Raises:
        ValueError: the format does not support this model or the suffix of `out`, or its library is not installed.
        OSError: the disk is full, or the folder can't be written to.
    """
    model = without_adapters(model)
    if reason := unsupported(model, to):
        raise ValueError(f"to={to}: the format has no {reason}; give to=safetensors")
    check_suffix(to, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with model.evaluating(), atomic.replacing(out) as written:
        WRITERS[to](model, written)


def unsupported(model: Model, to: str) -> str:
    """Returns the part of a model that a format does not have, or ""."""
    if isinstance(model, TimmClassifier) and to != "safetensors":
        return "model of timm"
    is_other_code = to in WITHOUT_OTHER_HEADS
    if isinstance(model, Classifier) and model.pools_both and (is_other_code or to == "reference"):
        return "pooling of class token and patches together"
    pools_patches = isinstance(model, Classifier) and model.global_pool
    if to == "timm" and not pools_patches and model.num_prefix_tokens > 1:
        return f"mean of {model.num_prefix_tokens} class tokens"
    if is_other_code and isinstance(model, Segmenter):
        return "head for segmentation of this library"
    if is_other_code and not has_plain_head(model):
        return f"{model.settings['probe']} probe"
    if model.encoder_name and (is_other_code or to == "reference"):
        return f"encoder {model.encoder_name}"
    if model.needed_inputs and to in GRAPHS:
        return f"extra input {model.needed_inputs[0]}"
    if is_other_code and (name := _setting_of_ours(model, has_decoder=to != "timm")):
        return f"{name}={model.settings[name]}"
    task = model.settings.get("task", CLASSIFICATION)
    if task != CLASSIFICATION and model.settings["nb_classes"] and to not in KEEP_TASK:
        return f"outputs of task={task}"
    return ""


def _setting_of_ours(model: Model, has_decoder: bool) -> str:
    """Returns the name of a setting that other libraries do not have and that has no default value, or ""."""
    names = [*BLOCK_ARGUMENTS, *(OF_AUTOENCODER if has_decoder and isinstance(model, Autoencoder) else ())]
    for name in names:
        default = ModelSpec.__dataclass_fields__[name].default
        if name not in TRANSLATED and model.settings.get(name) not in (None, default):
            return name
    return ""


def check_suffix(to: str, out: Path) -> None:
    """Raises ValueError if the name of an output file or folder has another suffix than those of its format."""
    suffixes = SUFFIXES[to]
    others = {suffix for known in SUFFIXES.values() for suffix in known} - {""}
    if out.suffix not in suffixes and (suffixes != ("",) or out.suffix in others):  # a folder may be named v1.5
        kind = "a folder" if suffixes == ("",) else " or ".join(suffix or "a folder" for suffix in suffixes)
        raise ValueError(f"out={out}: to={to} writes {kind}; give out={out.with_suffix(suffixes[0])}")


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "reference": write_reference,
    "safetensors": write_safetensors,
    "timm": write_timm,
    "transformers": write_transformers,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
