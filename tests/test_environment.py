"""Scripts started outside of their environment print a one-line error with the command to type."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

DEMOS = [[f"demo/{name}.py"] for name in ("unpack_data", "report", "segmentation", "app")]
COMMANDS = (["main_pretrain.py"], ["-m", "inference.predict"], ["submitit_pretrain.py"], *DEMOS)


@pytest.fixture
def clone(tmp_path):
    """The code, without a .venv."""
    for name in ("util", "inference", "demo"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data", "output", "__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def start(clone, *command):
    """Starts Python without the packages that are installed (-S)."""
    return subprocess.run([sys.executable, "-S", *command], cwd=clone, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_missing_packages_are_a_one_line_error(clone, command):
    done = start(clone, *command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "lacks torch, torchvision, timm, ...; type: " in line
    assert line.endswith("python3 -m venv ./.venv && source ./.venv/bin/activate && pip install .")
    (clone / ".venv/bin").mkdir(parents=True)
    assert start(clone, *command).stderr.endswith("; type: source ./.venv/bin/activate\n")


def test_a_program_that_imports_the_library_can_catch_the_error(clone):
    """torch.hub executes hubconf.py in the process of its caller."""
    code = "try: import hubconf\nexcept ImportError as error: print('caught', error)\nprint('runs on')\n1 / 0"
    done = start(clone, "-c", code)
    caught, after = done.stdout.splitlines()
    assert caught.startswith("caught -c: error: ")
    assert "lacks torch, torchvision, timm, ...; type: " in caught
    assert after == "runs on"
    assert "Traceback" in done.stderr  # other errors are reported as usual
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
