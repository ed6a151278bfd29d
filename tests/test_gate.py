"""checkpoint-best.pth of a run that starts from a file is the start, or clearly better."""

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mains import Stopped, assert_equal, assert_same_run, lines, stop_after, stop_and_resume, weights

from mae.checkpoints import checkpoint
from mae.checkpoints.run_state import Progress
from mae.inference import report
from mae.training.gate import Gate, paired
from mae.training.nonfinite import NonFiniteLoss


@pytest.fixture(scope="module")
def start(pretrain_once, labelled):
    """The file from which the runs start."""
    return pretrain_once("start", data_path=labelled, epochs=1) / "checkpoint-0.pth"


@pytest.fixture
def flags(start, labelled):
    return {"init_from": start, "data_path": labelled, "probe_every": 1, "probe_path": labelled, "batch_size": 8}


def test_without_progress_the_start_is_the_best(start, flags, pretrain, capsys):
    """A later state replaces the start only if it is better. A warning says that none is."""
    out = pretrain(**flags, lr=0, epochs=2)
    text = capsys.readouterr().out
    best = checkpoint.read(out / "checkpoint-best.pth")
    assert best["epoch"] == -1
    assert_equal(best["model"], weights(start.parent, start.name))
    (line,) = (line for line in text.splitlines() if "at the start" in line)
    score = lines(out)[-1]["test_knn_acc1"]
    assert line.count(f"{score:.1f}") == 2 and "(+0.0 ± 0.0 from the start)" in line
    assert "no later state is better" in text
    assert "23 held-out images, which are few" in text


def test_a_run_that_diverges_leaves_the_start(start, flags, pretrain, tmp_path):
    with pytest.raises(NonFiniteLoss):
        pretrain(**flags, lr=1e8, epochs=4)
    best = checkpoint.read(tmp_path / "run/checkpoint-best.pth")
    assert best["epoch"] == -1
    assert_equal(best["model"], weights(start.parent, start.name))


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 3])
def test_a_resumed_run_does_not_measure_the_start_again(calls, flags, pretrain, monkeypatch, capsys):
    """Killed in the middle of an epoch, and before the first checkpoint after the start."""
    whole = pretrain("whole", **flags, epochs=2)
    best = checkpoint.read(whole / "checkpoint-best.pth")
    capsys.readouterr()
    resumed = stop_and_resume(monkeypatch, pretrain, calls, **flags, epochs=2)
    assert capsys.readouterr().out.count("the start, before the first update") == 1
    assert_same_run(whole, resumed)
    again = checkpoint.read(resumed / "checkpoint-best.pth")
    assert again["epoch"] == best["epoch"]
    assert_equal(again["model"], best["model"])


def test_a_run_that_resumes_without_naming_its_file_keeps_the_start(start, flags, pretrain, monkeypatch, capsys):
    """It compares the end with the start, which is still the best state."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 1)
        pretrain(**flags, lr=0, epochs=2, save_minutes=0)
    given = {name: value for name, value in flags.items() if name != "init_from"}
    out = pretrain(**given, lr=0, epochs=2, resume="auto")
    best = checkpoint.read(out / "checkpoint-best.pth")
    assert best["epoch"] == -1
    assert_equal(best["model"], weights(start.parent, start.name))
    assert "no later state is better" in capsys.readouterr().out


def test_without_labels_the_start_is_not_measured(flags, pictures, pretrain, tmp_path, capsys):
    out = pretrain(init_from=flags["init_from"], epochs=1)
    assert "the start is not measured" in capsys.readouterr().out
    assert not (out / "checkpoint-best.pth").exists()


def test_a_state_replaces_the_best_one_by_more_than_the_standard_error():
    """The differences of n images are 1, 0 or -1: with w wins and l losses, their mean is (w - l) / n."""
    count = 400
    before = torch.zeros(count, dtype=torch.bool)
    before[:200] = True

    def after(wins, losses):
        hits = before.clone()
        hits[200 : 200 + wins] = True
        hits[:losses] = False
        return hits

    difference, error = paired(after(30, 20), before)
    assert difference == pytest.approx(2.5)
    variance = (50 - 10**2 / count) / (count - 1)
    assert error == pytest.approx(100 * math.sqrt(variance / count))
    probe = SimpleNamespace(hits=before)
    progress = Progress(8, 8)
    progress.selection = {"start": before, "best": before, "epoch": -1}
    progress.best_accuracy = 50.0
    gate = Gate(probe, progress)
    for wins, losses, expected in ((30, 25, False), (30, 20, True), (0, 0, False)):
        progress.selection = {"start": before, "best": before, "epoch": -1}
        probe.hits = after(wins, losses)
        assert gate.accepts(3) == expected
        assert progress.selection["epoch"] == (3 if expected else -1)


def test_one_image_does_not_decide_which_state_is_better():
    hits = torch.zeros(1, dtype=torch.bool)
    progress = Progress(8, 8)
    progress.selection = {"start": hits, "best": hits, "epoch": -1}
    assert not Gate(SimpleNamespace(hits=~hits), progress).accepts(0)


def test_a_resumed_run_holds_out_the_images_of_its_start(flags, labelled, pretrain, tmp_path):
    """Else its k-NN would be compared with that of other images."""
    changed = shutil.copytree(labelled, tmp_path / "changed")
    pretrain(**flags, epochs=1)
    next(changed.glob("val/*/*")).unlink()
    with pytest.raises(ValueError, match="held-out images"):
        pretrain(**flags | {"probe_path": changed}, epochs=2, resume="auto")


def test_a_run_that_resumes_refuses_another_start(start, flags, pretrain, tmp_path):
    """It would have no effect, and the run would record it."""
    pretrain(**flags, epochs=1)
    other = shutil.copy(start, tmp_path / "other.pth")
    with pytest.raises(checkpoint.CheckpointError, match="no effect on a run that resumes"):
        pretrain(**flags | {"init_from": other}, epochs=2, resume="auto")


def test_in_another_directory_no_state_is_the_best_that_is_not_better_than_the_start(flags, pretrain, capsys):
    first = pretrain(**flags, lr=0, epochs=2, save_every=1)
    capsys.readouterr()
    out = pretrain("other", **flags, lr=0, epochs=2, resume=first / "checkpoint-0.pth")
    text = capsys.readouterr().out
    assert not (out / "checkpoint-best.pth").exists()
    assert "no later state is better" in text
    (command,) = (line for line in text.splitlines() if line.startswith("fine-tune:"))
    assert str(out / "checkpoint-1.pth") in command


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def change_a_weight(file):
    """The names and plain values can still be read."""
    content = bytearray(file.read_bytes())
    weight = checkpoint.read(file)["model"]["blocks.0.mlp.fc1.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut, change_a_weight])
def test_a_best_state_that_cannot_be_read_is_not_recommended(damage, start, flags, pretrain, capsys):
    """The last lines name the file, and the start, which is still the best state."""
    out = pretrain(**flags, lr=0, epochs=1)
    damage(out / "checkpoint-best.pth")
    capsys.readouterr()
    pretrain(**flags, lr=0, epochs=2, resume="auto")
    text = capsys.readouterr().out
    (warning,) = (line for line in text.splitlines() if line.startswith("warning: the best state"))
    assert str(out / "checkpoint-best.pth") in warning and f"init_from={start}" in warning
    (command,) = (line for line in text.splitlines() if line.startswith("fine-tune:"))
    assert str(out / "checkpoint-1.pth") in command


def test_a_page_says_that_the_best_state_is_gone(flags, pretrain):
    out = pretrain(**flags, lr=0, epochs=1)
    cut(out / "checkpoint-best.pth")
    text = report.main(report.get_args_parser().parse_args([str(out), "--device", "cpu"])).read_text()
    assert "checkpoint-0.pth: the best state, checkpoint-best.pth, is gone or damaged" in text


def test_a_start_that_was_not_measured_is_named(flags, pretrain, capsys):
    """The held-out images of --probe_every are given too late."""
    pretrain(**flags | {"probe_every": 0}, epochs=1)
    out = pretrain(**flags, epochs=2, resume="auto")
    assert "the start was not measured" in capsys.readouterr().out
    assert not (out / "checkpoint-best.pth").exists()


def test_the_printed_command_and_the_page_are_of_the_best_state(flags, pretrain, capsys):
    out = pretrain(**flags, lr=0, epochs=1)
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("fine-tune:"))
    assert str(out / "checkpoint-best.pth") in command
    text = report.main(report.get_args_parser().parse_args([str(out), "--device", "cpu"])).read_text()
    assert "checkpoint-best.pth, the start" in text
    assert str(out / "checkpoint-0.pth") not in text
    assert "explains" not in text  # no entry of log.txt is of the start
    assert "is optimistic" not in text
    shutil.copy(out / "checkpoint-0.pth", out / "checkpoint-best.pth")  # a later state is the best
    text = report.main(report.get_args_parser().parse_args([str(out), "--device", "cpu"])).read_text()
    assert "its accuracy on the images that selected it is optimistic" in text
