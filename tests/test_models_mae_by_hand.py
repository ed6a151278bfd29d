"""The masked autoencoder on small inputs with results computed by hand, and with every number of patches."""

from functools import partial

import pytest
import torch
from test_models_mae import build

import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT


def single_layers(side, patch_size=1, **kwargs) -> MaskedAutoencoderViT:
    """A model without blocks, for images of one channel."""
    return build(img_size=side, patch_size=patch_size, in_chans=1, depth=0, decoder_depth=0, **kwargs)


@pytest.mark.parametrize("side", [7, 14, 16])
def test_an_explicit_mask_works_for_every_number_of_patches(side):
    """49, 196 and 256 patches: rounding of the ratio of a mask must not change its number of patches."""
    model, imgs, num_patches = single_layers(side), torch.randn(1, 1, side, side), side * side
    for kept in range(1, num_patches + 1):
        mask = torch.randperm(num_patches)[None] >= kept
        assert torch.equal(model(imgs, mask=mask)[2], mask.float()), kept


def test_reconstruct_restores_mean_and_std_of_each_patch():
    """Patch (1, 2, 3, 4): mean 2.5, unbiased variance 5/3."""
    imgs = torch.tensor([[1.0, 2, 5, 5], [3, 4, 5, 5]])[None, None]
    for norm_pix_loss, expected in ((True, [3.7909948, 1.2090054, 2.5, 5.0819885]), (False, [1.0, -1.0, 0.0, 2.0])):
        model = single_layers((2, 4), patch_size=2, norm_pix_loss=norm_pix_loss)
        model.decoder_pred.weight.data.zero_()
        model.decoder_pred.bias.data = torch.tensor([1.0, -1.0, 0.0, 2.0])
        picture = model.reconstruct(imgs, mask=torch.tensor([[True, False]]))
        assert picture.prediction[0, 0, :, :2].flatten().tolist() == pytest.approx(expected, rel=1e-5)
        assert torch.equal(picture.pasted[..., :2], picture.prediction[..., :2])
        assert torch.equal(picture.pasted[..., 2:], imgs[..., 2:]) and torch.equal(picture.original, imgs)
        assert torch.equal(picture.masked[..., 2:], imgs[..., 2:]) and not picture.masked[..., :2].any()


def test_a_normalized_target_by_hand():
    """With a prediction of zeros, the loss of patch (1, 2, 3, 4) is its mean square, 1.25 / (5/3 + 1e-6)."""
    model = single_layers((2, 4), patch_size=2, norm_pix_loss=True)
    imgs = torch.tensor([[1.0, 2, 5, 5], [3, 4, 5, 5]])[None, None]
    pred, mask = torch.zeros(1, 2, 4), torch.tensor([[1.0, 0.0]])
    assert model.forward_loss(imgs, pred, mask).item() == pytest.approx(0.7499995, rel=1e-6)
    assert model.forward_loss(1e-3 * imgs, pred, mask).item() == pytest.approx(0.46875, rel=1e-5)


def test_the_decoder_restores_the_order_of_tokens():
    """Without blocks, a visible patch is its embedding and a masked patch the mask token, plus their positions."""
    model = single_layers((2, 4), patch_size=2, decoder_embed_dim=32)
    model.decoder_embed.weight.data, model.decoder_embed.bias.data = torch.eye(32), torch.zeros(32)
    latent, ids_restore = torch.randn(1, 3, 32), torch.tensor([[1, 0]])
    embedded = model.decoder_pos_embed[0]
    tokens = torch.stack([latent[0, 2] + embedded[1], latent[0, 1] + embedded[2]])
    expected = model.decoder_pred(model.decoder_norm(tokens))
    torch.testing.assert_close(model.forward_decoder(latent, ids_restore)[0], expected)
    tokens = torch.stack([model.mask_token[0, 0] + embedded[1], latent[0, 1] + embedded[2]])
    expected = model.decoder_pred(model.decoder_norm(tokens))
    torch.testing.assert_close(model.forward_decoder(latent[:, :2], ids_restore)[0], expected)


def test_the_class_token_and_every_patch_get_their_positions():
    model = single_layers((2, 4), patch_size=2)
    model.pos_embed.data = torch.randn(1, 3, 32)
    imgs = torch.randn(1, 1, 2, 4)
    patches = model.patch_embed(imgs)[0]
    tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0], patches[1] + model.pos_embed[0, 2]]
    model.random_masking = partial(model.random_masking, noise=torch.tensor([[0.9, 0.1]]))
    latent, mask, ids_restore = model.forward_encoder(imgs, 0.5)
    torch.testing.assert_close(latent[0], model.norm(torch.stack(tokens)))
    assert (mask.tolist(), ids_restore.tolist()) == ([[1.0, 0.0]], [[1, 0]])


def test_reconstruct_supports_other_image_sizes():
    model = single_layers((4, 4), patch_size=2)
    imgs = torch.arange(32.0).reshape(1, 1, 8, 4)
    picture = model.reconstruct(imgs, mask=torch.tensor([[True] + 7 * [False]]))
    assert torch.equal(picture.pasted[0, 0, 2:], imgs[0, 0, 2:])
    assert torch.equal(picture.masked[0, 0, :2, 2:], imgs[0, 0, :2, 2:])


def test_loading_weights_does_not_change_other_models():
    first = single_layers(4)
    table = first.pos_embed.clone()
    with torch.no_grad():
        first.pos_embed.fill_(7.0)
        first.decoder_pos_embed.fill_(7.0)
    assert torch.equal(single_layers(4).pos_embed, table)
    assert not (single_layers(4).decoder_pos_embed == 7).any()


@pytest.mark.parametrize(("name", "encoder", "decoder"), [
    ("mini_patch4", (128, 4, 4, 4), (64, 1, 2)), ("tiny_patch16", (192, 12, 3, 16), (192, 4, 3)),
    ("small_patch16", (384, 12, 6, 16), (256, 4, 8)), ("base_patch16", (768, 12, 12, 16), (512, 8, 16)),
    ("large_patch16", (1024, 24, 16, 16), (512, 8, 16)), ("huge_patch14", (1280, 32, 16, 14), (512, 8, 16)),
    ("huge_patch16", (1280, 32, 16, 16), (512, 8, 16)), ("1b_patch16", (1536, 48, 24, 16), (512, 8, 16)),
    ("giant_patch14", (1408, 40, 16, 14), (512, 8, 16)),
])  # fmt: skip
def test_published_sizes(name, encoder, decoder):
    """Width, depth, heads and patch size of encoder and decoder: the number of heads has no effect on shapes."""
    with torch.device("meta"):
        model, classifier = getattr(models_mae, f"mae_vit_{name}")(), getattr(models_vit, f"vit_{name}")()
    width, depth, heads, patch = encoder
    for vit in (model, classifier):
        assert (vit.cls_token.shape[-1], len(vit.blocks), vit.patch_embed.patch_size) == (width, depth, (patch, patch))
        mlp = 6144 if name == "giant_patch14" else 4 * width
        assert {(block.attn.num_heads, block.mlp.fc1.out_features) for block in vit.blocks} == {(heads, mlp)}
    width, depth, heads = decoder
    assert (model.mask_token.shape[-1], len(model.decoder_blocks)) == (width, depth)
    blocks = {(block.attn.num_heads, block.mlp.fc1.out_features) for block in model.decoder_blocks}
    assert blocks == {(heads, 4 * width)}


def test_arguments_of_a_factory_replace_those_of_its_size():
    model = models_mae.mae_vit_mini_patch4(img_size=(16, 24), patch_size=8, depth=2, decoder_depth=3, in_chans=1)
    assert (model.grid_size, len(model.blocks), len(model.decoder_blocks)) == ((2, 3), 2, 3)
    assert model.patch_embed.proj.weight.shape == (128, 1, 8, 8)
    classifier = models_vit.vit_mini_patch4(img_size=(16, 24), patch_size=8, depth=2, in_chans=1)
    assert (classifier.patch_embed.grid_size, len(classifier.blocks)) == ((2, 3), 2)


def test_both_sides_of_an_image_are_multiples_of_the_patchs():
    model = build(patch_size=(4, 8), img_size=(16, 24))
    assert model.patch_embed.grid_of(8, 32) == (2, 4)
    for height, width in ((16, 20), (18, 24), (0, 24), (16, 0)):
        with pytest.raises(ValueError, match=rf"{height}x{width} .*4x8"):
            model.patch_embed.grid_of(height, width)
