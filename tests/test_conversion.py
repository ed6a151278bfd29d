"""Weights of other libraries, in files that these libraries write, give equal outputs."""

from pathlib import Path

import pytest
import torch
import transformers
from mains import assert_equal, randomized
from safetensors.torch import load_file, save_file

from mae.checkpoints.checkpoint import CheckpointError
from mae.position_tables import sincos_table
from mae.weights import loading
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 16,
      "patch_size": 4, "layer_norm_eps": 1e-6}  # fmt: skip


@pytest.fixture
def hf_mae():
    settings = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 64, "norm_pix_loss": True}  # fmt: skip
    model = randomized(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HF, **settings)), 0.2)
    with torch.no_grad():  # the installed version leaves the fixed tables zero
        model.vit.embeddings.position_embeddings.copy_(sincos_table(32, (4, 4)))
        model.decoder.decoder_pos_embed.copy_(sincos_table(16, (4, 4)))
    return model


@pytest.mark.parametrize("layout", ["file", "memory"])
def test_transformers_mae(hf_mae, tmp_path, layout):
    """Both layouts of the installed version: in files and in memory."""
    if layout == "file":
        hf_mae.save_pretrained(tmp_path)
    else:
        save_file(hf_mae.state_dict(), tmp_path / "model.safetensors")
    model = MaskedAutoencoderViT(**SIZES, **DECODER, norm_pix_loss=True)
    loading.init_mae(model, loading.read(tmp_path / "model.safetensors"))
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    loss, pred, mask = model(imgs, noise=noise)
    with torch.no_grad():
        theirs = hf_mae(imgs, noise=noise)
    assert torch.equal(mask, theirs.mask)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pred, theirs.logits, rtol=1e-4, atol=1e-5)


def test_transformers_mae_of_earlier_versions(hf_mae, tmp_path):
    """Before version 5, a part of the names of the decoder was another one."""
    hf_mae.save_pretrained(tmp_path)
    named = {name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): value
             for name, value in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    save_file(named, tmp_path / "old.safetensors")
    assert_equal(*(loading.read(tmp_path / name).tensors for name in ("old.safetensors", "model.safetensors")))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    model = VisionTransformer(**SIZES, num_classes=7)
    torch.save({"model": {f"{prefix}{k}": v for k, v in model.state_dict().items()}}, tmp_path / "file.pth")
    assert loading.read(tmp_path / "file.pth").tensors.keys() == model.state_dict().keys()


def test_files_without_a_transformer(tmp_path):
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"conv\.weight"):
        loading.read(tmp_path / "file.pth")


MMPRETRAIN = Path(__file__).parent / "fixtures" / "mmpretrain"  # written by mmpretrain 1.2.0


def test_mmpretrain_mae():
    answers = torch.load(MMPRETRAIN / "answers.pth")
    model = MaskedAutoencoderViT(**SIZES, **DECODER, norm_pix_loss=True)
    loading.init_mae(model, loading.read(MMPRETRAIN / "mae.pth"))
    loss, pred, mask = model(answers["imgs"], noise=answers["ids_restore"].float())
    assert torch.equal(mask, answers["mask"])
    torch.testing.assert_close(pred, answers["pred"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, answers["mae_loss"], rtol=1e-4, atol=1e-5)


def test_mmpretrain_mae_at_another_image_size():
    """The first half of the channels of its table encodes the row."""
    file = loading.read(MMPRETRAIN / "mae.pth")
    for size in (16, (16, 24)):
        model = MaskedAutoencoderViT(**{**SIZES, "img_size": size}, **DECODER, norm_pix_loss=True)
        loading.init_mae(model, file)
        for table, width in ((model.positions((4, 6)), 32), (model.decoder_positions((4, 6)), 16)):
            torch.testing.assert_close(table, sincos_table(width, (4, 6)).roll(width // 2, -1))


def test_mmpretrain_classifier():
    answers = torch.load(MMPRETRAIN / "answers.pth")
    model = VisionTransformer(**SIZES, num_classes=7, global_pool=True).eval()
    loading.load_classifier(model, loading.read_classifier(MMPRETRAIN / "classifier.pth"))
    torch.testing.assert_close(model(answers["imgs"]), answers["logits"], rtol=1e-4, atol=1e-4)
