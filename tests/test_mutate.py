"""The list of changes in tests/mutants/: each applies to the code as it is, and names tests that exist."""

import subprocess
import sys

import pytest
from conftest import ROOT
from mutate import Mutant, read_mutants

SOURCE = "def f(x):\n    return x + 1\n\n\nclass A:\n    def f(self, x):\n        return x + 1\n"


def test_every_change_applies():
    problems = []
    for mutant in read_mutants():
        try:
            mutant.apply((ROOT / mutant.file).read_text())
        except ValueError as error:
            problems.append(str(error))
    assert problems == []


def test_every_selection_of_tests_exists():
    files = {test.split("::")[0] for mutant in read_mutants() for test in mutant.tests if not test.startswith("-")}
    names = {test for mutant in read_mutants() for test in mutant.tests if "::" in test}
    assert [file for file in files if not (ROOT / file).exists()] == []
    without_file = [mutant for mutant in read_mutants() if all(test.startswith("-") for test in mutant.tests)]
    assert without_file == []  # it would select from all tests
    for name in names:
        file, test = name.split("::", 1)
        assert f"def {test.split('[')[0]}(" in (ROOT / file).read_text(), name


def test_a_change_stays_in_its_function():
    changed = Mutant("a.py", "A.f", "x + 1", "x - 1", ()).apply(SOURCE)
    assert changed == SOURCE.replace("        return x + 1", "        return x - 1")


@pytest.mark.parametrize(
    ("function", "snippet", "replacement", "message"),
    [
        ("g", "x + 1", "x - 1", "there is no function g"),
        ("", "x + 1", "x - 1", "stands 2 times"),
        ("f", "x + 2", "x - 1", "stands 0 times"),
        ("f", "x + 1", "x +", "no Python"),
        ("f", "x + 1", "(x + 1)", "nothing is changed"),
    ],
)
def test_a_change_that_does_not_apply_is_an_error(function, snippet, replacement, message):
    with pytest.raises(ValueError, match=message):
        Mutant("a.py", function, snippet, replacement, ()).apply(SOURCE)


def test_a_selection_without_changes_is_one_line():
    command = [sys.executable, "tests/mutate.py", "models_nothing.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "tests/mutants/ has no change of models_nothing.py (FILE or FILE:CLASS.FUNCTION)\n"
