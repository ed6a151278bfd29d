"""What a run tells."""

import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT

from util.runlog import Meters, RunLog, Stopwatch


def test_meters_are_means_over_batches():
    meters = Meters()
    meters.add(loss=2.0, grad_norm=1.0, lr=0.1, batches=3)
    meters.add(loss=6.0, grad_norm=1.0, lr=0.5, batches=1)
    assert meters.means() == pytest.approx({"train_loss": 3.0, "train_lr": 0.2})
    assert Meters(**meters.state_dict()) == meters
    meters.add(loss=math.nan, grad_norm=1.0, lr=0.5, batches=1)
    meters.add(loss=1.0, grad_norm=math.inf, lr=0.5, batches=1)
    assert meters.means() == pytest.approx({"train_loss": 3.0, "train_lr": 0.2, "skipped_steps": 2})
    assert Meters().means() == {"train_loss": None, "train_lr": None}


def test_stopwatch_counts_the_wait_alone():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    watch = Stopwatch()
    for _ in watch.watch(slow()):
        time.sleep(0.05)
    assert 0.3 < watch.wait_share < 0.7
    assert watch.seconds >= 0.3


def test_a_resumed_log_has_every_epoch_once(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "x": 1}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    RunLog(tmp_path, tmp_path, epochs=4, first_epoch=2).close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0, "x": 1}\n{"epoch": 1}\n'


def test_lines_where_there_is_no_terminal(tmp_path, caplog):
    caplog.set_level("INFO")
    log = RunLog(tmp_path, tmp_path, epochs=2)
    log.begin_epoch(1, 0, num_steps=10, images_per_step=8, watch=Stopwatch())
    for step in range(1, 11):
        log.step(step, lr=1e-3, loss=0.5, grad_norm=2.0)
    log.end_epoch({"train_lr": 1e-3, "train_loss": 0.5})
    log.close()
    first, last = (record.getMessage() for record in caplog.records)
    pattern = r"epoch 1 \[ 1/10\]  loss 0.5000  lr 1.00e-03  grad 2  [\d,]+ images/s  data wait 0%  left 0:00:00"
    assert re.fullmatch(pattern, first)
    assert last.startswith("epoch 1 done in 0:00:00: loss 0.5000")
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["epoch"] == 1
    assert line["train_loss"] == 0.5


def test_a_bar_on_a_terminal(tmp_path):
    """A real pseudo-terminal; tqdm writes what a person sees."""
    code = """
import time
from pathlib import Path
from util.runlog import RunLog, Stopwatch
log = RunLog(Path("."), Path("."), epochs=3)
log.begin_epoch(0, 0, num_steps=4, images_per_step=16, watch=Stopwatch())
for step in range(1, 5):
    time.sleep(0.15)  # the bar refreshes ten times a second
    log.step(step, lr=1e-3, loss=0.25, grad_norm=2.0)
log.end_epoch({"train_lr": 1e-3, "train_loss": 0.25})
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 150))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0
    text = seen.decode()
    for part in ("epoch 0/3", "loss 0.2500", "lr 1.00e-03", "img/s", "data wait", "run ends in"):
        assert part in text
