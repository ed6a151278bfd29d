"""The check of names against the table of terms."""

import identifiers
import pytest
from conftest import ROOT

TABLE = """# Contributing

## Terms

| concept | term | not | not in names |
|---|---|---|---|
| a text for the user | error message | sentence | sentence, told |
| flags | flag | switch | |

## Style
"""


def test_the_code_follows_the_terms():
    assert identifiers.problems() == []
    assert {"sentence", "mains"} <= identifiers.excluded_words((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("def tell_sentence(): pass", "tell_sentence"),
        ("class WhatWasTold: pass", "WhatWasTold"),
        ("def f(told): pass", "told"),
        ("told = 1", "told"),
        ("x.TOLD_ONCE = 1", "TOLD_ONCE"),
        ("import os as told", "told"),
        ("for told in (): pass", "told"),
    ],
)
def test_names_with_excluded_words_are_reported(line, name, tmp_path):
    (tmp_path / "CONTRIBUTING.md").write_text(TABLE)
    (tmp_path / "module.py").write_text(f'"""Told in a sentence."""\n\n{line}\n')
    (problem,) = identifiers.problems(tmp_path)
    assert problem.startswith(f"module.py:3: {name}: not ")


def test_other_names_are_accepted(tmp_path):
    (tmp_path / "CONTRIBUTING.md").write_text(TABLE)
    (tmp_path / "module.py").write_text("message = library.told(x.sentence)  # told\nuntold = 'told'\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_module.py").write_text("told = 1\n")
    assert identifiers.problems(tmp_path) == []
