"""Classes of the training and the validation set, and subsets of a dataset."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import main_finetune
from util.checkpoints import checkpoint
from util.data import labels
from util.data.sources import find_files
from util.data.webdataset_shards import Shards
from util.datasets import open_source


def folders(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (4, 4), number).save(root / name / f"{number}.png")
    return find_files(root)


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_images_without_labels(tmp_path):
    folders(tmp_path / "flat", deep=2)
    Image.new("L", (4, 4)).save(tmp_path / "flat" / "1.png")
    flat = find_files(tmp_path / "flat")
    with pytest.raises(ValueError, match=r"val/CLASS/IMAGE.*--val_list"):
        labels.require(flat, "val")
    with pytest.raises(ValueError, match="pre-training only"):
        labels.require(Shards("https://example.org/{0..3}.tar", 10), "train")
    named = folders(tmp_path / "named", cat=1)
    assert labels.require(named, "val") is named
    some = folders(tmp_path / "some", cat=2)
    some.labels = np.array([0, -1])  # as of an image above the class folders
    with pytest.raises(ValueError, match=r"train images .*no classes"):
        labels.require(some, "train")


def test_labels_count_the_models_classes(tmp_path, caplog):
    source = folders(tmp_path, cat=1, emu=2)
    assert labels.counted_as(source, ["cat", "emu"]) is source
    mapped = labels.counted_as(source, ["ant", "cat", "dog", "emu"])
    assert [mapped[index][1] for index in range(3)] == list(mapped.labels) == [1, 3, 3]
    assert mapped.classes == ["ant", "cat", "dog", "emu"]
    assert mapped.name(2) == source.name(2)
    assert mapped[2][0] == source[2][0]
    assert "the images have only 2 of the model's 4 classes" in caplog.text
    with pytest.raises(ValueError, match=r"1 of the 2 classes .*: emu"):
        labels.counted_as(source, ["cat", "dog"])


def test_some_of_each_class_grow_with_their_number(tmp_path):
    source = folders(tmp_path, cat=9, dog=7)
    few, more, other = (labels.some_of_each_class(source, *options) for options in ((2, 0), (5, 0), (5, 1)))
    assert np.bincount(few.labels).tolist() == [2, 2]
    assert np.bincount(more.labels).tolist() == [5, 5]
    assert set(names(few)) < set(names(more)) != set(names(other))
    with pytest.raises(ValueError, match=r"--train_per_class 8: .*dog .*7"):
        labels.some_of_each_class(source, 8, seed=0)


def test_held_out_images_are_in_no_other_part(tmp_path):
    source = folders(tmp_path, cat=9, dog=11)
    (rest, held), (_, other) = (labels.hold_out(source, 0.2, seed=seed, flag="--held_out") for seed in (0, 1))
    assert (len(rest), len(held)) == (16, 4)
    assert sorted(names(rest) + names(held)) == sorted(names(source))
    assert set(names(other)) != set(names(held))


@pytest.mark.parametrize(("count", "share", "expected"), [(20, 0.02, 1), (10, 0.99, 9), (3, 0.1, 1), (2, 0.9, 1)])
def test_both_parts_have_images(tmp_path, count, share, expected):
    rest, held_out = labels.hold_out(folders(tmp_path, cat=count), share, seed=0, flag="--val_fraction")
    assert (len(rest), len(held_out)) == (count - expected, expected)
    with pytest.raises(ValueError, match=r"--val_fraction 0.5 .*2 .*1"):
        labels.hold_out(folders(tmp_path / "one", cat=1), 0.5, seed=0, flag="--val_fraction 0.5")


def test_the_labels_of_both_sets_count_the_same_classes(tmp_path):
    """Lists may name the classes in any order."""
    train = folders(tmp_path / "train", cat=5, dog=6)
    val = folders(tmp_path / "val", cat=2, dog=1)
    val.classes, val.labels = ["dog", "cat"], 1 - val.labels
    sets = {"train": train, "val": val}
    options = {"nb_classes": 2, "train_per_class": 4, "seed": 0}
    few, tested = labels.open_pair(lambda split: sets[split], **options)
    assert few.classes == tested.classes == ["cat", "dog"]
    assert [tested[index][1] for index in range(3)] == tested.labels.tolist() == [0, 0, 1]
    assert np.bincount(few.labels).tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"2 classes, .*--nb_classes is 3"):
        labels.open_pair(lambda split: sets[split], **options | {"nb_classes": 3})


def write_lists(folder, labelled, names, suffix="csv"):
    """Writes lists of `labelled` in which the classes have other names; returns the flags."""
    flags = {"data_path": labelled}
    for split in ("train", "val"):
        files = sorted((labelled / split).glob("*/*"))
        rows = [(f"{file.relative_to(labelled)}", names[int(file.parent.name[-1])]) for file in files]
        rows = [(file, name) for file, name in rows if name is not None]
        text = json.dumps(rows) if suffix == "json" else "".join(f"{file}, {name}\n" for file, name in rows)
        flags[f"{split}_list"] = folder / f"{split}.{suffix}"
        flags[f"{split}_list"].write_text(text if suffix != "txt" else text.replace(",", ""))
    return flags


def recorded(out):
    return checkpoint.read(out / "checkpoint-0.pth")["args"]["classes"]


def test_labels_are_numbers_only_if_all_are_integers(classify, labelled, tmp_path, capsys):
    """Names are never merged. Folders of the same names have the same classes."""
    flags = {"epochs": 1, "lr": 0, "warmup_epochs": 0}
    names = ["1_11", "11_1", "001", "1", "4E5", "٣"]
    for suffix in ("txt", "json", "csv"):
        for own, expected in ((names, sorted(names)), ([10, 9, 2, 3, 4, 5], ["2", "3", "4", "5", "9", "10"])):
            lists = write_lists(tmp_path, labelled, own, suffix)
            assert open_source("val", str(labelled), str(lists["val_list"])).classes == expected, suffix
    lists = write_lists(tmp_path, labelled, names)
    out = classify(main_finetune, **flags, **lists)
    assert recorded(out) == sorted(names)
    assert re.search("train_list .*001, 1 are different classes", capsys.readouterr().out)
    for number, name in enumerate(names):
        shutil.copytree(labelled / "val" / f"kind{number}", tmp_path / "folders/val" / name)
    for data in ({"data_path": tmp_path / "folders"}, lists):
        assert len(classify(main_finetune, eval=True, resume=out / "checkpoint-0.pth", **data).labels) == 23


@pytest.mark.parametrize("text", ["1_5", "٣"])
def test_targets_and_extras_are_decimals(text, tmp_path):
    """float() takes 1_5 for 15."""

    def read(text, **options):
        (tmp_path / "0.png").touch()
        (tmp_path / "list.csv").write_text(f"path,label,dose\n0.png,{text},{text}\n")
        return open_source("train", file_list=str(tmp_path / "list.csv"), task="regression", **options)

    assert [read(good).labels.item() for good in ("1.50", "-.5", "1e-3", "7")] == [1.5, -0.5, 0.001, 7]
    for options in ({}, {"label_columns": ["dose"]}, {"extras": ["dose"]}):
        with pytest.raises(ValueError, match=text):
            read(text, **options)
