"""What makes the data loading of a run faster. The log names it if the device waits for batches."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from mae import parallel
from mae.data.kinds.listing import folder_of
from mae.data.loader import TrainLoader
from mae.settings.choices import SHORT_SIDE

JPEG_SUFFIXES = (".jpg", ".jpeg")


def faster_loading(batches: Any, record: Mapping[str, Any], device: torch.device) -> list[str]:
    """Returns the flags and the command that would load the images of a run faster.

    Args:
        batches: of a run. Only a `TrainLoader` reads images.
        record: the settings of the run.
        device: the device of the model.
    """
    if not isinstance(batches, TrainLoader):
        return []
    source = batches.source
    cores = parallel.cores_of_process()
    if device.type == "cpu":
        cores -= torch.get_num_threads()  # which compute
    found = [f"num_workers={cores}"] if batches.batches.num_workers < cores else []
    if record.get("cache_images"):
        return found
    name = source.name(0) if hasattr(source, "name") else ""
    if record.get("fast_jpeg") is False and record["in_chans"] == 3 and name.lower().endswith(JPEG_SUFFIXES):
        found.append("`fast_jpeg`")
    folder = folder_of(source)
    if folder and not record.get("train_list") and _short_side(folder.path(0)) > SHORT_SIDE:
        found.append("examples/resize_folder.py")
    return found


def _short_side(file: str) -> int:
    """Returns the short side of an image in pixels; 0 if it can't be read."""
    try:
        with Image.open(file) as picture:
            return min(picture.size)
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0
