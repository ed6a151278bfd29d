"""Pictures of tensors."""

import numpy as np
import pytest
import torch

from mae.data.transforms import Normalize
from mae.evaluate import pictures


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (13, 3)])
def test_tile_sets_images_side_by_side(channels, shown):
    """Of images with other channel counts, the first channel or three."""
    first, second, gap = torch.rand(2, channels, 4, 5), torch.rand(2, channels, 4, 5), pictures.GAP
    picture = pictures.tile([first, second], lambda x: x)
    assert picture.shape == (2 * 4 + gap, 2 * 5 + gap, shown)
    for row, column, image in ((0, 0, first[0]), (0, 5 + gap, second[0]), (4 + gap, 5 + gap, second[1])):
        expected = (image[:shown].permute(1, 2, 0) * 255).round().byte()
        assert np.array_equal(picture[row : row + 4, column : column + 5], expected)
    assert (picture[:4, 5 : 5 + gap] == 255).all() and (picture[4 : 4 + gap] == 255).all()
    assert pictures.tile([first], lambda x: x, scale=3).shape == (2 * 12 + gap, 15, shown)


def test_reconstruction_shows_the_models_own_pictures(mini_mae):
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    noise = torch.rand(2, 16)
    normalize = Normalize([0.4], [0.3])
    picture = pictures.reconstruction(mini_mae, images, noise, normalize, 0.5)
    assert picture.shape == (2 * 16 + pictures.GAP, 4 * 16 + 3 * pictures.GAP, 1)
    assert np.array_equal(picture[:16, :16, 0], images[0, 0])
    masked = picture[:16, 16 + pictures.GAP : 32 + pictures.GAP, 0]
    assert 7 * 16 < (masked == images[0, 0].numpy()).sum() < 9 * 16  # half of the pixels
    pasted = mini_mae.reconstruct(normalize(images), 0.5, noise=noise).pasted
    expected = (normalize.inverse(pasted)[1, 0] * 255).round().to(torch.uint8)
    assert np.array_equal(picture[-16:, -16:, 0], expected)


def test_titles_and_labels_stand_beside_the_pictures(mini_mae):
    images, noise = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8), torch.rand(2, 16)
    normalize = Normalize([0.4], [0.3])
    plain = pictures.reconstruction(mini_mae, images, noise, normalize, 0.5, scale=8)  # 128 pixels: titles fit
    labelled = pictures.reconstruction(mini_mae, images, noise, normalize, 0.5, labels=["first.png", ""])
    note, labelled = labelled[-pictures.HEADER :], labelled[: -pictures.HEADER]
    assert (note < 128).any()
    assert np.array_equal(labelled[-len(plain) :, -plain.shape[1] :], plain.repeat(3, axis=2))
    header, margin = labelled[: -len(plain)], labelled[-len(plain) :, : -plain.shape[1]]
    for column in np.array_split(header[:, -plain.shape[1] :], 4, axis=1):
        assert (column < 128).any()
        assert (column[:, [0, -1]] == 255).all()  # the title does not reach its neighbors
    first, second = np.array_split(margin, 2)
    assert (first < 128).any() and (second == 255).all()
    streamed = pictures.reconstruction(mini_mae, images, noise, normalize, 0.5, labels=[])
    assert streamed.shape[1] == plain.shape[1]


def test_the_range_is_that_of_images_of_more_than_8_bits():
    normalize = Normalize([0.4], [0.3])
    few = torch.linspace(0, 0.01, 1000).view(1, 10, 100)
    sentence = pictures.show_range(normalize, [few, few])
    assert normalize.shown == pytest.approx((0.00005, 0.00995)) and "5e-05" in sentence and "0.00995" in sentence
    expected = ((few - 0.00005) / 0.0099).clamp(0, 1)
    torch.testing.assert_close(normalize.displayed(normalize(few)), expected, atol=1e-4, rtol=0)
    counts = torch.zeros(1, 20, 20)
    counts[0, 3, 4] = 2e-5
    pictures.show_range(normalize, [counts])
    assert normalize.shown == pytest.approx((0, 2e-5))
    eight = torch.randint(0, 256, (1, 10, 10), dtype=torch.uint8)
    for images in ([few, eight], [torch.full((1, 8, 8), 0.5)], []):
        assert pictures.show_range(normalize, images) == ""
        x = normalize(eight)
        assert torch.equal(normalize.displayed(x), normalize.inverse(x))
