"""python -m mae.data.resize: sizes, files that are copied, and resuming."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from conftest import ROOT
from mains import call, wait_until
from PIL import Image
from test_decode import png

from mae.data import resize
from mae.files import locks


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


def test_resize_scales_large_images_only(folder, tmp_path):
    copy = tmp_path / "copy"
    command = [sys.executable, "-m", "mae.data.resize", folder, copy, "--short_side", "100"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "5 images: 3 scaled, 2 copied as they are" in output.stdout
    sizes = {str(f.relative_to(copy)): Image.open(f).size for f in copy.rglob("*.*") if f.suffix != ".npy"}
    assert sizes == {"train/cat/a.jpg": (150, 100), "train/cat/b.PNG": (100, 150), "train/dog/gray.jpg": (150, 100),
                     "train/dog/small.jpg": (80, 60)}  # fmt: skip
    for name in ("train/dog/small.jpg", "train/dog/deep.npy"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    assert Image.open(copy / "train/cat/a.jpg").getexif()[0x0112] == 6
    assert Image.open(copy / "train/dog/gray.jpg").mode == "L"
    expected = Image.open(folder / "train/cat/b.PNG").resize((100, 150), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(Image.open(copy / "train/cat/b.PNG")), np.asarray(expected))


def test_a_scaled_jpeg_has_the_given_quality_and_sides_of_the_given_size_are_copied(tmp_path):
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, size=(200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images/a.jpg", quality=100)
    Image.fromarray(noise[:100]).save(tmp_path / "images/b.jpg", quality=100)
    expected = Image.open(tmp_path / "images/a.jpg").resize((100, 100), Image.Resampling.BICUBIC)
    for quality in (40, 90):
        copy = tmp_path / str(quality)
        call(resize, tmp_path / "images", copy, "--short_side", 100, "--quality", quality)
        expected.save(tmp_path / "expected.jpg", quality=quality)
        assert (copy / "a.jpg").read_bytes() == (tmp_path / "expected.jpg").read_bytes()
        assert (copy / "b.jpg").read_bytes() == (tmp_path / "images/b.jpg").read_bytes()


def test_resize_resumes_after_an_interruption(folder, tmp_path, caplog):
    """Two commands do not write one copy: they would remove each other's temporary files."""
    caplog.set_level("INFO")
    copy = tmp_path / "copy"
    with locks.locked(copy), pytest.raises(ValueError, match="copy is being written"):
        call(resize, folder, copy, "--short_side", 100)
    call(resize, folder, copy, "--short_side", 100)
    kept = (copy / "train/cat/a.jpg").stat()
    (copy / "train/cat/b.PNG").unlink()
    call(resize, folder, copy, "--short_side", 100)
    assert "5 images: 4 there before, 1 scaled" in caplog.text
    assert "existing files are kept" in caplog.text
    assert (copy / "train/cat/a.jpg").stat().st_mtime_ns == kept.st_mtime_ns
    assert not list(copy.rglob("*.tmp"))


def test_worker_processes_end_with_a_killed_command(folder, tmp_path):
    """They would write to the copy, beside the same command."""
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from mae.cli import entry_point
from mae.data import resize

def sleep(*_, **__):
    Path({str(pid)!r}).write_text(str(os.getpid()))
    time.sleep(60)

resize.resize = sleep
if __name__ == "__main__":
    resize.main(entry_point.parse_command(resize.get_args_parser())[0])
""")
    process = subprocess.Popen([sys.executable, script, folder, tmp_path / "copy", "--num_workers", "1"])
    wait_until(lambda: pid.exists() and pid.read_text(), process)
    process.kill()
    process.wait()
    wait_until(lambda: not Path(f"/proc/{pid.read_text()}").exists(), seconds=20)


def test_files_that_scaling_would_change_are_copied(tmp_path, caplog):
    """Palettes, color keys, 16 bits, frames, masks, lossless WebP, TIFF; circular links are followed once."""
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
    (folder / "loop").symlink_to(folder)
    caplog.set_level("INFO")
    call(resize, folder, tmp_path / "copy", "--short_side", 100)
    assert "10 images: 9 copied as they are, 1 scaled" in caplog.text
    for file in folder.glob("[!p.]*.*"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert Image.open(tmp_path / "copy/plain.png").getexif()[0x0112] == 6


@pytest.mark.parametrize("name", ["annotations/training/a.png", "Train/Rural/masks_png/a.png"])
def test_folders_of_masks_are_refused(tmp_path, name):
    """Interpolation would create values of other classes."""
    file = tmp_path / "set" / name
    file.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((300, 300), dtype=np.uint8)).save(file)
    for root in (tmp_path / "set", file.parent if "masks" in name else file.parents[1]):
        with pytest.raises(ValueError, match=r"masks .*a.png is in a folder of masks"):
            call(resize, root, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_invalid_arguments_are_one_line_errors(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    whole = (folder / "train/cat/a.jpg").read_bytes()
    (folder / "train/cat/bad.jpg").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="1 files can't be read; the copy does not contain them"):
        call(resize, folder, tmp_path / "copy")
    assert "train/cat/bad.jpg: image file is truncated" in caplog.text
    assert not (tmp_path / "copy/train/cat/bad.jpg").exists()
    assert not list((tmp_path / "copy").rglob("*.tmp"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    for arguments, message in (
        ((tmp_path / "nowhere", tmp_path / "copy"), "No such file or directory"),
        ((folder, folder / "copy"), "give a folder outside of it"),
        ((tmp_path / "copy/train/dog/../../../nothing", tmp_path / "other"), "No such file or directory"),
        ((tmp_path / "empty", tmp_path / "other"), "there are no images in"),
        ((folder, tmp_path / "file"), r"Not a directory|File exists"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            call(resize, *arguments)
