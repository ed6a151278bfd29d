"""Writes the accuracy per class and the confusion matrix of an evaluation as CSV files and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.evaluation import tables
from util.files import atomic
from util.files.untrusted import escape_dollars

NAMED = 40  # largest number of classes with names at the axes of the picture


def write(folder: Path, classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    """Writes the report of a classifier, as `write_matrix` does.

    Args:
        labels: (n,), indices into `classes`.
        predictions: (n,), indices into `classes`.
    """
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
    images, right = matrix.sum(axis=1), matrix.diagonal()
    rows: list[list[Any]] = [["class", unit, "right", "accuracy", *(scores or {}), "most often taken for"]]
    for number, name in enumerate(classes):
        wrong = np.where(np.arange(len(classes)) == number, 0, matrix[number])
        other = classes[int(wrong.argmax())] if wrong.any() else ""
        share = f"{right[number] / images[number]:.4f}" if images[number] else ""
        columns = [column[number] for column in (scores or {}).values()]
        own = ["" if np.isnan(value) else f"{value / 100:.4f}" for value in columns]
        rows.append([name, images[number], right[number], share, *own, other])
    counts = [[name, *row] for name, row in zip(classes, matrix.tolist(), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(folder) as written:
        written.mkdir()
        tables.write_csv(written / "classes.csv", rows)
        tables.write_csv(written / "confusion.csv", [["true \\ predicted", *classes], *counts])
        _draw(written / "confusion.png", classes, matrix / np.maximum(images, 1)[:, None])


def _draw(path: Path, classes: Sequence[str], shares: np.ndarray) -> None:
    side = min(12.0, 3.0 + 0.35 * len(classes))
    figure = tables.new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= NAMED:
        names = [escape_dollars(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), names)
        for (row, column), value in np.ndenumerate(shares):
            if value >= 0.005:
                color = "white" if value > 0.5 else "black"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="predicted class", ylabel="true class", title="Share of each true class")
    figure.colorbar(picture, shrink=0.8)
    tables.save(figure, path)
