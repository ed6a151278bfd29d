"""Atomic files: complete or absent, on full disks and after interrupted commands."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from mae.files import atomic


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_file_replaces_the_previous_one(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("one", "two"):
        with atomic.replacing(file) as written:
            assert written.name == "a.txt"  # some libraries choose the format by the suffix
            written.write_text(text)
            assert not file.exists() or file.read_text() == "one"
        assert file.read_text() == text
    assert names(tmp_path) == ["a.txt"]


def test_an_interrupted_write_leaves_the_previous_file(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    for error in (KeyboardInterrupt(), ValueError("no format"), RuntimeError("of the model")):
        with pytest.raises(type(error)) as raised, atomic.replacing(tmp_path / "a.txt") as written:
            written.write_text("half")
            raise error
        assert raised.value is error
        assert (names(tmp_path), (tmp_path / "a.txt").read_text()) == (["a.txt"], "before")


@pytest.mark.parametrize("name", ["a" * 250 + ".jpg", "\u00e9" * 127, "a" * 251])
def test_the_longest_names_can_be_written(tmp_path, name):
    for text in ("one", "two"):
        atomic.write_text(tmp_path / name, text)
    assert (names(tmp_path), (tmp_path / name).read_text()) == ([name], "two")


def test_temporary_files_of_killed_commands_are_removed(tmp_path):
    killed = "import os, sys\nfrom pathlib import Path\nfrom mae.files import atomic\n" + (
        "with atomic.replacing(Path(sys.argv[1])) as written:\n    written.write_text('half')\n    os._exit(9)"
    )
    code = subprocess.run([sys.executable, "-c", killed, tmp_path / "a.txt"], cwd=ROOT).returncode
    assert (code, names(tmp_path)) == (9, [".a.txt.tmp", ".a.txt.tmp/a.txt"])
    (tmp_path / ".b.txt.tmp").write_text("a file of that name is no obstacle")
    for name in ("a.txt", "b.txt"):
        atomic.write_text(tmp_path / name, "whole")
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_folder_appears_complete_or_is_updated_file_by_file(tmp_path):
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with atomic.replacing(folder) as written:
            (written / "parts").mkdir(parents=True)
            (written / "config.json").write_text(text)
            (written / "parts" / "a").write_text(text)
        assert {(folder / name).read_text() for name in ("config.json", "parts/a")} == {text}
        (folder / "README").write_text("mine")
    assert names(tmp_path) == ["model", "model/README", "model/config.json", "model/parts", "model/parts/a"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"), atomic.replacing(tmp_path / "file") as w:
        w.mkdir()
    assert (tmp_path / "file").read_text() == "x"


def test_relative_paths_links_and_devices_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic.replacing(Path(".")) as written:
        written.mkdir()
        (written / "a").write_text("a")
    with atomic.replacing(Path("m.onnx")) as written:
        written.write_text("graph")
        written.with_name("m.onnx.data").write_text("weights")
    assert names(tmp_path) == ["a", "m.onnx", "m.onnx.data"]
    (tmp_path / "link").symlink_to("a")
    atomic.write_text(tmp_path / "link", "through the link")
    assert (tmp_path / "a").read_text() == "through the link"
    assert (tmp_path / "link").is_symlink()
    atomic.write_text(Path("/dev/null"), "nothing")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(bytes(10**7)), lambda path: save_file({"weight": torch.zeros(10**6)}, path)
], ids=["plain", "safetensors"])  # fmt: skip
def test_a_full_disk_is_a_one_line_error(small_disk, write):
    """test_checkpoint.py fills it by torch.save."""
    path = small_disk / "file"
    path.write_text("before")
    with pytest.raises(OSError) as raised, atomic.replacing(path) as written:
        write(written)
    assert str(raised.value) == f"can't write {path} ({os.strerror(errno.ENOSPC)}): free space there, or write to " \
        "another folder"  # fmt: skip
    assert (path.read_text(), names(small_disk)) == ("before", ["file"])


def test_data_are_synced_before_the_rename(tmp_path, monkeypatch):
    """After a power failure, either the previous or the new file exists. This requires fsync before the rename."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", lambda a, b: calls.append(("rename", a.name)) or replace(a, b))
    with atomic.replacing(tmp_path / "a") as file:
        file.write_text("a")
    assert calls == [("fsync", "a"), ("rename", "a")]
    calls.clear()
    with atomic.replacing(tmp_path / "b", sync=False) as file:
        file.write_text("b")
    assert calls == [("rename", "b")]
