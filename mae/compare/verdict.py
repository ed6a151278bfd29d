"""Sentences and a table from the results of `mae.compare.answer`: what an encoder is worth, and compared with what."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mae.settings.choices import CLASSIFICATION

ENCODER = "the encoder"
PIXELS = "pixels"
RANDOM = "random weights"
LEVEL = 95  # percent of an interval
# With fewer, no encoder is called better or worse.
LEAST_LABELS = 200
LEAST_IMAGES = 100  # held-out
BOTH_SIZES = 1_000  # labels below which only the results with all labels are compared

Results = Mapping[str, Any]  # the content of answer.json


class Difference(NamedTuple):
    """The difference of two rows with a number of labels, in points."""

    labels: int
    mean: float
    low: float  # bounds of the interval
    high: float
    other: str  # what the second row is, or its use
    is_enough: bool  # the images are enough to tell

    @property
    def is_better(self) -> bool:
        """Whether the first row is better."""
        return self.low > 0 and self.is_enough

    @property
    def is_worse(self) -> bool:
        """Whether the second row is better."""
        return self.high < 0 and self.is_enough


def packed(scores: np.ndarray, task: str) -> str | list[float]:
    """Returns the scores of images for a file: "1" for a right class and "0" for a wrong one, or numbers."""
    if task == CLASSIFICATION:
        return "".join("1" if score else "0" for score in scores)
    return [float(f"{score:.4g}") for score in scores]


def unpacked(scores: str | Sequence[float]) -> np.ndarray:
    """Returns the scores of `packed`, (n,)."""
    if isinstance(scores, str):
        return np.frombuffer(scores.encode(), np.uint8).astype(np.float64) - ord("0")
    return np.asarray(scores, np.float64)


def sizes_of(results: Results) -> list[int]:
    """Returns the numbers of labels that are compared, in ascending order."""
    sizes = _all_sizes(results)
    return sizes if results["labels"] >= BOTH_SIZES else sizes[-1:]


def _all_sizes(results: Results) -> list[int]:
    """Returns the numbers of labels, the last of which is that of all."""
    first = next(iter(results["rows"][ENCODER]["uses"].values()))
    return [size["labels"] for size in first]


def scores_of(results: Results, title: str, use: str, labels: int) -> np.ndarray:
    """Returns the scores of a use in each draw, (draws, n). Their mean is an accuracy, or r2: 1 - error / variance."""
    draws = _draws(results, title, use, labels)
    scores = np.stack([unpacked(draw["scores"]) for draw in draws])
    return scores if results["task"] == CLASSIFICATION else 1 + scores


def _draws(results: Results, title: str, use: str, labels: int) -> list[dict[str, Any]]:
    return next(size["draws"] for size in results["rows"][title]["uses"][use] if size["labels"] == labels)


def best_uses(results: Results, title: str, labels: int) -> list[str]:
    """Returns the use with the best cross-validation in each draw, which knows nothing of the held-out images."""
    uses = list(results["rows"][title]["uses"])
    by_use = [[draw["by_cross_validation"] for draw in _draws(results, title, use, labels)] for use in uses]
    return [uses[number] for number in np.argmax(by_use, axis=0)]


def scores_of_best(results: Results, title: str, labels: int) -> np.ndarray:
    """Returns the scores of `best_uses`, (draws, n)."""
    found = {use: scores_of(results, title, use, labels) for use in results["rows"][title]["uses"]}
    return np.stack([found[use][draw] for draw, use in enumerate(best_uses(results, title, labels))])


def difference(results: Results, first: str, second: str, labels: int) -> Difference:
    """Compares the best uses of two rows."""
    by_size = {
        size: scores_of_best(results, first, size) - scores_of_best(results, second, size)
        for size in _all_sizes(results)
    }
    variance = _variance_of_labels(by_size, labels, results["labels"])
    mean, low, high = interval(by_size[labels], variance, results["task"] == CLASSIFICATION)
    is_enough = labels >= LEAST_LABELS and results["images"] >= LEAST_IMAGES
    other = _in_words(best_uses(results, second, labels))
    return Difference(labels, 100 * mean, 100 * low, 100 * high, other, is_enough)


def _in_words(uses: Sequence[str]) -> str:
    return " or ".join(use for use, _ in Counter(uses).most_common())


def _variance_of_labels(by_size: Mapping[int, np.ndarray], labels: int, total: int) -> tuple[float, int]:
    """Returns the variance of a mean difference that comes from the choice of the labels, and its degrees of freedom.

    Draws of m of n labels differ by less than draws of new labels: their variance v is that of new labels, s, times
    1 - m / n. The mean of d draws has the variance v / d, and that of the n labels which they share, s · m / n. A part
    of v comes from images on which single draws differ, which the variance of the images has, too. It does not count
    twice, but it is at most half of v, because few draws tell it badly.

    Args:
        by_size: the differences with each number of labels (draws, images); those of all labels are the last.
        labels: the number of the mean.
        total: the number of all labels.
    """
    count, differences = next(iter(by_size.items()))
    draws = len(differences)
    if draws == 1:
        return 0.0, 1
    means = differences.mean(axis=1, keepdims=True)
    between = float(means.var(ddof=1))
    rest = differences - means - differences.mean(axis=0) + differences.mean()
    of_images = (rest**2).sum() / (draws - 1) / (rest.shape[1] - 1) / rest.shape[1]
    between = max(between / 2, between - of_images)
    of_draws = 1 / draws if labels == count else 0
    return between * (of_draws + count / (total - count)), draws - 1


def interval(
    differences: np.ndarray, variance_of_labels: tuple[float, int] = (0.0, 1), are_classes: bool = True
) -> tuple[float, float, float]:  # fmt: skip
    """Returns the mean of paired differences of scores (draws, n), and the bounds of its interval.

    The variance has two parts, of the held-out images and of the labels, and the degrees of freedom of Satterthwaite
    (1946). For classes, half an image more is right and half an image more is wrong in each direction (Agresti and Min
    2005): no difference of few images is certain.
    """
    from scipy import stats  # takes half a second

    mean = float(differences.mean())
    of_images = differences.mean(axis=0)
    if are_classes:
        of_images = np.concatenate([of_images, [math.sqrt(0.5), -math.sqrt(0.5)]])
    parts = [(of_images.var(ddof=1) / len(of_images), len(of_images) - 1), variance_of_labels]
    variance = sum(part for part, _ in parts)
    if not variance:
        return mean, mean, mean
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    margin = float(stats.t.ppf((100 + LEVEL) / 200, freedom)) * math.sqrt(variance)
    return mean, mean - margin, mean + margin


def of_baseline(results: Results) -> list[Difference]:
    """Returns the differences of the encoder to the strongest baseline, for each number of labels."""
    return [difference(results, ENCODER, PIXELS, labels) for labels in sizes_of(results)]


def numbers(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Returns the differences of the encoder to each other row in points, by its title, for a file."""
    return {
        title: [
            {name: round(value, 2) if isinstance(value, float) else value for name, value in one._asdict().items()}
            for one in (difference(results, ENCODER, title, labels) for labels in sizes_of(results))
        ]
        for title in results["rows"]
        if title != ENCODER
    }


def sentences(results: Results) -> list[str]:
    """Returns what the encoder is worth, compared with the strongest baseline, other encoders and random weights.

    Pre-training is said to help with the numbers of labels with which the encoder is better than the baseline and
    random weights.
    """
    if _tell_nothing(results):
        return ["These images tell nothing: all features classify all of them equally."]
    sizes = sizes_of(results)
    of_pixels = of_baseline(results)
    of_random = [difference(results, ENCODER, RANDOM, labels) for labels in sizes]
    texts = [_sentence([one._replace(other=f"{one.other} on {PIXELS}") for one in of_pixels])]
    helped = [
        one.labels for one, random in zip(of_pixels, of_random, strict=True) if one.is_better and random.is_better
    ]
    if helped:
        where = "" if helped == sizes else f" with {_labels(helped[0])}"
        texts[0] = f"Pre-training helped{where}. {texts[0]}"
    for title in (*others(results), RANDOM):
        found = [difference(results, ENCODER, title, labels)._replace(other=shown(results, title)) for labels in sizes]
        texts.append(_sentence(found))
    return texts


def _sentence(found: Sequence[Difference]) -> str:
    """Returns a sentence on the differences to a row. The other row is named where its use changes."""
    parts = []
    for number, one in enumerate(found):
        is_named = number == 0 or one.other != found[number - 1].other
        label = f"{_labels(one.labels)}, the encoder is" if number == 0 else f"{one.labels:,},"
        parts.append(f"with {label} {_comparison(one, one.other if is_named else '')}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _comparison(one: Difference, name: str) -> str:
    numbers = f"{one.low:+.1f} to {one.high:+.1f}"
    if one.is_better or one.is_worse:
        side = "better" if one.is_better else "worse"
        return f"{side}{name and f' than {name}'} by {abs(one.mean):.1f} points ({numbers})"
    text = f"not distinguishable{name and f' from {name}'} ({one.mean:+.1f}, {numbers})"
    return text if one.low <= 0 <= one.high else f"{text[:-1]}; labels or held-out images are too few to tell)"


def _labels(count: int) -> str:
    return f"{count:,} labels"


def _tell_nothing(results: Results) -> bool:
    """Whether the predictions of all rows are right for all images, or wrong."""
    found = [scores_of_best(results, title, labels) for title in results["rows"] for labels in sizes_of(results)]
    return results["task"] == CLASSIFICATION and {float(scores.mean()) for scores in found} in ({0.0}, {1.0})


def others(results: Results) -> list[str]:
    """Returns the titles of the other encoders."""
    return [title for title, row in results["rows"].items() if row["kind"] == "other"]


def shown(results: Results, title: str) -> str:
    """Returns the title of a row for a reader, with its input size and whether its weights are random."""
    row = results["rows"][title]
    title = title if title.count("/") < 2 else title.rpartition("/")[2]  # a path
    facts = [row["input"]] if row["kind"] == "other" else []
    facts += ["weights are random"] if row.get("has_random_weights") else []
    return f"{title} ({', '.join(facts)})" if facts else title


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and the rows of the table that `sentences` are about."""
    sizes = sizes_of(results)
    unit = "accuracy" if results["task"] == CLASSIFICATION else "r2"
    titles = ["features", *(f"{unit} with {_labels(labels)}, %" for labels in sizes)]
    titles += [f"the encoder − this row, points ({LEVEL} % interval), {labels:,} labels" for labels in sizes]
    rows = []
    for title in [ENCODER, PIXELS, RANDOM, *others(results)]:
        columns = [
            f"{_mean(scores_of_best(results, title, labels))} ({_in_words(best_uses(results, title, labels))})"
            for labels in sizes
        ]
        if title == ENCODER:
            columns += [""] * len(sizes)
        else:
            found = [difference(results, ENCODER, title, labels) for labels in sizes]
            columns += [f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f})" for one in found]
        rows.append([shown(results, title), *columns])
    return titles, rows


def table_of_uses(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and the rows of a table of all uses, with what was chosen."""
    sizes = sizes_of(results)
    titles = ["features", *(text for labels in sizes for text in (_labels(labels), "chosen"))]
    rows = []
    for title, row in results["rows"].items():
        for use in row["uses"]:
            columns = []
            for labels in sizes:
                chosen = dict.fromkeys(draw["chosen"] for draw in _draws(results, title, use, labels))
                columns += [_mean(scores_of(results, title, use, labels)), " or ".join(chosen)]
            rows.append([f"{shown(results, title)}, {use}", *columns])
    return titles, rows


def _mean(scores: np.ndarray) -> str:
    """Returns the mean of scores (draws, n) in percent, with the standard deviation over the draws."""
    means = 100 * scores.mean(axis=1)
    return f"{means.mean():.1f}" + (f" ± {means.std(ddof=1):.1f}" if len(means) > 1 else "")


def note(results: Results) -> str:
    """Returns what the results were measured on."""
    sizes = sizes_of(results)
    draws = len(scores_of_best(results, ENCODER, sizes[0]))
    several = f"; means of {draws} draws of {_labels(sizes[0])}" if draws > 1 else ""
    of_draw = " of each draw" if draws > 1 else ""
    equal = f" {results['equal']}." if results["equal"] else ""
    return (
        f"{results['images']:,} held-out images of {results['held_out']}{several}. Classifiers and their "
        f"hyperparameters are chosen by cross-validation with the labels{of_draw}. Intervals are of images and "
        f"labels, not of other runs.{equal}"
    )
