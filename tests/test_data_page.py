"""The short commands of docs/data.md. tests/demo_data_page.py runs the long ones."""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from forks import ROOT
from mains import call, lines, run_section


def read(heading: str) -> tuple[str, list[str]]:
    """A section of the page on one line, and its commands."""
    section = (ROOT / "docs/data.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    return section.replace("\n", " "), block[1].replace("\\\n", " ").splitlines() if block else []


def run(command: str) -> Any:
    """Runs a command; scripts run in this process, without the seconds of a start."""
    program, script, *argv = shlex.split(command)
    if program != "python":
        return subprocess.run(["bash", "-ec", command], check=True)
    module = import_module(script.removesuffix(".py").replace("/", "."))
    if script.startswith("examples/data_"):
        return module.generate(Path(argv[0]))
    return call(module, *argv)


@pytest.mark.slow
def test_images_and_tables_of_the_repository_train(tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    for command in read("Files and tables")[1]:
        run(command)
    assert "test_mae" in lines(tmp_path / "runs/weights")[-1]
    for name in ("photos", "clothes"):
        losses = [line["train_loss"] for line in lines(tmp_path / "runs" / name)]
        assert max(losses[-5:]) < 0.9 * losses[0]


def test_an_extra_input_trains(tmp_path):
    assert "checkpoint-1.pth" in run_section("docs/data.md", "## An extra input", tmp_path)
