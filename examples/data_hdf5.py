"""HDF5: train.h5 and val.h5 with the arrays `images` (n, H, W, c) and `labels` (n,) (pip install h5py).

python main_pretrain.py --dataset py:examples.data_hdf5:open_dataset --data_path FOLDER
"""

from typing import Any

import h5py


class Images:
    """The samples of a file."""

    def __init__(self, path: str) -> None:
        file = h5py.File(path)
        self.images = file["images"]
        self.labels = file["labels"][:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.labels[index]


def open_dataset(split: str, data_path: str) -> Images:
    """Returns the samples of `split`."""
    return Images(f"{data_path}/{split}.h5")
