"""What the encoders of a comparison cost: parameters, and images/s of a forward pass on this machine."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mae.build
from mae import parallel, user_code
from mae.compare import store
from mae.compare.encoders import PIXELS, Encoder, directory_of
from mae.evaluate.tables import markdown
from mae.files import atomic, locks
from mae.position_tables import to_pair
from mae.settings import Run, specs
from mae.training.precision import Precision

BATCH = {"cuda": 64, "cpu": 16}  # images, by the type of the device
PASSES = 3


def write(folder: Path, encoders: Sequence[Encoder], run: Run) -> str:
    """Writes costs.md to a folder: a table in Markdown of the encoders. A resumed comparison has the same."""
    rows = []
    with locks.locked(folder, "costs.md.lock", waits=True):
        for encoder in encoders:
            if encoder.name != PIXELS:
                scores = _scores_of(encoder, run, folder / "costs" / directory_of(encoder.name))
                speed = scores["images_per_s"]
                rows.append([encoder.name, f"{scores['parameters']:,}", f"{speed:,.1f}" if speed else ""])
        text = markdown(["encoder, without a head", "parameters", "images/s"], rows)
        atomic.write_text(folder / "costs.md", f"{text}\n")
    return text


def _scores_of(encoder: Encoder, run: Run, folder: Path) -> store.Scores:
    machine = {"device": run.machine.device, "amp": run.machine.amp}
    return store.kept(folder, encoder.architecture | machine, lambda _: _measure(encoder.architecture, run))


@torch.inference_mode()
def _measure(architecture: Mapping[str, Any], run: Run) -> store.Scores:
    """Measures an encoder with random weights on blank images; the fastest of PASSES batches, after one to warm up."""
    kind = user_code.named_object("encoder", run.model.encoder)
    device = parallel.choose_device(run.machine.device)
    model = mae.build.frozen_encoder(*specs(architecture), kind if architecture.get("encoder") else None)
    model.to(device).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if model.needed_inputs:  # their shapes are unknown
        return {"parameters": parameters, "images_per_s": None}
    count = BATCH.get(device.type, BATCH["cpu"])
    images = torch.zeros(count, architecture["in_chans"], *to_pair(architecture["input_size"]), device=device)
    times = []
    with Precision(run.machine.amp, device).autocast():
        for _ in range(1 + PASSES):
            begin = time.perf_counter()
            model.forward_features(images).sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
    return {"parameters": parameters, "images_per_s": count / min(times[1:])}
