"""Weights in the wild: files in the layouts of MIGRATING.md's table are read, or refused with the reason."""

import argparse

import pytest
import timm
import torch

from inference import get_model
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4
from util.checkpoints.checkpoint import CheckpointError
from util.weights import loading

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def autoencoder():
    return mae_vit_mini_patch4(img_size=16, norm_pix_loss=True).eval()


def saved(content, folder):
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


def test_forks_of_the_papers_code_with_optimizer_and_settings(imgs, tmp_path):
    """RETFound and others: the whole checkpoint, with an argparse.Namespace whose model is a name of their own."""
    model = autoencoder()
    args = argparse.Namespace(model="RETFound_mae", input_size=16, nb_classes=5, output_dir="out", mask_ratio=0.75)
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}
    file = saved(content, tmp_path)
    torch.testing.assert_close(get_model(file).forward_features(imgs), model.forward_features(imgs))
    classifier = vit_mini_patch4(img_size=16, num_classes=7, global_pool=True)
    loading.load_encoder(classifier, loading.read(file))
    assert torch.equal(classifier.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_the_encoder_alone_with_a_mask_token(tmp_path):
    state = {name: value for name, value in autoencoder().state_dict().items() if not name.startswith("decoder_")}
    model = get_model(saved({"model": state}, tmp_path))
    assert "mask_token" in state
    assert model.settings["nb_classes"] == 0


def test_timms_mae(imgs, tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SHAPE).eval()
    ours = get_model(saved(theirs.state_dict(), tmp_path))
    torch.testing.assert_close(ours.extract_feat(imgs, "cls"), theirs(imgs))


def test_spectrograms_of_audio_mae(tmp_path):
    """One channel, and a grid that is no square, which the file does not record."""
    model = vit_mini_patch4(img_size=(32, 16), in_chans=1, num_classes=0).eval()
    ours = get_model(saved({"model": model.state_dict()}, tmp_path), input_size=[32, 16])
    spectrogram = torch.randn(1, 1, 32, 16)
    torch.testing.assert_close(ours.extract_feat(spectrogram, "cls"), model(spectrogram))


def groups_of_channels(state):
    """SatMAE: a patch projection for each group of channels, and an embedding of the groups."""
    weight, bias = state.pop("patch_embed.proj.weight"), state.pop("patch_embed.proj.bias")
    state |= {f"patch_embed.{group}.proj.{name}": value for group in (0, 1)
              for name, value in (("weight", weight), ("bias", bias))}  # fmt: skip
    return {"model": {**state, "channel_embed": torch.zeros(1, 2, 8)}}


def no_class_token(state):
    """I-JEPA and Hiera have neither a class token nor its position."""
    del state["cls_token"]
    return state


def tubelets(state):
    """VideoMAE: patches of two frames."""
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2).repeat(1, 1, 2, 1, 1)
    return {"model": state}


def layer_scale(state):
    """DINOv2 and BEiT scale each branch."""
    return {**state, "blocks.0.ls1.gamma": torch.ones(128), "blocks.0.ls2.gamma": torch.ones(128)}


@pytest.mark.parametrize(("layout", "message"), [
    (groups_of_channels, r"has a patch projection for each group of channels \(patch_embed\.0\.proj\.weight\)"),
    (no_class_token, r"has no cls_token, which the models of this library have"),
    (tubelets, r"its patch_embed\.proj\.weight is torch\.float32 \(128, 3, 2, 4, 4\), which does not fit"),
    (layer_scale, r"2 tensors are unexpected \(blocks\.0\.ls1\.gamma, blocks\.0\.ls2\.gamma\)"),
])  # fmt: skip
def test_other_architectures_are_refused_with_the_reason(layout, message, tmp_path):
    file = saved(layout(dict(vit_mini_patch4(img_size=16).state_dict())), tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        get_model(file)
    assert "\n" not in str(caught.value)
