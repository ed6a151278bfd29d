"""What stands out among images: equal ones, near-duplicates, outliers, and labels that the neighbors do not have.

The functions take features and small pictures, and no files. `mae.inference.image_map` draws what they find.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mae.inference import nearest
from mae.inference.nearest import Neighbors

NEIGHBORS = 20  # of an outlier and of a vote: up to so many images of another kind stand out together
LOCAL = 10  # the neighbor whose distance is the unit of the distance of a pair
FLOOR = 0.1  # of the median distance: beside many nearly equal images, all others would be outliers
NEAR = 0.5  # distance of near-duplicates, in this unit
AGREEMENT = 0.85  # of near-duplicates; 95 % of photographs have more with their crop of 95 % or JPEG of quality 50
SHIFT = 2  # pixels of a small picture, in each direction
BLOCK = 3  # pixels of a side, whose mean is compared: the noise of fine textures and of JPEG is less
NOISE = 10  # of 255, in colors: less of it counts little
TEMPERATURE = 0.07  # of the votes (Wu et al. 2018, section 3.4)
CHUNK = 8_192  # pairs whose vectors are in memory at a time
COMPONENTS = 50
CLUSTERS = 10


class Pairs(NamedTuple):
    """Near-duplicates, the nearest first."""

    images: Tensor  # (p, 2), indices
    distances: Tensor  # (p,), relative to those of other neighbors
    cosines: Tensor  # (p, 2), of the features and of the spectra of the gray pictures


class Votes(NamedTuple):
    """What the neighbors say of the labels of images."""

    winners: Tensor  # (n,), the class with most votes
    excess: Tensor  # (n,), its share of the votes minus that of the label, 0 to 1: 0 if the winner is the label


def groups_of_equal(digests: Sequence[Hashable]) -> list[list[int]]:
    """Returns the indices of images with equal digests (n,), in groups of two or more, in the order of the images."""
    groups = defaultdict(list)
    for index, digest in enumerate(digests):
        groups[digest].append(index)
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(found: Neighbors, grays: Tensor, colors: Tensor) -> Pairs:
    """Finds pairs that are much nearer than other neighbors are, in features and in small gray pictures, and agree.

    The distance of a pair is |a - b| of unit vectors, divided by the mean distance of both images to their LOCAL-th
    neighbor: how dense the images are differs by kind. It is below 1 for the pictures, and the geometric mean is below
    NEAR. There the pictures count twice, because the features of fine textures change with a shift of some pixels.
    The spectra of a picture, its negative and the picture turned by 180 degrees are equal, so that the pictures are
    compared, too: their `agreement` is at least AGREEMENT.

    Args:
        found: features, and the LOCAL or more nearest to each of them.
        grays: small gray pictures of the same images (n, side, side).
        colors: the same in colors, uint8 (n, side, side, 3).
    """
    of_grays = nearest.find(_spectra(grays), k=LOCAL)
    first = torch.arange(len(grays))[:, None].expand(-1, LOCAL)
    near = torch.cat([torch.stack([first, each.indices[:, :LOCAL]], dim=2).flatten(0, 1) for each in (found, of_grays)])
    pairs = near.sort(dim=1).values.unique(dim=0)
    scaled = []
    cosines = []
    for rows, indices, _ in (found, of_grays):
        unit = nn.functional.normalize(rows.float(), dim=1)
        local = _distances(unit, torch.arange(len(unit)), indices[:, LOCAL - 1])
        distances = _distances(unit, pairs[:, 0], pairs[:, 1])
        unit_of_pair = local[pairs].mean(dim=1)  # 0 among equal vectors, such as those of flat pictures
        scaled.append(torch.where(unit_of_pair > 0, distances / unit_of_pair, torch.inf))
        cosines.append(1 - distances.square() / 2)
    score = (scaled[0] * scaled[1].square()).pow(1 / 3)
    near_ones = torch.nonzero((score < NEAR) & (scaled[1] < 1))[:, 0]
    parts = pairs[near_ones].split(CHUNK)
    agreements = torch.cat([agreement(*colors[part].unbind(1)) for part in parts])
    near_ones = near_ones[agreements >= AGREEMENT]
    order = near_ones[score[near_ones].argsort(stable=True)]
    return Pairs(pairs[order], score[order], torch.stack(cosines, dim=1)[order])


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Returns how much small pictures in colors agree, uint8 (p, side, side, 3), after the best shift: (p,), up to 1.

    Brightness and contrast do not count.
    """
    best = torch.full((len(first),), -1.0)
    for down, right in product(range(-SHIFT, SHIFT + 1), repeat=2):
        best = torch.maximum(best, _similarities(_blocks(first, down, right), _blocks(second, -down, -right)))
    return best


def _blocks(pictures: Tensor, down: int, right: int) -> Tensor:
    """Returns the means of blocks (p, 3, h, w) of pictures without their first `down` rows and `right` columns.

    Negative numbers are those of the last rows and columns.
    """
    side = pictures.shape[1]
    rows = slice(max(0, down), side + min(0, down))
    columns = slice(max(0, right), side + min(0, right))
    return nn.functional.avg_pool2d(pictures[:, rows, columns].permute(0, 3, 1, 2).float(), BLOCK)


def _similarities(a: Tensor, b: Tensor) -> Tensor:
    """Returns the lower of two similarities (p,) of pictures (p, 3, h, w): of their content, and of their colors.

    The one is the correlation of the values without the mean of each channel; it is 0 of flat pictures. The other one
    is that of the differences of the channels to gray, as the contrast term of SSIM; it is 1 of gray pictures.
    """
    x, y = ((each - each.mean(dim=(2, 3), keepdim=True)).flatten(1) for each in (a, b))
    lowest = x.shape[1] ** 0.5  # a contrast of one of 255 levels
    contrast_of_x, contrast_of_y = (each.norm(dim=1).clamp(min=lowest) for each in (x, y))
    of_content = (x * y).sum(dim=1) / (contrast_of_x * contrast_of_y)
    x, y = ((each - each.mean(dim=1, keepdim=True)).flatten(1) for each in (a, b))
    gain = contrast_of_y / contrast_of_x
    squares = gain * x.square().sum(dim=1) + y.square().sum(dim=1) / gain
    floor = (NOISE * lowest) ** 2
    of_colors = (2 * (x * y).sum(dim=1) + floor) / (squares + floor)
    return torch.minimum(of_content, of_colors)


def _spectra(grays: Tensor) -> Tensor:
    """Returns the amplitude spectra of pictures (n, side, side) without their means, (n, side * (side // 2 + 1)).

    They depend little on a shift of the content, with a Hann window at the borders. As unit vectors, they do not depend
    on brightness and contrast.
    """
    window = torch.hann_window(grays.shape[-1] + 2, periodic=False)[1:-1]
    centered = grays - grays.mean(dim=(1, 2), keepdim=True)
    return torch.fft.rfft2(centered * window[:, None] * window).abs().flatten(1)


def _distances(unit: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns |a - b| of pairs of rows (p,). The cosine of near vectors in fp32 is too coarse for it."""
    parts = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    return torch.cat([(unit[some] - unit[others]).norm(dim=1) for some, others in parts])


def outlier_factors(found: Neighbors) -> Tensor:
    """Returns the local outlier factor of each image (n,), with NEIGHBORS neighbors (Breunig et al. 2000, section 4).

    It says how many times farther the neighbors of an image are than those of its neighbors: about 1 for most images,
    however dense their part of the features is. The distances are |a - b| of unit vectors.
    """
    unit = nn.functional.normalize(found.features.float(), dim=1)
    near = found.indices[:, :NEIGHBORS]
    images = torch.arange(len(unit)).repeat_interleave(NEIGHBORS)
    distances = _distances(unit, images, near.flatten()).view_as(near)
    reach = torch.maximum(distances, distances[near, -1]).mean(dim=1)
    reach = reach.clamp(min=max(FLOOR * float(reach.median()), 1e-6))  # all vectors may be equal
    return reach * (1 / reach[near]).mean(dim=1)


def votes(found: Neighbors, labels: Tensor, num_classes: int) -> Votes:
    """Lets the NEIGHBORS nearest images vote on the class of each image, weighted as in `mae.evaluate.knn`.

    Args:
        labels: classes (n,), 0 to num_classes - 1; -1: the image has none, and no vote.
    """
    cosines = found.similarities[:, :NEIGHBORS]
    voters = labels[found.indices[:, :NEIGHBORS]]
    weights = ((cosines - cosines[:, :1]) / TEMPERATURE).exp().double() * (voters >= 0)
    shares = torch.zeros(len(labels), num_classes, dtype=torch.double).scatter_add_(1, voters.clamp(min=0), weights)
    shares /= shares.sum(dim=1, keepdim=True).clamp(min=1e-12)
    most, winners = shares.max(dim=1)
    given = shares.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return Votes(winners, (most - given).where(labels >= 0, 0))


def reduced(features: Tensor) -> np.ndarray:
    """Returns the COMPONENTS first principal components of unit features (n, D). Those of equal features are equal."""
    from sklearn.decomposition import PCA

    unit = nn.functional.normalize(features.float(), dim=1).numpy()
    with np.errstate(invalid="ignore"):  # the share of the variance, if all features are equal
        components = PCA(min(COMPONENTS, *unit.shape), random_state=0).fit_transform(unit)
    return components[_first_equal(unit)]


def _first_equal(rows: np.ndarray) -> np.ndarray:
    """Returns the index of the first equal row for each of rows (n, d), (n,)."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault((row + 0.0).tobytes(), index) for index, row in enumerate(rows)])  # not -0.0


def clusters(components: np.ndarray) -> np.ndarray:
    """Returns the cluster of k-means of each image (n,), 0 to CLUSTERS - 1, the largest first."""
    from sklearn.cluster import KMeans

    found = KMeans(CLUSTERS, n_init=3, random_state=0).fit_predict(components)
    by_size = np.argsort(-np.bincount(found, minlength=CLUSTERS), kind="stable")
    return np.argsort(by_size)[found]


def positions(components: np.ndarray) -> np.ndarray:
    """Returns the positions of images on a map (n, 2), from 0 to 1, by t-SNE. Equal images have one position."""
    from sklearn.manifold import TSNE

    # Features of an encoder that sees no difference are equal but for the rounding errors of a forward pass.
    chosen, group = np.unique(_first_equal(components.round(5)), return_inverse=True)
    if len(chosen) == 1:
        return np.full((len(components), 2), 0.5)
    found = TSNE(perplexity=min(30, (len(chosen) - 1) / 3), random_state=0).fit_transform(components[chosen])
    low = found.min(axis=0)
    return ((found - low) / np.maximum(found.max(axis=0) - low, 1e-12))[group]
