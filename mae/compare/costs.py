"""What the encoders of a comparison cost: parameters, and images/s of a forward pass on this machine."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mae.build
from mae import parallel, user_code
from mae.compare import store
from mae.compare.encoders import PIXELS, Encoder, directory_of
from mae.evaluate.tables import markdown
from mae.files import atomic, locks
from mae.settings import specs
from mae.sizes import to_pair
from mae.training.precision import Precision

BATCH = {"cuda": 64, "cpu": 16}  # images, by the type of the device
PASSES = 3


def write(folder: Path, encoders: Sequence[Encoder], device: str, amp: str, code: str | None = None) -> str:
    """Writes costs.md to a folder: a table in Markdown of the encoders. A resumed comparison has the same.

    Args:
        device, amp: the settings.
        code: the user's class of encoders, the setting `encoder`.
    """
    rows = []
    with locks.locked(folder, "costs.md.lock", waits=True):
        for encoder in encoders:
            if encoder.name != PIXELS:
                settings = encoder.architecture | {"device": device, "amp": amp}
                measure = partial(_measure, encoder.architecture, device, amp, code)
                scores = store.kept(folder / "costs" / directory_of(encoder.name), settings, measure)
                speed = scores["images_per_s"]
                rows.append([encoder.name, f"{scores['parameters']:,}", f"{speed:,.1f}" if speed else ""])
        text = markdown(["encoder, without a head", "parameters", "images/s"], rows)
        atomic.write_text(folder / "costs.md", f"{text}\n")
    return text


@torch.inference_mode()
def _measure(
    architecture: Mapping[str, Any], device_name: str, amp: str, code: str | None, _folder: Path
) -> store.Scores:
    """Measures an encoder with random weights on blank images; the fastest of PASSES batches, after one to warm up."""
    kind = user_code.named_object("encoder", code) if architecture.get("encoder") else None
    device = parallel.choose_device(device_name)
    model = mae.build.frozen_encoder(*specs(architecture), kind)
    model.to(device).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if model.needed_inputs:  # their shapes are unknown
        return {"parameters": parameters, "images_per_s": None}
    count = BATCH.get(device.type, BATCH["cpu"])
    images = torch.zeros(count, architecture["in_chans"], *to_pair(architecture["input_size"]), device=device)
    times = []
    with Precision(amp, device).autocast():
        for _ in range(1 + PASSES):
            begin = time.perf_counter()
            model.forward_features(images).sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
    return {"parameters": parameters, "images_per_s": count / min(times[1:])}
