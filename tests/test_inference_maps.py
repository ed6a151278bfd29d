"""Attention maps and principal components of patches."""

import numpy as np
import pytest
import torch
from skimage import data as photographs

from inference import get_model, maps


@pytest.fixture(params=["mae_vit_mini_patch4", "vit_mini_patch4"])
def model(request):
    torch.manual_seed(0)
    return get_model(request.param, input_size=[32, 48])


def test_attention_is_the_class_tokens_row(model):
    x = model.prepare(photographs.chelsea())
    _, all_maps = model.get_intermediate_layers(x, n=4, return_attention=True)
    for block, place in ((-1, 3), (0, 0), (2, 2)):
        found = maps.attention(model, x, block)
        assert found.shape == (1, 4, 8, 12)
        torch.testing.assert_close(found.flatten(2), all_maps[place][:, :, 0, 1:].detach())
    with pytest.raises(ValueError, match="block 4: the encoder has 4"):
        maps.attention(model, x, 4)


def test_components_are_scikit_learns(model):
    from sklearn.decomposition import PCA

    images = [photographs.chelsea(), photographs.coffee()]
    found = maps.components(model, images)
    assert found.shape == (2, 8, 12, 3)
    tokens = model.extract_feat(images, "tokens")[:, 1:].detach().flatten(0, 1).numpy()
    theirs = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(tokens))
    inside = (found.view(-1, 3) > 0) & (found.view(-1, 3) < 1)
    for number in range(3):  # up to the sign and the scaling to 0 to 1
        pair = torch.stack([found.view(-1, 3)[:, number], theirs[:, number]])[:, inside[:, number]]
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.9999


def test_overlay_is_bright_where_weights_are(model):
    image = model.prepare(photographs.coffee())[0]
    weights = torch.zeros(8, 12)
    weights[:, :6] = 1
    picture = torch.from_numpy(np.asarray(maps.overlay(model, image, weights))).float()
    pixels = model.normalize.inverse(image[None])[0].permute(1, 2, 0) * 255
    assert picture.shape == (32, 48, 3)
    torch.testing.assert_close(picture[:, :24], pixels[:, :24], rtol=0, atol=0.6)
    torch.testing.assert_close(picture[:, 24:], 0.15 * pixels[:, 24:], rtol=0, atol=0.6)
