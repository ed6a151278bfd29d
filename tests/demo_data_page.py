"""The examples of docs/data.md: pre-training is better than random weights by the margin of the page."""

import ast
import re

import pytest
from conftest import ROOT
from test_data_page import read, run
from test_docs import commands


@pytest.mark.parametrize("name", ["data_spectrograms", "data_bands", "data_signals"])
def test_pretraining_helps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, _ = read("Sounds, bands and signals")
    margin = int(re.search(rf"\[{name}\.py\].*?at least (\d+) points above", section)[1])
    docstring = ast.get_docstring(ast.parse((ROOT / f"examples/{name}.py").read_text()))
    _, _, trained, random, _ = [run(line) for line in commands(docstring) if line.startswith("    python ")]
    assert trained[10, 0.07] > random[10, 0.07] + margin
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size < 100_000
