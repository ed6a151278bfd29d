"""Writes the scores of each class or target of an evaluation as CSV files, and the confusion matrix as a picture."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae import parallel
from mae.evaluate import metrics, tables, tasks
from mae.files import atomic, spreadsheet
from mae.settings.choices import MULTILABEL, REGRESSION

logger = logging.getLogger(__name__)

MOST_PAIRED = 10_000  # classes in a confusion matrix, which has 800 MB
NAMED = 40  # largest number of classes with names at the axes of the picture


def report_scores(scores: Any, classes: Sequence[str], folder: str | None) -> None:
    """Logs the scores of a `tasks.Classification`, and writes the files of `report` to a folder."""
    logger.info(str(scores))
    tasks.warn_of_undefined(scores.scores())
    if folder and parallel.is_main():
        write_files = write_targets if isinstance(scores, tasks.TargetEvaluation) else write
        write_files(Path(folder), classes, scores.labels, scores.predictions)


def write(folder: Path, classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    """Writes the report of a classifier, as `write_matrix` does.

    Of more than MOST_PAIRED classes, it has those that are true or predicted; if these are too many, there is none.

    Args:
        labels: (n,), indices into `classes`.
        predictions: (n,), indices into `classes`.
    """
    if len(classes) > MOST_PAIRED:
        used, both = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
        classes = [classes[number] for number in used]
        labels, predictions = np.split(both, 2)
    if len(classes) > MOST_PAIRED:
        logger.warning(f"`report`: there is none, as its matrix has all pairs of the {len(classes):,} classes")
        return
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    write_matrix(folder, classes, matrix)


def write_matrix(
    folder: Path,
    classes: Sequence[str],
    matrix: np.ndarray,
    unit: str = "images",
    scores: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes classes.csv, confusion.csv (rows: true classes, columns: predicted classes) and confusion.png.

    Args:
        matrix: (classes, classes), the counts of confusion.csv.
        unit: what is counted.
        scores: further columns of classes.csv, (classes,) in percent; NaN is an empty cell.

    Raises:
        OSError: the disk is full, or the folder can't be written to. Its files are unchanged.
    """
    images = matrix.sum(axis=1)
    right = matrix.diagonal()
    rows: list[list[Any]] = [["class", unit, "right", "accuracy", *(scores or {}), "most often taken for"]]
    for number, name in enumerate(classes):
        wrong = np.where(np.arange(len(classes)) == number, 0, matrix[number])
        other = classes[int(wrong.argmax())] if wrong.any() else ""
        share = f"{right[number] / images[number]:.4f}" if images[number] else ""
        columns = [column[number] for column in (scores or {}).values()]
        texts = ["" if np.isnan(value) else f"{value / 100:.4f}" for value in columns]
        rows.append([name, images[number], right[number], share, *texts, other])
    counts = [[name, *row] for name, row in zip(classes, matrix.tolist(), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(folder) as written:
        written.mkdir()
        spreadsheet.write(written / "classes.csv", rows)
        spreadsheet.write(written / "confusion.csv", [["true \\ predicted", *classes], *counts])
        figure = confusion_figure(classes, matrix / np.maximum(images, 1)[:, None])
        tables.save(figure, written / "confusion.png")


def write_targets(folder: Path, names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    """Writes the report of a model of several classes or of numbers.

    classes.csv or targets.csv: a row for each class or target, with its scores.

    Args:
        labels: (n, C); integers 0 and 1 for classes.
        predictions: (n, C): probabilities, or numbers.

    Raises:
        OSError: as in `write_matrix`.
    """
    has_classes = labels.dtype.kind == "i"
    known = metrics.names_of(MULTILABEL if has_classes else REGRESSION)
    used = [name for name in known if ":" not in name]  # one of the user's code may need all classes
    rows: list[list[Any]] = [["class" if has_classes else "target", "images", *used]]
    for number, name in enumerate(names):
        truth = labels[:, [number]]
        predicted = predictions[:, [number]]
        values = [metrics.compute(one, truth, predicted, predicted, 1) for one in used]
        count = int(truth.sum()) if has_classes else len(truth)
        rows.append([name, count, *("" if np.isnan(value) else f"{value:.6g}" for value in values)])
    folder.mkdir(parents=True, exist_ok=True)
    spreadsheet.write(folder / ("classes.csv" if has_classes else "targets.csv"), rows)


def confusion_figure(classes: Sequence[str], shares: np.ndarray) -> Any:
    """Returns a figure of a confusion matrix.

    Args:
        shares: (classes, classes), the share of each true class that is predicted as each class.
    """
    side = min(12.0, 3.0 + 0.35 * len(classes))
    figure = tables.new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for (row, column), value in np.ndenumerate(shares):
            if value >= 0.005:
                color = "white" if value > 0.5 else "black"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="predicted class", ylabel="true class", title="Share of each true class")
    figure.colorbar(picture, shrink=0.8)
    return figure
