"""Unpacks the embedded dataset to class folders of PNG files.

python demo/unpack_data.py --out demo/data/fashion_mnist
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import numpy as np
from PIL import Image

from mae.files import atomic

ARCHIVE = Path(__file__).parent / "data" / "fashion_mnist_12k.npz"


def unpack(out: Path) -> None:
    """Writes out/{train,val}/CLASS/NNNNN.png: 10,000 and 2,000 gray images of 28 x 28 pixels in 10 classes.

    Each file is complete or absent, also after the command was killed.
    """
    archive = np.load(ARCHIVE, allow_pickle=False)
    out.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out, sync=False) as written:
        for split in ("train", "val"):
            images = map(Image.fromarray, archive[f"{split}_images"])
            write_split(written / split, archive["classes"], zip(images, archive[f"{split}_labels"], strict=True))


def write_split(out: Path, classes: Iterable[str], labeled: Iterable[tuple[Image.Image, int]]) -> None:
    """Writes out/CLASS/NNNNN.png for images with the numbers of their classes."""
    folders = [out / folder_of(name) for name in classes]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, (image, label) in enumerate(labeled):
        image.save(folders[label] / f"{number:05}.png")
        if (number + 1) % 2000 == 0:
            print(f"{number + 1:,} images of {out.name}/", flush=True)


def folder_of(class_name: str) -> str:
    return class_name.lower().replace("/", "_").replace(" ", "_")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(
        description="Unpacks the embedded Fashion-MNIST images to class folders of PNG files."
    )
    parser.add_argument("--out", type=Path, default=ARCHIVE.parent / "fashion_mnist", help="folder to write")
    return parser


if __name__ == "__main__":
    parser = get_args_parser()
    out = parser.parse_args().out
    try:
        unpack(out)
    except OSError as error:
        parser.exit(
            1,
            f"{parser.prog}: error: --out {out} can't be written to ({error.strerror or error}); give another folder\n",
        )
