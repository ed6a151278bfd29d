"""The log of a run: header, progress, log.txt, TensorBoard."""

import contextlib
import json
import logging
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from util import dist
from util.training import run_log, trainer
from util.training.run_log import Meters, RunLog, Stopwatch, start_logging


def test_meters_are_means_over_updates():
    meters = Meters()
    for loss, lr in ((2.0, 0.1), (2.0, 0.1), (2.0, 0.1), (6.0, 0.5)):
        meters.add(loss, 1.0, lr)
    assert meters.means() == pytest.approx({"train_loss": 3.0, "train_lr": 0.2})
    assert Meters(**meters.state_dict()) == meters
    meters.add(loss=math.nan, grad_norm=1.0, lr=0.5)
    meters.add(loss=1.0, grad_norm=math.inf, lr=0.5)
    assert meters.means() == pytest.approx({"train_loss": 3.0, "train_lr": 0.2, "skipped_steps": 2})
    assert Meters().means() == {"train_loss": None, "train_lr": None}


def test_stopwatch_measures_only_data_loading():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    watch = Stopwatch()
    for _ in watch.watch(slow()):
        time.sleep(0.05)
    assert 0.3 < watch.loading_share < 0.7
    assert watch.seconds >= 0.3


def test_a_resumed_log_has_every_epoch_once(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0, "x": 1}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    RunLog(tmp_path, tmp_path, epochs=4, first_epoch=2).close()
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0, "x": 1}\n{"epoch": 1}\n'


def test_a_resumed_run_logs_every_scalar_once(tmp_path):
    """The x axis of the loss is thousandths of an epoch, that of perf/* epochs. Files of other runs are unchanged."""

    def log_epochs(first, last, first_iteration=0):
        log = RunLog(tmp_path / "run", tmp_path, 4, first, int(1000 * (first + first_iteration / 10)))
        for epoch in range(first, last):
            log.begin_epoch(epoch, first_iteration, 10, 8, Stopwatch())
            for step in range(first_iteration, 10):
                log.update(step + 1, lr=1e-3, loss=float(epoch), grad_norm=2.0)
            log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "test_acc1": 10.0 * epoch})
            log.picture("reconstruction", np.zeros((4, 4, 3), np.uint8), epoch)
            first_iteration = 0
        log.close()

    (tmp_path / "run").mkdir()
    log_epochs(0, 3)
    other = tmp_path / "events.out.tfevents.1.host.2.other"
    shutil.copy(next(tmp_path.glob("events.*.run-*")), other)
    before = other.read_bytes()
    log_epochs(1, 4, first_iteration=5)
    assert other.read_bytes() == before
    other.unlink()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [int(1000 * (i / 10)) for i in range(40)]
    assert [(e.step, e.value) for e in events.Scalars("perf/test_acc1")] == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert [e.step for e in events.Images("reconstruction")] == [0, 1, 2, 3]


def log_events(run, events, *epochs, resumed=0):
    """A run that logs epochs of one update."""
    run.mkdir(parents=True, exist_ok=True)
    log = RunLog(run, events, 4, resumed, 1000 * resumed)
    for epoch in epochs:
        log.begin_epoch(epoch, 0, 1, 8, Stopwatch())
        log.update(1, lr=1e-3, loss=1.0, grad_norm=2.0)
    log.close()


def steps_of(events):
    """The steps of the losses in each file, also of those that TensorBoard ignores."""
    steps = []
    for file in events.iterdir():
        loaded = EventFileLoader(str(file)).Load()
        steps.append([event.step for event in loaded for value in event.summary.value if value.tag == "train_loss"])
    return [own for own in steps if own]


def test_runs_that_share_a_folder_for_tensorboard_keep_their_events(tmp_path):
    """The names of two are equal, the name of one is the end of another, and one is a pattern that fits another."""
    names, events = ["a/base", "b/base", "lr.x5", "x5", "x[5]"], tmp_path / "events"
    for name in names:
        log_events(tmp_path / name, events, 0, 1)
    assert steps_of(events) == [[0, 1000]] * len(names)
    log_events(tmp_path / "x[5]", events, resumed=1)
    assert sorted(steps_of(events)) == [[0], *[[0, 1000]] * (len(names) - 1)]


def test_a_resumed_run_drops_its_events_after_a_move(tmp_path):
    log_events(tmp_path / "old/run", tmp_path / "old/events", 0, 1)
    shutil.move(tmp_path / "old", tmp_path / "new")
    log_events(tmp_path / "new/run", tmp_path / "new/events", resumed=1)
    assert steps_of(tmp_path / "new/events") == [[0]]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_log_lines_are_written_after_a_full_disk_has_space(tmp_path, caplog):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        log = RunLog(tmp_path, tmp_path, epochs=4)
        log.begin_epoch(0, 0, 2, 8, Stopwatch())
        log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "test_acc1": 1.0})
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for epoch in (1, 2):
            log.begin_epoch(epoch, 0, 2, 8, Stopwatch())
            log.picture("reconstruction", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), epoch)
            log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "test_acc1": 1.0, "note": "x" * 3000})
        assert caplog.text.count("No space left on device") == 1
        filler.unlink()
        log.begin_epoch(3, 0, 2, 8, Stopwatch())
        log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "test_acc1": 1.0})
        log.close()
        assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1, 2, 3]
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [e.step for e in events.Scalars("perf/test_acc1")] == [0, 1, 2, 3]
        assert [e.step for e in events.Images("reconstruction")] == [1, 2]

        log = RunLog(tmp_path, tmp_path, epochs=5, first_epoch=4, first_x=4000)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        log.begin_epoch(4, 0, 2, 8, Stopwatch())
        log.end_epoch({"train_lr": 1e-3, "train_loss": 0.0, "note": "x" * 9000})
        with pytest.raises(OSError, match=r"can't write .*; the last [\d,]+ bytes are in (.*)") as stop:
            log.close()
        assert Path(str(stop.value).rpartition(" ")[2]).stat().st_size > 0
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_progress_is_logged_as_lines_without_a_terminal(tmp_path, caplog):
    caplog.set_level("INFO")
    log = RunLog(tmp_path, tmp_path, epochs=2)
    log.begin_epoch(1, 0, num_iterations=10, images_per_iteration=8, watch=Stopwatch())
    for step in range(1, 11):
        log.update(step, lr=1e-3, loss=0.5, grad_norm=2.0)
    log.end_epoch({"train_lr": 1e-3, "train_loss": 0.5})
    log.close()
    first, last = (record.getMessage() for record in caplog.records)
    pattern = r"epoch 1 \[ 1/10\]  loss 0.5000  lr 1.00e-03  grad 2  [\d,]+ images/s  data loading 0%  left 0:00:00"
    assert re.fullmatch(pattern, first)
    assert last.startswith("epoch 1 done in 0:00:00: loss 0.5000")
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["epoch"] == 1
    assert line["train_loss"] == 0.5


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    """The bar of tqdm on a pseudo-terminal."""
    code = """
import time
from pathlib import Path
from util.training.run_log import RunLog, Stopwatch
log = RunLog(Path("."), Path("."), epochs=3)
log.begin_epoch(0, 0, num_iterations=4, images_per_iteration=16, watch=Stopwatch())
for step in range(1, 5):
    time.sleep(0.15)  # the bar refreshes ten times a second
    log.update(step, lr=1e-3, loss=0.25, grad_norm=2.0)
log.end_epoch({"train_lr": 1e-3, "train_loss": 0.25})
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 150))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=theirs, env=environment)
    os.close(theirs)
    data = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            data += chunk
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0
    text = data.decode()
    for part in ("epoch 0/3", "loss 0.2500", "lr 1.00e-03", "img/s", "data loading", "run ends in"):
        assert part in text


def test_other_ranks_log_only_their_own_messages(monkeypatch, capsys):
    monkeypatch.setattr(dist, "rank", lambda: 3)
    start_logging()
    logger = logging.getLogger("util.x")
    logger.info("all alike")
    logger.warning("all alike, too")
    logger.warning("an image of mine", extra={"every_rank": True})
    monkeypatch.undo()
    start_logging()
    logger.warning("all alike, too")
    assert capsys.readouterr().out == "warning: [rank 3] an image of mine\nwarning: all alike, too\n"


def test_both_files_are_closed_and_both_errors_are_named(tmp_path, monkeypatch):
    log = run_log.RunLog(tmp_path, tmp_path, epochs=1)

    def fail(name):
        raise OSError(f"{name} is full")

    monkeypatch.setattr(log.events, "close", lambda: fail("events"))
    monkeypatch.setattr(log.lines, "close", lambda: fail("log.txt"))
    with pytest.raises(OSError, match=r"^events is full; log.txt is full$"):
        log.close()


def test_the_error_that_ends_a_run_precedes_an_error_of_the_log(caplog):
    class Full(run_log.NullLog):
        def close(self):
            raise OSError("the log is full")

    with pytest.raises(OSError, match=r"^The state is in X$"), trainer._closing(Full()):
        raise OSError("The state is in X")
    assert "the log is full" in caplog.text
    with pytest.raises(OSError, match="the log is full"), trainer._closing(Full()):
        pass
