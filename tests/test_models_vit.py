"""The classifier: its parts by hand."""

import pytest
import timm.layers
import torch

import mae.build
import models_vit
from mae.position_tables import resize_pos_embed


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
    mae.build.set_grad_checkpointing(model)
    torch.testing.assert_close(gradients(), expected)
    model.eval()
    torch.testing.assert_close(model(imgs), model(imgs), rtol=0, atol=0)  # nothing is dropped


def test_positions_of_another_rectangle():
    """A table of 2 x 4 patches is interpolated to 4 x 3 with rows and columns in their order."""
    model = models_vit.vit_mini_patch4(img_size=(8, 16))
    for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token):
        parameter.data.zero_()
    table = model.pos_embed.data
    torch.testing.assert_close(model.embed(torch.rand(1, 3, 16, 12)), resize_pos_embed(table, (2, 4), (4, 3)))
    torch.testing.assert_close(model.embed(torch.rand(1, 3, 8, 16)), table)


@pytest.mark.parametrize("shape", [(64, 3), (64, 3, 5)])
def test_drop_path_equals_timms(shape):
    x, ours, theirs = torch.randn(shape), models_vit.DropPath(0.3), timm.layers.DropPath(0.3)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), expected) and torch.equal(ours.eval()(x), x)


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


def test_gelu_is_exact():
    """GELU(1) = Phi(1) = 0.8413447; the tanh approximation gives 0.8411920."""
    mlp = models_vit.Mlp(1, 1)
    for layer in (mlp.fc1, mlp.fc2):
        layer.weight.data, layer.bias.data = torch.ones(1, 1), torch.zeros(1)
    assert mlp(torch.tensor([[1.0], [-2.0]])).flatten().tolist() == pytest.approx([0.8413447, -0.0455003], rel=1e-5)


def test_the_memory_format_of_images_changes_no_bit():
    """Batches are contiguous or channels-last, depending on worker processes and on cached images."""
    model = models_vit.vit_mini_patch4(img_size=16, global_pool=True)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = model(images)
    assert torch.equal(model(images.to(memory_format=torch.channels_last)), outputs)
