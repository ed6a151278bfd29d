"""From a file alone to a model."""

import pytest
import torch

from inference.model import load_mae
from util import checkpoint
from util.checkpoint import CheckpointError


def test_a_checkpoint_tells_its_own_story(pretrain):
    out = pretrain(norm_pix_loss=True, in_chans=1, input_size="16 24", mean="0.3", std="0.2")
    loaded = load_mae(out / "checkpoint-1.pth")
    assert loaded.model.grid_size == (4, 6)
    assert loaded.model.norm_pix_loss
    assert not loaded.model.training
    assert loaded.normalize.mean.item() == pytest.approx(0.3)
    state = checkpoint.read(out / "checkpoint-1.pth")
    assert all(torch.equal(v, state["model"][k]) for k, v in loaded.model.state_dict().items())


def test_a_bare_file_is_told_apart(tmp_path, mini_mae):
    torch.save({"model": mini_mae.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="none of our checkpoints"):
        load_mae(tmp_path / "bare.pth")
