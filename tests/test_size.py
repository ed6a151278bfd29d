"""The limits of what a reader follows: `./run size` prints the numbers."""

import ast
import json
import subprocess
import sys

import pytest
import size
from size import ROOT
from test_architecture import PACKAGES


@pytest.fixture(scope="module")
def trees():
    return size.sources()


@pytest.fixture(scope="module")
def traces():
    """Functions and modules, by the first words of their titles."""
    code = "import json, traces; print(json.dumps(traces.report()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_below_the_scripts_knows_the_command_line(trees):
    assert size.imports_of_the_roof(trees) == []
    assert size.flags_in_strings(trees) == {}


def test_no_package_imports_itself_through_others(trees):
    assert size.packages_in_circles(trees) == []
    planted = trees | {"mae/files/planted.py": ast.parse("def f():\n    from mae.training import loop")}
    assert {"mae.files", "mae.training"} <= set(size.packages_in_circles(planted))
    assert size.arrows_up(planted, PACKAGES) == ["mae.files.planted -> mae.training.loop"]


def test_what_is_counted():
    text = """
a, b = 1, 2
a, b = b, a
first, second = pair
names = ["x"] * has_names + "s" * (count > 1) + [0] * len(names)
has_names = not lacking
def f(run: Run, names: list[str]): run.changed({})
def g(which, whole): return names(cells=run.own)
self.places = whole
"""
    trees = {"mae/data/planted.py": ast.parse(text)}
    assert size.packed_assignments(trees) == ["mae/data/planted.py:2"]
    assert size.products_with_booleans(trees) == ["mae/data/planted.py:5"] * 2
    assert sorted(size.vague_names(trees)) == ["mae/data/planted.py:8 which", "mae/data/planted.py:9 places"]
    assert size.functions_with_run(trees) == ["mae/data/planted.py f"]
    assert size.changes_of_run(trees) == ["mae/data/planted.py:7"]


def test_lines_are_for_reading(trees):
    """But those of a claim of the speedrun are its author's: the rows have the SHA-256 of the file."""
    folder = "benchmarks/speedruns/"
    claims = {path for path in trees if path.startswith(folder)} - {f"{folder}baseline.py", f"{folder}pixels.py"}
    ours = {path: tree for path, tree in trees.items() if path not in claims}
    assert size.packed_assignments(ours) == []
    assert size.products_with_booleans(ours) == []
    assert size.vague_names(ours) == []


def test_settings_stay_in_the_session(trees):
    """Below it, functions take values: one takes all settings of a run, and nothing changes them."""
    assert len(size.functions_with_run(trees)) <= 5
    assert {position.partition(":")[0] for position in size.changes_of_run(trees)} <= {"mae/session.py"}


def test_a_setting_has_one_definition(trees):
    counts = size.definitions(trees)
    assert len(counts) > 100
    assert {name for name, count in counts.items() if count != 1} == set()


def test_scripts_are_short(trees):
    for script in ("main_pretrain.py", "main_finetune.py"):
        assert size.statements(ast.walk(trees[script])) <= 130, script


@pytest.mark.slow
def test_the_functions_that_a_value_passes_are_found(traces):
    """They are printed, and have no limit."""
    assert len(traces["functions that receive mask_ratio"]) >= 5
    assert len(traces["functions from main to backward"]) >= 1
    assert len(traces["functions that receive a file of --finetune"]) >= 5
    assert len(traces["functions that an image passes before the model"]) >= 20
