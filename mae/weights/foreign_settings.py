"""The settings in folders of other libraries."""

import json
from pathlib import Path
from typing import Any

from mae.files.untrusted import read_file
from mae.weights.formats import timm, transformers
from mae.weights.formats.format import Record
from mae.weights.formats.transformers import crop_share

__all__ = ["crop_share", "read_folder", "recorded"]


def read_folder(folder: Path) -> dict[str, Any]:
    """Reads the settings of a folder that transformers or timm wrote.

    Raises:
        Exception: config.json or preprocessor_config.json can't be read, or has another structure.
    """
    config = json.loads(read_file(folder / "config.json"))
    return recorded(Record(folder, folder=folder, config=config))


def recorded(record: Record) -> dict[str, Any]:
    """Returns the settings that are recorded beside weights of any names."""
    library = transformers if transformers.has_config(record) else timm
    return library.settings(record, {})
