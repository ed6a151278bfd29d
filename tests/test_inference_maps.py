"""Attention maps and principal components of patches."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from skimage import data as photographs

import mae.build
from mae.inference import get_model, maps
from mae.settings import specs


@pytest.fixture(params=["mae_vit_mini_patch4", "vit_mini_patch4"])
def model(request):
    torch.manual_seed(0)
    return get_model(request.param, input_size=[32, 48])


def test_features_of_several_blocks_are_in_order(model):
    images = torch.randn(2, 3, 16, 32)
    several, last = maps.dense(model, images, 3), maps.dense(model, images, 1)
    assert several.shape == (2, 3 * 128, 4, 8)
    torch.testing.assert_close(several[:, -128:], last)
    assert not torch.allclose(several[:, :128], last)
    tokens = model.get_intermediate_layers(images, n=1)[0][:, 1:]
    torch.testing.assert_close(last[1, :, 2, 5], tokens[1, 2 * 8 + 5])


def test_attention_is_the_class_tokens_row(model):
    x = model.prepare(photographs.chelsea())
    _, all_maps = model.get_intermediate_layers(x, n=4, return_attention=True)
    for block, place in ((-1, 3), (0, 0), (2, 2)):
        found = maps.attention(model, x, block)
        assert found.shape == (1, 4, 8, 12)
        torch.testing.assert_close(found.flatten(2), all_maps[place][:, :, 0, 1:].detach())
    with pytest.raises(ValueError, match="block 4"):
        maps.attention(model, x, 4)


def test_attention_of_an_attentive_probe(tmp_path):
    settings = {"model": "vit_mini_patch4", "input_size": [32, 48], "patch_size": None, "in_chans": 3,
                "global_pool": False, "nb_classes": 3, "probe": "attentive", "num_queries": 8}  # fmt: skip
    probe = mae.build.probe(*specs(settings)).eval()
    with torch.no_grad():
        probe.head.pool.queries.mul_(50)
    torch.save({"model": probe.state_dict(), "args": settings}, tmp_path / "probe.pth")
    loaded, picture = get_model(tmp_path / "probe.pth"), ROOT / "demo/clothes/bag.png"
    found, x = maps.query_attention(loaded, str(picture)), loaded.prepare(str(picture))
    assert found.shape == (1, 8, 8, 12)
    tokens = probe.get_intermediate_layers(x)[0][:, 1:].detach()
    scores = torch.einsum("qd,bnd->bqn", probe.head.pool.queries.detach(), tokens) / 128**0.5
    torch.testing.assert_close(found, scores.softmax(dim=2).view(1, 8, 8, 12))
    assert found.max() > 2 / 96  # not uniform
    with pytest.raises(AttributeError, match="pool"):
        maps.query_attention(get_model("vit_mini_patch4"), x)


@pytest.mark.parametrize("remove_position_mean", [False, True])
def test_components_are_scikit_learns(model, remove_position_mean):
    from sklearn.decomposition import PCA

    images = [photographs.chelsea(), photographs.coffee(), photographs.astronaut()]
    colors = maps.components(model, images, remove_position_mean)
    assert colors.shape == (3, 8, 12, 3)
    tokens = model.extract_feat(images, "tokens")[:, 1:].detach()
    if remove_position_mean:
        tokens = tokens - tokens.mean(dim=0)
    expected = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(tokens.flatten(0, 1).numpy()))
    inside = (colors.view(-1, 3) > 0) & (colors.view(-1, 3) < 1)
    for number in range(3):  # up to the sign and the scaling to 0 to 1
        pair = torch.stack([colors.view(-1, 3)[:, number], expected[:, number]])[:, inside[:, number]]
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.9999


def test_the_position_mean_needs_several_images(model):
    with pytest.raises(ValueError, match="several images"):
        maps.components(model, photographs.chelsea(), remove_position_mean=True)


def test_overlay_is_bright_where_weights_are(model):
    image = model.prepare(photographs.coffee())[0]
    weights = torch.zeros(8, 12)
    weights[:, :6] = 1
    picture = torch.from_numpy(np.asarray(maps.overlay(model, image, weights))).float()
    pixels = model.normalize.inverse(image[None])[0].permute(1, 2, 0) * 255
    assert picture.shape == (32, 48, 3)
    torch.testing.assert_close(picture[:, :24], pixels[:, :24], rtol=0, atol=0.6)
    torch.testing.assert_close(picture[:, 24:], 0.15 * pixels[:, 24:], rtol=0, atol=0.6)
