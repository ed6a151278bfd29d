"""DICOM: files below train/ and val/, in physical units such as Hounsfield units, without labels (pip install pydicom).

Float values are not scaled: python -m mae.data --recipe writes their range, mean and std.

python main_pretrain.py --dataset py:examples.data_dicom:open_dataset --data_path FOLDER --in_chans 1
"""

from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.pixels import apply_rescale


class Images:
    """The samples of a folder."""

    def __init__(self, path: str) -> None:
        self.files = sorted(Path(path).rglob("*.dcm"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, None]:
        file = dcmread(self.files[index])
        pixels = file.pixel_array.astype(int)
        if file.PhotometricInterpretation == "MONOCHROME1":  # its highest value is black, and that of others is white
            pixels = (-1 if file.PixelRepresentation else 2**file.BitsStored - 1) - pixels
        return apply_rescale(pixels, file).astype(np.float32), None

    def name(self, index: int) -> str:
        """Returns the path of a file, for messages."""
        return str(self.files[index])


def open_dataset(split: str, data_path: str) -> Images:
    """Returns the samples of `split`."""
    return Images(f"{data_path}/{split}")
