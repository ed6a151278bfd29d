"""Unpacks Debian's package dataset-fashion-mnist.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist/unpack.py

runs/study/data has the files as torchvision reads them, and runs/study/images has image files.
"""

import argparse
import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from torchvision.datasets import FashionMNIST

from benchmarks.scripts import ROOT
from demo.unpack_data import write_split
from mae.files import atomic

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
OUT = ROOT / "runs/study"


def unpack(archives: Path, out: Path) -> None:
    """Writes out/data/FashionMNIST/raw/FILE and out/images/{train,val}/CLASS/NNNNN.png."""
    raw = out / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in archives.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    with atomic.replacing(out / "images") as written:
        for split in ("train", "val"):
            dataset = FashionMNIST(out / "data", train=split == "train")
            write_split(written / split, dataset.classes, dataset)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    get_args_parser().parse_args()
    unpack(DEBIAN, OUT)
