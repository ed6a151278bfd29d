"""Tar and zip files read in place."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
import tracemalloc
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from mains import open_source
from PIL import Image
from test_decode import saved

from mae.data import transforms
from mae.data.decode import decode
from mae.data.kinds.archives import open_archive
from mae.data.kinds.folders import find_files
from mae.data.pixels import BadImage
from mae.data.samples import Samples


def zip_of(path, names, **options):
    """A zip file, the members of which contain their names."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, name)
    return path


FORMATS = (
    "zip",
    "zip, stored",
    "zip in a folder",
    "zip64",
    "tar",
    "tar of ./",
    "tar -P",
    "tar with a hard link",
    "pax",
    "gnu",
)


@pytest.fixture(params=FORMATS)
def packed(request, pictures, tmp_path):
    """`pictures` as archives of several formats, and the folder with the same images."""
    kind, folder, out = request.param, shutil.copytree(pictures, tmp_path / "copy"), tmp_path / "set"
    if kind == "tar with a hard link":
        first, second, *_ = sorted((folder / "train" / "cat").iterdir())
        second.unlink()
        os.link(first, second)
    if kind in ("zip", "tar", "tar with a hard link"):
        return shutil.make_archive(str(out), kind[:3], folder), folder
    if kind == "zip in a folder":
        return shutil.make_archive(str(out), "zip", tmp_path, "copy"), folder
    if kind in ("tar of ./", "tar -P"):  # absolute names
        subprocess.run(
            ["tar", *(["-cf", out, "-C", folder, "."] if kind[-1] == "/" else ["-Pcf", out, folder])], check=True
        )
    elif kind in ("pax", "gnu"):  # names of more than 100 and of more than 255 bytes
        for split in ("train", "val"):
            for number, path in enumerate([*(folder / split).rglob("*.*")]):
                path.rename(path.with_name(f"{'long' * (30 + 20 * (number % 2))}-{path.name}"))
        with tarfile.open(out, "w", format={"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[kind]) as archive:
            archive.add(folder, "é" * 60)
    else:
        if kind == "zip64":  # positions of more than 32 bits, as of an archive that unpacks itself
            out.write_text("#!")
            os.truncate(out, 5 << 30)
        with zipfile.ZipFile(out, "a") as archive:
            for path in folder.rglob("*.*"):
                archive.write(path, path.relative_to(folder))
    return out, folder


def test_an_archive_has_the_images_of_its_folder(packed):
    path, folder = Path(packed[0]), find_files(packed[1] / "train")
    archive = open_archive(path, "train")
    assert archive.classes == folder.classes
    assert [archive[i] for i in range(len(archive))] == [folder[i] for i in range(len(folder))]
    assert archive.name(0) == f"{path}: {folder.names[0]}"


def test_members_behind_many_gigabytes_are_read(tmp_path):
    """A member of more than 8 GiB has a size of another format. The file is sparse."""
    with (tmp_path / "large.tar").open("wb") as file:
        for name, data, hole, kind in (
            ("a.bin", b"", 9 << 30, tarfile.GNU_FORMAT), ("b.bin", b"", 9 << 30, tarfile.PAX_FORMAT),
            ("c.png", b"image", 507, tarfile.GNU_FORMAT),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data) or hole
            file.write(member.tobuf(kind) + data)
            file.seek(hole, os.SEEK_CUR)
        file.write(bytes(1024))
    archive = open_archive(tmp_path / "large.tar", "train")
    assert (list(archive.names), archive[0][0]) == (["c.png"], b"image")


def _sum(archive):
    return sum(len(archive[index][0]) for index in range(len(archive)))


@pytest.mark.slow
def test_several_processes_read_one_archive(pictures, tmp_path):
    """Forked processes inherit the open file, others get the pickled source; no process changes another's offset."""
    archive = open_archive(Path(shutil.make_archive(str(tmp_path / "set"), "zip", pictures)), "train")
    expected = _sum(archive)
    for method in ("fork", "spawn"):
        with get_context(method).Pool(2) as pool:
            assert pool.map(_sum, [archive] * 8) == [expected] * 8


def test_members_that_are_hidden_or_no_images_are_ignored(tmp_path):
    names = ("set/a/1.png", "set/a/._2.png", "__MACOSX/set/a/1.png", "set/readme.txt", "set/b/3.JPG")
    source = open_archive(zip_of(tmp_path / "set.zip", names), "train")
    assert list(source.names) == ["a/1.png", "b/3.JPG"]
    assert source.classes == ["a", "b"]
    assert source[1][:2] == (b"set/b/3.JPG", 1)


def test_damaged_archives_are_errors(pictures, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "set"), "zip", pictures))
    source = open_archive(path, "train")
    data = bytearray(path.read_bytes())
    start = int(source.files.positions[5][0])
    data[start + 80] ^= 1
    data[int(source.files.positions[6][0])] ^= 1
    path.write_bytes(data)
    for index in (5, 6):
        with pytest.raises(BadImage, match="damaged"):
            _ = source[index]
    assert len(source[7][0]) > 100
    os.truncate(path, start + 50)
    with pytest.raises(BadImage, match="ends"):
        _ = source[5]
    stored = open_archive(zip_of(tmp_path / "stored.zip", ["a/1.png"]), None)
    assert stored[0][0] == b"a/1.png"
    data = (tmp_path / "stored.zip").read_bytes()
    (tmp_path / "stored.zip").write_bytes(data.replace(b"a/1.png", b"a/1.pnz", 2).replace(b"a/1.pnz", b"a/1.png", 1))
    with pytest.raises(BadImage, match="checksum"):
        _ = stored[0]


def test_archives_that_cant_be_read_in_place_are_errors(pictures, tmp_path):
    """tarfile takes a damaged header, and a missing end, for the end of the archive."""
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for number in range(10):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 5
            archive.addfile(member, io.BytesIO(b"12345"))
    assert len(open_archive(tmp_path / "whole.tar", "train")) == 10
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "header.tar").write_bytes(whole[: 4 * 1024 + 10] + b"damage" + whole[4 * 1024 + 16 :])
    (tmp_path / "end.tar").write_bytes(whole[: 6 * 1024])
    (tmp_path / "middle.tar").write_bytes(whole[:6300])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.npy").write_bytes(b"some")
    os.truncate(tmp_path / "in/1.npy", 1 << 20)
    subprocess.run(["tar", "-cSf", tmp_path / "sparse.tar", "-C", tmp_path, "in"], check=True)
    shutil.make_archive(str(tmp_path / "set"), "gztar", pictures)
    zip_of(tmp_path / "empty.zip", ["readme.txt"])
    for name, message in (
        ("header.tar", "3.png"), ("end.tar", "5.png"), ("middle.tar", "5.png"), ("sparse.tar", "1.npy"),
        ("set.tar.gz", "set.tar.gz"), ("empty.zip", "data_path=.*empty.zip"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_source("train", str(tmp_path / name))


def test_links_of_a_tar_are_followed(tmp_path):
    (tmp_path / "in/b").mkdir(parents=True)
    (tmp_path / "in/a").mkdir()
    (tmp_path / "in/a/1.png").write_text("a/1.png")
    for name, target in {"b/2.png": "../a/1.png", "b/3.png": "/nowhere.png"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    subprocess.run(["tar", "-cf", tmp_path / "links.tar", "-C", tmp_path / "in", "."], check=True)
    source = open_archive(tmp_path / "links.tar", "train")
    assert [source[0][:2], source[1][:2]] == [(b"a/1.png", 0), (b"a/1.png", 1)]
    with pytest.raises(BadImage, match="link"):
        _ = source[2]


def zip_link(name, compression=zipfile.ZIP_STORED):
    member = zipfile.ZipInfo(name)
    member.external_attr, member.compress_type = (stat.S_IFLNK | 0o777) << 16, compression
    return member


def test_a_tar_with_a_zip_at_its_end_is_a_tar(tmp_path):
    zip_of(tmp_path / "inner.zip", ["m.png"])
    (tmp_path / "1.png").touch()
    subprocess.run(["tar", "-b", "1", "-cf", tmp_path / "set.tar", "-C", tmp_path, "1.png", "inner.zip"], check=True)
    assert open_archive(tmp_path / "set.tar", "train").names[0] == "1.png"


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("folder", ["set", "home/me/data"])
def test_splits_are_found_in_any_folder(tmp_path, folder, separator):
    names = [f"{folder}/{name}" for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png")]
    file = zip_of(tmp_path / "set.zip", names)
    file.write_bytes(file.read_bytes().replace(b"/", separator.encode()))
    source, validation = (open_archive(file, split) for split in ("train", "val"))
    assert (source.classes, len(source), len(validation)) == (["a", "b"], 2, 1)
    if separator == "/":
        assert (source[1][:2], validation[0][:2]) == ((names[1].encode(), 1), (names[2].encode(), 0))


LIES = {
    **dict.fromkeys(("bzip2.png", "encrypted.png", "link.png"), "it is encrypted, compressed by another method than"),
    "nested.png": "not an image of a known format", "short.png": "the checksum does not match",
    **dict.fromkeys(("stored_long.png", "unpacked_long.png"), "it has 2,147,483,648 bytes when unpacked"),
}  # fmt: skip


def test_zip_members_with_wrong_headers_are_bad_images(tmp_path):
    """One image is good. Sizes are checked before memory is allocated, and the members count as bad images."""
    path, good = tmp_path / "set.zip", saved(Image.new("RGB", (16, 16), "red"), "PNG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/good.png", good)
        archive.writestr(zip_link("a/link.png", zipfile.ZIP_DEFLATED), "x" * 50_000_000)
        archive.writestr("a/nested.png", zip_of(tmp_path / "nested.zip", ["a/good.png"]).read_bytes())
        archive.writestr("a/bzip2.png", good, zipfile.ZIP_BZIP2)
        for name in ("a/encrypted.png", "a/stored_long.png", "a/unpacked_long.png"):
            archive.writestr(name, good)
        archive.writestr("a/short.png", bytes(50_000_000))
    data = bytearray(path.read_bytes())
    for name, at, value in (
        (b"a/encrypted.png", 8, b"\1"), (b"a/stored_long.png", 20, b"\xf0\xff\xff\xff"),
        (b"a/unpacked_long.png", 24, b"\xf0\xff\xff\xff"), (b"a/short.png", 24, b"\5\0\0\0"),
    ):  # fmt: skip
        start = data.rindex(name) - 46 + at  # the entry in the directory at the end
        data[start : start + len(value)] = value
    path.write_bytes(data)
    source, why = open_archive(path, "train"), {}
    tracemalloc.start()
    for index in range(len(source)):
        try:
            decode(source[index][0], 3)
        except BadImage as error:
            why[source.names[index]] = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert why.keys() == LIES.keys()
    assert [name for name, message in LIES.items() if message not in why[name]] == []
    transform = transforms.pretrain_transform(8)
    samples = Samples(source, transform, in_chans=3, seed=0, on_bad_image="skip")
    taken = [samples[(0, index)] for index in range(len(source))]
    assert [len(sample.bad) > 0 for sample in taken].count(False) == 1
    assert all(torch.isfinite(sample.item.image.float()).all() for sample in taken)


def test_tar_headers_with_wrong_sizes_are_errors(tmp_path):
    """A negative size would make tarfile loop; a long name could fill the memory."""
    for size, kind in ((-1024, tarfile.REGTYPE), (7 << 30, tarfile.GNUTYPE_LONGNAME)):
        member = tarfile.TarInfo("1.png")
        member.size, member.type = size, kind
        (tmp_path / "set.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(ValueError, match=r"set.tar"):
            open_archive(tmp_path / "set.tar", "train")
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("1.png")
        member.pax_headers = {"size": "-1024"}
        archive.addfile(member)
    # Python before 3.11.4 stops at such a header.
    with pytest.raises(ValueError, match=r"pax.tar"):
        open_archive(tmp_path / "pax.tar", "train")


def test_an_archive_closes_its_file(pictures, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "set"), "tar", pictures))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        _ = open_archive(path, "train")[0]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_list_beside_an_archive_is_relative_to_its_own_folder(tmp_path, caplog):
    """If it has the first file of the list. The log tells it."""
    caplog.set_level("INFO")
    (tmp_path / "val").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "a.png")
    (tmp_path / "val" / "list.csv").write_text("path,label\na.png,cat\n")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(tmp_path / "val" / "a.png", "cat/a.png")
    source = open_source("val", str(tmp_path / "train.zip"), str(tmp_path / "val" / "list.csv"))
    assert (len(source), source.classes) == (1, ["cat"])
    assert f"files of {tmp_path / 'val'}" in caplog.text
    (tmp_path / "list.csv").write_text("path,label\ncat/a.png,dog\n")
    source = open_source("val", str(tmp_path / "train.zip"), str(tmp_path / "list.csv"))
    assert (source.name(0), source.classes) == (f"{tmp_path}/train.zip: cat/a.png", ["dog"])
    assert f"files of {tmp_path / 'train.zip'}" in caplog.text
