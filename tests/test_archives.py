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

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import transforms
from util.data.archives import Archive
from util.data.decode import BadImage, decode
from util.data.samples import Samples
from util.data.sources import find_files
from util.datasets import open_source


@pytest.fixture(params=["zip", "tar", "zip, stored", "tar of ./", "zip in a folder", "tar with a hard link"])
def packed(request, pictures, tmp_path):
    """`pictures` as archives of several formats."""
    return Path(pack(request.param, pictures, tmp_path))


def pack(how, pictures, tmp_path):
    if how in ("zip", "tar"):
        return shutil.make_archive(str(tmp_path / "set"), how, pictures)
    if how == "zip, stored":
        with zipfile.ZipFile(tmp_path / "stored.zip", "w") as archive:
            for path in pictures.rglob("*.*"):
                archive.write(path, path.relative_to(pictures))
        return tmp_path / "stored.zip"
    if how == "tar of ./":
        subprocess.run(["tar", "-cf", tmp_path / "dot.tar", "-C", pictures, "."], check=True)
        return tmp_path / "dot.tar"
    if how == "zip in a folder":
        return shutil.make_archive(str(tmp_path / "set"), "zip", pictures.parent, pictures.name)
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    first, second, *_ = sorted((copy / "train" / "cat").iterdir())
    second.unlink()
    os.link(first, second)
    return shutil.make_archive(str(tmp_path / "set"), "tar", copy)


def test_an_archive_has_the_images_of_its_folder(packed, pictures, tmp_path):
    folder = find_files((tmp_path / "copy" if (tmp_path / "copy").exists() else pictures) / "train")
    archive = Archive(packed, "train")
    assert archive.classes == folder.classes
    assert [archive[i] for i in range(len(archive))] == [folder[i] for i in range(len(folder))]
    assert archive.name(0) == f"{packed}: {folder.names[0]}"


def _sum(archive):
    return sum(len(archive[index][0]) for index in range(len(archive)))


def test_several_processes_read_one_archive(pictures, tmp_path):
    """Forked processes inherit the open file, others get the pickled source; no process changes another's offset."""
    archive = Archive(Path(shutil.make_archive(str(tmp_path / "set"), "zip", pictures)), "train")
    expected = _sum(archive)
    for method in ("fork", "spawn"):
        with get_context(method).Pool(4) as pool:
            assert pool.map(_sum, [archive] * 8) == [expected] * 8


def test_members_that_are_hidden_or_no_images_are_ignored(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("set/a/1.png", "set/a/._2.png", "__MACOSX/set/a/1.png", "set/readme.txt", "set/b/3.JPG"):
            archive.writestr(name, name)
    source = Archive(tmp_path / "set.zip", "train")
    assert [source.names[0], source.names[1]] == ["a/1.png", "b/3.JPG"]
    assert source.classes == ["a", "b"]
    assert source[1] == (b"set/b/3.JPG", 1)


def test_images_of_other_splits_are_ignored(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("set/train/a/1.png", "set/val/a/2.png"):
            archive.writestr(name, name)
    for split, content in (("train", b"set/train/a/1.png"), ("val", b"set/val/a/2.png")):
        source = Archive(tmp_path / "set.zip", split)
        assert len(source) == 1
        assert source[0] == (content, 0)


def test_absolute_names_have_splits_and_classes(pictures, tmp_path):
    subprocess.run(["tar", "-Pcf", tmp_path / "set.tar", pictures], check=True)  # an absolute folder
    folder, source = find_files(pictures / "train"), Archive(tmp_path / "set.tar", "train")
    assert list(source.names) == list(folder.names)
    assert source.classes == folder.classes


def test_damaged_archives_are_errors(pictures, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "set"), "zip", pictures))
    source = Archive(path, "train")
    data = bytearray(path.read_bytes())
    start = int(source.places[5][0])
    data[start + 80] ^= 1
    data[int(source.places[6][0])] ^= 1
    path.write_bytes(data)
    for index in (5, 6):
        with pytest.raises(BadImage, match="damaged"):
            _ = source[index]
    assert len(source[7][0]) > 100
    os.truncate(path, start + 50)
    with pytest.raises(BadImage, match="ends"):
        _ = source[5]


def test_damage_of_a_stored_member_is_an_error(tmp_path):
    """Only the checksum differs."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/1.png", b"pixels")
    source = Archive(path, None)
    assert source[0][0] == b"pixels"
    path.write_bytes(path.read_bytes().replace(b"pixels", b"pixelz"))
    with pytest.raises(BadImage, match="checksum"):
        _ = source[0]


def test_archives_that_cant_be_read_in_place_are_errors(pictures, tmp_path):
    compressed = Path(shutil.make_archive(str(tmp_path / "set"), "gztar", pictures))
    with pytest.raises(ValueError, match=r"set.tar.gz is neither"):
        Archive(compressed, "train")
    with zipfile.ZipFile(tmp_path / "bz2.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("1.png", "1")
    with pytest.raises(ValueError, match=r"bz2.zip: .* 1.png.* deflate"):
        Archive(tmp_path / "bz2.zip", "train")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match=r"--data_path .*empty.zip: there are no images"):
        Archive(tmp_path / "empty.zip", "train")


def tar_of(path, names, contents=b"12345"):
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return path


def test_a_damaged_or_truncated_tar_is_an_error(tmp_path):
    names = [f"{number}.png" for number in range(10)]
    whole = tar_of(tmp_path / "whole.tar", names).read_bytes()
    assert len(Archive(tmp_path / "whole.tar", "train")) == 10
    damaged = bytearray(whole)
    damaged[4 * 1024 + 10] ^= 1
    for name, data, last in (
        ("damaged", damaged, "3.png"), ("at a member", whole[: 6 * 1024], "5.png"), ("in one", whole[:6300], "5.png"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"truncated after {last}"):
            Archive(tmp_path / name, "train")


def test_sparse_files_are_errors_and_links_are_followed(tmp_path):
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "1.npy").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"some")
    subprocess.run(["tar", "-cSf", tmp_path / "sparse.tar", "-C", tmp_path, "in"], check=True)
    with pytest.raises(ValueError, match=r"1.npy .*sparse"):
        Archive(tmp_path / "sparse.tar", "train")
    for name in ("links.tar", "links.zip"):
        folder = tmp_path / name.replace(".", "")
        (folder / "a").mkdir(parents=True)
        (folder / "b").mkdir()
        (folder / "a" / "1.png").write_bytes(b"one")
        (folder / "b" / "2.png").symlink_to("../a/1.png")
        (folder / "b" / "3.png").symlink_to("/nowhere.png")
        if name == "links.tar":
            subprocess.run(["tar", "-cf", tmp_path / name, "-C", folder, "."], check=True)
        else:
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.write(folder / "a" / "1.png", "a/1.png")
                for link in ("2.png", "3.png"):
                    member = zipfile.ZipInfo(f"b/{link}")
                    member.external_attr = (stat.S_IFLNK | 0o777) << 16
                    archive.writestr(member, os.readlink(folder / "b" / link))
        source = Archive(tmp_path / name, "train")
        assert [source[0], source[1]] == [(b"one", 0), (b"one", 1)]
        with pytest.raises(BadImage, match="link"):
            _ = source[2]


def test_a_tar_with_a_zip_at_its_end_is_a_tar(tmp_path):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("m.png", "m")
    subprocess.run(["touch", tmp_path / "1.png"], check=True)
    subprocess.run(["tar", "-b", "1", "-cf", tmp_path / "set.tar", "-C", tmp_path, "1.png", "inner.zip"], check=True)
    assert Archive(tmp_path / "set.tar", "train").names[0] == "1.png"


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_deeply_nested_splits_are_found(tmp_path, separator):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("home/me/data/train/a/1.png", "home/me/data/train/b/2.png", "home/me/data/val/a/3.png"):
            archive.writestr(name, name)
    data = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(data.replace(b"/", separator.encode()))
    source = Archive(tmp_path / "set.zip", "train")
    assert source.classes == ["a", "b"]
    assert len(source) == 2
    assert len(Archive(tmp_path / "set.zip", "val")) == 1


def test_zip_bombs_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(50_000_000))
    source = Archive(tmp_path / "bomb.zip", "train")
    source.places[0][3] = 1000  # the size in a wrong header
    with pytest.raises(BadImage, match="checksum"):
        _ = source[0]
    source.places[0][3] = 5 << 30
    with pytest.raises(BadImage, match=r"5,368,709,120 bytes .*1,073,741,824"):
        _ = source[0]


def crooked_zip(path: Path, good: bytes) -> Path:
    """A zip file with one good image; the other members have wrong sizes, or are links, encrypted or nested."""
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    link.compress_type = zipfile.ZIP_DEFLATED
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("a/good.png", good)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/good.png", good)
        archive.writestr(link, "x" * 50_000_000)
        archive.writestr("a/nested.png", nested.getvalue())
        archive.writestr("a/bzip2.png", good, zipfile.ZIP_BZIP2)
        for name in ("a/encrypted.png", "a/stored_long.png", "a/unpacked_long.png", "a/short.png"):
            archive.writestr(name, good)
    data = bytearray(path.read_bytes())
    for name, at, value in (
        (b"a/encrypted.png", 8, b"\1"), (b"a/stored_long.png", 20, b"\xf0\xff\xff\xff"),
        (b"a/unpacked_long.png", 24, b"\xf0\xff\xff\xff"), (b"a/short.png", 24, b"\5\0\0\0"),
    ):  # fmt: skip
        start = data.rindex(name) - 46 + at  # the entry in the directory at the end
        data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


LIES = {
    "bzip2.png": "compressed with method 12",
    "encrypted.png": "it is encrypted",
    "link.png": "it is a link to a file that is not in the archive",
    "nested.png": "not an image of a known format",
    "short.png": "the checksum does not match",
    "stored_long.png": "it has 2,147,483,648 bytes when unpacked",
    "unpacked_long.png": "it has 2,147,483,648 bytes when unpacked",
}


def test_zip_members_with_wrong_headers_are_bad_images(tmp_path):
    """Sizes are checked before memory is allocated, and the members count as bad images."""
    good = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(good, "PNG")
    source = Archive(crooked_zip(tmp_path / "set.zip", good.getvalue()), "train")
    why = {}
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
    for name, message in LIES.items():
        assert message in why[name]
    transform = transforms.keeps_label(transforms.pretrain_transform(8))
    samples = Samples(source, transform, in_chans=3, seed=0, on_bad_image="skip")
    taken = [samples[(0, index)] for index in range(len(source))]
    assert [len(sample.bad) > 0 for sample in taken].count(False) == 1
    assert all(torch.isfinite(sample.image.float()).all() for sample in taken)


def test_tar_headers_with_wrong_sizes_are_errors(tmp_path):
    """A negative size would make tarfile loop; a long name could fill the memory."""
    for size, kind in ((-1024, tarfile.REGTYPE), (8 << 30, tarfile.GNUTYPE_LONGNAME)):
        member = tarfile.TarInfo("1.png")
        member.size, member.type = size, kind
        (tmp_path / "set.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(ValueError, match=rf"set.tar is damaged .*{size:,} bytes|is neither a zip"):
            Archive(tmp_path / "set.tar", "train")
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("1.png")
        member.pax_headers = {"size": "-1024"}
        archive.addfile(member)
    # Python before 3.11.4 stops at such a header.
    message = r"pax.tar is damaged or truncated after 1.png: its size is -1024|\S*pax.tar: there are no images"
    with pytest.raises(ValueError, match=message):
        Archive(tmp_path / "pax.tar", "train")


def test_an_archive_closes_its_file(pictures, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "set"), "tar", pictures))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        _ = Archive(path, "train")[0]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_numpy_arrays_is_no_archive(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="NumPy"):
        open_source("train", str(tmp_path / "images.npz"))


def test_a_list_beside_an_archive_is_relative_to_its_own_folder(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "a.png")
    (tmp_path / "val" / "list.csv").write_text("path,label\na.png,cat\n")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(tmp_path / "val" / "a.png", "cat/a.png")
    source = open_source("val", str(tmp_path / "train.zip"), str(tmp_path / "val" / "list.csv"))
    assert (len(source), source.classes) == (1, ["cat"])
