"""Saving during training: file names, times, and failures."""

import math
import signal
import time
from concurrent.futures import wait
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mae.checkpoints import checkpoint, run_directory
from mae.checkpoints.run_state import Progress
from mae.interrupts import Interrupted, Interrupts
from mae.training.saver import Request, Saver

WEIGHT = torch.zeros(1)


def make_saver(tmp_path, weight=WEIGHT, progress=None, **options):
    progress = progress or Progress(effective_batch_size=16, global_batch_size=8)
    options = {"epochs": 50, "save_every": 20, "save_minutes": 15} | options
    return Saver(Interrupts(), tmp_path, lambda: {"model": {"weight": weight}}, progress, **options)


def test_checkpoints_are_written_at_the_published_epochs(tmp_path):
    saver = make_saver(tmp_path)
    for epoch in range(50):
        saver.save_epoch(epoch)
    saver.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"checkpoint-{epoch}.pth" for epoch in (0, 20, 40, 49)}
    state = checkpoint.read(tmp_path / "checkpoint-20.pth")
    assert (state["epoch"], state["progress"]["epoch"]) == (20, 21)


def test_save_minutes_writes_checkpoint_last(tmp_path):
    assert make_saver(tmp_path).request() is Request.NONE
    saver = make_saver(tmp_path, save_minutes=0)
    assert saver.request() is Request.SAVE
    assert saver.request() is Request.NONE  # a request is returned once
    saver.save(3, 2, {"loss": 1.0})
    saver.close()
    assert saver.request() is Request.SAVE
    state = checkpoint.read(tmp_path / "checkpoint-last.pth")
    assert state["epoch"] == 2
    assert state["progress"] == {"epoch": 3, "images_done": 16, "effective_batch_size": 16, "meters": {"loss": 1.0},
                                 "best_accuracy": -math.inf, "num_images": None, "images": {}}  # fmt: skip


def test_checkpoint_last_is_written_every_save_minutes(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    writer, requests = make_saver(tmp_path), []
    for seconds in (0, 899, 2, 1, 897, 3):
        clock.now += seconds
        requests.append(writer.request())
        if requests[-1] is Request.SAVE:
            writer.save(0, 1, {})
    writer.close()
    assert [request is Request.SAVE for request in requests] == [False, False, True, False, False, True]


def test_an_unwritable_checkpoint_does_not_end_the_run(tmp_path, caplog):
    """The next save writes the newest state. The best state is the best of those that are on the disk."""
    saver = make_saver(tmp_path / "gone", save_minutes=0)
    saver.progress.selection = {"epoch": 20}
    saver.save_epoch(20, accuracy=50.0)
    wait([saver.writing])
    assert saver.request() is Request.SAVE and not list(tmp_path.iterdir())
    [record] = caplog.records
    assert record.levelname == "ERROR" and "checkpoint-20.pth" in record.message
    assert saver.progress.selection == {}
    (tmp_path / "gone").mkdir()
    saver.save(21, 2, {})
    saver.save_epoch(21, accuracy=40.0)
    saver.close()
    names = {path.name: run_directory.position(path) for path in (tmp_path / "gone").iterdir()}
    assert names == {"checkpoint-best.pth": (22, 0), "checkpoint-last.pth": (21, 16)}
    assert checkpoint.read(tmp_path / "gone/checkpoint-best.pth")["progress"]["best_accuracy"] == 40.0


def test_a_run_does_not_end_without_its_last_state(tmp_path, caplog):
    """The final state, the state at a signal, and the state before an error."""
    with pytest.raises(OSError, match=r"checkpoint-49.pth"):
        make_saver(tmp_path / "gone").save_epoch(49)
    assert make_saver(tmp_path / "gone").save_emergency(3, 1, {}) == ""
    assert "checkpoint-emergency.pth" in caplog.text
    saver = make_saver(tmp_path / "gone")
    saver.interrupts.pending = signal.SIGTERM
    saver.save(7, 1, {})
    with pytest.raises(OSError, match="can't write") as stop:
        saver.stop()
    saver.save(7, 1, {})
    saver.raise_if_stopping(stop.value)  # returns: the state is not saved
    (tmp_path / "gone").mkdir()
    saver.save(7, 1, {})
    with pytest.raises(Interrupted):
        saver.raise_if_stopping(stop.value)
    assert run_directory.position(tmp_path / "gone/checkpoint-last.pth") == (7, 8)


def test_best_accuracy_requires_an_existing_checkpoint(tmp_path):
    saver = make_saver(tmp_path)
    saver.progress.best_accuracy = 70.0
    resumed = make_saver(tmp_path, progress=saver.progress)
    assert resumed.progress.best_accuracy == -math.inf
    saver.save_epoch(1, 50.0)
    saver.close()
    resumed = make_saver(tmp_path, progress=saver.progress)
    assert resumed.progress.best_accuracy == 50.0


def test_the_best_checkpoint_is_independent_of_keep_last(tmp_path):
    saver = make_saver(tmp_path)
    for epoch, accuracy in ((1, 50.0), (2, 70.0), (3, 60.0), (4, 70.0)):
        saver.save_epoch(epoch, accuracy)
    saver.close()
    assert [p.name for p in tmp_path.glob("*.pth")] == ["checkpoint-best.pth"]
    state = checkpoint.read(tmp_path / "checkpoint-best.pth")
    assert (state["epoch"], state["progress"]["best_accuracy"]) == (2, 70.0)


def test_the_written_state_is_that_of_the_call(tmp_path, monkeypatch):
    """Training continues while a state is written, and modifies the weights in place."""
    weight = torch.zeros(1000)
    saver = make_saver(tmp_path, weight)
    saver.save(0, 1, {})
    weight.fill_(7)
    saver.close()
    assert checkpoint.read(tmp_path / "checkpoint-last.pth")["model"]["weight"].sum() == 0


class AllocatedBytes(TorchDispatchMode):
    """Adds up the tensors that operations allocate."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            AllocatedBytes.total += result.nbytes * (result.untyped_storage().data_ptr() not in storages)
        return result


def test_saving_copies_the_state_once(tmp_path, monkeypatch):
    weight, write = torch.zeros(1000, 1000), checkpoint.write

    def count(*args):
        with AllocatedBytes():
            write(*args)

    monkeypatch.setattr(checkpoint, "write", count)
    saver = make_saver(tmp_path, weight)
    with AllocatedBytes():
        saver.save(0, 1, {})
    saver.close()
    assert AllocatedBytes.total == weight.nbytes
    assert checkpoint.read(tmp_path / "checkpoint-last.pth")["model"]["weight"].shape == (1000, 1000)


def test_keep_last_keeps_the_newest_checkpoints(tmp_path):
    saver = make_saver(tmp_path, save_every=1, keep_last=2)
    for epoch in range(12):
        saver.save_epoch(epoch, accuracy=50.0 if epoch == 3 else 10.0)
    saver.save(12, 1, {})
    saver.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-10.pth", "checkpoint-11.pth", "checkpoint-best.pth", "checkpoint-last.pth"}
    assert checkpoint.read(tmp_path / "checkpoint-best.pth")["epoch"] == 3
