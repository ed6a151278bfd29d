"""Large pictures: a quarter of their sides is read, with the crops of the whole picture, in little memory."""

import io
import subprocess
import sys

import augmentations
import numpy as np
import pytest
import tifffile
import torch
from mains import open_source
from PIL import Image
from torchvision import tv_tensors

from mae.data import image_cache, large, transforms
from mae.data.decode import decode, decode_item
from mae.data.item import Item
from mae.data.pixels import size_of, to_tensor
from mae.data.samples import Samples

HEIGHT, WIDTH = 403, 530  # no multiples of 4
RAMP = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)).astype(np.float64) / (HEIGHT + WIDTH)
COLOR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
BYTES = (255 * COLOR).astype(np.uint8)


def saved(picture, kind, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig")
    return buffer.getvalue()


def npy(pixels) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES = {
    "PNG": (saved(BYTES, "PNG"), 3),
    "turned PNG": (saved(BYTES, "PNG", exif=EXIF), 3),
    "indexed PNG": (saved(Image.fromarray(BYTES).quantize(64), "PNG"), 3),
    "transparent PNG": (saved(np.dstack([BYTES, BYTES[:, :, :1]]), "PNG"), 3),
    "16-bit PNG": (saved((65535 * RAMP).astype(np.uint16), "PNG"), 1),
    "bits": (saved(Image.fromarray(BYTES[:, :, 0] > 128), "PNG"), 1),
    "JPEG": (saved(BYTES, "JPEG", quality=95), 3),
    "turned JPEG": (saved(BYTES, "JPEG", quality=95, exif=EXIF), 3),
    "BMP": (saved(BYTES, "BMP"), 3),
    "TIFF of 5 channels": (tiff((65535 * np.dstack([COLOR, COLOR])[:, :, :5]).astype(np.uint16)), 5),
    "npy": (npy(COLOR.astype(np.float32)), 3),
}


@pytest.fixture
def are_large(monkeypatch):
    monkeypatch.setattr(large, "PIXELS", 1000)
    monkeypatch.setattr(large, "SHORTER", 100)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fast_jpeg", [False, True])
def test_large_pictures_have_a_quarter_of_their_sides_and_the_same_crops(name, fast_jpeg, are_large):
    data, in_chans = FILES[name]
    options = {"upright": True, "fast_jpeg": fast_jpeg}
    whole = decode(data, in_chans, **options)
    reduced = decode(data, in_chans, reduces=True, **options)
    assert size_of(reduced) == tuple(-(-side // 4) for side in size_of(whole))
    crops = []
    for picture in (whole, reduced):
        torch.manual_seed(5)
        crop = augmentations.pretrain_transform(24)(picture)
        crops.append(transforms.to_unit_range(to_tensor(crop)))
    assert (crops[0] - crops[1]).abs().mean() < 0.015


def test_pictures_with_masks_or_maps_keep_their_size(are_large):
    mask = tv_tensors.Mask(torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8))
    data = FILES["PNG"][0]
    assert size_of(decode_item(Item(data, label=mask), 3).image) == (HEIGHT, WIDTH)
    assert size_of(decode_item(Item(data, inputs={"map": tv_tensors.Image(mask[None])}), 3).image) == (HEIGHT, WIDTH)
    assert size_of(decode_item(Item(data), 3).image) == (-(-HEIGHT // 4), -(-WIDTH // 4))


def test_crops_of_cached_large_pictures_are_those_without_a_cache(tmp_path, are_large):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(FILES["PNG"][0])
    source = open_source("train", str(folder))
    cache = image_cache.cached(Samples(source, transforms.eval_transform(24), in_chans=3, seed=0), 0)
    crops = [
        Samples(each, transforms.pretrain_transform(24), in_chans=3, seed=0)[3, 0].item.image
        for each in (source, cache)
    ]
    assert torch.equal(*crops)


@pytest.mark.slow
def test_two_workers_read_large_pictures_in_little_memory(tmp_path):
    """A PNG and a JPEG just below the limit of pixels. In Pillow, either has 676 MB."""
    folder = tmp_path / "images"
    folder.mkdir()
    side = 13_000
    columns = np.arange(side) // 51
    picture = Image.fromarray(np.add.outer(columns // 2, columns // 2).astype(np.uint8)).convert("RGB")
    picture.save(folder / "a.png", compress_level=1)
    picture.save(folder / "b.jpg")
    del picture
    check = [sys.executable, "-m", "mae.data", str(folder), "--num_workers", "2"]  # fails if one is not read
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    output = subprocess.run([sys.executable, "-c", watch, *check], check=True, capture_output=True, text=True).stdout
    assert f"{side} x {side}" in output
    peak = 1024 * int(output.split()[-1])  # of the largest process
    assert peak < 1.5e9
