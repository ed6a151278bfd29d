"""Runs of the mains: in several processes, stopped on the way, compared."""

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, torchrun

from util.checkpoints import checkpoint
from util.training import saver


def weights(out, name="checkpoint-1.pth"):
    return checkpoint.read(out / name)["model"]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_close(a, b, name="checkpoint-1.pth"):
    """Two runs that add up in another order. Keys' biases are left out: their gradient is zero but for rounding."""
    ours, theirs = weights(a, name), weights(b, name)
    for name in ours:
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    for line_a, line_b in zip(lines(a), lines(b), strict=True):
        assert line_a["train_loss"] == pytest.approx(line_b["train_loss"], rel=1e-5)


def lines(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Waits for a condition; fails at the deadline, or with the output of a process that ends before."""
    ends = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < ends, f"nothing happened in {seconds:g} s"
        time.sleep(0.02)


class Stopped(BaseException):
    """As sudden as a killed process: nothing is saved because of it."""


def stop_after(monkeypatch, method, calls):
    """Makes the run die after so many calls of a saver's method, as a killed process would."""
    original, count = getattr(saver.Saver, method), iter(range(1, 1000))

    def save_and_stop(self, *args, **options):
        original(self, *args, **options)
        if next(count) == calls:
            self.close()  # what it had begun to write
            raise Stopped

    monkeypatch.setattr(saver.Saver, method, save_and_stop)


def in_processes(processes, pictures, out, *flags, script="main_pretrain.py", check=True):
    """main_pretrain.py as `pretrain` runs it, in several processes, or one of its own."""
    command = [
        *([sys.executable] if processes == 1 else torchrun(processes)), script,
        "--data_path", pictures, "--output_dir", out, "--model", "mae_vit_mini_patch4", "--input_size", 16,
        "--warmup_epochs", 1, "--blr", 0.01, "--num_workers", 0, "--device", "cpu", "--vis_every", 0, *flags,
    ]  # fmt: skip
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=check, capture_output=True, timeout=300)
