"""A sample of ./run faults, and a run that resumes with other numbers of processes."""

import ast
import re
import shutil
import signal
import subprocess
import sys

import faults
import pytest
from conftest import ROOT
from forks import Forks
from mains import assert_close, lines, small_run, wait_until

from mae.data.pixels import MAX_PIXELS


@pytest.mark.slow
def test_a_restart_by_torchrun_resumes_and_damaged_checkpoints_are_rejected_or_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "EPOCHS", 5)  # the process is killed in the second
    subprocess.run([sys.executable, "demo/unpack_data.py"], cwd=ROOT, check=True)
    few = faults.Faults(tmp_path, trials=1, loads=500)
    assert few.restarts(1) == [("one process of two killed, torchrun --max-restarts", 1, 1)]
    assert all(trials == survived for _, trials, survived in few.damage())


# A dataset that notes how many images are read, slowly.
COUNTING = """
import time
from torchvision.datasets import ImageFolder
class Counting(ImageFolder):
    def __getitem__(self, index):
        with open(f"{self.root}/../reads", "a") as file:
            file.write(".")
        time.sleep(0.01)
        return super().__getitem__(index)
def open_dataset(split, data_path):
    return Counting(f"{data_path}/{split}")
"""


@pytest.mark.slow
def test_a_run_resumes_with_other_numbers_of_processes(own_module, pictures, tmp_path):
    """A signal stops the run within an epoch twice: the losses of all epochs and the weights stay the same."""
    own_module("counting", COUNTING)
    shutil.copytree(pictures, tmp_path / "data")
    reads = tmp_path / "data/reads"

    def run(name, processes, stop_after=None):
        out, output = tmp_path / name, tmp_path / f"{name}.{processes}"
        flags = ("--dataset", "py:counting:open_dataset", "--batch_size", 4 // processes, "--epochs", 9)
        argv = small_run(tmp_path / "data", out, *flags, "--resume", "auto")
        run = Forks("main_pretrain.py", argv, output, processes)
        if stop_after:
            reads.write_text("")
            wait_until(lambda: reads.stat().st_size >= stop_after)  # of 24 in an epoch
            run.signal(signal.SIGTERM)
        assert set(run.wait(120)) == {128 + signal.SIGTERM if stop_after else 0}, output.read_text()
        return output.read_text()

    run("whole", 1)
    run("parts", 2, stop_after=58)
    assert "resuming from" in run("parts", 1, stop_after=72)
    assert "resuming from" in run("parts", 2)
    assert [line["epoch"] for line in lines(tmp_path / "parts")] == list(range(9))
    assert_close(tmp_path / "whole", tmp_path / "parts", "checkpoint-8.pth")  # losses and weights


def test_the_security_page_agrees_with_the_code():
    assert f"{MAX_PIXELS:,}" in (ROOT / "docs/security.md").read_text()
    folders = ("", "mae/*/", "mae/")
    code = "\n".join(path.read_text() for folder in folders for path in ROOT.glob(f"{folder}*.py"))
    assert not re.search(r"pickle\.load|yaml\.load\(|extractall", code)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loads = [call.keywords for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads
    for keywords in loads:
        assert [ast.unparse(word.value) for word in keywords if word.arg == "weights_only"] == ["True"]
