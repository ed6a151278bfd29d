"""The masked autoencoder: published sizes, formulas, results by hand. test_inference_export.py has transformers'."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import models_mae
import models_vit
from mae.masking import take
from mae.position_tables import get_2d_sincos_pos_embed, resize_pos_embed
from models_mae import MaskedAutoencoderViT


def build(**kwargs) -> MaskedAutoencoderViT:
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 16,
                "decoder_depth": 2, "decoder_num_heads": 2}  # fmt: skip
    return MaskedAutoencoderViT(**(settings | kwargs))


@pytest.mark.parametrize(("width", "depth"), [(16, 1), (48, 3), (100, 6), (256, 8), (512, 12), (640, 12)])
def test_the_decoder_of_a_small_encoder_is_smaller(width, depth):
    model = models_mae.MaskedAutoencoderViT(img_size=16, patch_size=4, embed_dim=width, depth=depth, num_heads=4,
                                            **models_mae.decoder_for(width, depth))  # fmt: skip
    encoder, decoder = (sum(p.numel() for p in blocks.parameters()) for blocks in (model.blocks, model.decoder_blocks))
    assert decoder < encoder / 2 or width < 32
    assert model(torch.randn(2, 3, 16, 16))[1].shape == (2, 16, 48)


def test_initial_weights():
    model = build(embed_dim=256, decoder_embed_dim=256, num_heads=4)
    fan = 256 + 3 * 4 * 4
    bound = (6 / fan) ** 0.5
    weight = model.patch_embed.proj.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.patch_embed.proj.bias.abs().max() > 0  # nn.Conv2d's own
    assert [token.std().item() for token in (model.cls_token, model.mask_token)] == pytest.approx([0.02] * 2, rel=0.15)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad


def test_a_seed_selects_the_published_patches():
    """forward calls torch.rand(B, N) once; the patches with the smallest values stay visible."""
    model, imgs = build(), torch.randn(2, 3, 16, 16)
    torch.manual_seed(7)
    _, _, mask = model(imgs)
    after = torch.rand(1)
    torch.manual_seed(7)
    noise = torch.rand(2, 16)
    assert torch.equal(torch.rand(1), after)
    kept = torch.zeros(2, 16).scatter(1, noise.argsort(dim=1)[:, :4], 1)
    assert torch.equal(mask, 1 - kept)


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(100, 0.9, 9), (25, 0.8, 4), (196, 0.75, 49), (16, 0, 16)])
def test_number_of_visible_patches_is_truncated(patches, ratio, kept):
    assert build().random_masking(torch.zeros(1, patches, 4), ratio)[0].shape[1] == kept


def test_a_mask_ratio_of_zero_has_zero_loss_and_a_gradient():
    model = build()
    loss, _, mask = model(torch.randn(2, 3, 16, 16), 0.0)
    loss.backward()
    assert loss == 0
    assert not mask.any() and model.decoder_pred.weight.grad is not None


@pytest.mark.parametrize(("height", "width", "p", "q", "chans"),
                         [(16, 16, 4, 4, 3), (8, 24, 4, 8, 1), (6, 10, 2, 5, 13)])  # fmt: skip
def test_unpatchify_inverts_patchify(height, width, p, q, chans):
    model = build(img_size=(height, width), patch_size=(p, q), in_chans=chans)
    imgs = torch.randn(2, chans, height, width)
    patches = model.patchify(imgs)
    assert patches.shape == (2, (height // p) * (width // q), p * q * chans)
    assert torch.equal(patches[:, 1].reshape(2, p, q, chans).permute(0, 3, 1, 2), imgs[:, :, :p, q : 2 * q])
    assert torch.equal(model.unpatchify(patches), imgs)
    unfolded, layer = F.unfold(imgs, (p, q), stride=(p, q)).transpose(1, 2), model.patch_embed.proj
    torch.testing.assert_close(model.patch_embed(imgs), F.linear(unfolded, layer.weight.flatten(1), layer.bias))


def test_another_image_size_recomputes_the_tables():
    small, large = build(), build(img_size=(8, 24))
    np.testing.assert_allclose(large.pos_embed[0], get_2d_sincos_pos_embed(32, (2, 6), cls_token=True), atol=1e-6)
    large.load_state_dict({k: v for k, v in small.state_dict().items() if "pos_embed" not in k}, strict=False)
    imgs, noise = torch.randn(2, 3, 8, 24), torch.rand(2, 12)
    torch.testing.assert_close(small(imgs, noise=noise), large(imgs, noise=noise))


def test_noise_and_mask_must_be_given_for_every_image():
    model, imgs = build(), torch.randn(4, 3, 16, 16)
    for given in ({"noise": torch.rand(1, 16)}, {"mask": torch.arange(16)[None] < 8}, {"noise": torch.rand(4, 15)}):
        with pytest.raises(ValueError, match="16 patches"):
            model(imgs, **given)


def test_features_are_deterministic_and_complete():
    model, imgs = build().eval(), torch.randn(2, 3, 16, 16)
    features = model.forward_features(imgs)
    assert features.shape == (2, 17, 32)
    assert torch.equal(features, model.forward_features(imgs))
    latent, _, ids = model.forward_encoder(imgs, 0.0)
    in_order = torch.cat([latent[:, :1], take(latent[:, 1:], ids)], dim=1)
    torch.testing.assert_close(in_order, features)
    first, last = model.get_intermediate_layers(imgs, n=2, norm=False)
    torch.testing.assert_close(model.blocks[1](first), last)
    torch.testing.assert_close(model.norm(last), features)


def test_loss_is_fp32_under_autocast():
    model, imgs = build(norm_pix_loss=True), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(imgs)
    assert (loss.dtype, pred.dtype) == (torch.float32, torch.bfloat16)


def test_losses_and_masks_without_options_are_those_of_earlier_versions():
    """Recorded before the options --num_cls_tokens, --learned_pos_embed and --drop_path were added."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_mini_patch4(img_size=16, in_chans=1)
    imgs = torch.randn(3, 1, 16, 16)
    loss, _, mask = model(imgs)
    assert loss.item() == pytest.approx(2.5766818523406982, rel=1e-6)
    assert [row.nonzero().flatten().tolist() for row in 1 - mask] == [[7, 8, 14, 15], [8, 9, 10, 12], [0, 7, 14, 15]]
    assert torch.rand(1).item() == 0.03373366594314575  # nothing else was sampled
    assert not any(isinstance(module, models_vit.DropPath) for module in model.modules())


@pytest.mark.parametrize("count", [1, 3])
def test_class_tokens_and_patches_pass_the_encoder_and_the_decoder_by_hand(count):
    model = build(num_cls_tokens=count, learned_pos_embed=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    _, pred, mask = model(imgs, noise=noise)
    visible = noise.argsort(dim=1)[:, :4]
    for number in range(2):
        patches = model.patch_embed(imgs[number : number + 1])[0] + model.pos_embed[0, count:]
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :count], patches[visible[number]]])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        full = model.mask_token[0].repeat(count + 16, 1)
        full[:count] = x[:count]
        for place, patch in enumerate(visible[number].tolist()):
            full[count + patch] = x[count + place]
        x = (full + model.decoder_pos_embed[0])[None]
        for block in model.decoder_blocks:
            x = block(x)
        torch.testing.assert_close(pred[number], model.decoder_pred(model.decoder_norm(x))[0, count:])
        assert mask[number].nonzero().flatten().tolist() == sorted(set(range(16)) - set(visible[number].tolist()))


def test_learned_positions_are_trained_and_interpolated():
    model = build(num_cls_tokens=2, learned_pos_embed=True)
    assert model.pos_embed.shape == (1, 18, 32)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.decoder_pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    model(torch.randn(2, 3, 24, 16))[0].backward()
    assert (model.pos_embed.grad.abs().sum(dim=2) > 0).sum() > 10
    assert (model.decoder_pos_embed.grad.abs().sum(dim=2) > 0).all()
    table = resize_pos_embed(model.pos_embed, (4, 4), (6, 4))
    expected = model.patch_embed(torch.ones(1, 3, 24, 16)) + table[:, 2:]
    torch.testing.assert_close(model.embed(torch.ones(1, 3, 24, 16))[:, 2:], expected)


def test_fixed_positions_of_several_class_tokens_are_zero():
    one, several = build(), build(num_cls_tokens=3)
    for name in ("pos_embed", "decoder_pos_embed"):
        table = getattr(several, name)
        assert not table.requires_grad and not table[:, :3].any()
        assert torch.equal(table[:, 3:], getattr(one, name)[:, 1:])
    assert several(torch.randn(2, 3, 24, 16))[1].shape == (2, 24, 48)


def test_images_of_another_size_compile_as_one_graph_and_wait_for_no_value():
    """The positions are those of the new grid, in the order of the table. Meta tensors have no values."""
    model, images, noise = build(depth=1, decoder_depth=1), torch.randn(2, 3, 24, 32), torch.rand(2, 48)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    expected = torch.from_numpy(get_2d_sincos_pos_embed(32, (6, 8), cls_token=True)).float()
    for shift in (0, 16):  # the paper's order, and mmpretrain's
        with torch.no_grad():
            model.pos_embed.copy_(build().pos_embed.roll(shift, -1))
        assert torch.equal(model.positions((6, 8))[0], expected.roll(shift, -1))
        for ours, theirs in zip(compiled(images, noise=noise), model(images, noise=noise), strict=True):
            assert torch.equal(ours, theirs)
    assert model.to("meta")(images.to("meta"))[1].shape == (2, 48, 48)


def test_drop_path_grows_over_the_encoder_and_is_absent_in_the_decoder():
    model = build(depth=3, drop_path_rate=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0) for block in model.blocks] == [0, 0.2, 0.4]
    assert not any(isinstance(module, models_vit.DropPath) for module in model.decoder_blocks.modules())


@pytest.mark.parametrize("size", ["base_patch16", "large_patch16", "huge_patch16", "1b_patch16"])
def test_models_of_pixio(size):
    """The encoder of the size with eight class tokens and learned positions, and 32 blocks of the decoder."""
    with torch.device("meta"):
        model, plain = (getattr(models_mae, f"{kind}_vit_{size}")() for kind in ("pixio", "mae"))
    width = plain.cls_token.shape[2]
    assert (model.cls_token.shape, model.mask_token.shape) == ((1, 8, width), (1, 1, 512))
    assert (model.pos_embed.shape, model.decoder_pos_embed.shape) == ((1, 264, width), (1, 264, 512))
    assert model.learned_pos_embed
    for blocks, count, expected in (
        (model.blocks, len(plain.blocks), plain.blocks[0]),
        (model.decoder_blocks, 32, plain.decoder_blocks[0]),
    ):
        assert len(blocks) == count and {block.attn.num_heads for block in blocks} == {expected.attn.num_heads}
        assert {str(block) for block in blocks} == {str(expected)}


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


def test_uniformity_is_a_second_loss_of_the_class_tokens():
    """It is the weight if all class tokens are equal. The loss in evaluation mode has no second term."""
    model = build(uniformity=2.0)
    imgs, noise = torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1), torch.rand(1, 16).expand(4, -1)
    terms = model.train()(imgs, noise=noise)[0]
    assert terms["uniformity"].item() == pytest.approx(2)
    assert terms["pixels"].item() == pytest.approx(model.eval()(imgs, noise=noise)[0].item())


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


@pytest.mark.parametrize(("name", "encoder", "decoder", "counts"), [
    ("mini_patch4", (128, 4, 4, 4), (64, 1, 2), None), ("tiny_patch16", (192, 12, 3, 16), (192, 4, 3), None),
    ("small_patch16", (384, 12, 6, 16), (256, 4, 8), None),
    ("base_patch16", (768, 12, 12, 16), (512, 8, 16), (111_907_840, 86_567_656)),
    ("large_patch16", (1024, 24, 16, 16), (512, 8, 16), (329_541_888, 304_326_632)),
    ("huge_patch14", (1280, 32, 16, 14), (512, 8, 16), (657_074_508, 632_045_800)),
    ("huge_patch16", (1280, 32, 16, 16), (512, 8, 16), None), ("1b_patch16", (1536, 48, 24, 16), (512, 8, 16), None),
    ("giant_patch14", (1408, 40, 16, 14), (512, 8, 16), (1_037_577_676, 1_012_611_432)),
])  # fmt: skip
def test_published_sizes(name, encoder, decoder, counts):
    """Width, depth, heads, patch size and number of parameters: the number of heads has no effect on shapes."""
    with torch.device("meta"):
        model, classifier = getattr(models_mae, f"mae_vit_{name}")(), getattr(models_vit, f"vit_{name}")()
    if counts:
        assert counts == tuple(sum(p.numel() for p in vit.parameters()) for vit in (model, classifier))
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
        with pytest.raises(ValueError, match=f"{height}x{width}"):
            model.patch_embed.grid_of(height, width)


def test_loss_is_the_mean_over_masked_patches():
    model = build(norm_pix_loss=True)
    imgs = torch.randn(2, 3, 16, 16)
    pred, mask = torch.randn(2, 16, 48), (torch.rand(2, 16) < 0.5).float()
    total, count = 0.0, 0
    for b in range(2):
        for n in range(16):
            row, column = divmod(n, 4)
            patch = imgs[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            if mask[b, n]:
                target = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6) ** 0.5
                total, count = total + ((pred[b, n] - target) ** 2).mean(), count + 1
    torch.testing.assert_close(model.forward_loss(imgs, pred, mask), total / count)


def test_the_encoder_may_return_what_only_the_decoder_of_a_class_takes():
    class Layers(MaskedAutoencoderViT):
        def forward_encoder(self, imgs, mask_ratio, **context):
            latent, mask, ids_restore = super().forward_encoder(imgs, mask_ratio, **context)
            return [latent, latent], mask, ids_restore

        def forward_decoder(self, latent, ids_restore, **context):
            return super().forward_decoder(sum(latent) / 2, ids_restore, **context)

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16,
             "decoder_depth": 1, "decoder_num_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    plain = MaskedAutoencoderViT(**sizes)
    layers = Layers(**sizes)
    layers.load_state_dict(plain.state_dict())
    imgs = torch.rand(2, 3, 16, 16)
    noise = torch.rand(2, 16)
    assert torch.equal(layers(imgs, noise=noise)[0], plain(imgs, noise=noise)[0])
