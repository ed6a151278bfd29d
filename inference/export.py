"""Exports a model to other libraries.

    python -m inference.export --model runs/tuned/checkpoint-best.pth --to onnx --out model.onnx
    python -m inference.export --model runs/mine/checkpoint-last.pth --to transformers --out folder

| --to | what is written | read by |
|---|---|---|
| reference | .pth, {model: ...} | the published code; everything here |
| safetensors | .safetensors with our settings | everything here |
| timm | state dict, .pth or .safetensors | timm.create_model(..., checkpoint_path=) |
| transformers | a folder | ViTMAEForPreTraining, ViTModel, ViTForImageClassification |
| mmpretrain | .pth, {state_dict: ...} | mmpretrain, mmselfsup |
| onnx | .onnx of any batch size | onnxruntime and others |
| torch_export | .pt2 of any batch size | torch.export.load |

Classifiers give logits, encoders features. Autoencoders go whole into the first five (timm, which has no decoder, gets
the encoder) and as encoders, images to tokens, into the last two; --encoder makes an encoder of anything.
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

from inference.model import Autoencoder, Classifier, Model, get_model
from util.cli import entry_point, options
from util.files import atomic
from util.training.run_log import start_logging
from util.weights import conversion
from util.weights.loading import SETTINGS

logger = logging.getLogger(__name__)

CLOSE = 1e-4  # of an exported model's answers to ours


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = entry_point.parser("Exports a model to other libraries.")
    options.add_inference_options(parser, images=False)
    parser.add_argument(
        "--to", required=True, choices=sorted(WRITERS), metavar="FORMAT", help=", ".join(sorted(WRITERS))
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="file to write; a folder for transformers"
    )
    parser.add_argument("--encoder", action="store_true", help="export the encoder only, without decoder or head")
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes the file or folder."""
    start_logging()
    model = get_model(args.model, pretrained=True)
    if args.encoder:
        model = encoder_of(model)
    export(model, args.to, args.out)
    logger.info(f"{args.out}: {model.settings['model']} for {args.to}")


def export(model: Model, to: str, out: Path) -> None:
    """Writes a model in a format that `--help` lists. The file or folder is there when it is complete.

    Raises:
        ValueError: the format can't hold this model, or its library is not installed.
        OSError: the disk is full, or the place can't be written to.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as written:
        WRITERS[to](model, written)


def encoder_of(model: Model) -> Classifier:
    """The encoder alone, with the class token's normalised features."""
    if model.settings.get("global_pool") and not isinstance(model, Autoencoder):
        raise ValueError("--encoder: this classifier pools patch tokens, and has no norm for single ones")
    architecture = model.settings["model"].removeprefix("mae_")
    encoder = Classifier(
        {**model.settings, "model": architecture, "nb_classes": 0, "global_pool": False, "probe": False}
    )
    names = encoder.state_dict().keys()
    encoder.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    return encoder


# ----------------------------------------------------------------------------------------------------- state dicts


def write_reference(model: Model, out: Path) -> None:
    _save({"model": model.state_dict()}, out)


def write_safetensors(model: Model, out: Path) -> None:
    save_file(_contiguous(model.state_dict()), out, {"format": "pt", SETTINGS: json.dumps(model.settings)})


def write_timm(model: Model, out: Path) -> None:
    state = plain_head(model if isinstance(model, Classifier) else encoder_of(model))
    if out.suffix == ".safetensors":
        save_file(_contiguous(state), out, {"format": "pt"})
    else:
        _save(state, out)


def write_mmpretrain(model: Model, out: Path) -> None:
    _save({"meta": {}, "state_dict": conversion.to_mmpretrain(plain_head(model))}, out)


def write_transformers(model: Model, out: Path) -> None:
    """A folder with weights, config.json, and preprocessor_config.json for the model's own pixels."""
    transformers = _library("transformers")
    settings, (height, width) = model.settings, model.patch_embed.img_size
    block: Any = model.blocks[0]
    same = {
        "hidden_size": model.pos_embed.shape[-1], "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads, "intermediate_size": block.mlp.fc1.out_features,
        "image_size": height if height == width else (height, width), "num_channels": model.in_chans,
        "patch_size": _square(model.patch_embed.patch_size, "patches"), "layer_norm_eps": block.norm1.eps,
    }  # fmt: skip
    if isinstance(model, Autoencoder):
        _square((height, width), "images, whose decoder's positions it interpolates in one dimension,")
        decoder: Any = model.decoder_blocks
        theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
            **same, mask_ratio=settings["mask_ratio"], norm_pix_loss=model.norm_pix_loss,
            decoder_hidden_size=model.decoder_pos_embed.shape[-1], decoder_num_hidden_layers=len(decoder),
            decoder_num_attention_heads=decoder[0].attn.num_heads,
            decoder_intermediate_size=decoder[0].mlp.fc1.out_features,
        ))  # fmt: skip
    elif settings.get("global_pool"):
        raise ValueError(
            "transformers' classifier takes the class token, and this one pools patch tokens: it can't be exported "
            "there; onnx and torch_export can hold it, and timm has such a classifier"
        )
    elif not settings["nb_classes"]:
        theirs = transformers.ViTModel(transformers.ViTConfig(**same), add_pooling_layer=False)
    else:
        names = model.classes or [f"class {label}" for label in range(settings["nb_classes"])]
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**same, **labels))
    theirs.load_state_dict(conversion.to_transformers(plain_head(model), set(theirs.state_dict())))
    theirs.save_pretrained(out)
    transformers.ViTImageProcessor(
        size={"height": height, "width": width}, resample=3,
        image_mean=model.normalize.mean.flatten().tolist(), image_std=model.normalize.std.flatten().tolist(),
    ).save_pretrained(out)  # fmt: skip
    logger.info("transformers' processor scales images to the model's size without cutting; ours cuts the centre out")


def plain_head(model: Model) -> dict[str, Tensor]:
    """The state dict, with a linear probe's batch norm and layer as one layer: other libraries have no such head."""
    state = dict(model.state_dict())
    if not model.settings.get("probe"):
        return state
    norm, linear = model.head  # type: ignore[misc]
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    weight = linear.weight / (norm.running_var + norm.eps).sqrt()
    return {**state, "head.weight": weight.detach(), "head.bias": (linear.bias - weight @ norm.running_mean).detach()}


def _save(state: dict[str, Any], out: Path) -> None:
    with out.open("wb") as file:  # given a path, torch.save does not say why it failed
        torch.save(state, file)


def _square(sides: tuple[int, int], what: str) -> int:
    if sides[0] != sides[1]:
        raise ValueError(f"transformers supports square {what} only, and these are {sides[0]} x {sides[1]}")
    return sides[0]


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in state.items()}


# ---------------------------------------------------------------------------------------------------------- graphs


class Graph(nn.Module):
    """What becomes a graph: normalised images (B, c, H, W) to logits, features or tokens."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images) if isinstance(self.model, Autoencoder) else self.model(images)


def _graph(model: Model) -> tuple[Graph, Tensor, dict[str, Any]]:
    """A graph, an example batch, and which of its sides may vary."""
    example = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    return Graph(model).eval(), example, {"images": {0: torch.export.Dim("batch", min=1)}}


def write_torch_export(model: Model, out: Path) -> None:
    graph, example, dynamic = _graph(model)
    stream = io.BytesIO()  # a full disk would end the process in torch.export.save
    with torch.no_grad():
        torch.export.save(torch.export.export(graph, (example,), dynamic_shapes=dynamic), stream)
    out.write_bytes(stream.getbuffer())


def write_onnx(model: Model, out: Path) -> None:
    """The graph, checked by onnxruntime with another batch size; mean, std and classes stand in its metadata."""
    onnx, runtime = _library("onnx"), _library("onnxruntime", "onnx")
    _library("onnxscript", "onnx")
    graph, example, dynamic = _graph(model)
    name = "logits" if model.settings["nb_classes"] else "features"
    with torch.no_grad():
        program = torch.onnx.export(
            graph, (example,), dynamo=True, dynamic_shapes=dynamic, input_names=["images"], output_names=[name],
            verbose=False,
        )  # fmt: skip
        assert program
        program.save(out)
        exported = onnx.load(out, load_external_data=False)
        for key in ("mean", "std"):
            exported.metadata_props.add(key=key, value=json.dumps(getattr(model.normalize, key).flatten().tolist()))
        exported.metadata_props.add(key="classes", value=json.dumps(model.classes))
        onnx.save(exported, out)
        batch = example[:1].repeat(3, 1, 1, 1)
        theirs = runtime.InferenceSession(out).run(None, {"images": batch.numpy()})[0]
        difference = float((torch.from_numpy(theirs) - graph(batch)).abs().max())
    if difference > CLOSE:
        raise ValueError(
            f"--to onnx: {out.name} is not written: its outputs differ from the model's by {difference:.2g}"
        )


def _library(name: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'--to: it needs the package {name}, which is not installed: pip install ".[{extra or name}]"'
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
