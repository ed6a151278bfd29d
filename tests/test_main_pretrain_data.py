"""main_pretrain.py on every kind of dataset, and on damaged datasets."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import datasets as hugging_face
import numpy as np
import pytest
import tifffile
import torch
import webdataset
from mains import Stopped, assert_same_run, in_processes, lines, stop_after, stop_and_resume
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_libraries import write_idx

from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.data import jpeg


@pytest.fixture(scope="module")
def smooth():
    """400 smooth pictures of 24 x 24 pixels and 13 channels, three of them repeated, uint8."""
    coarse = torch.rand(400, 3, 2, 2, generator=torch.Generator().manual_seed(0))[:, [0, 1, 2] * 4 + [0]]
    fine = torch.nn.functional.interpolate(coarse, size=24, mode="bilinear")
    return (255 * fine).byte().permute(0, 2, 3, 1).numpy()


def write_pngs(folder, pixels):
    folder.mkdir(parents=True)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
    return folder


def flat_folder(root, smooth):
    return {"data_path": write_pngs(root / "flat", smooth[..., :3])}


def tiffs_of_13_channels(root, smooth):
    (root / "tiff").mkdir()
    for number, picture in enumerate(smooth):
        tifffile.imwrite(root / "tiff" / f"{number}.tif", picture.astype(np.uint16) * 257, photometric="minisblack",
                         planarconfig="contig")  # fmt: skip
    return {"data_path": root / "tiff", "in_chans": 13}


def torchvisions(root, smooth):
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", smooth[..., 0]), ("labels-idx1", np.zeros(400, dtype=np.uint8))):
            write_idx(root / f"FashionMNIST/raw/{part}-{kind}-ubyte", array)
    return {"data_path": root, "dataset": "FashionMNIST", "in_chans": 1}


def hugging_faces(root, smooth):
    folder = write_pngs(root / "flat", smooth[..., :3])
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]}
    features = hugging_face.Features({"image": hugging_face.Image()})
    (root / "hf").mkdir()
    hugging_face.Dataset.from_dict(rows, features=features).to_parquet(root / "hf" / "train.parquet")
    return {"dataset": f"hf:{root / 'hf'}"}


def webdatasets(root, smooth):
    folder = write_pngs(root / "flat", smooth[..., :3])
    with webdataset.ShardWriter(str(root / "%03d.tar"), maxcount=len(smooth) // 5, verbose=0) as writer:
        for path in sorted(folder.iterdir()):
            writer.write({"__key__": path.stem, "png": path.read_bytes()})
    return {"dataset": f"wds:{root}/{{000..004}}.tar"}


KINDS = [flat_folder, tiffs_of_13_channels, torchvisions, hugging_faces, webdatasets]


def step_losses(out):
    return [event.value for event in EventAccumulator(str(out)).Reload().Scalars("train_loss")]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_on_every_kind_of_data_set(pretrain, smooth, tmp_path, kind):
    out = pretrain(**kind(tmp_path, smooth), epochs=1, warmup_epochs=0, lr=0.003, num_workers=1, vis_every=1)
    losses = step_losses(out)
    assert len(losses) == 100
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    assert len(EventAccumulator(str(out)).Reload().Images("reconstruction")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_trains_like_its_folder(pretrain, pictures, tmp_path, monkeypatch, kind):
    """Also if the run is interrupted and resumed."""
    packed = shutil.make_archive(str(tmp_path / "set"), kind, pictures)
    parts = stop_and_resume(monkeypatch, pretrain, 3, data_path=packed)
    assert_same_run(pretrain("folder"), parts)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_repeated_sampling_repeats_every_image(pretrain, smooth, tmp_path, streamed):
    data = (webdatasets if streamed else flat_folder)(tmp_path, smooth[:80])
    out = pretrain(**data, epochs=1, batch_size=32, repeated_sampling=4)
    assert len(step_losses(out)) == 80 * 4 / 32


@pytest.mark.slow
def test_fast_jpeg_gives_a_bit_equal_run_on_small_pictures(pretrain, monkeypatch):
    """Also if the run is interrupted and resumed, with repeated samples."""
    decoded, decode_rgb = [], jpeg.decode_rgb
    monkeypatch.setattr(jpeg, "decode_rgb", lambda *given: decoded.append(decode_rgb(*given)) or decoded[-1])
    fast = pretrain("fast", fast_jpeg=True)
    # the color JPEG files among 24, in two epochs, and for the share of the variance that is explained
    assert sum(picture is not None for picture in decoded) == 3 * 13
    assert_same_run(fast, pretrain("slow"))
    assert len(decoded) == 3 * 24
    parts = stop_and_resume(monkeypatch, pretrain, 5, repeated_sampling=2, fast_jpeg=True)
    assert_same_run(parts, pretrain("repeated", repeated_sampling=2))


def test_a_run_that_scaled_otherwise_with_fast_jpeg_does_not_resume(pretrain):
    """A version before df1688b4 scaled with numba, and recorded no `fast_jpeg_resize`."""
    file = pretrain("run", fast_jpeg=True, epochs=1, warmup_epochs=0) / "checkpoint-0.pth"
    pretrain("same", resume=file, fast_jpeg=True, epochs=1, warmup_epochs=0)
    state = checkpoint.read(file)
    del state["args"]["fast_jpeg_resize"]
    checkpoint.write(state, file)
    with pytest.raises(CheckpointError, match="df1688b4"):
        pretrain("resumed", resume=file, fast_jpeg=True, epochs=1, warmup_epochs=0)


@pytest.mark.parametrize(("num_bad", "fails"), [(4, False), (5, True)])
def test_the_limit_of_bad_images_applies_to_all_processes_together(tmp_path, num_bad, fails):
    """A tenth of 40 images may be bad. Neither of two processes reads more than four. Each is logged once."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"images/{number:02}.png")
    for number in range(num_bad):
        (tmp_path / f"images/{number:02}.png").write_bytes(b"")
    flags = (tmp_path / "images", tmp_path / "out", "--batch_size", 4, "--epochs", 3, "--on_bad_image", "skip")
    if fails:
        with pytest.raises(subprocess.CalledProcessError) as raised:
            in_processes(2, *flags)
        assert "5 of the 40 images" in raised.value.output
    else:
        output = in_processes(2, *flags)
        assert [output.count(f"{number:02}.png: the file is empty") for number in range(4)] == [1] * 4
        assert [line["bad_images"] for line in lines(tmp_path / "out")] == [4] * 3


def test_an_epoch_resumes_without_an_image_that_has_disappeared(pretrain, pictures, tmp_path, monkeypatch):
    """It is an image that can't be read: the run equals one in which it was damaged from the beginning."""
    files = sorted(path.relative_to(pictures) for path in pictures.rglob("*.*"))
    last = files[np.random.default_rng([0, 0]).permutation(24)[-1]]  # of the first epoch
    damaged, lost = (shutil.copytree(pictures, tmp_path / name) for name in ("damaged", "lost"))
    (damaged / last).write_bytes(b"")
    flags = {"data_path": lost}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 3)
        pretrain("parts", **flags, save_minutes=0)
    (lost / last).unlink()
    with pytest.raises(CheckpointError, match=r"24 .* 23"):
        pretrain("parts", **flags, resume="auto")
    parts = pretrain("parts", **flags, resume="auto", on_bad_image="skip")
    assert_same_run(parts, pretrain("whole", data_path=damaged, on_bad_image="skip"))
    assert lines(parts)[0]["bad_images"] == 1


@pytest.mark.slow
def test_a_stream_in_two_processes_resumes(pretrain, smooth, tmp_path):
    shards = ["--dataset", webdatasets(tmp_path, smooth)["dataset"], "--batch_size", 10]
    in_processes(2, tmp_path, tmp_path / "out", *shards, "--epochs", 1)
    output = in_processes(2, tmp_path, tmp_path / "out", *shards, "--epochs", 2, "--resume", "auto")
    assert "streamed: resuming is approximate" in output
    assert [line["epoch"] for line in lines(tmp_path / "out")] == [0, 1]


@pytest.mark.parametrize(("flags", "is_weak"), [
    ({"mean": 0, "std": 1}, True), ({"mean": 0, "std": 1e-4}, False), ({"value_range": "-0.0003 0.0003"}, False),
    ({"mean": 0, "std": 1, "no_norm_pix_loss": True}, False),
])  # fmt: skip
def test_targets_of_weak_signals_are_named(pretrain, capsys, flags, is_weak):
    """The published constant 1e-6 in the variance of a patch hides images with a standard deviation of 1e-4."""
    images = 1e-4 * np.random.default_rng(0).standard_normal((8, 16, 16)).astype(np.float32)
    flags = {"norm_pix_loss": True, "in_chans": 1, "crop": "none", "epochs": 1, "blr": 0, "warmup_epochs": 0} | flags
    pretrain(**flags, of_main={"source": lambda split, path: [(image, 0) for image in images]})
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: `norm_pix_loss`")]
    assert len(warnings) == is_weak
    assert all("value_range=" in line and "`std`" in line for line in warnings)


def test_images_of_which_most_patches_are_flat_are_no_weak_signals(pretrain, smooth, tmp_path, capsys):
    flat = np.full((8, 16, 16, 3), 255, np.uint8)
    flat[:, :4, :4] = smooth[:8, :4, :4, :3]  # one of 16 patches
    pretrain(data_path=write_pngs(tmp_path / "flat", flat), norm_pix_loss=True, crop="none", epochs=1)
    assert "norm_pix_loss" not in capsys.readouterr().out


RENAMED = "train/cat/01.jpg"


def interrupted(monkeypatch, run, calls=3, **flags):
    """Interrupts a run within an epoch; it has saved its state after each of `calls` updates."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", calls)
        run("parts", **flags, save_minutes=0)


def test_an_epoch_is_not_resumed_with_renamed_images(pretrain, pictures, tmp_path, monkeypatch, capsys):
    """As many files with other names are other images. A moved folder has the same, and so has the file of a run that
    recorded no names. After the last update of an epoch, the images may change, with a warning."""
    here, moved = (shutil.copytree(pictures, tmp_path / name) for name in ("here", "moved"))
    interrupted(monkeypatch, pretrain, data_path=here)
    (here / RENAMED).rename(here / "train/cat/zz.jpg")
    for skips in ({}, {"on_bad_image": "skip"}):
        with pytest.raises(CheckpointError, match="names"):
            pretrain("parts", data_path=here, resume="auto", **skips)
    file = tmp_path / "parts/checkpoint-last.pth"
    state = checkpoint.read(file)
    earlier = state | {"progress": {name: value for name, value in state["progress"].items() if name != "images"}}
    checkpoint.write(earlier, tmp_path / "earlier.pth")
    assert len(lines(pretrain("earlier", data_path=here, resume=tmp_path / "earlier.pth"))) == 2
    whole = pretrain("whole", data_path=pictures)
    assert_same_run(pretrain("parts", data_path=moved, resume="auto"), whole)
    capsys.readouterr()
    pretrain("next", data_path=here, resume=whole / "checkpoint-0.pth")
    assert "the names of the training images have changed" in capsys.readouterr().out


def packed(root):
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, path.relative_to(root))
    return {"data_path": root.with_suffix(".zip")}


def in_a_list(root):
    """With absolute paths."""
    root.with_suffix(".csv").write_text("\n".join(["path", *map(str, sorted(root.rglob("*.*")))]))
    return {"train_list": root.with_suffix(".csv")}


class Named:
    """A dataset of the user's code, with names of its items."""

    def __init__(self, split, data_path):
        self.files = sorted(Path(data_path).rglob("*.*"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.files[index], None

    def name(self, index):
        return str(self.files[index])


def of_a_dataset(root):
    return {"dataset": "py:test_main_pretrain_data:Named"}


@pytest.mark.parametrize("kind", [packed, in_a_list, of_a_dataset])
def test_names_of_all_kinds_of_datasets_are_compared(kind, pretrain, pictures, tmp_path, monkeypatch):
    here, moved = (shutil.copytree(pictures, tmp_path / name) for name in ("here", "moved"))
    interrupted(monkeypatch, pretrain, **{"data_path": here} | kind(here))
    (here / RENAMED).rename(here / "train/cat/zz.jpg")
    with pytest.raises(CheckpointError, match="names"):
        pretrain("parts", **{"data_path": here} | kind(here), resume="auto")
    pretrain("parts", **{"data_path": moved} | kind(moved), resume="auto")
