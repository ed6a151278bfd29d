"""Held-out images that equal training images: one count, in each script and in the check of the images."""

import shutil
import zipfile

import pytest
from mains import call, open_source

import main_compare
import main_finetune
import main_knn
import main_linprobe
from mae.data import equal_images
from mae.recommend import check

COUNT = "3 of 26 held-out images equal training images, 1 with another label"
MACHINE = {"device": "cpu", "num_workers": 0}


@pytest.fixture
def leaked(labelled, tmp_path):
    """`labelled` with copies of three training images in val/, one of them in the folder of another class."""
    images = shutil.copytree(labelled, tmp_path / "leaked")
    for number in range(3):
        kind = "kind5" if number == 2 else f"kind{number}"
        shutil.copy(images / f"train/kind{number}/{number:02}.png", images / f"val/{kind}/copy{number}.png")
    return images


def test_each_script_counts_the_same_images(leaked, classify, tmp_path, capsys):
    out = classify(main_finetune, "tuned", data_path=leaked, epochs=1)
    assert COUNT in capsys.readouterr().out
    file = {"finetune": out / "checkpoint-0.pth"}
    for main, flags in (
        (main_knn, {**file, "k": 5}), (main_linprobe, {**file, "epochs": 1, "batch_size": 16}),
        (main_finetune, {"resume": file["finetune"], "eval": True}),
    ):  # fmt: skip
        classify(main, main.__name__, data_path=leaked, **flags)
        assert COUNT in capsys.readouterr().out, main.__name__


@pytest.mark.slow
def test_a_comparison_counts_them(leaked, tmp_path, capsys):
    words = ["--encoders", "pixels", "--protocols", "knn", "--labels", "12", "--draws", "1", "--output_dir", tmp_path]
    call(main_compare, *words, data_path=leaked, input_size=16, **MACHINE)
    assert COUNT in capsys.readouterr().out


def test_the_check_counts_them_in_both_splits(leaked, labelled, capsys):
    for path, count in ((leaked, 1), (labelled, 0), (leaked / "train", 0)):
        for split in ("train", "val") if (path / "val").exists() else ("train",):
            call(check, path, split=split, num_workers=0)
            assert capsys.readouterr().out.count(COUNT) == count, (path, split)


def test_the_check_counts_equal_images_of_one_split_with_different_labels(labelled, tmp_path, capsys):
    images = shutil.copytree(labelled / "train", tmp_path / "images")
    for kind in ("kind0", "kind3"):
        shutil.copy(images / "kind0/00.png", images / kind / "copy.png")
    call(check, images, num_workers=0)
    assert "duplicates  2 images, 1 with another label\n" in capsys.readouterr().out


def test_an_evaluation_needs_no_training_images(leaked, classify, capsys):
    out = classify(main_finetune, "tuned", data_path=leaked, epochs=1)
    shutil.rmtree(leaked / "train")
    capsys.readouterr()
    classify(main_finetune, resume=out / "checkpoint-0.pth", eval=True, data_path=leaked)
    assert "Acc@1" in (printed := capsys.readouterr().out) and "equal" not in printed


def test_images_of_an_archive_equal_those_of_a_list(leaked, tmp_path):
    """Its files are compressed."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in leaked.rglob("*.png"):
            archive.write(file, file.relative_to(leaked))
    rows = [f"{file},{file.parent.name}" for file in sorted(leaked.glob("val/*/*"))]
    (tmp_path / "val.csv").write_text("\n".join(["path,label", *rows]))
    train = open_source("train", str(tmp_path / "images.zip"))
    assert equal_images.in_files(train, open_source("val", file_list=str(tmp_path / "val.csv"))).startswith(COUNT)


def test_files_of_other_sizes_are_not_read(leaked, monkeypatch):
    for file in leaked.glob("val/*/*"):
        file.write_bytes(file.read_bytes().ljust(2**13, b"x"))
    train, val = (open_source(split, str(leaked)) for split in ("train", "val"))
    monkeypatch.delattr(type(train.files), "read")
    assert equal_images.in_files(train, val) == ""


def test_a_comparison_that_takes_too_long_ends(leaked, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(equal_images, "SECONDS", 0)
    train, val = (open_source(split, str(leaked)) for split in ("train", "val"))
    assert equal_images.in_files(train, val) == "" and "not compared" in caplog.text
