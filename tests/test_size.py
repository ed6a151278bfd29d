"""The limits of what a reader follows: `./run size` prints the numbers."""

import json
import subprocess
import sys

import pytest
import size
from conftest import ROOT

# Files of the published code contain their settings as an argparse.Namespace.
READS_NAMESPACES = ["mae/checkpoints/checkpoint.py"]


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
    assert size.imports_of_the_roof(trees) == READS_NAMESPACES
    assert size.flags_in_strings(trees).total() <= 20


def test_a_setting_has_one_definition(trees):
    counts = size.definitions(trees)
    assert len(counts) > 100
    assert {name for name, count in counts.items() if count != 1} == set()


def test_scripts_are_short(trees):
    for script in ("main_pretrain.py", "main_finetune.py"):
        assert size.statements(size.ast.walk(trees[script])) <= 130, script


@pytest.mark.slow
def test_a_value_passes_few_functions(traces):
    assert 5 <= len(traces["functions that receive mask_ratio"]) <= 10
    assert 5 <= len(traces["functions that receive a file of --finetune"]) <= 20
    assert 20 <= len(traces["functions that an image passes before the model"]) <= 40
