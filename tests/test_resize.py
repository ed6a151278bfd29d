"""examples/resize_folder.py: sizes, files that are copied, and resuming."""

import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from conftest import ROOT
from PIL import Image
from test_decode import png


def run(*argv):
    command = [sys.executable, ROOT / "examples/resize_folder.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for kind in ("cat", "dog"):
        (root / "train" / kind).mkdir(parents=True)
    picture = Image.fromarray(skimage.data.chelsea())  # 451 x 300
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "train/cat/a.jpg", exif=exif)
    picture.rotate(90, expand=True).save(root / "train/cat/b.PNG")
    picture.convert("L").save(root / "train/dog/gray.jpg")
    picture.resize((80, 60)).save(root / "train/dog/small.jpg")
    np.save(root / "train/dog/deep.npy", np.zeros((13, 400, 300), dtype=np.float32))
    (root / "train/dog/readme.txt").write_text("no image")
    return root


def test_large_images_are_scaled_and_a_copy_resumes(folder, tmp_path):
    """A file that can't be read is named, and has no copy."""
    copy = tmp_path / "copy"
    assert run(folder, copy, "--short_side", 100).returncode == 0
    sizes = {str(f.relative_to(copy)): Image.open(f).size for f in copy.rglob("*.*") if f.suffix in (".jpg", ".PNG")}
    assert sizes == {"train/cat/a.jpg": (150, 100), "train/cat/b.PNG": (100, 150), "train/dog/gray.jpg": (150, 100),
                     "train/dog/small.jpg": (80, 60)}  # fmt: skip
    for name in ("train/dog/small.jpg", "train/dog/deep.npy"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    assert Image.open(copy / "train/cat/a.jpg").getexif()[0x0112] == 6
    expected = Image.open(folder / "train/cat/b.PNG").resize((100, 150), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(Image.open(copy / "train/cat/b.PNG")), np.asarray(expected))
    nothing = run(tmp_path / "nothing", copy)
    assert nothing.returncode == 2 and "nothing" in nothing.stderr.splitlines()[-1]
    kept = (copy / "train/cat/a.jpg").stat().st_mtime_ns
    (copy / "train/cat/b.PNG").unlink()
    (folder / "train/cat/bad.jpg").write_bytes((folder / "train/cat/a.jpg").read_bytes()[:3000])
    again = run(folder, copy, "--short_side", 100)
    assert (again.returncode, "bad.jpg: " in again.stderr) == (1, True)
    assert (copy / "train/cat/b.PNG").exists() and not (copy / "train/cat/bad.jpg").exists()
    assert (copy / "train/cat/a.jpg").stat().st_mtime_ns == kept


def test_files_that_scaling_would_change_are_copied(tmp_path):
    """Palettes, color keys, 16 bits, frames, masks, lossless WebP, TIFF."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.fromarray(skimage.data.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "plain.png", exif=exif)
    picture.save(folder / "keyed.png", transparency=(0, 0, 0))
    picture.quantize().save(folder / "palette.png")
    picture.save(folder / "lossless.webp", lossless=True)
    picture.save(folder / "some.tif")
    picture.save(folder / "frames.gif", save_all=True, append_images=[picture])
    Image.fromarray(np.zeros((300, 300), dtype=np.uint16)).save(folder / "deep.png")
    classes = np.repeat(np.arange(60, dtype=np.uint8), 300 * 5).reshape(300, 300)
    Image.fromarray(classes).save(folder / "mask.png")
    Image.fromarray(np.stack([classes, classes, classes % 7], axis=-1)).save(folder / "color_mask.png")
    (folder / "deep_color.png").write_bytes(png(np.zeros((300, 300, 3)), 16, 2))
    (folder / "._hidden.jpg").write_bytes(b"no image")
    assert run(folder, tmp_path / "copy", "--short_side", 100).returncode == 0
    assert min(Image.open(tmp_path / "copy/plain.png").size) == 100
    for file in folder.glob("[!p.]*.*"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert Image.open(tmp_path / "copy/plain.png").getexif()[0x0112] == 6
