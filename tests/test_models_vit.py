"""The classifier: published names and parameter counts, compared with timm's ViT."""

import pytest
import timm
import timm.layers
import torch

import models_build
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
    with pytest.raises(ValueError, match="input_size"):
        model(torch.randn(1, 3, 18, 16))


def test_from_scratch_weights():
    model = models_vit.vit_tiny_patch16()
    for weight in (model.pos_embed, model.blocks[3].attn.qkv.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.blocks[0].mlp.fc1.bias == 0).all()


def test_checkpointed_blocks_drop_the_same_paths():
    """The recomputation must use the random numbers of the first pass; otherwise gradients are wrong."""
    model, imgs = models_vit.vit_mini_patch4(img_size=16, drop_path_rate=0.5, num_classes=3), torch.randn(16, 3, 16, 16)

    def gradients():
        torch.manual_seed(4)
        model.zero_grad()
        model(imgs).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    models_build.set_grad_checkpointing(model)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    model.eval()
    torch.testing.assert_close(model(imgs), model(imgs), rtol=0, atol=0)  # nothing is dropped


def test_positions_of_another_rectangle():
    """A table of 2 x 4 patches is interpolated to 4 x 3 with rows and columns in their order."""
    model = models_vit.vit_mini_patch4(img_size=(8, 16))
    for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token):
        parameter.data.zero_()
    table = model.pos_embed.data
    grid = table[:, 1:].reshape(1, 2, 4, 128).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(4, 3), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(model.embed(torch.rand(1, 3, 16, 12)), expected)
    torch.testing.assert_close(model.embed(torch.rand(1, 3, 8, 16)), table)


def test_attention_by_hand():
    """Two heads of one channel: softmax of query times key divided by the root of the head's width; projection."""
    attention = models_vit.Attention(2, 2)
    attention.qkv.weight.data = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3], [1, 1], [1, -1]])
    attention.qkv.bias.data.zero_()
    attention.proj.weight.data, attention.proj.bias.data = torch.eye(2), torch.tensor([0.5, 0.0])
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    e2, e3 = 7.38905609893065, 20.085536923187668
    # Head 1: queries (1, 0), keys (2, 0), values (1, 1). Head 2: queries (0, 1), keys (0, 3), values (1, -1).
    expected = [[1.5, 0.0], [1.5, (1 - e3) / (1 + e3)]]
    torch.testing.assert_close(attention(x), torch.tensor([expected]))
    torch.testing.assert_close(attention.maps(x)[0, 0], torch.tensor([[e2 / (1 + e2), 1 / (1 + e2)], [0.5, 0.5]]))


@pytest.mark.parametrize("shape", [(64, 3), (64, 3, 5)])
def test_drop_path_equals_timms(shape):
    x, ours, theirs = torch.randn(shape), models_vit.DropPath(0.3), timm.layers.DropPath(0.3)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), expected)
    assert torch.equal(ours.eval()(x), x)


def test_drop_path_acts_on_attention_and_mlp():
    """Each branch is dropped in half of the samples, and multiplied by two in the others."""
    block = models_vit.Block(8, 2, drop_path=0.5).train()
    x = torch.randn(400, 3, 8)
    attention = block.attn(block.norm1(x))
    kinds = set()
    with torch.no_grad():
        for sample, out, branch in zip(x, block(x), attention, strict=True):
            for first in (0.0, 2.0):
                y = sample + first * branch
                for second in (0.0, 2.0):
                    if torch.allclose(out, y + second * block.mlp(block.norm2(y)), atol=1e-5):
                        kinds.add((first, second))
                        break
    assert kinds == {(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (2.0, 2.0)}
    block.eval()
    y = x + attention
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_a_frozen_model_trains_only_its_head():
    model = models_vit.vit_mini_patch4(img_size=16)
    model.freeze()
    model.train()
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.weight", "head.bias"
    ]  # fmt: skip
    assert model.head.training
    assert not any(module.training for module in model.blocks.modules())
    model.eval()
    assert not model.head.training


def test_gelu_is_exact():
    """GELU(1) = Phi(1) = 0.8413447; the tanh approximation gives 0.8411920."""
    mlp = models_vit.Mlp(1, 1)
    for layer in (mlp.fc1, mlp.fc2):
        layer.weight.data, layer.bias.data = torch.ones(1, 1), torch.zeros(1)
    assert mlp(torch.tensor([[1.0], [-2.0]])).flatten().tolist() == pytest.approx([0.8413447, -0.0455003], rel=1e-5)


@pytest.mark.parametrize(
    ("size", "name"),
    [("tiny_patch16", "vit_tiny_patch16_224"), ("small_patch16", "vit_small_patch16_224"),
     ("base_patch16", "vit_base_patch16_224"), ("large_patch16", "vit_large_patch16_224"),
     ("huge_patch14", "vit_huge_patch14_224"), ("giant_patch14", "vit_giant_patch14_224")],
)  # fmt: skip
def test_the_sizes_are_those_of_timm(size, name):
    with torch.device("meta"):
        reference, ours = timm.create_model(name, num_classes=0), getattr(models_vit, f"vit_{size}")(num_classes=0)
    assert reference.patch_embed.num_patches == ours.patch_embed.num_patches
    assert reference.blocks[0].attn.num_heads == ours.blocks[0].attn.num_heads
    assert {name: p.shape for name, p in reference.blocks.named_parameters()} == {
        name: p.shape for name, p in ours.blocks.named_parameters()
    }


@pytest.mark.parametrize(("size", "shape"), [("huge_patch16", (1280, 32, 16)), ("1b_patch16", (1536, 48, 24))])
def test_the_sizes_of_pixio(size, shape):
    """Width, depth and heads (Yang et al. 2025)."""
    with torch.device("meta"):
        model = getattr(models_vit, f"vit_{size}")()
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == shape
    assert model.patch_embed.patch_size == (16, 16)
