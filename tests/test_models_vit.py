"""The classifier: published names and counts, and timm's ViT as an oracle."""

import pytest
import timm
import torch

import models_vit
from models_vit import VisionTransformer


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("vit_base_patch16", {}, 86_567_656),
        ("vit_large_patch16", {"global_pool": True}, 304_326_632),
        ("vit_huge_patch14", {}, 632_045_800),
        ("vit_huge_patch14", {"img_size": 448, "global_pool": True}, 633_028_840),
        ("vit_giant_patch14", {}, 1_012_611_432),
    ],
)
def test_published_parameter_counts(name, kwargs, count):
    with torch.device("meta"):
        model = getattr(models_vit, name)(**kwargs)
    assert sum(p.numel() for p in model.parameters()) == count


def test_giant_is_timms():
    with torch.device("meta"):
        ours, theirs = models_vit.vit_giant_patch14(), timm.create_model("vit_giant_patch14_224")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_published_keys():
    pooled = list(models_vit.vit_mini_patch4(global_pool=True).state_dict())
    assert pooled[-4:] == ["head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"]
    assert not any(key.startswith("norm.") for key in pooled)
    token = list(models_vit.vit_mini_patch4().state_dict())
    assert token[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert token[:4] == ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]


@pytest.mark.parametrize("global_pool", [False, True])
def test_agrees_with_timm(global_pool):
    ours = VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=3, num_heads=4, global_pool=global_pool
    ).eval()
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=3, num_heads=4,
        global_pool="avg" if global_pool else "token",
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    imgs = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(imgs), theirs(imgs), rtol=1e-5, atol=1e-5)
    assert ours.forward_features(imgs).shape == (2, 32)


def test_drop_path_grows_linearly():
    model = models_vit.vit_mini_patch4(drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_another_image_size_interpolates_the_positions():
    model = models_vit.vit_mini_patch4(img_size=16).eval()
    assert model(torch.randn(1, 3, 24, 32)).shape == (1, 1000)
    with pytest.raises(ValueError, match="choose input_size so that its sides"):
        model(torch.randn(1, 3, 18, 16))


def test_from_scratch_weights():
    model = models_vit.vit_tiny_patch16()
    for weight in (model.pos_embed, model.blocks[3].attn.qkv.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.blocks[0].mlp.fc1.bias == 0).all()
