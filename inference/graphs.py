"""Exports graphs: ONNX and torch.export."""

import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch

from inference.model import Autoencoder, Model, settings_of

CLOSE = 1e-4  # largest difference between the outputs of the exported model and of our model


def library(name: str, extra: str | None = None) -> Any:
    """Imports a package. If it is missing, the error names the extra that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f'--to: this format needs the package {name}, which is not installed: pip install ".[{extra or name}]"'
        ) from error


class Graph(torch.nn.Module):
    """The exported module: normalized images (B, c, H, W) -> logits or features.

    For an autoencoder: images and noise (B, N) -> prediction (B, N, p·p·c) and mask (B, N). The patches with the
    smallest noise are visible.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> Any:
        if noise is None:
            return self.model(images)
        return self.model(images, self.model.settings["mask_ratio"], noise=noise)[1:3]


def _graph(model: Model) -> tuple[Graph, dict[str, torch.Tensor], dict[str, Any], list[str]]:
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
        ValueError: the outputs differ from the outputs of the model by more than CLOSE.
    """
    onnx, runtime = library("onnx"), library("onnxruntime", "onnx")
    library("onnxscript", "onnx")
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
        pairs = zip([ours] if isinstance(ours, torch.Tensor) else ours, theirs, strict=True)
        difference = max(float((torch.from_numpy(their) - our).abs().max()) for our, their in pairs)
    if difference > CLOSE:
        raise ValueError(
            f"--to onnx: {out.name} is not written: its outputs differ from the model's by {difference:.2g}"
        )
