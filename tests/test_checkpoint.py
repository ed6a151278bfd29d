"""Checkpoint files: complete or rejected, without executing code; and files of other libraries."""

import copy
import os
import pickle

import pytest
import torch

from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.training import resume


def example_state():
    return {
        "model": {"weight": torch.randn(3, 4), "bias": torch.zeros(3, dtype=torch.bfloat16), "count": torch.tensor(7)},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3, "args": {"model": "mae_vit_mini_patch4", "input_size": [16, 24], "lr": None}
    }  # fmt: skip


def test_round_trip_with_plain_torch_load(tmp_path):
    state, path = example_state(), tmp_path / "checkpoint-3.pth"
    checkpoint.write(state, path)
    assert checkpoint.compute_digest(checkpoint.read(path)) == checkpoint.compute_digest(state)
    assert torch.load(path, weights_only=True)["digest"].startswith("sha256:")
    assert os.listdir(tmp_path) == ["checkpoint-3.pth"]


def test_digest_covers_everything():
    state = example_state()
    changes = [lambda s: s["model"]["weight"][0, 0].add_(1e-6),
               lambda s: s["model"].update(bias=s["model"]["bias"].half()),
               lambda s: s["model"].update(weight=s["model"]["weight"].reshape(4, 3)),
               lambda s: s["optimizer"]["param_groups"][0].update(lr=0.2), lambda s: s.update(epoch=4),
               lambda s: s["args"].update(lr="None"),
               lambda s: s["model"].update(other=s["model"].pop("count"))]  # fmt: skip
    digests = {checkpoint.compute_digest(state)}
    for change in changes:
        changed = copy.deepcopy(state)
        change(changed)
        digests.add(checkpoint.compute_digest(changed))
    assert len(digests) == len(changes) + 1


def test_a_full_disk_leaves_the_previous_file(small_disk):
    path = small_disk / "checkpoint-last.pth"
    checkpoint.write(example_state(), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"checkpoint-last.pth .*space"):
        checkpoint.write({"model": {"weight": torch.randn(1000, 1000)}}, path)
    assert (path.read_bytes(), os.listdir(small_disk)) == (before, ["checkpoint-last.pth"])


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_file_with_code_is_rejected_and_not_executed(tmp_path, plain_pickle):
    path, proof = tmp_path / "evil.pth", tmp_path / "executed"
    evil = {"model": {"weight": torch.zeros(1)}, "args": Attack(proof)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path)
    with pytest.raises(CheckpointError, match="refused"):
        checkpoint.read(path)
    assert not proof.exists()


def test_other_files_are_not_checkpoints(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("missing.pth", "empty.pth", "list.pth"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read(tmp_path / name)


def test_newest_first_orders_undamaged_checkpoints_by_progress(tmp_path, caplog):
    assert resume.read_newest(tmp_path) is None
    for number in range(3):
        path = tmp_path / f"checkpoint-{number}.pth"
        checkpoint.write(example_state() | {"epoch": number}, path)
        os.utime(path, (9 - number, 9 - number))  # modification times of a copied folder are ignored
    rolling = tmp_path / "checkpoint-last.pth"
    position = {"epoch": 3, "images_done": 8}
    checkpoint.write(example_state() | {"epoch": 2, "progress": position}, rolling)
    assert resume.read_newest(tmp_path)["progress"] == position
    whole = rolling.read_bytes()
    middle = whole.index(checkpoint.read(rolling)["model"]["weight"].numpy().tobytes())
    rolling.write_bytes(whole[:middle] + b"\xff" + whole[middle + 1 :])  # only the digest detects the damage
    assert resume.read_newest(tmp_path)["epoch"] == 2
    path.write_bytes(path.read_bytes()[:-100])
    assert resume.read_newest(tmp_path)["epoch"] == 1
    assert "skips checkpoint-last.pth" in caplog.text
    assert "skips checkpoint-2.pth" in caplog.text
