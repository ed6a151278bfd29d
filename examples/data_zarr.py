"""zarr: groups train/ and val/ with the arrays `images` (n, c, H, W) and `labels` (n,) (pip install zarr).

Float values are not scaled: python -m mae.data --recipe writes their range, mean and std.

python main_pretrain.py --dataset py:examples.data_zarr:open_dataset --data_path FOLDER --in_chans 4
"""

from typing import Any

import torch
import zarr


class Images:
    """The samples of a group."""

    def __init__(self, path: str) -> None:
        group: Any = zarr.open_group(path, mode="r")
        self.images = group["images"]
        self.labels = group["labels"][:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index]), self.labels[index]


def open_dataset(split: str, data_path: str) -> Images:
    """Returns the samples of `split`."""
    return Images(f"{data_path}/{split}")
