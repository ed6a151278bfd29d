"""A run's position, its files, and its way back."""

import pytest
import torch

from util import checkpoint, runstate
from util.checkpoint import CheckpointError
from util.runstate import Progress, Saver


def test_a_used_folder_needs_resume(tmp_path):
    (tmp_path / "job.log").write_text("a launcher's file is no run")
    runstate.prepare_output_dir(tmp_path, "")
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(ValueError, match="--resume auto"):
        runstate.prepare_output_dir(tmp_path, "")
    runstate.prepare_output_dir(tmp_path, "auto")
    runstate.prepare_output_dir(tmp_path, str(tmp_path / "checkpoint-0.pth"))
    with pytest.raises(ValueError, match="already holds a run"):
        runstate.prepare_output_dir(tmp_path, str(tmp_path.parent / "checkpoint-0.pth"))


def test_progress_counts_images():
    saved = {"epoch": 4, "images_done": 96, "effective_batch_size": 48, "meters": {}}
    progress = Progress(effective_batch_size=48, global_batch_size=12)
    progress.restore({"epoch": 3, "progress": saved})
    assert (progress.epoch, progress.first_step) == (4, 8)
    with pytest.raises(CheckpointError, match="--accum_iter 6 restores"):
        Progress(effective_batch_size=8, global_batch_size=8).restore({"progress": saved})
    with pytest.raises(CheckpointError, match="another --batch_size"):
        Progress(effective_batch_size=64, global_batch_size=64).restore({"progress": saved})
    foreign = Progress(48, 48)
    foreign.restore({"epoch": 19})
    assert (foreign.epoch, foreign.first_step) == (20, 0)


def test_another_architecture_is_named(mini_mae):
    from models_mae import mae_vit_mini_patch4

    state = {"model": mae_vit_mini_patch4(img_size=16, in_chans=3).state_dict(), "args": {"model": "x", "in_chans": 3}}
    with pytest.raises(CheckpointError, match=r"3 tensors differ .*made with: --model x --in_chans 3"):
        runstate.restore_model(mini_mae, state)


def test_optimizer_state_of_an_older_torch(mini_mae):
    """The published code's groups know no fused option; ours stay fused."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.3, fused=True)
    old_group = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05, "amsgrad": False, "params": [0]}
    old_state = {0: {"step": 11, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    runstate.restore_optimizer(optimizer, {"state": old_state, "param_groups": [old_group]})
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0.3  # settings are this run's
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 12


def make_saver(tmp_path, **options):
    progress = Progress(effective_batch_size=16, global_batch_size=8)
    options = {"epochs": 50, "save_every": 20, "save_minutes": 15} | options
    return Saver(tmp_path, lambda: {"model": {"weight": torch.zeros(1)}}, progress, **options)


def test_milestones_are_the_published_ones(tmp_path):
    saver = make_saver(tmp_path)
    for epoch in range(50):
        saver.save_epoch(epoch)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"checkpoint-{epoch}.pth" for epoch in (0, 20, 40, 49)}
    state = checkpoint.read(tmp_path / "checkpoint-20.pth")
    assert state["epoch"] == 20
    assert state["progress"]["epoch"] == 21


def test_rolling_states_come_by_the_clock(tmp_path):
    assert not make_saver(tmp_path).due()
    saver = make_saver(tmp_path, save_minutes=0)
    assert saver.due()
    saver.save(3, 2, {"loss": 1.0})
    state = checkpoint.read(tmp_path / "checkpoint-last.pth")
    assert state["epoch"] == 2
    assert state["progress"] == {
        "epoch": 3, "images_done": 16, "effective_batch_size": 16, "meters": {"loss": 1.0}, "best_accuracy": -1.0,
        "num_images": None,
    }  # fmt: skip


def test_a_state_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    saver = make_saver(tmp_path / "gone", save_minutes=0)
    saver.save(0, 1, {})
    assert "can't write" in caplog.text
    assert "tries again in a minute" in caplog.text
    assert not saver.due()
    saver.save_epoch(20)
    assert saver.save_emergency(0, 1, {}) == ""
    with pytest.raises(OSError, match="can't write"):
        saver.save_epoch(49)  # the result of the run


def test_the_best_state_is_kept_beside_the_milestones(tmp_path):
    saver = make_saver(tmp_path)
    for epoch, accuracy in ((1, 50.0), (2, 70.0), (3, 60.0), (4, 70.0)):
        saver.save_epoch(epoch, accuracy)
    assert [p.name for p in tmp_path.glob("*.pth")] == ["checkpoint-best.pth"]
    state = checkpoint.read(tmp_path / "checkpoint-best.pth")
    assert state["epoch"] == 2
    assert state["progress"]["best_accuracy"] == 70.0
    resumed = runstate.Progress(state["progress"]["effective_batch_size"], 8)
    resumed.restore(state)
    assert resumed.best_accuracy == 70.0


def test_an_epoch_goes_on_with_the_same_images_only(caplog):
    position = {"effective_batch_size": 8, "epoch": 3, "meters": {}, "num_images": 160}
    progress = runstate.Progress(8, 8, num_images=161)
    progress.restore({"progress": {**position, "images_done": 0}})
    assert "had 160 images, and has 161 now" in caplog.text
    with pytest.raises(CheckpointError, match="in the middle of an epoch of 160 images, and now there are 161"):
        progress.restore({"progress": {**position, "images_done": 16}})
