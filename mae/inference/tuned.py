"""What the page about a fine-tuned run shows: the accuracy, the classes that are confused, images that are wrong."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mae.build
from engine_finetune import evaluate_model
from mae import parallel
from mae.checkpoints import run_directory
from mae.data import transforms
from mae.data.loader import collate
from mae.data.run_data import RunData
from mae.data.source import Source, evenly_spaced
from mae.evaluate import pictures, score_files, tables, tasks
from mae.inference import page
from mae.settings import DataSpec, specs
from mae.training.labelled import load_for_evaluation
from mae.training.precision import Precision
from mae.weights import loading
from mae.weights.model_zoo import CLASSIFIER

PAIRS = 5  # of classes that are listed
WRONG = 24  # images that are drawn
SIDE = 112  # approximate width of an image in pixels; larger images keep their size
ALL = 100  # classes up to which the confusion matrix is drawn


class Evaluated(NamedTuple):
    """The predictions of a classifier for its validation images."""

    scores: tasks.Evaluation
    val: Source  # the images, in the order of the predictions
    classes: Sequence[str]
    data: RunData


def evaluate(path: Path, data: DataSpec, encoder: Any, device: str, batch_size: int) -> Evaluated:
    """Evaluates the classifier of a run on its validation images, or on those that stand for them.

    Args:
        path: a checkpoint of the run.
        data: the dataset, with the settings that have chosen images.
        encoder: class of encoders of the user's code, if the run has one.

    Raises:
        ValueError: the images can't be opened, or have other classes.
    """
    file = loading.read_classifier(path, CLASSIFIER)
    spec, images = specs(file.settings)
    opened = RunData(images, data, parallel.choose_device(device))
    model, val = load_for_evaluation(partial(mae.build.classifier, encoder=encoder), spec, file, opened)
    model.to(opened.device)
    scores = evaluate_model(
        model, opened.eval_batches(val, batch_size), normalize=opened.normalize,
        precision=Precision("auto", opened.device).of_evaluation(), task=tasks.task_of(file.settings, val),
    )  # fmt: skip
    return Evaluated(scores, val, file.settings.get("classes") or val.classes, opened)


def has_classes(found: Evaluated) -> bool:
    """Whether each image has one class."""
    return not isinstance(found.scores, tasks.TargetEvaluation)


def interval(found: Evaluated) -> tuple[float, float]:
    """Returns the bounds of the 95 % interval of the accuracy (Wilson), in percent."""
    from scipy import stats  # takes half a second

    count = len(found.val)
    bounds = stats.binomtest(round(found.scores.acc1 / 100 * count), count).proportion_ci(0.95, method="wilson")
    return 100 * bounds.low, 100 * bounds.high


def facts_of(found: Evaluated) -> dict[str, str]:
    """Returns the scores of an evaluation, by their titles."""
    facts = {"validation images": f"{len(found.val):,}"}
    if has_classes(found):
        low, high = interval(found)
        facts["accuracy (95 % interval)"] = f"{found.scores.acc1:.1f} % ({low:.1f} to {high:.1f})"
    return facts | {name: f"{value:.4g}" for name, value in found.scores.metrics.items()}


def confusion(found: Evaluated) -> str:
    """Draws the share of each class that is predicted as each class, and lists the pairs that are confused most."""
    labels = found.scores.labels
    predictions = found.scores.predictions
    wrong = labels != predictions
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True)
    of_class = np.bincount(labels, minlength=len(found.classes))
    texts = [
        f"{counts[number]:,} of the {of_class[pairs[0, number]]:,} images of {found.classes[pairs[0, number]]} are "
        f"taken for {found.classes[pairs[1, number]]}."
        for number in np.argsort(-counts, kind="stable")[:PAIRS]
    ]
    text = page.paragraph(" ".join(texts) or "All images are right.")
    if len(found.classes) > ALL:
        return text
    matrix = np.zeros((len(found.classes),) * 2)
    np.add.at(matrix, (labels, predictions), 1)
    figure = score_files.confusion_figure(found.classes, matrix / np.maximum(of_class, 1)[:, None])
    shown = page.image(tables.to_svg(figure), "svg+xml", "share of each class that is predicted as each class")
    return f'{text}<div style="max-width: {figure.get_figwidth():.0f}00px">{shown}</div>'


def mistakes(found: Evaluated) -> str:
    """Draws evenly spaced images that are wrong, as the model gets them, with their class and the predicted one."""
    wrong = np.flatnonzero(found.scores.labels != found.scores.predictions)
    if not len(wrong):
        return page.paragraph("There are none.")
    chosen = [int(wrong[number]) for number in evenly_spaced(len(wrong), WRONG)]
    images = found.data.images
    transform = transforms.eval_transform(images.input_size, images.crop_pct, images.crop, images.interpolation)
    samples = found.data.samples(found.val, transform)
    normalize = found.data.normalize
    text = f"{len(chosen):,} of the {len(wrong):,} validation images that are wrong, evenly spaced. "
    text += pictures.show_range(normalize, pictures.decoded(samples))
    pixels = collate([samples[0, index].item for index in chosen]).images.to(found.data.device)
    scale = max(1, round(SIDE / pixels.shape[3]))
    shown = [
        (
            page.picture(pictures.tile([one[None]], normalize.displayed, scale), found.val.name(index)),
            f"{found.classes[found.scores.labels[index]]}, taken for {found.classes[found.scores.predictions[index]]}",
        )
        for one, index in zip(normalize(pixels), chosen, strict=True)
    ]
    return page.paragraph(text) + page.captioned(shown)


def notes(path: Path, evaluations: int) -> str:
    """Returns what the accuracy means.

    Args:
        path: the checkpoint.
        evaluations: number of evaluations of the run.
    """
    text = "The interval is that of the choice of the images; another seed of the training changes the accuracy, too."
    if path.name == run_directory.BEST and evaluations > 1:
        text += (
            f" {path.name} is the best of {evaluations} evaluations on these images, so its accuracy is optimistic: "
            f"measure it on other images."
        )
    return page.paragraph(text)
