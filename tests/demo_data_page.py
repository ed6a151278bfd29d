"""The commands of docs/data.md: pre-training is better than random weights by the margin of the page."""

import re

import pytest
from test_data_page import read, run


@pytest.mark.parametrize("heading", ["Sounds", "Bands with clouds", "Signals"])
def test_pretraining_helps(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, commands = read(heading)
    margin = int(re.search(r"at least (\d+) points above", section)[1])
    _, _, trained, random, _ = [run(command) for command in commands]
    assert trained[10, 0.07] > random[10, 0.07] + margin
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size < 100_000
