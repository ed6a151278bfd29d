"""Lists, masks and extras whose files are in folders and in archives."""

import shutil

import numpy as np
import pytest
import torch
from mains import assert_same_run, call, open_source, stop_and_resume
from segments import make_scenes
from test_extra_inputs import CODE

import main_segment
from mae.data.fingerprint import fingerprint
from mae.data.segmentation_masks import MaskFormat

THREE = MaskFormat(["ground", "tree", "water"])


def packed(folder, kind="zip"):
    """An archive beside a folder, which encloses its files."""
    return shutil.make_archive(str(folder.parent / f"{folder.name}_packed"), kind, folder.parent, folder.name)


@pytest.fixture
def listed(pictures, tmp_path):
    """A list of the pictures with labels and an extra input, in another folder."""
    names = sorted(str(file.relative_to(pictures)) for file in pictures.rglob("*.*"))[::-1]
    rows = [f"{name},{name.split('/')[1]},{number % 2}" for number, name in enumerate(names)]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.csv").write_text("\n".join(["path,label,level", *rows]))
    return tmp_path / "lists/list.csv"


@pytest.fixture
def scenes(tmp_path):
    """Images with masks; lists of them with an extra input are in another folder."""
    root = make_scenes(tmp_path / "scenes")
    (tmp_path / "lists").mkdir()
    for split, folder in (("train", "training"), ("val", "validation")):
        names = sorted(file.stem for file in (root / "images" / folder).iterdir())[::-1]
        rows = [f"images/{folder}/{name}.jpg,annotations/{folder}/{name}.png,{int(name) % 3}" for name in names]
        (tmp_path / f"lists/{split}.csv").write_text("\n".join(["image,mask,level", *rows]))
    return root


def assert_same_items(found, expected):
    assert (len(found), found.classes) == (len(expected), expected.classes)
    assert np.array_equal(found.labels, expected.labels)
    for index in range(len(expected)):
        ours, theirs = found[index], expected[index]
        assert ours.image == theirs.image and np.array_equal(ours.label, theirs.label)
        assert dict(ours.inputs) == dict(theirs.inputs)
    assert fingerprint(found, True) == fingerprint(expected, True)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_list_in_an_archive_has_the_items_of_the_folder(pictures, listed, tmp_path, kind):
    copied = shutil.copytree(pictures, tmp_path / "copied")
    of_folder, of_archive = (
        open_source("train", str(path), str(listed), extras=["level"]) for path in (copied, packed(copied, kind))
    )
    assert_same_items(of_archive, of_folder)
    assert of_archive[0].inputs == {"level": torch.tensor(0.0)}


def test_a_file_that_is_not_in_the_archive_is_named(pictures, listed, tmp_path):
    archive = packed(shutil.copytree(pictures, tmp_path / "copied"))
    listed.write_text(listed.read_text() + "\ntrain/cat/none.png,cat,0")
    with pytest.raises(ValueError, match=r"list\.csv.* train/cat/none\.png .*copied_packed\.zip"):
        open_source("train", archive, str(listed))


@pytest.mark.parametrize("named_by", ["list", "folders"])
def test_masks_in_an_archive_have_the_items_of_the_folder(scenes, tmp_path, named_by):
    options = {"train_folders": ["images/training", "annotations/training"]}
    if named_by == "list":
        options = {"file_list": str(tmp_path / "lists/train.csv"), "extras": ["level"]}
    of_folder, of_archive = (
        open_source("train", str(path), masks=THREE, **options) for path in (scenes, packed(scenes))
    )
    assert_same_items(of_archive, of_folder)
    assert of_folder.input_shapes == ({"level": "()"} if named_by == "list" else {})


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_folders_of_an_archive_start_where_those_of_the_unpacked_folder_start(tmp_path, caplog, kind):
    """Folders of the same name within others, such as those of another split, are not read."""
    root = make_scenes(tmp_path / "scenes", "splits")
    for split in ("train", "val"):
        (root / split / "images").rename(root / split / "img")
        (root / split / "masks").rename(root / split / "msk")
    enclosed = packed(root, kind)
    bare = shutil.make_archive(str(tmp_path / "bare"), kind, root)
    for path in (enclosed, bare):
        with pytest.raises(ValueError, match=f"data_path={path}: there is no folder img in it"):
            open_source("train", path, masks=THREE, train_folders=["img", "msk"])
        with pytest.raises(ValueError, match=f"data_path={path}: there is no folder train/none in it"):
            open_source("train", path, masks=THREE, train_folders=["train/img", "train/none"])
    with pytest.raises(FileNotFoundError, match="scenes/img"):
        open_source("train", str(root), masks=THREE, train_folders=["img", "msk"])
    caplog.clear()
    for train in (["train/img", "train/msk"], ["./train/img/", "train//msk"]):
        folders = {"train_folders": train, "val_folders": ["val/img/", "./val/msk"]}
        for split in ("train", "val"):
            found, *others = (open_source(split, str(path), masks=THREE, **folders) for path in (root, enclosed, bare))
            for other in others:
                assert_same_items(other, found)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    whole = {"train_folders": ["scenes/train/img", "scenes/train/msk"]}
    assert len(open_source("train", enclosed, masks=THREE, **whole)) == 12


def test_a_list_of_json_has_masks_and_extras(scenes, tmp_path):
    path = tmp_path / "lists/train.json"
    path.write_text(
        '[{"image": "images/training/00.jpg", "mask": "annotations/training/00.png", "level": 0},'
        ' {"image": "images/training/01.jpg", "mask": "annotations/training/01.png", "level": 1}]'
    )
    found = open_source("train", str(scenes), str(path), masks=THREE, extras=["level"])
    assert [float(found[index].inputs["level"]) for index in range(2)] == [0, 1]
    assert found[1].label.shape == (24, 30)


def test_a_run_on_a_list_in_an_archive_resumes_and_equals_one_in_a_folder(
    pretrain, pictures, listed, tmp_path, monkeypatch
):
    """The second run is killed within an epoch."""
    archive = packed(shutil.copytree(pictures, tmp_path / "copied"))
    whole = pretrain("whole", train_list=listed)
    assert_same_run(whole, stop_and_resume(monkeypatch, pretrain, 3, train_list=listed, data_path=archive))


@pytest.mark.parametrize("extras", [{}, {"extras": "level", "encoder": "levels:Level"}], ids=["masks", "extras"])
def test_a_run_on_masks_of_an_archive_resumes_and_equals_one_in_a_folder(
    scenes, own_module, tmp_path, monkeypatch, extras
):
    """The second run is killed within an epoch."""
    own_module("levels", CODE)
    lists = {f"{split}_list": tmp_path / f"lists/{split}.csv" for split in ("train", "val")}

    def segment(name, **flags):
        call(main_segment, nb_classes=3, model="vit_mini_patch4", input_size=16, batch_size=4, epochs=2, lr=0.01,
             num_workers=0, device="cpu", amp="off", unfreeze_blocks="all", output_dir=tmp_path / name, **lists,
             **extras, **flags)  # fmt: skip
        return tmp_path / name

    whole = segment("whole", data_path=scenes)
    assert_same_run(whole, stop_and_resume(monkeypatch, segment, 2, data_path=packed(scenes)))
