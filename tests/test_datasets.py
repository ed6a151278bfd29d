"""Opening datasets, and the command that checks a dataset."""

import pickle
import shutil
import tarfile

import forks
import numpy as np
import pytest
import webdataset
from mains import call, fails, open_source
from PIL import Image
from test_decode import saved

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from mae import parallel
from mae.data.kinds.listing import Listing
from mae.data.pixels import BadImage
from mae.recommend import check as datasets


def test_training_images_are_never_used_for_validation(pictures, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", pictures)
    for path in (str(pictures), archive):
        with pytest.raises(ValueError, match=" val/ "):
            open_source("val", path)
        with pytest.raises(ValueError, match=" test/ "):
            open_source("test", path)
    shutil.copytree(pictures / "train", tmp_path / "only" / "val")
    assert isinstance(open_source("val", str(tmp_path / "only")), Listing)
    with pytest.raises(ValueError, match=" train/ "):
        open_source("train", str(tmp_path / "only"))
    with pytest.raises(ValueError, match=r"`val_list` .*`dataset`"):
        open_source("val", None, "list.txt", "CIFAR10")


def test_splits_are_in_lower_case(pictures, tmp_path):
    folder = tmp_path / "set"
    for name in ("Train", "Val"):
        shutil.copytree(pictures / "train", folder / name)
    for path in (folder, shutil.make_archive(str(folder), "zip", tmp_path, "set")):
        for split in ("train", "val"):
            with pytest.raises(ValueError, match=f"{split.title()}/"):
                open_source(split, str(path))
    (folder / "Val").rename(folder / "Car")  # two classes
    assert open_source("train", str(folder)).classes == ["Car", "Train"]


def test_splits_of_other_names_are_no_classes(pictures, tmp_path, caplog):
    folder = tmp_path / "set"
    for name in ("training", "testing"):
        shutil.copytree(pictures / "train", folder / name)
    (folder / "labels.csv").write_text("")
    found = open_source("train", str(folder))
    assert found.classes == [] and set(found.labels) == {-1}
    assert "testing, training are splits" in caplog.text
    shutil.move(folder / "testing", folder / "test")
    shutil.move(folder / "training", folder / "train")
    assert open_source("train", str(tmp_path)).classes == ["set"]
    assert "has train/ and test/" in caplog.text


def test_rank_0_lists_the_images_for_all(pictures, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("cat/01.jpg\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(pictures / "train/cat/01.jpg", "0.jpg")
    opened = [
        ({"data_path": str(pictures)}, 24), ({"data_path": str(pictures / "train" / "cat")}, 12),
        ({"data_path": str(pictures / "train"), "file_list": str(tmp_path / "list.txt")}, 1),
        ({"data_path": shutil.make_archive(str(tmp_path / "set"), "tar", pictures)}, 24),
        ({"dataset": f"wds:{tmp_path}/shard.tar"}, 1),
    ]  # fmt: skip
    calls = []

    def copied(compute):
        calls.append(compute)
        return pickle.loads(pickle.dumps(compute()))

    for arguments, count in opened:
        own = open_source("train", **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "from_rank_0", copied)
            other = open_source("train", **arguments)
        assert len(other) == len(own) == count
        if "dataset" not in arguments:
            assert [other[index] for index in range(count)] == [own[index] for index in range(count)]
    assert len(calls) == len(opened)


def test_the_check_reports_good_images(pictures, tmp_path):
    text = forks.run("mae/data/__main__.py", [pictures, "--num_workers", 1], tmp_path / "output")
    output = dict(line.split(maxsplit=1) for line in text.splitlines()[1:])
    expected = {"images": "24", "classes": "2, of 12 images: cat, dog", "unreadable": "0"}
    assert {name: output[name] for name in expected} == expected
    assert "1: 5 images" in output["channels"]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in (pictures / "train").rglob("*.*")]
    # Training scales the images to one size: each has the same weight, whatever its size.
    mean, squares = (np.mean([((p / 255) ** power).mean(axis=(0, 1)) for p in pixels], axis=0) for power in (1, 2))
    np.testing.assert_allclose(np.array(output["--mean"].split(), float), mean, atol=6e-4)
    np.testing.assert_allclose(np.array(output["--std"].split(), float), np.sqrt(squares - mean**2), atol=6e-4)
    heights = [len(p) for p in pixels]
    assert f"{min(heights)} to {max(heights)} x" in output["sizes"]
    assert "images/s read and decoded" in output["speed"]


def test_the_check_reports_bad_images(tmp_path, capsys):
    for number in range(3):
        Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match="1 of 4 "):
        call(datasets, tmp_path, "--in_chans", 1, "--num_workers", 0)
    output = capsys.readouterr().out
    assert f"unreadable  1\n            {tmp_path / 'bad.jpg'}: the file is empty" in output
    assert "depth       3 images of more than 8 bits" in output
    assert "classes     none" in output


@pytest.mark.parametrize("script", [main_finetune, main_linprobe, main_knn])
def test_a_stray_image_beside_class_folders_is_named(script, labelled, tmp_path, capsys, monkeypatch):
    """Without labels it would end supervised scripts with advice that fits no class folders. Pre-training reads it."""
    data = shutil.copytree(labelled, tmp_path / "data")
    shutil.copy(data / "train/kind0/00.png", data / "train/stray.png")
    error = fails(capsys, monkeypatch, script, "--data_path", data, "--device", "cpu", "--model", "vit_mini_patch4")
    assert "stray.png" in error
    assert len(open_source("train", str(data))) == 49


def test_the_check_takes_the_list_of_its_part(tmp_path, capsys):
    for number in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    lists = {"train": "0.png\n", "val": "1.png\n2.png\n"}
    for split, content in lists.items():
        (tmp_path / split).write_text(content)
    for split, content in lists.items():
        call(datasets, train_list=tmp_path / "train", val_list=tmp_path / "val", num_workers=0, split=split)
        assert f"images      {content.count('png')}\n" in capsys.readouterr().out


def test_the_check_limits_the_number_of_images(pictures, capsys):
    call(datasets, pictures, "--limit", 5, "--num_workers", 0)
    assert "images      24, of which 5 were read" in capsys.readouterr().out


def test_the_check_reads_streams(tmp_path, capsys):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": str(number), "png": saved(Image.new("L", (8, 6)), "PNG") if number else b""})
    with pytest.raises(BadImage, match=r"1 of 4 "):
        call(datasets, "--dataset", f"wds:{tmp_path}/a.tar", "--in_chans", 1, "--num_workers", 0)
    output = capsys.readouterr().out
    assert "sizes       6 x 8 (height x width): 3 images" in output
    assert f"unreadable  1\n            {tmp_path}/a.tar: 0: the file is empty" in output


def test_flags_without_effect_warn(pictures, caplog):
    open_source("train", str(pictures))
    assert "no effect" not in caplog.text
    open_source("train", str(pictures), download=True, num_images=7)
    for name in ("download", "num_images"):
        assert f"`{name}` has no effect with this dataset" in caplog.text


def test_the_check_counts_images_with_an_orientation(tmp_path, capsys):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (8, 6)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    call(datasets, tmp_path, "--num_workers", 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "EXIF" in line]
    assert line.split()[1] == "7"


@pytest.mark.parametrize("script", [main_pretrain, main_finetune, main_linprobe, main_knn, main_segment, main_compare])
def test_the_check_takes_the_flags_of_the_data_of_all_scripts(script):
    (group,) = [group for group in script.get_args_parser()._action_groups if group.title == "data"]
    flags = {flag for action in group._group_actions for flag in action.option_strings} - {"--batch_size"}
    assert flags <= datasets.get_args_parser()._option_string_actions.keys()


def test_the_path_is_an_argument_or_a_flag(pictures, capsys):
    for argv in ((pictures,), ("--data_path", pictures)):
        call(datasets, *argv, "--num_workers", 0, "--input_size", 16)
        output = capsys.readouterr().out
        assert "images      24\n" in output
        assert "no effect on the check: input_size=16" in output
    with pytest.raises(ValueError, match=r"data_path="):
        call(datasets, pictures, "--data_path", pictures)


def test_a_list_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "images.csv").write_text("path\n")
    with pytest.raises(ValueError, match=r"data_path=.*train_list="):
        call(datasets, tmp_path / "images.csv")


def test_a_folder_that_contains_the_only_folder_has_no_classes(pictures, tmp_path, capsys, labelled, classify):
    shutil.copytree(pictures / "train/cat", tmp_path / "data/images")
    call(datasets, tmp_path / "data", "--num_workers", 0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("classes")]
    assert "none" in line and "images" in line
    for split in ("train", "val"):
        shutil.copytree(labelled / split / "kind0", tmp_path / "one" / split / "kind0")
    classify(main_finetune, data_path=tmp_path / "one", epochs=1, warmup_epochs=0)
    assert "one class, kind0" in capsys.readouterr().out


def test_labels_and_masks_are_checked(tmp_path, capsys):
    for number in range(11):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("L", (8, 8), number % 3 + (folder == "images") * 50).save(tmp_path / folder / f"{number}.png")
    rows = [f"images/{number}.png,{number / 2},{number}" for number in range(11)]
    (tmp_path / "numbers.csv").write_text("\n".join(["path,weight,age", *rows]))
    flags = {"train_list": tmp_path / "numbers.csv", "num_workers": 0, "task": "regression"}
    call(datasets, **flags, label_columns="weight age")
    assert "labels      2 for each image: weight, age" in capsys.readouterr().out
    with pytest.raises(ValueError, match="height"):
        call(datasets, **flags, label_columns="height")
    folders = {"data_path": tmp_path, "train_folders": "images masks", "num_workers": 0}
    call(datasets, **folders, nb_classes=3)
    with pytest.raises(BadImage, match="3 of 11"):
        call(datasets, **folders, nb_classes=2)
    assert "2.png" in capsys.readouterr().out.split("unreadable  3")[1]
