"""A sample of ./run faults, and a run that resumes with other numbers of processes."""

import ast
import hashlib
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from faults import Faults
from forks import Forks
from mains import assert_close, lines, small_run


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    subprocess.run([sys.executable, "demo/unpack_data.py"], cwd=ROOT, check=True)
    return Faults(tmp_path_factory.mktemp("faults"), trials=1, loads=500)


def test_a_run_restarted_by_torchrun_resumes(faults):
    assert faults.restarts(1) == [("one process of two killed, torchrun --max-restarts", 1, 1)]


def test_damaged_checkpoints_are_rejected_or_equal(faults):
    assert all(trials == survived for _, trials, survived in faults.damage())


# main_pretrain.py, slowed down, with a log of the indices of its samples.
NOTING = """
import os, sys, time
sys.path.insert(0, {root!r})
from util.cli import entry_point; from util.data import samples
finish = samples.Samples.finish
def note(self, *sample):
    epoch, index, _ = sample[-3:]
    with open(f"{{os.environ['NOTES']}}/{{epoch}}", "a") as file:
        file.write(f"{{index}} ")
    time.sleep(0.01)
    return finish(self, *sample)
samples.Samples.finish = note
import main_pretrain
entry_point.run(main_pretrain.main, main_pretrain.get_args_parser())
"""


def test_a_run_resumes_with_other_numbers_of_processes(pictures, tmp_path):
    """A signal stops the run within an epoch twice: the samples of each epoch and the losses stay the same."""
    script = tmp_path / "noting.py"
    script.write_text(NOTING.format(root=str(ROOT)))

    def run(name, processes, stop_after=None):
        out, notes = tmp_path / name, tmp_path / f"{name}.notes"
        notes.mkdir(exist_ok=True)
        flags = small_run(pictures, out, "--batch_size", 4 // processes, "--epochs", 9, "--resume", "auto")
        output = tmp_path / f"{name}.{processes}"
        run = Forks(script, flags, output, processes, {"NOTES": str(notes)})
        if stop_after is not None:
            while not (notes / str(stop_after)).exists():
                assert all(process.is_alive() for process in run.processes), output.read_text()
                time.sleep(0.005)
            run.signal(signal.SIGTERM)
        codes = run.wait(120)
        assert stop_after is not None or not any(codes), output.read_text()
        return output.read_text()

    run("whole", 1)
    run("parts", 2, stop_after=2)
    assert "resuming from" in run("parts", 1, stop_after=5)
    assert "resuming from" in run("parts", 2)
    for epoch in range(9):
        ids_of = [sorted(map(int, (tmp_path / f"{name}.notes" / str(epoch)).read_text().split())) for name in
                ("whole", "parts")]  # fmt: skip
        digests = [hashlib.sha256(str(sorted(set(ids))).encode()).hexdigest() for ids in ids_of]
        assert digests[0] == digests[1], epoch
    parts = lines(tmp_path / "parts")
    assert [line["epoch"] for line in parts] == list(range(9))
    assert_close(tmp_path / "whole", tmp_path / "parts", "checkpoint-8.pth")  # losses and weights


def test_the_security_page_agrees_with_the_code():
    text = (ROOT / "SECURITY.md").read_text()
    from util.data.decode import MAX_PIXELS

    assert f"{MAX_PIXELS:,}" in text
    folders = ("", "util/*/", "util/", "inference/")
    code = "\n".join(path.read_text() for folder in folders for path in ROOT.glob(f"{folder}*.py"))
    assert not re.search(r"pickle\.load|yaml\.load\(|extractall", code)
    calls = [node for node in ast.walk(ast.parse(code))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]  # fmt: skip
    assert calls
    for call in calls:
        assert [ast.unparse(word.value) for word in call.keywords if word.arg == "weights_only"] == ["True"]
