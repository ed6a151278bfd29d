"""The state of a run: position, checkpoints, restoring."""

import pytest
import torch

from util.checkpoints import run_state
from util.checkpoints.checkpoint import CheckpointError
from util.checkpoints.run_state import Progress


def test_progress_counts_images():
    saved = {"epoch": 4, "images_done": 96, "effective_batch_size": 48, "meters": {}}
    progress = Progress(effective_batch_size=48, global_batch_size=12)
    progress.restore({"epoch": 3, "progress": saved})
    assert (progress.epoch, progress.first_iteration) == (4, 8)
    for global_batch_size, remedy in ((8, "--batch_size 8 --accum_iter 6"), (64, "--batch_size 48 --accum_iter 1"),
                                      (9, "--batch_size 8 --accum_iter 6")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"batch size of 48 .*: give {remedy}$"):
            Progress(global_batch_size, global_batch_size).restore({"progress": saved})
    foreign = Progress(48, 48)
    foreign.restore({"epoch": 19})
    assert (foreign.epoch, foreign.first_iteration) == (20, 0)


def test_resuming_another_architecture_is_an_error(mini_mae):
    from models_mae import mae_vit_mini_patch4

    state = {"model": mae_vit_mini_patch4(img_size=16, in_chans=3).state_dict(), "args": {"model": "x", "in_chans": 3}}
    with pytest.raises(CheckpointError, match="3 tensors differ") as raised:
        run_state.restore_model(mini_mae, state, {"model": "y", "in_chans": 1, "input_size": 16})
    assert raised.value.__notes__ == ["give --model x --in_chans 3"]


def test_optimizer_states_of_older_versions_are_loaded(mini_mae):
    """The groups of the published code have no option `fused`; ours stay fused."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.3, fused=True)
    old_group = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05, "amsgrad": False, "params": [0]}
    old_state = {0: {"step": 11, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    run_state.restore_optimizer(optimizer, {"state": old_state, "param_groups": [old_group]})
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0.3  # settings are this run's
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 12


def test_resuming_within_an_epoch_requires_the_same_images(caplog):
    position = {"effective_batch_size": 8, "epoch": 3, "meters": {}, "num_images": 160}
    progress = run_state.Progress(8, 8, num_images=161)
    progress.restore({"progress": {**position, "images_done": 0}})
    assert "had 160 images, and has 161 now" in caplog.text
    with pytest.raises(CheckpointError, match="in the middle of an epoch of 160 images, and now there are 161"):
        progress.restore({"progress": {**position, "images_done": 16}})
