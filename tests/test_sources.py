"""Folders and lists of files."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from mains import open_source
from PIL import Image
from torchvision.datasets import ImageFolder

from mae.data import labels
from mae.data.kinds.archives import open_archive
from mae.data.kinds.folders import find_files
from mae.data.kinds.lists import read_list
from mae.data.source import version_of, versions

NAMES = ["a.png", "with blank.png", "sub/c.png"]


def save(*paths, gray=0):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), gray).save(path)


def names(source):
    return [source.names[index] for index in range(len(source))]


def test_class_folders(pictures):
    source = find_files(pictures / "train")
    assert source.classes == ["cat", "dog"]
    assert [source[index][1] for index in range(24)] == list(source.labels) == [0] * 12 + [1] * 12
    assert names(source) == sorted(names(source))
    path = pictures / "train" / source.names[3]
    assert (source[3][0], source.name(3)) == (path.read_bytes(), str(path))


def test_every_common_suffix_is_an_image_and_classes_are_those_of_torchvision(tmp_path):
    suffixes = ("JPEG", "JPG", "bmp", "jpeg", "jpg", "png", "tif", "webp")
    for name in ("b", "A", "c10", "c9", "Z", "_"):
        (tmp_path / name).mkdir()
        for suffix in suffixes:
            (tmp_path / name / f"1.{suffix}").touch()
    source = find_files(tmp_path)
    assert source.classes == ImageFolder(tmp_path).classes == ["A", "Z", "_", "b", "c10", "c9"]
    assert names(source)[:8] == [f"A/1.{suffix}" for suffix in suffixes]


def test_the_version_of_a_sample_changes_with_its_file(tmp_path):
    save(*(tmp_path / "train" / name for name in ("a/1.png", "b/2.png")))
    file = Path(shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "train"))
    folder = find_files(tmp_path / "train")
    before = versions(labels.Subset(folder, np.array([1, 0])))
    assert before == versions(folder)[::-1]
    assert versions(folder, 1, 2) == versions(folder)[1:]
    packed = versions(open_archive(file, "train"))
    assert packed == versions(open_archive(file, "train"))
    save(tmp_path / "train/b/2.png", gray=255)
    after = versions(labels.Subset(folder, np.array([1, 0])))
    assert (after[0] != before[0], after[1]) == (True, before[1])
    shutil.copy(file, tmp_path / "copy.zip")
    shutil.move(tmp_path / "copy.zip", file)
    assert not set(packed) & set(versions(open_archive(file, "train")))
    (tmp_path / "train/b/2.png").unlink()  # is reported when it is read
    assert versions(folder)[1] not in (before[0], after[0])


def test_the_version_of_a_folder_changes_with_files_behind_links(tmp_path):
    """As of a dataset of the user's code with its images on another disk. Links that form a cycle end."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    save(root / "1.png", elsewhere / "2.png")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(root)
    first = version_of(root)
    assert version_of(root) == first
    (elsewhere / "2.png").write_bytes(b"another")
    assert version_of(root) != first


def test_flat_and_nested_folders_have_no_classes(tmp_path):
    files = ["0.png", "1.PNG", "deep/er/UPPER.JPG", "x/y.Tif"]
    save(*(tmp_path / name for name in files))
    source = find_files(tmp_path)
    assert (names(source), source.classes, set(source.labels)) == (files, [], {-1})


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_within_a_whole_folder_are_named(kind, tmp_path, caplog):
    """The images of both train. Classes may have the names of splits."""
    for name in ("d/train/a/1.png", "d/val/a/2.png", "e/train/3.png", "cover.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "root" / name)
    root = tmp_path / "root" if kind == "folder" else shutil.make_archive(tmp_path / "root", "zip", tmp_path / "root")
    assert len(open_source("train", str(root))) == 4
    assert "its folder d has train/ and val/" in caplog.text
    assert "folder e" not in caplog.text


def test_hidden_files_pipes_and_other_files_are_ignored(tmp_path):
    skipped = ("a/.3.png", ".hidden/4.png", ".DS_Store.png", "__MACOSX/5.png", "a/__MACOSX/6.png")
    save(*(tmp_path / name for name in ("a/1.png", "b/2.png", *skipped)))
    for name in ("notes.txt", "png"):
        (tmp_path / name).write_text("no picture")
    os.mkfifo(tmp_path / "a/5.png")
    source = find_files(tmp_path)
    assert (names(source), source.classes) == (["a/1.png", "b/2.png"], ["a", "b"])


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_that_are_not_read_are_counted_by_suffix(kind, tmp_path, caplog):
    """Text beside the images is counted without a warning. Each split has its own count."""
    root = tmp_path / "root"
    save(*(root / "train" / f"{name}/{number}.png" for name in "ab" for number in range(4)))
    save(root / "val/a/0.png")
    for number in range(40):
        (root / f"train/a/{number}.{'heic' if number % 2 else 'HEIC'}").touch()
    for number in range(5):
        (root / f"train/b/IMG_{number}").touch()
    (root / "val/labels.txt").touch()
    path = root if kind == "folder" else shutil.make_archive(str(root), kind, root)
    with caplog.at_level("INFO"):
        assert [len(open_source(split, str(path))) for split in ("train", "val")] == [8, 1]
    train, val = (record for record in caplog.records if "found in" in record.getMessage())
    assert [part for part in ("45 of 53 ", "40 .heic", "5 without") if part not in train.getMessage()] == []
    assert [part for part in ("1 of 2 ", "1 .txt") if part not in val.getMessage()] == []
    assert (train.levelname, val.levelname) == ("WARNING", "INFO")


def test_an_empty_class_folder_is_logged_and_remains_a_class(tmp_path, caplog):
    """The numbers of the other classes are those of ImageFolder in torchvision."""
    save(*(tmp_path / name for name in ("a/1.png", "c/1.png")))
    (tmp_path / "b").mkdir()
    source = find_files(tmp_path)
    assert (source.classes, list(source.labels)) == (["a", "b", "c"], [0, 2])
    assert "the class folder b contains no images" in caplog.text


@contextlib.contextmanager
def without_privileges():
    """Permissions do not apply to root: the effective user is another one."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(("images", "refused"), [
    (["a/1.png", "b/1.png"], "lost+found"), (["1.png", "2.png"], "private"), (["a/1.png", "b/1.png"], "a/private"),
    (["a/1.png", "b/1.png"], "c"),
])  # fmt: skip
def test_a_folder_without_permission_is_skipped_unless_it_is_a_class(images, refused, tmp_path, monkeypatch, caplog):
    save(*(tmp_path / "images" / name for name in images))
    (tmp_path / "images" / refused).mkdir()
    (tmp_path / "images" / refused).chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are of one user only
    with without_privileges(), pytest.raises(PermissionError) if refused == "c" else contextlib.nullcontext() as error:
        source = open_source("train", "images")
    if error:
        assert error.value.filename == "images/c"
    else:
        assert (names(source), source.classes) == (images, ["a", "b"] if "/" in images[0] else [])
        assert refused in caplog.text


def test_links_are_followed_and_loops_are_not(tmp_path, caplog):
    images = tmp_path / "images"
    save(tmp_path / "elsewhere/1.png", images / "2.png")
    for link, target in (
        ("linked", tmp_path / "elsewhere"), ("again", images), ("../elsewhere/up", images),
        ("itself", images / "itself"), ("itself.png", images / "itself.png"),
    ):  # fmt: skip
        (images / link).symlink_to(target)
    assert names(find_files(images)) == ["2.png", "itself.png", "linked/1.png"]
    assert caplog.text.count("links to a folder that is already included; skipped") == 2


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    for name, other in itertools.product("abcdefg", repeat=2):
        save(tmp_path / name / "1.png")
        (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    source = find_files(tmp_path)  # below each of seven classes, all seven
    assert np.bincount(source.labels).tolist() == [7] * 7


def test_names_that_are_not_utf8(tmp_path):
    save(tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"gr\xfc\xdf.png"), tmp_path / "ok\n" / "1.png")
    source = find_files(tmp_path)
    assert source[0][0].startswith(b"\x89PNG")
    assert source.classes == ["caf\\udce9", "ok\\n"]
    assert source.name(0).endswith("caf\\udce9/gr\\udcfc\\udcdf.png")
    source.name(0).encode()


def test_a_missing_folder_or_list_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=rf"data_path={tmp_path}: .*\.jpg"):
        find_files(tmp_path)
    (tmp_path / "000.tar").touch()
    with pytest.raises(ValueError, match=r"dataset=.?wds:.*/\*\.tar"):
        find_files(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"list.txt"):
        read_list(tmp_path / "list.txt", None, "--val_list")


@pytest.fixture
def make_list(tmp_path):
    save(*(tmp_path / name for name in NAMES))

    def read(name, content, root=None):
        (tmp_path / name).write_text(content)
        return read_list(tmp_path / name, root, "--train_list")

    return read


DOG_CAT = ["dog", "cat", "dog"]


@pytest.mark.parametrize(("name", "content", "own"), [
    ("list.txt", "a.png\nwith blank.png\n\nsub/c.png\n", None),
    ("list", "\ufeffa.png\r\nwith blank.png\r\nsub/c.png", None),
    ("list.csv", "number,Path\n1,a.png\n2,with blank.png\n3,sub/c.png\n", None),
    ("list.json", json.dumps(NAMES), None),
    ("list.json", json.dumps([{"path": name} for name in NAMES]), None),
    ("list.csv", "path,label\na.png,-1\nwith blank.png,\nsub/c.png,-1\n", None),
    ("list.txt", "a.png dog\nwith blank.png  cat\nsub/c.png dog\n", DOG_CAT),
    ("list.txt", "a.png\tdog\nwith blank.png\tcat\nsub/c.png\tdog\n", DOG_CAT),
    ("list.csv", "label,path\ndog,a.png\ncat,with blank.png\ndog,sub/c.png\n\n,\n", DOG_CAT),
    ("list.csv", "\ufeffFilename,Label\r\na.png,dog\r\nwith blank.png,cat\r\nsub/c.png,dog\r\n", DOG_CAT),
    ("list.csv", 'label, path\ndog, a.png\ncat, with blank.png \n"dog",sub/c.png\n', DOG_CAT),
    ("list.csv", "path,label\na.png,great white shark\nwith blank.png,a\nsub/c.png,a\n", ["great white shark", *"aa"]),
    ("list.json", json.dumps([*zip(NAMES, DOG_CAT, strict=True)]), DOG_CAT),
    *(("list.json", json.dumps([{path: n, label: c} for n, c in zip(NAMES, DOG_CAT, strict=True)]), DOG_CAT)
      for path, label in (("path", "label"), ("file_name", "class"))),
    *(("list.csv", f"{header}\na.png, dog\nwith blank.png,cat\nsub/c.png,dog\n", DOG_CAT)
      for header in ("File Name, Ground Truth", "file_name,label", "file path,ground-truth")),
    # Integers are numbers; only classes that occur count, in the order of the numbers.
    ("list.txt", "a.png 10\nwith blank.png 9\nsub/c.png 20231105\n", ["10", "9", "20231105"]),
    ("list.json", json.dumps([*zip(NAMES, (1, 2, 10), strict=True)]), ["1", "2", "10"]),
    ("list.csv", "path,label\na.png,1.0\nwith blank.png,2.0\nsub/c.png,10.0\n", ["1.0", "2.0", "10.0"]),
])  # fmt: skip
def test_lists(make_list, name, content, own, caplog):
    source = make_list(name, content)
    assert caplog.text == "" or own is None
    assert names(source) == NAMES
    assert source[1][0].startswith(b"\x89PNG")
    if own is None:
        assert (source.classes, source[1][1]) == ([], -1)
    else:
        assert source.classes == sorted({*own}, key=lambda text: float(text) if text[0].isdigit() else text)
        assert [source.classes[label] for label in source.labels] == own


def annotations_of(categories, labels, first=0):
    """Returns a document in the format of iNaturalist, of the files from `first` on. Ids need not start at 0."""
    return {
        "info": {"year": 2018},
        "images": [{"id": 40 + n, "file_name": f"train_val2018/Aves/{first + n}.jpg"} for n in range(len(labels))],
        "categories": [{"id": number, "name": name, "supercategory": "Aves"} for number, name in categories],
        "annotations": [{"id": n, "image_id": 40 + n, "category_id": i} for n, i in reversed([*enumerate(labels)])],
    }


def test_annotations_of_inaturalist(tmp_path):
    """Labels number the categories by their ids. A category without images is a class, as train and val must agree.

    Annotations for detection are no labels.
    """
    save(*(tmp_path / "train_val2018" / "Aves" / f"{number}.jpg" for number in range(3)))

    def read(names, labels, **others):
        (tmp_path / "train2018.json").write_text(json.dumps(annotations_of(names, labels) | others))
        return read_list(tmp_path / "train2018.json", tmp_path, "--train_list")

    source = read([(9, "wren"), (2, "owl"), (5, "crow")], [9, 2, 9])
    assert (source.classes, source.labels.tolist()) == (["owl", "crow", "wren"], [2, 0, 2])
    assert source.name(1).endswith("train_val2018/Aves/1.jpg")
    assert read([(9, "1"), (2, "1"), (5, "1")], [9, 2, 9]).classes == ["2 1", "5 1", "9 1"]
    assert read([], [9, 2, 9], categories=[{"id": 2}, {"id": 9}]).classes == ["2", "9"]
    assert read([], [1, 2, 3], annotations=[]).labels.tolist() == [-1, -1, -1]
    document = annotations_of([(2, "owl"), (5, "crow")], [2, 5, 5])
    boxes = document["annotations"]
    for annotations, reason in (
        ([*boxes, {"image_id": 40, "category_id": 7}], "7"), (boxes[:2], "categories"),
        ([*boxes, {"image_id": 40, "category_id": 5}], "categories"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            read([], [], **document | {"annotations": annotations})
        source = read_list(tmp_path / "train2018.json", tmp_path, "--train_list", task=None)  # pre-training
        assert [Path(source.files.path(n)).name for n in range(3)] == ["0.jpg", "1.jpg", "2.jpg"]


def test_relative_paths_start_at_the_root(make_list, tmp_path):
    for path in ("c.png", tmp_path / "a.png"):
        assert len(make_list("list.txt", f"{path}\n", root=tmp_path / "sub")) == 1


@pytest.mark.parametrize(("name", "content", "message"), [
    ("list.txt", "", "list.txt"), ("list.txt", "nowhere.png\n", "nowhere.png"),
    ("list.json", '[{"path": "a.png"}, {"label": "a"}]', "path"), ("list.json", '[{"img": "a.png"}]', "img"),
    # Without a header, the first row would be its names.
    ("list.csv", "a.png,dog\nwith blank.png,cat\n", "header"),
    ("list.csv", "a.png dog\nwith blank.png cat\n", ".txt"),  # of Places205
    ("list.csv", "path,label,label\na.png,1,2\n", "label"),
    # A part of a label that has blanks would be a label.
    ("list.txt", "a.png\tgreat white shark\n", "PATH LABEL"),
    ("list.csv", "label,path\ndog\n", "1 and 2 cells"),
    ("list.csv", "path,label\na.png,dog, brown\nsub/c.png,dog\n", "a.png .*3 and 2 cells"),
    ("list.csv", "file;label\na.png;dog\nsub/c.png;dog\n", "file;label"),
    ("list.txt", "a.png 1\nsub/c.png -2\n", "-2"),
])  # fmt: skip
def test_invalid_lists_are_errors(make_list, name, content, message):
    with pytest.raises(ValueError, match=message):
        make_list(name, content)


def test_a_csv_file_without_labels_is_named(make_list, caplog):
    assert make_list("list.csv", "File Name,species\na.png,cat\n").classes == []
    assert "species" in caplog.text


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize(("split", "folders"), [
    ("train", ("train/images", "train/masks")), ("train", ("images/training", "annotations/training")),
    ("val", ("val/images", "val/masks")), ("train", ("train/cat/Images", "train/cat/Masks")),
])  # fmt: skip
def test_masks_are_no_images(tmp_path, split, folders, archived):
    """The layouts of main_segment.py, and masks in class folders. The folder of the images is one of images."""
    root = tmp_path / "data"
    save(*(root / folder / f"{number}.png" for folder in folders for number in range(3)))
    save(root / ("preview.png" if "training" in folders[0] else f"{split}/preview.png"))
    path = shutil.make_archive(str(root), "zip", root) if archived else root
    with pytest.raises(ValueError, match=r"(images|Images) and (masks|annotations|Masks) are those of a segmentation"):
        open_source(split, str(path))
    assert names(open_source("train", str(root / folders[0]))) == ["0.png", "1.png", "2.png"]


def test_annotations_of_detection_are_no_masks(tmp_path):
    root = tmp_path / "data"
    save(*(root / f"images/train2017/{number}.png" for number in range(3)))
    (root / "annotations").mkdir()
    (root / "annotations/instances.json").write_text("{}")
    assert len(open_source("train", str(root))) == 3
