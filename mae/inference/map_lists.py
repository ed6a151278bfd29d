"""What a map of images lists: equal ones, near-duplicates, outliers, and images whose neighbors have another label."""

from collections.abc import Collection, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.data.source import Source
from mae.inference import curation, nearest
from mae.plurals import counted
from mae.pooling import TITLES
from mae.settings.choices import BOTH, PATCHES

GRAY = 24  # side of the small pictures


class Images(NamedTuple):
    """Images, and what is known of each."""

    names: list[str]
    labels: np.ndarray  # (n,), indices into `classes`; -1 without a class
    classes: list[str]
    clusters: np.ndarray  # (n,)
    among: str  # how many of how many

    def class_of(self, index: int) -> str:
        """Returns the class of an image, "" if it has none."""
        return self.classes[self.labels[index]] if self.labels[index] >= 0 else ""


class Listed(NamedTuple):
    """A list of images that stand out."""

    title: str
    text: str  # how it was chosen, and among how many images
    entries: list[tuple[list[int], str]]  # of the page: one or two images, and their caption
    rows: list[list[Any]]  # of the CSV file; the first has the titles


def images_of(source: Source, clusters: np.ndarray, compared: str) -> Images:
    """Returns what is known of the images of a source. Labels that are no classes are left out."""
    has_classes = bool(source.classes) and np.ndim(source.labels) == 1
    labels = np.asarray(source.labels) if has_classes else np.full(len(source), -1)
    names = [source.name(index) for index in range(len(source))]
    return Images(names, labels, list(source.classes) if has_classes else [], clusters, compared)


def all_of(
    images: Images, features: Tensor, digests: Sequence[Hashable], grays: Tensor, colors: Tensor, pooling: str = ""
) -> dict[str, Listed]:  # fmt: skip
    """Returns the lists by the end of the name of their CSV file.

    Args:
        features: of the images (n, D).
        digests: of their pixels, equal for equal images (n,). More than curation.NEIGHBORS differ.
        grays: small gray pictures (n, GRAY, GRAY).
        colors: the same in colors, uint8 (n, GRAY, GRAY, 3).
        pooling: of the features, a key of `mae.pooling.TITLES`. Of BOTH, the patches tell outliers.
    """
    groups = curation.groups_of_equal(digests)
    different = np.setdiff1d(np.arange(len(digests)), [index for group in groups for index in group[1:]])
    found = nearest.find(features[different], k=curation.NEIGHBORS)
    far = found
    space = "features"
    if pooling == BOTH:
        far = nearest.find(features[different, features.shape[1] // 2 :], k=curation.NEIGHBORS)
        space = TITLES[PATCHES]
    lists = {
        "duplicates": duplicates(images, groups),
        "near_duplicates": near_duplicates(images, different, found, grays, colors),
        "outliers": outliers(images, different, far, space),
    }  # fmt: skip
    if len(np.unique(images.labels[images.labels >= 0])) > 1:
        lists["labels"] = other_labels(images, different, found)
    return lists


def duplicates(images: Images, groups: Sequence[Sequence[int]]) -> Listed:
    """Lists the images with equal pixels."""
    copies = sum(len(group) - 1 for group in groups)
    text = (
        f"Images of equal size whose decoded pixels are equal, among {images.among}: {copies:,} equal an earlier one."
    )
    labels = [{images.class_of(index) for index in group} for group in groups]
    if differ := sum(len(of_group) > 1 for of_group in labels):
        text += f" In {differ:,} of the {len(groups):,} groups, the labels differ."
    text += " The other lists have the first image of each group only."
    entries = [
        (list(group[:2]), f"{len(group)} equal images{_differing(of_group)}")
        for group, of_group in zip(groups, labels, strict=True)
    ]
    rows = [
        [number, images.names[index], images.class_of(index)] for number, group in enumerate(groups) for index in group
    ]
    return Listed("Groups of equal images", text, entries, [["group", "image", "label"], *rows])


def _differing(labels: Collection[str]) -> str:
    """Returns the labels of equal or nearly equal images for a caption, if they differ."""
    named = sorted({label or "no label" for label in labels})
    return f", labelled {' and '.join(named)}" if len(named) > 1 else ""


def near_duplicates(
    images: Images, different: np.ndarray, found: nearest.Neighbors, grays: Tensor, colors: Tensor
) -> Listed:
    """Lists the pairs of images that are nearly equal."""
    pairs = curation.near_duplicates(found, grays[different], colors[different])
    text = (
        f"Pairs among {len(different):,} different images, the nearest first. The distance of a pair is divided by the "
        f"mean distance of both to their {curation.LOCAL}th neighbor, in the features and in the amplitude spectra of "
        f"gray pictures of {GRAY} x {GRAY} pixels. It is below 1 for the spectra. The geometric mean, in which the "
        f"spectra count twice, is shown, and is below {curation.NEAR}. The pictures agree after a shift, also in color."
    )
    entries = []
    rows: list[list[Any]] = [
        ["image", "other", "relative distance", "cosine", "cosine of spectra", "label", "label of other"]
    ]
    for (first, second), distance, cosines in zip(different[pairs.images], *map(Tensor.tolist, pairs[1:]), strict=True):
        labels = [images.class_of(first), images.class_of(second)]
        entries.append(([int(first), int(second)], f"relative distance {distance:.2f}{_differing(labels)}"))
        both = [f"{value:.6f}" for value in (distance, *cosines)]
        rows.append([images.names[first], images.names[second], *both, *labels])
    return Listed("Pairs of near-duplicates", text, entries, rows)


def outliers(images: Images, different: np.ndarray, found: nearest.Neighbors, space: str) -> Listed:
    """Lists the images that are far from others, in comparison with their neighbors."""
    factors = curation.outlier_factors(found)
    order = factors.argsort(descending=True, stable=True).tolist()
    text = (
        f"All {len(order):,} different images, by the local outlier factor, the largest first: how many times farther "
        f"the {curation.NEIGHBORS} nearest neighbors of an image are than the neighbors of these, by the {space}; the "
        f"median is {factors.median():.3g}. The list says what differs most, not that it is wrong: a rare class is at "
        f"its top, too."
    )
    entries = [([int(different[index])], f"local outlier factor {factors[index]:.3g}") for index in order]
    rows = [
        [images.names[different[index]], f"{factors[index]:.6f}", images.class_of(different[index]),
         images.clusters[different[index]] + 1]
        for index in order
    ]  # fmt: skip
    return Listed("Outliers", text, entries, [["image", "factor", "label", "cluster"], *rows])


def other_labels(images: Images, different: np.ndarray, found: nearest.Neighbors) -> Listed:
    """Lists the images whose neighbors have another label."""
    labels = torch.from_numpy(images.labels[different])
    winners, excess = curation.votes(found, labels, len(images.classes))
    by_both = np.lexsort(
        (-found.similarities.mean(dim=1).numpy(), -excess.numpy())
    )  # of equal votes, those of nearer neighbors
    order = [index for index in by_both.tolist() if excess[index] > 0]
    labelled = int((labels >= 0).sum())
    judged = int(((labels >= 0) & (labels[found.indices[:, : curation.NEIGHBORS]] >= 0).any(dim=1)).sum())
    text = (
        f"{len(order):,} of {labelled:,} different labelled images: their {curation.NEIGHBORS} nearest neighbors vote "
        f"for another class, weighted by exp(cosine / {curation.TEMPERATURE}). Those whose label has fewest votes in "
        f"comparison are first, and of equal ones those with nearer neighbors; the difference is shown."
    )
    of_which = "images"
    if isolated := labelled - judged:
        text += f" No neighbor of {counted(isolated, 'labelled image')} has a label."
        of_which = "others"
    if judged:
        share = f"{1 - len(order) / judged:.1%} of the {of_which}"
        text += f" The neighbors vote for the label of {share}: the lower this is, the less the list means."
    entries = []
    rows: list[list[Any]] = [["image", "label", "label of the neighbors", "difference"]]
    for index in order:
        image = int(different[index])
        voted = images.classes[winners[index]]
        more = f"{voted} has {excess[index]:.0%} of all votes more"
        entries.append(([image], f"labelled {images.class_of(image)}; {more}"))
        rows.append([images.names[image], images.class_of(image), voted, f"{excess[index]:.6f}"])
    return Listed("Images whose neighbors have another label", text, entries, rows)
