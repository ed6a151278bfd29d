"""The examples of docs/data.md: pre-training is better than random weights by the margin of the page."""

import ast
import re

import pytest
from conftest import ROOT
from test_data_page import read, run
from test_docs import commands


@pytest.mark.parametrize(("name", "heading"), [
    ("data_clips", "Clips and volumes"), ("data_volumes", "Clips and volumes"),  # the longest first
    ("data_bands", "Sounds, bands and signals"), ("data_spectrograms", "Sounds, bands and signals"),
    ("data_signals", "Sounds, bands and signals"),
])  # fmt: skip
def test_pretraining_helps(name, heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, _ = read(heading)
    margin = int(re.search(rf"\[{name}\.py\].*?at least (\d+) points above", section)[1])
    docstring = ast.get_docstring(ast.parse((ROOT / f"examples/{name}.py").read_text()))
    _, _, trained, random, _ = [run(line) for line in commands(docstring) if line.startswith("    python ")]
    assert trained[10, 0.07] > random[10, 0.07] + margin
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size < 100_000
