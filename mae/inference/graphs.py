"""Exports graphs: ONNX and torch.export. They take pixels of 0 to 1, and normalize them."""

import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch

from mae.data import stages
from mae.inference.model import Autoencoder, Model, Segmenter, is_uncropped, settings_of

logger = logging.getLogger(__name__)

CLOSE = 1e-4  # largest difference between the outputs of the exported model and of our model
HALF_CLOSE = 16 * 2**-10  # in fp16, relative to the largest output; 1.5 · 2^-10 was measured, for mini to base models


def library(name: str, extra: str | None = None) -> Any:
    """Imports a package. If it is missing, the error names the extra that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'`to`: this format needs the package {name}, which is not installed: pip install ".[{extra or name}]"'
        ) from error


class Graph(torch.nn.Module):
    """The exported module: pixels of 0 to 1 (B, c, H, W) -> logits or features. It normalizes the pixels.

    For an autoencoder: images and noise (B, N) -> prediction (B, N, p·p·c) and mask (B, N). The patches with the
    smallest noise are visible. The prediction is of normalized pixels, as the prediction of the model.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> Any:
        x = self.model.normalize(images)
        if self.model.values.nodata is not None:  # NaN in a channel marks an invalid pixel, which is 0, the mean
            x = x.masked_fill(images.isnan().any(dim=1, keepdim=True), 0)
        x = x.to(self.model.pos_embed.dtype)
        if noise is None:
            return self.model(x)
        return self.model(x, self.model.settings["mask_ratio"], noise=noise)[1:3]


def _graph(model: Model) -> tuple[Graph, dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """Returns a graph, example inputs by name, their dynamic shapes, and the names of the outputs."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator)
    inputs = {"images": normal * model.normalize.std + model.normalize.mean}  # the units of the model's pixels
    outputs = ["logits" if model.settings["nb_classes"] else "features"]
    if isinstance(model, Autoencoder):
        inputs["noise"] = torch.rand(2, model.num_patches, generator=generator)
        outputs = ["prediction", "mask"]
    batch = torch.export.Dim("batch", min=1)
    return Graph(model).eval(), inputs, {name: {0: batch} for name in inputs}, outputs


def description(model: Model) -> str:
    """Returns what a graph takes as images: shape, order of the channels, units, crop, and statistics."""
    height, width = model.patch_embed.img_size
    settings = settings_of(model)
    channels = {1: "gray", 3: "RGB"}.get(model.in_chans, f"{model.in_chans} channels")
    mean, std = (" ".join(f"{value:g}" for value in settings[name]) for name in ("mean", "std"))
    return (
        f"float32 (B, {model.in_chans}, {height}, {width}), {channels}, {_units(model)}; {crop_of(model)}; "
        f"the graph subtracts the mean {mean} and divides by the std {std}"
    )


def _units(model: Model) -> str:
    value_range = model.values.value_range
    nodata = model.values.nodata
    if value_range:
        units = f"(value - {value_range[0]:g}) / {value_range[1] - value_range[0]:g}"
    elif model.normalize.fits_bytes:
        units = "pixels of 0 to 1 (float data in their own units)"
    else:
        units = "values in the units of the training data"
    return units if nodata is None else f"{units}, NaN for the value {nodata}"


def crop_of(model: Model) -> str:
    """Returns which pixels of a picture are the input of a model, as a text."""
    height, width = model.patch_embed.img_size
    if isinstance(model, Segmenter):
        scaled = f", which is scaled to a short side of {model.short_side} pixels" if model.short_side else ""
        return f"windows of {height} x {width} pixels of a picture{scaled}"
    mode = interpolation_of(model)
    if is_uncropped(model):
        return f"a picture that is scaled to {height} x {width} pixels ({mode})"
    crop_pct = settings_of(model)["crop_pct"]
    rows = int(height / crop_pct)
    columns = int(width / crop_pct)
    return f"the center of a picture that is scaled to cover {rows} x {columns} pixels ({mode})"


def interpolation_of(model: Model) -> str:
    """Returns the interpolation of the scaling, as timm names it."""
    return model.settings.get("interpolation") or stages.BICUBIC


def _metadata(model: Model) -> dict[str, Any]:
    """Returns the metadata of a graph, and logs what it takes."""
    logger.info(f"the graph takes images: {description(model)}")
    return {**settings_of(model), "classes": model.classes, "images": description(model)}


def write_torch_export(model: Model, out: Path) -> None:
    """Writes the graph, which takes positional arguments. The extra file "settings" contains the metadata as JSON."""
    graph, inputs, dynamic, _ = _graph(model)
    stream = io.BytesIO()  # torch.export.save would abort the process if the disk is full
    with torch.no_grad():
        program = torch.export.export(graph, (*inputs.values(),), dynamic_shapes=(*dynamic.values(),))
    torch.export.save(program, stream, extra_files={"settings": json.dumps(_metadata(model))})
    out.write_bytes(stream.getbuffer())


def _onnx_sort(values: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort along the last of two dimensions, as TopK of all values, which keeps the order of equal values."""
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values, start=dim, end=dim + 1), axis=dim, largest=int(descending))


def write_onnx(model: Model, out: Path) -> None:
    """Writes the graph, and checks it with onnxruntime and another batch size. Its metadata are values as JSON.

    Raises:
        ValueError: the weights are bf16; or the outputs differ from the outputs of the model by more than CLOSE, or
            HALF_CLOSE.
    """
    onnx = library("onnx")
    runtime = library("onnxruntime", "onnx")
    library("onnxscript", "onnx")
    for name in ("onnx_ir", "onnxscript"):  # they log each change of the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    if model.cls_token.dtype == torch.bfloat16:
        raise ValueError("onnxruntime computes no bfloat16 on CPUs: export model.float() or model.half()")
    graph, inputs, dynamic, outputs = _graph(model)
    with torch.no_grad():
        program = torch.onnx.export(
            graph, (), kwargs=inputs, dynamo=True, dynamic_shapes=dynamic, input_names=list(inputs),
            output_names=outputs, custom_translation_table={torch.ops.aten.sort.stable: _onnx_sort}, verbose=False,
        )  # fmt: skip
        assert program
        program.save(out)
        exported = onnx.load(out, load_external_data=False)
        for key, value in _metadata(model).items():
            exported.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(exported, out)
        batch = {name: value[:1].repeat(3, *(1,) * (value.ndim - 1)) for name, value in inputs.items()}
        results = runtime.InferenceSession(out).run(None, {name: value.numpy() for name, value in batch.items()})
        ours = graph(**batch)
        pairs = zip([ours] if isinstance(ours, torch.Tensor) else ours, results, strict=True)
        for our, result in pairs:
            difference = float((torch.from_numpy(result) - our).abs().max())
            close = HALF_CLOSE * float(our.abs().max()) if our.dtype == torch.float16 else CLOSE
            if not difference <= close:  # NaN, too
                raise ValueError(
                    f"to=onnx: {out.name} is not written: its outputs differ from the model's by {difference:.2g}"
                )
