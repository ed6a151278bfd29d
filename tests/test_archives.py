"""Tar and zip files read in place."""

import os
import shutil
import subprocess
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from util.archives import Archive
from util.decode import BadImage
from util.sources import find_files


@pytest.fixture(params=["zip", "tar", "zip, stored", "tar of ./", "zip in a folder", "tar with a hard link"])
def packed(request, pictures, tmp_path):
    """`pictures`, packed in several ways."""
    if request.param in ("zip", "tar"):
        return shutil.make_archive(str(tmp_path / "set"), request.param, pictures)
    if request.param == "zip, stored":
        with zipfile.ZipFile(tmp_path / "stored.zip", "w") as archive:
            for path in pictures.rglob("*.*"):
                archive.write(path, path.relative_to(pictures))
        return tmp_path / "stored.zip"
    if request.param == "tar of ./":
        subprocess.run(["tar", "-cf", tmp_path / "dot.tar", "-C", pictures, "."], check=True)
        return tmp_path / "dot.tar"
    if request.param == "zip in a folder":
        return shutil.make_archive(str(tmp_path / "set"), "zip", pictures.parent, pictures.name)
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    first, second, *_ = sorted((copy / "train" / "cat").iterdir())
    second.unlink()
    os.link(first, second)
    return shutil.make_archive(str(tmp_path / "set"), "tar", copy)


def test_is_the_folder_that_was_packed(packed, pictures, tmp_path):
    folder = find_files((tmp_path / "copy" if (tmp_path / "copy").exists() else pictures) / "train")
    archive = Archive(packed, "train")
    assert archive.classes == folder.classes
    assert [archive[i] for i in range(len(archive))] == [folder[i] for i in range(len(folder))]
    assert archive.name(0) == f"{packed}: {folder.names[0]}"


def _sum(archive):
    return sum(len(archive[index][0]) for index in range(len(archive)))


def test_processes_read_at_once(pictures, tmp_path):
    """Forked ones inherit the open file, others get the source as bytes; none moves another's place."""
    archive = Archive(shutil.make_archive(str(tmp_path / "set"), "zip", pictures), "train")
    expected = _sum(archive)
    for method in ("fork", "spawn"):
        with get_context(method).Pool(4) as pool:
            assert pool.map(_sum, [archive] * 8) == [expected] * 8


def test_hidden_members_and_other_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("set/a/1.png", "set/a/._2.png", "__MACOSX/set/a/1.png", "set/readme.txt", "set/b/3.JPG"):
            archive.writestr(name, name)
    source = Archive(tmp_path / "set.zip", "train")
    assert [source.names[0], source.names[1]] == ["a/1.png", "b/3.JPG"]
    assert source.classes == ["a", "b"]
    assert source[1] == (b"set/b/3.JPG", 1)


def test_other_parts_of_a_set_are_left(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("set/train/a/1.png", "set/val/a/2.png"):
            archive.writestr(name, name)
    for split, said in (("train", b"set/train/a/1.png"), ("val", b"set/val/a/2.png")):
        source = Archive(tmp_path / "set.zip", split)
        assert len(source) == 1
        assert source[0] == (said, 0)


def test_damage_is_noticed(pictures, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "set"), "zip", pictures))
    source = Archive(path, "train")
    data = bytearray(path.read_bytes())
    start = int(source.places[5][0])
    data[start + 80] ^= 1
    data[int(source.places[6][0])] ^= 1
    path.write_bytes(data)
    for index in (5, 6):
        with pytest.raises(BadImage, match="the archive is damaged here"):
            _ = source[index]
    assert len(source[7][0]) > 100
    os.truncate(path, start + 50)
    with pytest.raises(BadImage, match="the archive ends before its member does"):
        _ = source[5]


def test_archives_that_cant_be_read_in_place(pictures, tmp_path):
    compressed = shutil.make_archive(str(tmp_path / "set"), "gztar", pictures)
    with pytest.raises(ValueError, match=r"set.tar.gz is neither a zip file nor an uncompressed tar file"):
        Archive(compressed, "train")
    with zipfile.ZipFile(tmp_path / "bz2.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("1.png", "1")
    with pytest.raises(ValueError, match=r"bz2.zip: 1.png is encrypted, or compressed by another method"):
        Archive(tmp_path / "bz2.zip", "train")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match=r"no images in .*empty.zip \(looked for .jpg"):
        Archive(tmp_path / "empty.zip", "train")
