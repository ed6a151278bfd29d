"""The state of a run: position, checkpoints, restoring."""

import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from mae.checkpoints import checkpoint, run_state
from mae.checkpoints.checkpoint import CheckpointError
from mae.checkpoints.run_state import Progress
from mae.interrupts import Interrupts
from mae.training import resume
from mae.training.lars import LARS
from mae.training.saver import Saver
from models_mae import mae_vit_mini_patch4


def test_progress_counts_images():
    saved = Progress(effective_batch_size=48, global_batch_size=12).position(4, 8, {})
    progress = Progress(effective_batch_size=48, global_batch_size=12)
    resume.restore_progress(progress, {"epoch": 3, "progress": saved, "args": {}})
    assert (progress.epoch, progress.first_iteration) == (4, 8)
    with pytest.raises(CheckpointError, match=r"48 .*`batch_size`"):
        resume.restore_progress(Progress(8, 8), {"progress": saved, "args": {}})
    foreign = Progress(48, 48)
    resume.restore_progress(foreign, {"epoch": 19, "args": {}})
    assert (foreign.epoch, foreign.first_iteration) == (20, 0)


def test_scale_random_numbers_and_best_accuracy_are_restored(tmp_path, mini_mae):
    """Resumed runs have equal weights and losses in the tests of each script."""
    optimizer = torch.optim.AdamW(mini_mae.parameters())
    settings = {"script": "main_pretrain", "model": "mae_vit_mini_patch4"}
    progress, scaler = Progress(16, 8, num_images=48), torch.amp.GradScaler("cpu", init_scale=1024.0)
    checkpoint.write({"epoch": 0}, tmp_path / "checkpoint-best.pth")  # otherwise a saver resets the best accuracy
    progress.best_accuracy = 70.0
    state = partial(run_state.collect, mini_mae, optimizer, scaler, settings)
    writer = Saver(Interrupts(), tmp_path, state, progress, epochs=50, save_every=20, save_minutes=15)
    torch.manual_seed(77)
    expected = torch.rand(4)
    torch.manual_seed(77)
    writer.save(5, 4, {"loss": 1.5})
    writer.close()
    torch.manual_seed(5)
    progress, scaler = Progress(16, 8, num_images=48), torch.amp.GradScaler("cpu")
    resume.restore_run("auto", tmp_path, mini_mae, optimizer, scaler, settings, progress)
    assert torch.equal(torch.rand(4), expected)
    assert (progress.epoch, progress.first_iteration, progress.meters) == (5, 4, {"loss": 1.5})
    assert (scaler.get_scale(), progress.best_accuracy) == (1024.0, 70.0)


def test_resuming_another_architecture_is_an_error(mini_mae):
    args = {"model": "x", "in_chans": 3, "script": "main_pretrain"}
    state = {"model": mae_vit_mini_patch4(img_size=16, in_chans=3).state_dict(), "args": args}
    with pytest.raises(CheckpointError, match="3 tensors differ") as raised:
        resume.restore_model(mini_mae, state, {**args, "model": "y", "in_chans": 1, "input_size": 16})
    assert str(raised.value).endswith(": give model=x in_chans=3")


@pytest.mark.parametrize(("which", "remedy"), [("auto", "give another `output_dir`"),
                                               ("a.pth", "finetune=a.pth instead of `resume` starts")])  # fmt: skip
def test_a_checkpoint_without_a_script_and_with_another_model(which, remedy):
    """The published code does not record the script. Flags can't change the script, so the remedy names none."""
    ours, theirs = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)}), {"b.weight": torch.ones(1)}
    with pytest.raises(CheckpointError) as raised:
        resume.restore_model(ours, {"model": theirs, "args": {"model": "vit"}}, {"model": "mae_vit"}, which)
    assert remedy in str(raised.value)


def test_resuming_with_another_optimizer_is_an_error():
    """AdamW can't use the momentum of SGD: it fails at its first update. The reverse would silently start from zero."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizers = [torch.optim.AdamW([weight]), torch.optim.SGD([weight], lr=1, momentum=0.9), LARS([weight])]
    for ours, theirs in itertools.product(optimizers, optimizers):
        state = {"optimizer": theirs.state_dict()}
        if isinstance(ours, torch.optim.AdamW) is isinstance(theirs, torch.optim.AdamW):
            resume.require_same_optimizer(ours, state)
        else:
            with pytest.raises(CheckpointError, match="another optimizer"):
                resume.require_same_optimizer(ours, state)


@pytest.mark.parametrize("content", [b"damaged", None])
def test_checkpoints_that_can_not_be_read_are_not_trained_over(tmp_path, content, caplog):
    """None: a link to a file system that is not mounted."""
    path = tmp_path / "checkpoint-3.pth"
    path.write_bytes(content) if content else path.symlink_to("/nothing/checkpoint-3.pth")
    with pytest.raises(CheckpointError, match=r"checkpoint-3.pth"):
        resume.read_newest(tmp_path)
    assert "resume=auto skips checkpoint-3.pth" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the rights of another user")
def test_a_checkpoint_of_another_user_is_not_skipped():
    """An older one that can be read would silently lose epochs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # that of the tests is not readable for others
        os.chmod(folder, 0o755)
        for epoch in range(2):
            checkpoint.write({"epoch": epoch, "model": {}}, Path(folder) / f"checkpoint-{epoch}.pth")
        (Path(folder) / "checkpoint-1.pth").chmod(0o600)
        os.seteuid(65534)  # nobody
        try:
            with pytest.raises(OSError, match=r"checkpoint-1.pth"):
                resume.read_newest(Path(folder))
        finally:
            os.seteuid(0)


def test_optimizer_states_of_older_versions_are_loaded(mini_mae):
    """The groups of the published code have no option `fused`; ours stay fused."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.3, fused=True)
    old_group = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05, "amsgrad": False, "params": [0]}
    old_state = {0: {"step": 11, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    resume.restore_optimizer(optimizer, {"state": old_state, "param_groups": [old_group]})
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0.3  # settings are this run's
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 12


def test_what_an_optimizer_keeps_in_its_groups_is_restored():
    """Prodigy, D-Adaptation and schedule-free optimizers keep their estimates there."""

    def optimizer(estimate):
        group = {"params": [torch.nn.Parameter(torch.ones(3))], "lr": estimate, "estimate": estimate}
        return torch.optim.SGD([group], momentum=0.9, weight_decay=estimate)

    found = optimizer(1.0)
    resume.restore_optimizer(found, optimizer(7.0).state_dict())
    group = found.param_groups[0]
    assert (group["estimate"], group["lr"], group["weight_decay"]) == (7.0, 1.0, 1.0)


def test_resuming_within_an_epoch_requires_the_same_images(caplog):
    earlier = run_state.Progress(8, 8, num_images=160)
    progress = run_state.Progress(8, 8, num_images=161)
    resume.restore_progress(progress, {"progress": earlier.position(3, 0, {}), "args": {}})
    assert "had 160 images, and has 161 now" in caplog.text
    with pytest.raises(CheckpointError, match=r"160 images, .*161"):
        resume.restore_progress(progress, {"progress": earlier.position(3, 2, {}), "args": {}})
