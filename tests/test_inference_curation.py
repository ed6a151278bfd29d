"""What stands out among features: near-duplicates, outliers, votes of neighbors; oracles are those of scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor, NearestNeighbors
from torch.nn.functional import normalize

from mae.inference import curation, neighbors


def found_in(rows):
    return neighbors.find(rows, k=curation.NEIGHBORS)


def pairs_in(rows, grays):
    """The near-duplicates among gray pictures (n, side, side) and their features."""
    colors = grays.round().clamp(0, 255).byte()[..., None].expand(-1, -1, -1, 3)
    return curation.near_duplicates(found_in(rows), grays, colors)


def test_equal_images_are_in_groups():
    assert curation.groups_of_equal(["a", "b", "a", "c", "b", "a"]) == [[0, 2, 5], [1, 4]]
    assert curation.groups_of_equal(["a", "b"]) == []


def test_near_duplicates_are_near_in_features_and_pictures():
    """A pair is planted in both, and another in the features only."""
    rows, grays = torch.randn(300, 16), 128 + 40 * torch.randn(300, 8, 8)
    rows[1], grays[1] = rows[0] + 0.1 * torch.randn(16), grays[0] + 4 * torch.randn(8, 8)
    rows[3] = rows[2]
    pairs = pairs_in(rows, grays)
    assert pairs.images.tolist() == [[0, 1]]
    window = np.sin(np.pi * np.arange(1, 9) / 9) ** 2
    windowed = (grays.numpy() - grays.numpy().mean((1, 2), keepdims=True)) * np.outer(window, window)
    spectra = torch.from_numpy(np.abs(np.fft.fft2(windowed))[:, :, :5].reshape(300, -1))
    parts = (rows.double(), spectra)
    torch.testing.assert_close(
        pairs.cosines[0].double(), torch.stack([torch.cosine_similarity(part[0], part[1], dim=0) for part in parts])
    )
    ratios = []
    for part in (normalize(part, dim=1) for part in parts):
        distances, _ = NearestNeighbors(n_neighbors=curation.LOCAL + 1).fit(part.numpy()).kneighbors(part[:2].numpy())
        ratios.append(float((part[0] - part[1]).norm()) / distances[:, -1].mean())
    np.testing.assert_allclose(pairs.distances, [(ratios[0] * ratios[1] ** 2) ** (1 / 3)], rtol=1e-4)


def test_brightness_and_contrast_of_pictures_do_not_count():
    rows, grays = torch.randn(100, 16), 128 + 40 * torch.randn(100, 8, 8)
    rows[1], grays[1] = 1.001 * rows[0], 20 + 0.5 * grays[0]
    assert pairs_in(rows, grays).images.tolist() == [[0, 1]]


def test_a_texture_that_is_shifted_is_a_near_duplicate():
    """Its features may be those of another image: the encoder sees the patches at their positions."""
    textures = 128 + 80 * torch.nn.functional.avg_pool2d(torch.randn(300, 26, 26), 2, stride=1)
    grays = textures[:, :24, :24].clone()
    grays[1] = textures[0, 1:25, 1:25]
    assert pairs_in(torch.randn(300, 16), grays).images.tolist() == [[0, 1]]


def pairs_with(picture, other):
    """The near-duplicates of a picture and another one, whose features are equal, among 98 others (24, 24, 3)."""
    generator = np.random.default_rng(1)
    every = [picture, other]
    for _ in range(98):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
        every.append(np.asarray(coarse.resize((24, 24), Image.Resampling.BILINEAR)))
    grays = np.stack([np.asarray(Image.fromarray(each).convert("L"), np.float32) for each in every])
    rows = torch.randn(100, 16)
    rows[1] = rows[0]
    pairs = curation.near_duplicates(found_in(rows), torch.from_numpy(grays), torch.from_numpy(np.stack(every)))
    return pairs.images.tolist()


def flat(*color):
    return np.full((24, 24, 3), color, np.uint8)


def disc(*color):
    rows, columns = np.ogrid[:24, :24]
    return np.where(((rows - 12) ** 2 + (columns - 12) ** 2 < 50)[..., None], flat(*color), flat(250))


SCENE = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 220, (5, 5, 3), np.uint8)).resize((28, 28), 2)
)  # fmt: skip
MIDDLE = SCENE[2:26, 2:26]
FOUR = {"red": disc(200, 60, 60), "green": disc(60, 160, 60), "blue": disc(60, 60, 200), "yellow": disc(200, 180, 60)}
NO_PAIRS = {
    "flat": (flat(200, 60, 60), flat(60, 160, 60)),
    "flat, gray": (flat(80), flat(160)),
    "negative": (MIDDLE, 255 - MIDDLE),
    "turned": (MIDDLE, MIDDLE[::-1, ::-1]),
    **{f"{a}, {b}": (FOUR[a], FOUR[b]) for a, b in itertools.combinations(FOUR, 2)},
}
CHANGED = {
    "brighter": (1.1 * MIDDLE).astype(np.uint8), "less contrast": 60 + MIDDLE // 2, "shifted": SCENE[1:25, 3:27],
    "noisy": MIDDLE ^ np.uint8(3),
}  # fmt: skip


@pytest.mark.parametrize(("first", "second"), NO_PAIRS.values(), ids=NO_PAIRS)
def test_pictures_of_equal_spectra_that_do_not_agree_are_no_pair(first, second):
    assert pairs_with(first, second) == []


@pytest.mark.parametrize("other", CHANGED.values(), ids=CHANGED)
def test_pictures_that_agree_are_a_pair(other):
    assert pairs_with(MIDDLE, other) == [[0, 1]]


def test_random_images_and_flat_pictures_have_no_near_duplicates():
    rows = torch.randn(300, 16)
    assert len(pairs_in(rows, 128 + 40 * torch.randn(300, 8, 8)).images) == 0
    assert len(pairs_in(rows, torch.ones(300, 8, 8)).images) == 0


def test_outliers_are_far_in_comparison_with_their_neighbors():
    """The factors are those of scikit-learn. An image near a dense group stands out more than any in a sparse one."""
    rows = torch.randn(200, 8) + 8
    rows[:100] = 0.2 * torch.randn(100, 8) - 8
    rows[7] = torch.randn(8) - 8  # as far as those of the sparse group
    factors = curation.outlier_factors(found_in(rows))
    assert int(factors.argmax()) == 7
    unit = torch.nn.functional.normalize(rows.double(), dim=1).numpy()
    oracle = LocalOutlierFactor(n_neighbors=curation.NEIGHBORS).fit(unit)
    np.testing.assert_allclose(factors, -oracle.negative_outlier_factor_, rtol=1e-4)


def test_images_beside_many_nearly_equal_ones_are_no_outliers():
    rows = torch.randn(200, 8)
    rows[:50] = rows[0] + 1e-6 * torch.randn(50, 8)
    assert curation.outlier_factors(found_in(rows)).max() < 10
    assert curation.outlier_factors(found_in(torch.ones(100, 8))).tolist() == pytest.approx([1] * 100)


def test_votes_are_those_of_weighted_neighbors():
    rows, labels = torch.randn(150, 6), torch.randint(0, 3, (150,))
    rows[:, 0] += 2 * labels
    winners, excess = curation.votes(found_in(rows), labels, 3)
    for image in range(0, 150, 10):
        others = np.delete(np.arange(150), image)
        oracle = KNeighborsClassifier(
            curation.NEIGHBORS, metric="cosine", weights=lambda distances: np.exp(-distances / curation.TEMPERATURE)
        ).fit(rows[others].double().numpy(), labels[others].numpy())
        (shares,) = oracle.predict_proba(rows[image : image + 1].double().numpy())
        assert winners[image] == shares.argmax()
        np.testing.assert_allclose(excess[image], shares.max() - shares[labels[image]], atol=1e-3)


def test_images_without_a_label_have_no_vote_and_are_not_listed():
    rows = torch.randn(60, 4)
    labels = torch.full((60,), -1)
    labels[:2] = torch.tensor([0, 1])
    winners, excess = curation.votes(found_in(rows), labels, 2)
    assert (excess[2:] == 0).all()
    seen = neighbors.find(rows, k=curation.NEIGHBORS).indices[0]
    assert winners[0] == (1 if 1 in seen else 0)


def test_clusters_are_numbered_by_their_size_and_positions_have_a_range():
    groups = [torch.randn(5 + 20 * number, 4) * 0.01 + torch.eye(4)[number] for number in range(4)]
    components = curation.reduced(torch.cat(groups))
    found = curation.clusters(components)
    sizes = np.bincount(found)
    assert len(sizes) == 10 and sizes.tolist() == sorted(sizes, reverse=True)
    assert {*found[:5]}.isdisjoint(found[5:])
    positions = curation.positions(components)
    assert positions.min() == 0 and positions.max() == 1 and positions.shape == (140, 2)


def test_equal_images_have_one_position():
    """Also those of an encoder that sees no difference, whose features differ by rounding errors."""
    rows = torch.randn(60, 16)
    rows[5:25] = rows[5]
    positions = curation.positions(curation.reduced(rows))
    assert len(np.unique(positions, axis=0)) == 41 and len(np.unique(positions[5:25], axis=0)) == 1
    for rows in (torch.ones(60, 16), torch.ones(60, 16) + 1e-6 * torch.randn(60, 16)):
        assert len(np.unique(curation.positions(curation.reduced(rows)), axis=0)) == 1
