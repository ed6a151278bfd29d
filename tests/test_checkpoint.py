"""Our files: whole or refused, without running anything; and foreign ones."""

import argparse
import copy
import os
import pickle
import random

import pytest
import torch

from util import checkpoint
from util.checkpoint import CheckpointError, Progress


def example_state():
    return {
        "model": {"weight": torch.randn(3, 4), "bias": torch.zeros(3, dtype=torch.bfloat16), "count": torch.tensor(7)},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
        "args": {"model": "mae_vit_mini_patch4", "input_size": [16, 24], "lr": None},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def test_round_trip_with_plain_torch_load(tmp_path):
    state, path = example_state(), tmp_path / "checkpoint-3.pth"
    checkpoint.write(state, path)
    assert same(checkpoint.read(path), state)
    assert torch.load(path, weights_only=True)["digest"].startswith("sha256:")
    assert os.listdir(tmp_path) == ["checkpoint-3.pth"]


def test_digest_covers_everything():
    state = example_state()
    changes = [
        lambda s: s["model"]["weight"][0, 0].add_(1e-6),
        lambda s: s["model"].update(bias=s["model"]["bias"].half()),
        lambda s: s["model"].update(weight=s["model"]["weight"].reshape(4, 3)),
        lambda s: s["optimizer"]["param_groups"][0].update(lr=0.2),
        lambda s: s.update(epoch=4),
        lambda s: s["args"].update(lr="None"),
        lambda s: s["model"].update(other=s["model"].pop("count")),
    ]
    digests = {checkpoint.compute_digest(state)}
    for change in changes:
        changed = copy.deepcopy(state)
        change(changed)
        digests.add(checkpoint.compute_digest(changed))
    assert len(digests) == len(changes) + 1


def test_damaged_files_are_refused_or_equal(tmp_path):
    state, path = example_state(), tmp_path / "checkpoint.pth"
    checkpoint.write(state, path)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(600):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[generator.randrange(len(whole)) :]
        else:
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.read(path), state)
        except CheckpointError:
            refused += 1
    assert refused > 300


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-last.pth"
    checkpoint.write(example_state(), path)
    before = path.read_bytes()

    def disk_full(state, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(example_state(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint-last.pth"]


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, plain_pickle):
    path, proof = tmp_path / "evil.pth", tmp_path / "executed"
    evil = {"model": {"weight": torch.zeros(1)}, "args": Attack(proof)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path)
    with pytest.raises(CheckpointError, match="refused"):
        checkpoint.read(path)
    assert not proof.exists()


def test_published_layouts_are_read(tmp_path):
    weights = {"cls_token": torch.randn(1, 1, 4)}
    torch.save({"model": weights}, tmp_path / "bare.pth")
    torch.save({"model": weights, "args": argparse.Namespace(model="mae")}, tmp_path / "namespace.pth")
    assert same(checkpoint.read(tmp_path / "bare.pth"), {"model": weights})
    assert checkpoint.read(tmp_path / "namespace.pth")["args"].model == "mae"


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("missing.pth", "empty.pth", "list.pth"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read(tmp_path / name)


def test_auto_takes_the_newest_that_is_whole(tmp_path, caplog):
    assert checkpoint.find("auto", tmp_path) is None
    for number in range(3):
        path = tmp_path / f"checkpoint-{number}.pth"
        checkpoint.write(example_state() | {"epoch": number}, path)
        os.utime(path, (number, number))
    assert checkpoint.find("auto", tmp_path)["epoch"] == 2
    path.write_bytes(path.read_bytes()[:-100])
    os.utime(path, (9, 9))
    assert checkpoint.find("auto", tmp_path)["epoch"] == 1
    assert "skips" in caplog.text
    assert "checkpoint-2.pth" in caplog.text
    assert checkpoint.find("", tmp_path) is None


def test_a_used_folder_needs_resume(tmp_path):
    (tmp_path / "job.log").write_text("a launcher's file is no run")
    checkpoint.prepare_output_dir(tmp_path, "")
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(ValueError, match="--resume auto"):
        checkpoint.prepare_output_dir(tmp_path, "")
    checkpoint.prepare_output_dir(tmp_path, "auto")


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
    with pytest.raises(CheckpointError, match=r"3 tensors differ .* --model x --in_chans 3; --resume needs the same"):
        checkpoint.restore_model(mini_mae, state)


def test_optimizer_state_of_an_older_torch(mini_mae):
    """The published code's groups know no fused option; ours stay fused."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    old_group = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05, "amsgrad": False, "params": [0]}
    old_state = {0: {"step": 11, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    checkpoint.restore_optimizer(optimizer, {"state": old_state, "param_groups": [old_group]})
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 12
