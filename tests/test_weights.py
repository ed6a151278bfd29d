"""Weights of files into models."""

import pytest
import torch

from models_mae import mae_vit_mini_patch4
from util import weights
from util.checkpoint import CheckpointError


def saved(path, model, drop=lambda name: False):
    torch.save({"model": {k: v for k, v in model.state_dict().items() if not drop(k)}}, path)
    return path


def test_all_weights_also_for_another_image_size(tmp_path, mini_mae):
    other = mae_vit_mini_patch4(img_size=32, in_chans=1)
    weights.init_mae(mini_mae, saved(tmp_path / "full.pth", other))
    for name, value in mini_mae.state_dict().items():
        if name not in weights.FIXED_TABLES:
            assert torch.equal(value, other.state_dict()[name])
    assert mini_mae.pos_embed.shape[1] == 17


def test_an_encoder_alone_leaves_the_decoder_untrained(tmp_path, mini_mae, caplog):
    other = mae_vit_mini_patch4(img_size=16, in_chans=1)
    decoder = mini_mae.decoder_pred.weight.clone()
    path = saved(tmp_path / "encoder.pth", other, lambda name: "decoder" in name or name == "mask_token")
    weights.init_mae(mini_mae, path)
    assert "encoder only" in caplog.text
    assert torch.equal(mini_mae.decoder_pred.weight, decoder)
    assert torch.equal(mini_mae.cls_token, other.cls_token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "lacks 1 tensors"),
        (lambda s: s.update(extra=torch.zeros(1)), r"holds besides 1 tensors \(extra"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 5)), "in another shape 1 tensors"),
    ],
)
def test_files_that_do_not_fit(tmp_path, mini_mae, change, message):
    state = mae_vit_mini_patch4(img_size=16, in_chans=1).state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        weights.init_mae(mini_mae, tmp_path / "file.pth")
