"""The masked autoencoder: published parameter counts, and the formulas. test_inference_export.py has transformers'."""

import pytest
import torch
from torch.autograd import gradcheck

import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT
from util.masking import take
from util.pos_embed import resize_pos_embed


def build(**kwargs) -> MaskedAutoencoderViT:
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 16,
                "decoder_depth": 2, "decoder_num_heads": 2}  # fmt: skip
    return MaskedAutoencoderViT(**(settings | kwargs))


@pytest.mark.parametrize(("name", "count"), [("base_patch16", 111_907_840), ("large_patch16", 329_541_888),
                                             ("huge_patch14", 657_074_508),
                                             ("giant_patch14", 1_037_577_676)])  # fmt: skip
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{name}")()
    assert sum(p.numel() for p in model.parameters()) == count


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


def test_gradients_against_finite_differences():
    model = MaskedAutoencoderViT(img_size=4, patch_size=2, in_chans=1, embed_dim=8, depth=1, num_heads=2,
                                 decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=2,
                                 norm_pix_loss=True).double()  # fmt: skip
    imgs, noise = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.rand(2, 4)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def loss(*values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, parameters, (imgs, 0.5), {"noise": noise})[0]

    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert gradcheck(loss, values, eps=1e-6, atol=1e-6, fast_mode=True)


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


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.99, 1.5])
def test_impossible_ratio(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        build()(torch.zeros(1, 3, 16, 16), ratio)


def test_a_mask_ratio_of_zero_has_zero_loss_and_a_gradient():
    model = build()
    loss, _, mask = model(torch.randn(2, 3, 16, 16), 0.0)
    loss.backward()
    assert loss == 0
    assert not mask.any() and model.decoder_pred.weight.grad is not None


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


@pytest.mark.parametrize(("height", "width", "p", "q", "chans"),
                         [(16, 16, 4, 4, 3), (8, 24, 4, 8, 1), (6, 10, 2, 5, 13)])  # fmt: skip
def test_unpatchify_inverts_patchify(height, width, p, q, chans):
    model = build(img_size=(height, width), patch_size=(p, q), in_chans=chans)
    imgs = torch.randn(2, chans, height, width)
    patches = model.patchify(imgs)
    assert patches.shape == (2, (height // p) * (width // q), p * q * chans)
    assert torch.equal(patches[:, 1].reshape(2, p, q, chans).permute(0, 3, 1, 2), imgs[:, :, :p, q : 2 * q])
    assert torch.equal(model.unpatchify(patches), imgs)


def test_another_image_size_recomputes_the_tables():
    small, large = build(), build(img_size=(8, 24))
    large.load_state_dict({k: v for k, v in small.state_dict().items() if "pos_embed" not in k}, strict=False)
    imgs, noise = torch.randn(2, 3, 8, 24), torch.rand(2, 12)
    torch.testing.assert_close(small(imgs, noise=noise), large(imgs, noise=noise))
    with pytest.raises(ValueError, match="input_size"):
        small(torch.zeros(1, 3, 18, 16))


def test_an_explicit_mask_is_used():
    model, imgs = build(), torch.randn(2, 3, 16, 16)
    mask = torch.rand(2, 16).argsort(dim=1) < 11
    for given in (mask, mask.float(), mask.reshape(2, 4, 4)):
        assert torch.equal(model(imgs, mask=given)[2], mask.float())
    one_pixel = torch.zeros(2, 16, 16, dtype=torch.bool)
    one_pixel[:, 5, 9] = True
    assert model(imgs, mask=one_pixel)[2].nonzero().tolist() == [[0, 6], [1, 6]]


def test_noise_and_mask_must_be_given_for_every_image():
    model, imgs = build(), torch.randn(4, 3, 16, 16)
    for given in ({"noise": torch.rand(1, 16)}, {"mask": torch.arange(16)[None] < 8}, {"noise": torch.rand(4, 15)}):
        with pytest.raises(ValueError, match="4 images of 16 patches"):
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


def test_a_transposed_image_through_a_transposed_model_gives_the_transposed_result():
    sizes = {"in_chans": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16,
             "decoder_depth": 1, "decoder_num_heads": 2}  # fmt: skip
    model = MaskedAutoencoderViT(img_size=(12, 20), patch_size=(4, 2), **sizes)
    other = MaskedAutoencoderViT(img_size=(20, 12), patch_size=(2, 4), **sizes)
    weights = model.state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].transpose(2, 3)
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        weights[name] = weights[name].unflatten(0, (4, 2, 2)).transpose(0, 1).flatten(0, 2)
    for name in ("pos_embed", "decoder_pos_embed"):
        patches = weights[name][:, 1:].unflatten(1, (3, 10)).transpose(1, 2).flatten(1, 2)
        weights[name] = torch.cat([weights[name][:, :1], patches], dim=1)
        # Half of the channels encode the column, half the row: they are exchanged in the table of the transposed model.
        torch.testing.assert_close(other.get_parameter(name), weights[name].roll(weights[name].shape[2] // 2, dims=2))
    other.load_state_dict(weights)
    imgs, noise = torch.randn(2, 2, 12, 20), torch.rand(2, 30)
    turned = noise.unflatten(1, (3, 10)).transpose(1, 2).flatten(1)
    loss, pred, mask = model(imgs, noise=noise)
    loss_t, pred_t, mask_t = other(imgs.transpose(2, 3), noise=turned)
    torch.testing.assert_close(loss_t, loss)
    torch.testing.assert_close(other.unpatchify(pred_t), model.unpatchify(pred).transpose(2, 3))
    assert torch.equal(mask_t, mask.unflatten(1, (3, 10)).transpose(1, 2).flatten(1))


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


def test_several_class_tokens_pass_the_encoder_and_the_decoder_by_hand():
    model = build(num_cls_tokens=3, learned_pos_embed=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    _, pred, mask = model(imgs, noise=noise)
    visible = noise.argsort(dim=1)[:, :4]
    for number in range(2):
        patches = model.patch_embed(imgs[number : number + 1])[0] + model.pos_embed[0, 3:]
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :3], patches[visible[number]]])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        full = model.mask_token[0].repeat(19, 1)
        full[:3] = x[:3]
        for place, patch in enumerate(visible[number].tolist()):
            full[3 + patch] = x[3 + place]
        x = (full + model.decoder_pos_embed[0])[None]
        for block in model.decoder_blocks:
            x = block(x)
        torch.testing.assert_close(pred[number], model.decoder_pred(model.decoder_norm(x))[0, 3:])
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


def test_drop_path_grows_over_the_encoder_and_is_absent_in_the_decoder():
    model = build(depth=3, drop_path_rate=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0) for block in model.blocks] == [0, 0.2, 0.4]
    assert not any(isinstance(module, models_vit.DropPath) for module in model.decoder_blocks.modules())


@pytest.mark.parametrize(("size", "width", "depth", "heads"), [
    ("base_patch16", 768, 12, 12), ("large_patch16", 1024, 24, 16), ("huge_patch16", 1280, 32, 16),
    ("1b_patch16", 1536, 48, 24)
])  # fmt: skip
def test_models_of_pixio(size, width, depth, heads):
    """Counts by hand: blocks 12 D^2 + 13 D, norms, patches, positions, tokens and the decoder of 32 blocks."""
    with torch.device("meta"):
        model = getattr(models_mae, f"pixio_vit_{size}")()

    def blocks(number, dim):
        return number * (12 * dim**2 + 13 * dim)

    encoder = blocks(depth, width) + 2 * width + 769 * width + (256 + 8) * width + 8 * width
    decoder = blocks(32, 512) + 2 * 512 + (width + 1) * 512 + (256 + 8) * 512 + 512 + 513 * 768
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder
    assert model.cls_token.shape == (1, 8, width)
    assert model.blocks[0].attn.num_heads == heads
    assert (len(model.decoder_blocks), model.decoder_blocks[0].attn.num_heads) == (32, 16)
    assert model.learned_pos_embed


def test_an_error_in_a_property_names_its_cause(mini_mae):
    mini_mae.patch_embed = torch.nn.ModuleList([mini_mae.patch_embed])  # as in a model of groups of channels
    for name, kind in (("predicts_pixels", "ModuleList"), ("grid_size", "ModuleList"), ("no", "MaskedAutoencoderViT")):
        with pytest.raises(AttributeError, match=f"'{kind}' object has no attribute"):
            getattr(mini_mae, name)
