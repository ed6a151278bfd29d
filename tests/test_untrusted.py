"""Untrusted files: names with control characters, pipes, devices, endless files."""

import logging
import os
import socket

import forks
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mae.files.untrusted import MAX_BYTES, escape_dollars, printable
from mae.training import log


def test_untrusted_names_are_escaped(capsys):
    assert printable("plain, ünïcode 图 and blanks") == "plain, ünïcode 图 and blanks"
    assert printable("a\x1b]0;title\x07b\r\nc\x9b2J") == r"a\x1b]0;title\x07b\r\nc\x9b2J"
    assert printable("gnp.\u202eevil\udce9") == r"gnp.\u202eevil\udce9"
    line = logging.LogRecord("", logging.WARNING, "", 0, "class \x1b]0;owned\x07\nand more", (), None)
    log.LineHandler().emit(line)
    assert capsys.readouterr().out == "warning: class \\x1b]0;owned\\x07\nand more\n"


@pytest.mark.parametrize("text", ["$1-$5", "$", r"a\$\frac{1$", "plain"])
def test_names_with_dollars_are_no_formulas(text):
    """matplotlib draws the same pixels as without formulas."""
    drawn = []
    for label, options in ((escape_dollars(text), {}), (text, {"parse_math": False})):
        figure = Figure((2, 1), dpi=50)
        figure.text(0.1, 0.5, label, **options)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn.append(bytes(canvas.buffer_rgba()))
    assert drawn[0] == drawn[1]


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
