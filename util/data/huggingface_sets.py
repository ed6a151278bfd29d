"""Map-style datasets of Hugging Face, from the hub or from a folder."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from util import dist
from util.data.decode import BadImage
from util.data.sources import VALIDATION, version_of
from util.files.untrusted import read_file


class HuggingFaceSet:
    """A map-style dataset of Hugging Face.

    Args:
        name: its name on the hub, or a folder of Parquet files, of images, or written by `save_to_disk`.
        split: "train" or "val".

    Raises:
        ValueError: the package `datasets` is not installed or can't open the dataset, or the dataset has no such split
            or no column of images.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError('--dataset hf: needs the package datasets: pip install ".[hf]"') from error
        self.title = f"hf:{name}"
        if not name:
            raise ValueError("--dataset hf: give hf:NAME or hf:FOLDER")
        if dist.is_main():
            self._load(datasets, name)  # the other processes use the prepared files
        dist.barrier()
        parts = self._load(datasets, name)
        available = [part for part in (("train",) if split == "train" else VALIDATION) if part in parts]
        if not available:
            raise ValueError(f"--dataset {self.title}: it has no {split} split, only {', '.join(parts)}")
        table = parts[available[0]]
        features = table.features
        image = next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"--dataset {self.title}: no column contains images: {', '.join(map(str, features))}")
        label = next((c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        self.classes = list(features[label].names) if label else []
        self.labels = np.array([-1 if n is None else n for n in table[label]] if label else [-1] * len(table))
        self.table = table.select_columns([image, *([label] if label else [])])
        self.table = self.table.cast_column(image, datasets.Image(decode=False))
        self.image, self.label = image, label

    def _load(self, datasets: Any, name: str) -> Any:
        try:
            if (Path(name) / "dataset_dict.json").exists():
                return datasets.load_from_disk(name)
            if (Path(name) / "dataset_info.json").exists() and (Path(name) / "state.json").exists():
                return {"train": datasets.load_from_disk(name)}
            return datasets.load_dataset(name)
        except Exception as error:  # the library raises any exception for files that it can't read
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ValueError(f"--dataset {self.title}: {reason}") from error

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self.table[index]
        image, label = row[self.image], row[self.label] if self.label else -1
        if image is None:
            raise BadImage("this row has no image")
        data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
        return data, -1 if label is None else label

    def name(self, index: int) -> str:
        """Returns the name of the dataset and the number of the row."""
        return f"{self.title}[{index}]"

    def version(self, index: int) -> str:
        """Returns the names and versions of the prepared files; the library prepares a changed dataset anew."""
        return self._version

    @cached_property
    def _version(self) -> str:
        files = [file["filename"] for file in self.table.cache_files]
        return " ".join(f"{file} {version_of(file)}" for file in files)
