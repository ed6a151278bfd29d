"""Untrusted files: names with control characters, pipes, devices, endless files."""

import logging
import os
import socket

import forks

from mae.files.untrusted import MAX_BYTES, printable
from mae.training import log


def test_untrusted_names_are_escaped(capsys):
    assert printable("plain, ünïcode 图 and blanks") == "plain, ünïcode 图 and blanks"
    assert printable("a\x1b]0;title\x07b\r\nc\x9b2J") == r"a\x1b]0;title\x07b\r\nc\x9b2J"
    assert printable("evil\udce9") == r"evil\udce9"
    line = logging.LogRecord("", logging.WARNING, "", 0, "class \x1b]0;owned\x07\nand more", (), None)
    log.LineHandler().emit(line)
    assert capsys.readouterr().out == "warning: class \\x1b]0;owned\\x07\nand more\n"


def test_a_dataset_of_pipes_devices_and_unusual_names_is_read_safely(tmp_path):
    """The command terminates, names all files, and prints no control characters."""
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("pipe", tmp_path / "pipe"), ("zero", "/dev/zero"), ("socket", tmp_path / "socket")):
        (folder / f"{name}.png").symlink_to(target)
    (folder / "\x1b]0;owned\x07.png").write_bytes(b"P5 \x1b[2J")
    with (folder / "endless.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert forks.Forks("mae/data/__main__.py", [folder, "--num_workers", 0], tmp_path / "output").wait(120) == [1]
    output = (tmp_path / "output").read_text()
    assert "unreadable  5" in output
    assert output.count("not a regular file") == 2
    assert "No such device" in output
    assert "1,073,741,825 bytes, and at most 1,073,741,824 are read" in output
    assert r"\x1b]0;owned\x07.png" in output
    assert not set("\x1b\x07") & set(output)
