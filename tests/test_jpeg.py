"""--fast_jpeg: decoded pixels equal Pillow's, and crops almost do, for every kind of JPEG file."""

import sys
import time

import numpy as np
import pytest
import skimage.data
import torch
from augmentations import eval_transform, finetune_transform, pretrain_transform, probe_transform
from PIL import Image
from sklearn.datasets import load_sample_images
from test_decode import saved

from mae.data import jpeg, transforms
from mae.data.decode import decode
from mae.data.generators import seed_generators
from mae.data.pixels import MAX_PIXELS, BadImage, to_tensor


def photographs() -> list[Image.Image]:
    arrays = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket(),
              *load_sample_images().images]  # fmt: skip
    return [Image.fromarray(array).convert("RGB").resize((500, 375)) for array in arrays]


def encoded(picture: Image.Image, **options) -> bytes:
    return saved(picture, "JPEG", **({"quality": 95} | options))


def pixels(picture) -> np.ndarray:
    return to_tensor(picture).numpy()


@pytest.fixture(params=["torchcodec", "torchvision"])
def decoder(request, monkeypatch):
    """torchvision decodes if torchcodec is not installed."""
    if request.param == "torchvision":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    jpeg.decoder.cache_clear()
    yield
    jpeg.decoder.cache_clear()


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("options", [
    {}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}, {"restart_marker_blocks": 5},
], ids=str)  # fmt: skip
def test_decoding_equals_pillows(options):
    for picture in photographs():
        data = encoded(picture, **options)
        assert jpeg.decode_rgb(data, MAX_PIXELS) is not None  # Pillow would only be slower
        fast = decode(data, 3, fast_jpeg=True)
        assert np.array_equal(fast.numpy(), pixels(decode(data, 3)))


def with_scans(data: bytes, number: int, before: bytes = b"") -> bytes:
    """Repeats the last scan of a progressive file until it has `number` scans."""
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (before + last) * (number - data.count(b"\xff\xda")) + data[-2:]


@pytest.mark.parametrize("before", [b"", b"\0\0", b"\xff\xff", b"\xff\xd0", b"\xff\xfe\0\2"], ids=bytes.hex)
@pytest.mark.parametrize("fast_jpeg", [False, True])
def test_files_with_very_many_scans_are_refused_before_they_are_decoded(fast_jpeg, before):
    """Each scan costs a pass over all pixels, and takes a few bytes."""
    data = encoded(Image.new("RGB", (2000, 1000)), progressive=True)
    start = time.perf_counter()
    with pytest.raises(BadImage, match="50 scans"):
        decode(with_scans(data, 2000, before), 3, fast_jpeg=fast_jpeg)
    assert time.perf_counter() - start < 1
    assert np.array_equal(pixels(decode(with_scans(data, 50, before), 3, fast_jpeg=fast_jpeg)), pixels(decode(data, 3)))


@pytest.mark.parametrize("fast_jpeg", [False, True])
def test_bytes_of_comments_and_after_the_end_are_no_scans(fast_jpeg):
    marks = b"\xff\xda\0\2" * 1000
    picture = photographs()[0]
    data = encoded(picture, comment=marks, progressive=True)
    assert np.array_equal(pixels(decode(data, 3, fast_jpeg=fast_jpeg)), pixels(decode(encoded(picture), 3)))
    assert np.array_equal(pixels(decode(data + marks, 3, fast_jpeg=fast_jpeg)), pixels(decode(data, 3)))


def test_unsupported_files_are_left_to_pillow():
    picture = photographs()[0].crop((0, 0, 64, 48))
    whole = encoded(picture)
    for data in (encoded(picture.convert("L")), encoded(picture.convert("CMYK")), saved(picture, "PNG")):
        assert jpeg.decode_rgb(data, 10**6) is None
        assert np.array_equal(pixels(decode(data, 3, fast_jpeg=True)), pixels(decode(data, 3)))
    assert jpeg.decode_rgb(whole, 64 * 48) is not None
    assert jpeg.decode_rgb(whole, 64 * 48 - 1) is None
    assert isinstance(decode(whole, 1, fast_jpeg=True), Image.Image)


def test_damaged_files_decode_as_in_pillow():
    whole = encoded(photographs()[2].crop((0, 0, 64, 48)))
    draw = np.random.default_rng(0)
    for number in range(300):
        data = bytearray(whole[: int(draw.integers(len(whole)))] if number % 3 == 0 else whole)
        for place in draw.integers(len(data), size=number % 4) if len(data) else ():
            data[place] = draw.integers(256)
        results = []
        for fast in (False, True):
            try:
                results.append(pixels(decode(bytes(data), 3, fast_jpeg=fast)))
            except BadImage:
                results.append(None)
        assert (results[0] is None) == (results[1] is None)
        assert results[0] is None or np.array_equal(results[0], results[1])


IMAGENET = transforms.IMAGENET_MEAN


@pytest.mark.parametrize(("transform", "count"), [
    (pretrain_transform(224), 24), (pretrain_transform(48, vflip=0.5, rotate90=True), 12),
    (finetune_transform((32, 48), IMAGENET, crop_scale=(0.01, 0.1), hflip=0), 24),
    (probe_transform((96, 32), crop="none"), 6), (probe_transform(224), 24),
    (eval_transform(224), 6), (eval_transform(64, crop_pct=1), 6), (eval_transform((48, 200)), 6),
])  # fmt: skip
def test_transforms_give_almost_the_pixels_of_pillow(transform, count):
    """Values differ by at most 2 of 255, and rarely."""
    files = [encoded(picture) for picture in photographs()]
    differences = []
    for number in range(count):
        made = []
        for fast in (True, False):
            seed_generators(number)
            made.append(transform(decode(files[number % len(files)], 3, fast_jpeg=fast)).double())
        differences.append((made[0] - made[1]).abs().flatten())
    values = torch.cat(differences)
    assert values.max() <= 2
    assert values.mean() < 0.01


def test_small_pictures_have_the_pixels_of_pillow():
    """Up to 64 pixels per side, before and after scaling; also if they are enlarged further."""
    picture = photographs()[0].crop((100, 100, 164, 148))
    for data in (encoded(picture), saved(picture, "PNG")):
        for size in (32, (20, 60), 224):
            slow, fast = (eval_transform(size, crop_pct=1)(decode(data, 3, fast_jpeg=fast)) for fast in (False, True))
            assert torch.equal(slow, fast)
