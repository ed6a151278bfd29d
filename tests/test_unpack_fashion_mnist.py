"""benchmarks/fashion_mnist/unpack.py: Debian's package as torchvision reads it, and as image files."""

import gzip

import numpy as np
from PIL import Image
from test_libraries import write_idx
from torchvision.datasets import FashionMNIST

from benchmarks.fashion_mnist.unpack import unpack


def test_the_data_are_unpacked_for_torchvision_and_as_images(tmp_path):
    debian = tmp_path / "debian"
    debian.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array([4, 0, 9], dtype=np.uint8))):
            write_idx(tmp_path / "idx", array)
            (debian / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress((tmp_path / "idx").read_bytes()))
    unpack(debian, tmp_path)
    train = FashionMNIST(str(tmp_path / "data"), train=True)
    assert np.array_equal(train.data.numpy(), pixels)
    assert train.targets.tolist() == [4, 0, 9]
    for split in ("train", "val"):
        for number, name in enumerate(("coat", "t-shirt_top", "ankle_boot")):
            file = tmp_path / "images" / split / name / f"{number:05}.png"
            assert np.array_equal(np.asarray(Image.open(file)), pixels[number])
