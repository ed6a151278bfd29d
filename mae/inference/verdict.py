"""Whether a pre-training helped: the encoder of a run, raw pixels and random weights on the same held-out images."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mae.data import equal_images, raw_pixels
from mae.data.source import Source
from mae.evaluate import knn
from mae.inference import page
from mae.inference.model import Autoencoder
from mae.settings import ImageSpec
from mae.training.explained import OF_TARGET

logger = logging.getLogger(__name__)

NEIGHBORS = 20
TEMPERATURE = 0.07
LEVEL = 95  # percent of an interval
ADVICE = "More time or more images may help (docs/small_data.md)."
EQUAL = "These images tell nothing: all features classify all of them equally."
ENCODER = "the encoder"
PIXELS = "raw pixels"
RANDOM = "random weights of the same model"

Extract = Callable[[Autoencoder, Source], torch.Tensor]


def is_classified(source: Source) -> bool:
    """Whether each image of a source has one class, and there are several."""
    labels = np.asarray(source.labels) if source.classes else np.zeros(0)
    return labels.ndim == 1 and len(labels) > 1 and labels.min() >= 0 and labels.min() < labels.max()


def hits_of(
    model: Autoencoder, train: Source, val: Source, extract: Extract, num_workers: int
) -> tuple[dict[str, np.ndarray], str]:
    """Returns whether k neighbors classify each held-out image correctly (n,), by ENCODER, PIXELS and RANDOM.

    Returns also `equal_images.sentence` of their pixels.
    """
    images = ImageSpec.of(model.settings)
    with_random_weights = random_weights(model)
    pairs = {
        ENCODER: [extract(model, source) for source in (train, val)],
        PIXELS: [torch.from_numpy(raw_pixels.read(source, images, num_workers)) for source in (train, val)],
        RANDOM: [extract(with_random_weights, source) for source in (train, val)],
    }
    of_pictures = (equal_images.of_pictures(rows.numpy()) for rows in pairs[PIXELS])  # `predict` changes the rows
    equal = equal_images.sentence(train, val, *of_pictures)
    labels, truth = (torch.as_tensor(np.asarray(source.labels)) for source in (train, val))
    found = {}
    for name, (bank, queries) in pairs.items():
        ((hits,),) = knn.predict(
            bank, labels, queries, truth, lambda votes, targets: (votes.argmax(dim=1) == targets,),
            ks=[min(NEIGHBORS, len(train))], temperatures=[TEMPERATURE], num_classes=len(train.classes),
            device=torch.device("cpu"),
        ).values()  # fmt: skip
        found[name] = hits
    return found, equal


def random_weights(model: Autoencoder) -> Autoencoder:
    """Returns a new model of the same settings and pooling, with the weights of the seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = type(model)(dict(model.settings))
    network.pooling = model.pooling
    network.initial = {}  # no warning: the weights are meant to be random
    return network.to(model.normalize.mean.device)


def interval(better: int, worse: int, images: int) -> tuple[float, float]:
    """Returns the bounds of the difference of two accuracies on the same images, in percent points.

    It is the score interval of Tango (1998), with Student's t, so that few images claim nothing.

    Args:
        better: number of images that only the first classifies correctly.
        worse: number of images that only the second classifies correctly.
        images: number of all images.
    """
    return 100 * _lower(better, worse, images), -100 * _lower(worse, better, images)


def _lower(better: int, worse: int, images: int) -> float:
    from scipy import optimize, stats  # takes half a second

    difference = (better - worse) / images
    if difference == -1:
        return difference
    quantile = float(stats.t.ppf((100 + LEVEL) / 200, max(1, images - 1)))

    def excess(bound: float) -> float:
        """Returns the squared score above its quantile, if `bound` is the difference."""
        linear = (2 * images - better + worse) * bound - better - worse
        root = math.sqrt(max(0.0, linear**2 + 8 * images * worse * bound * (1 - bound)))
        share = (root - linear) / (4 * images)  # of `worse`, by maximum likelihood
        return (better - worse - images * bound) ** 2 - quantile**2 * images * (2 * share + bound * (1 - bound))

    return float(optimize.brentq(excess, -1, difference - 1e-6))


def differences(hits: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Returns the paired difference of the encoder to the others in percent points, with the bounds of its interval."""
    found = {}
    for name in (PIXELS, RANDOM):
        better = int((hits[ENCODER] & ~hits[name]).sum())
        worse = int((hits[name] & ~hits[ENCODER]).sum())
        count = len(hits[name])
        found[name] = (100 * (better - worse) / count, *interval(better, worse, count))
    return found


def in_words(name: str, difference: tuple[float, float, float]) -> str:
    """Returns a sentence on the difference to a baseline, which claims nothing if the interval contains 0."""
    mean, low, high = difference
    bounds = f"{LEVEL} % interval {low:+.1f} to {high:+.1f}"
    if low <= 0 <= high:
        return f"Not distinguishable from {name}: {mean:+.1f} points, {bounds}."
    return f"{'Better' if mean > 0 else 'Worse'} than {name}, by {abs(mean):.1f} points: {bounds}."


def conclusion(found: Mapping[str, tuple[float, float, float]]) -> str:
    """Returns whether the pre-training helped, by the differences to all baselines."""
    if better := [name for name, (_, _, high) in found.items() if high < 0]:
        return f"Pre-training has not helped: {' and '.join(better)} have better features. {ADVICE}"
    if all(low > 0 for _, low, _ in found.values()):
        return "Pre-training helped."
    return f"It is not shown that pre-training helped. {ADVICE}"


def explained(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on what the model has learned without labels; "" if the log does not have it."""
    for name, losses, images in (
        ("test_explained", ["test_loss"], "held-out"),
        ("train_explained", OF_TARGET, "training"),
    ):
        found = [entry for entry in entries if entry.get(name) is not None]
        if found and (share := found[-1][name]) < 1:
            loss = next(found[-1][loss] for loss in losses if loss in found[-1])
            return (
                f"The model explains {share:.1%} of the variance of {images} images: the loss of its predictions is "
                f"{loss:.3f}, and that of their mean {loss / (1 - share):.3f}."
            )
    return ""


def section(
    model: Autoencoder, train: Source, val: Source, held_out: str, without_labels: str, extract: Extract,
    num_workers: int,
) -> str:  # fmt: skip
    """Returns the verdict on a run, as HTML.

    Args:
        train: the images that classify.
        val: held-out images of the same classes.
        held_out: what the held-out images are, in words.
        without_labels: from `explained`.
        extract: function(model, source) that returns features (n, D).
    """
    hits, equal = hits_of(model, train, val, extract, num_workers)
    found = differences(hits)
    told = {float(each.mean()) for each in hits.values()}
    verdict = EQUAL if told in ({0.0}, {1.0}) else conclusion(found)
    sentences = [verdict, *(in_words(name, difference) for name, difference in found.items()), without_labels]
    logger.info(" ".join(sentences))
    if equal:
        logger.warning(equal)
    rows = [[ENCODER, f"{100 * hits[ENCODER].mean():.1f}", ""]]
    for name, (mean, low, high) in found.items():
        rows.append([name, f"{100 * hits[name].mean():.1f}", f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"])
    leak = f" {equal}." if equal else ""
    measured_on = knn.in_words(min(NEIGHBORS, len(train)), len(train), len(val))
    note = (
        f"{measured_on}. The held-out images are of {held_out}.{leak} The intervals are of these images: one run says "
        f"nothing of the spread of others."
    )
    titles = ["features", "accuracy, %", f"the encoder is better by, points ({LEVEL} % interval)"]
    return page.paragraph(" ".join(sentences), "verdict") + page.table(titles, rows) + page.paragraph(note)
