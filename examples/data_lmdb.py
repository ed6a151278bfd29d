"""LMDB: environments train/ and val/; key: digits of the index, value: class and image file (pip install lmdb).

A value is the class as 8 bytes (int64, little-endian), followed by the bytes of an image file.

python main_pretrain.py --dataset py:examples.data_lmdb:open_dataset --data_path FOLDER
"""

from typing import Any

import lmdb


class Images:
    """The samples of an environment."""

    def __init__(self, path: str) -> None:
        self.reader: Any = lmdb.open(path, readonly=True, lock=False, readahead=False).begin()

    def __len__(self) -> int:
        return self.reader.stat()["entries"]

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        value = self.reader.get(str(index).encode())
        return value[8:], int.from_bytes(value[:8], "little", signed=True)


def open_dataset(split: str, data_path: str) -> Images:
    """Returns the samples of `split`."""
    return Images(f"{data_path}/{split}")
