"""Position tables."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models_vit
from mae.position_tables import get_2d_sincos_pos_embed, interpolate_pos_embed, resize_pos_embed


def test_first_half_encodes_the_column():
    table = get_2d_sincos_pos_embed(16, (3, 5)).reshape(3, 5, 16)
    omega = 1 / 10000 ** (np.arange(4) / 4)
    for y in range(3):
        for x in range(5):
            expected = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
            np.testing.assert_allclose(table[y, x], np.concatenate(expected), rtol=0, atol=1e-15)


def test_class_row_is_zero_and_square_is_the_diagonal_case():
    table = get_2d_sincos_pos_embed(8, 4, cls_token=True)
    assert table.shape == (17, 8)
    assert table.dtype == np.float64
    assert not table[0].any()
    np.testing.assert_array_equal(table[1:], get_2d_sincos_pos_embed(8, (4, 4)))


def test_channels_must_be_a_multiple_of_4():
    with pytest.raises(ValueError, match="even number of channels"):
        get_2d_sincos_pos_embed(6, 4)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((2, 3), (4, 9)), ((3, 5), (5, 3)), ((5, 2), (2, 5))])
def test_interpolation_agrees_with_timm(old, new):
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, old[0] * old[1] + 1, 8)
    ours = resize_pos_embed(table, old, new)
    theirs = resample_abs_pos_embed(table, list(new), list(old), interpolation="bicubic", antialias=False)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[:, 0], table[:, 0])


def test_interpolate_pos_embed_changes_the_checkpoint_in_place():
    model = models_vit.vit_mini_patch4(img_size=(16, 24))
    checkpoint = {"pos_embed": torch.randn(1, 65, 128)}
    interpolate_pos_embed(model, checkpoint)
    assert checkpoint["pos_embed"].shape == model.pos_embed.shape
    same = {"pos_embed": model.pos_embed.data}
    interpolate_pos_embed(model, same)
    assert same["pos_embed"] is model.pos_embed.data or torch.equal(same["pos_embed"], model.pos_embed)
    with pytest.raises(ValueError, match="not a square"):
        interpolate_pos_embed(model, {"pos_embed": torch.zeros(1, 13, 128)})


def test_a_square_table_in_a_grid_of_as_many_patches_is_resampled():
    table = torch.randn(1, 17, 128)
    model = models_vit.vit_mini_patch4(img_size=(8, 32))  # 2 x 8, not 4 x 4
    published, own = {"pos_embed": table}, {"pos_embed": table}
    interpolate_pos_embed(model, published)
    assert torch.equal(published["pos_embed"], resize_pos_embed(table, (4, 4), (2, 8)))
    interpolate_pos_embed(model, own, old_grid=(2, 8))
    assert torch.equal(own["pos_embed"], table)


def test_the_attributes_of_published_models_are_enough():
    """timm 0.3.2, which the published code needs, has neither `grid_size` nor `num_prefix_tokens`."""
    table = torch.randn(1, 1 + 16, 8)
    model = SimpleNamespace(patch_embed=SimpleNamespace(num_patches=64), pos_embed=torch.zeros(1, 1 + 64, 8))
    checkpoint = {"pos_embed": table.clone()}
    interpolate_pos_embed(model, checkpoint)
    torch.testing.assert_close(checkpoint["pos_embed"], resize_pos_embed(table, (4, 4), (8, 8)))
