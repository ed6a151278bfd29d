"""Labels in a CSV file beside the images of a folder, whose first column names the images."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae.data.kinds.listing import Files, Listing, folder_of
from mae.data.kinds.lists import INTEGER, LABEL_COLUMNS, UNLABELED, are_ids, number_labels
from mae.files import spreadsheet
from mae.files.spreadsheet import DECIMAL
from mae.files.untrusted import open_file, printable
from mae.plurals import counted
from mae.settings.choices import CLASSIFICATION, REGRESSION

MOST_NUMBERS = 20  # different whole numbers that are classes; more are quantities
MOST_CLASSES = 0.5  # of the labelled images: more different texts are no classes
TARGET = "target"  # the column of a list whose labels are numbers


class Labels(NamedTuple):
    """The labels of the images of a folder."""

    file: str  # name of the CSV file
    column: str
    task: str
    texts: list[str]  # of each image of the folder; "" without a label
    num_unused: int  # rows without an image

    @property
    def line(self) -> str:
        """What the check says of the labels."""
        kind = f"task={self.task}"
        numbers = {text for text in self.texts if text}
        if all(map(DECIMAL.fullmatch, numbers)):
            other = CLASSIFICATION if self.task == REGRESSION else REGRESSION
            kind = f"{len(numbers):,} different numbers, {kind}; task={other} is the other kind"
        return (
            f"labels      column {printable(self.column)} of {printable(self.file)} ({kind}); "
            f"{counted(self.texts.count(''), 'image')} without a label, {counted(self.num_unused, 'row')} without an "
            f"image"
        )

    def applied_to(self, images: Any) -> Any:
        """Returns the images of the folder with their labels, NaN for those without a number."""
        if self.task != CLASSIFICATION:
            targets = np.array([[float(text) if DECIMAL.fullmatch(text) else np.nan] for text in self.texts])
            return Listing(images.files, [printable(self.column)], targets)
        classes, numbers = number_labels([text for text in self.texts if text])
        labels = np.full(len(images), -1)
        labels[np.array(self.texts) != ""] = numbers
        return Listing(images.files, classes, labels, has_ids=are_ids(classes))

    def write(self, path: Path, images: Any, data_path: Path, only_labelled: bool) -> dict[str, Any]:
        """Writes a list of the images with their labels, and returns the settings that read it.

        Args:
            data_path: the folder that the names are relative to.
            only_labelled: leave out the images without a label.

        Raises:
            ValueError: the file exists, with other labels.
        """
        title = "label" if self.task == CLASSIFICATION else TARGET
        names = [os.path.relpath(images.files.path(index), data_path) for index in range(len(images))]
        pairs = zip(names, self.texts, strict=True)
        rows = [["path", title], *([name, text] for name, text in pairs if text or not only_labelled)]
        if not path.exists():
            spreadsheet.write(path, rows)
        elif spreadsheet.read(_text_of(path)) != rows:
            raise ValueError(f"{path} exists, with other labels: delete it, or give another `recipe`")
        settings = {"train_list": str(path)}
        return settings if self.task == CLASSIFICATION else {**settings, "task": self.task, "label_columns": [title]}


def find(images: Any, data_path: Path, task: str | None) -> tuple[Labels | None, list[str]]:
    """Returns the labels of the images of a folder without classes, and the lines that the check prints.

    Args:
        images: the opened images.
        data_path: the folder, or the one that contains the folder of the training images.
        task: what the labels mean. None: the labels determine it.
    """
    files = folder_of(images)
    if files is None or len(images.classes) > 1:
        return None, []
    found = []
    lines = []
    for path in sorted({*data_path.glob("*.csv"), *Path(files.root).glob("*.csv")}):
        try:
            found.append(_read(path, files, data_path, task))
        except (ValueError, csv.Error, OSError) as error:
            name = printable(path.name)
            lines.append(f"labels      {name} is not used: {error}; train_list={name} reads a list of images")
    if len(found) > 1:
        names = ", ".join(printable(one.file) for one in found)
        return None, [f"labels      {names} are not used: each one names the images; give one as `train_list`"]
    return (found[0], [found[0].line]) if found else (None, lines)


def _read(path: Path, files: Files, data_path: Path, task: str | None) -> Labels:
    """Reads the labels of files.

    Raises:
        ValueError: the first column does not name the files, each once, or it is unknown which column has the labels.
    """
    header, *rows = [[text.strip() for text in row] for row in spreadsheet.read(_text_of(path)) if any(row)] or [[]]
    others = [number for number, title in enumerate(header) if number and title.lower() in LABEL_COLUMNS[:2]]
    if len(header) != 2 and len(others) != 1:
        raise ValueError("it is unknown which column has the labels")
    column = 1 if len(header) == 2 else others[0]
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row has more or fewer cells than the header")
    numbers = _numbers_of(files, data_path)
    indices = [numbers.get(row[0]) for row in rows]
    named = Counter(index for index in indices if index is not None)
    if not named:
        raise ValueError("its first column names no image")
    if max(named.values()) > 1:
        raise ValueError(f"it names {files.name(named.most_common(1)[0][0])} in several rows")
    texts = [""] * len(files.names)
    for index, row in zip(indices, rows, strict=True):
        if index is not None and row[column].lower() not in UNLABELED:
            texts[index] = row[column]
    return Labels(path.name, header[column], task or _task_of(list(filter(None, texts))), texts, indices.count(None))


def _numbers_of(files: Files, data_path: Path) -> dict[str, int]:
    """Returns the numbers of files by their names, with and without folders and suffixes, as far as one file has it."""
    below = os.path.relpath(files.root, data_path)
    found: dict[str, set[int]] = {}
    for number, name in enumerate(files.names):
        for text in (name, os.path.basename(name), os.path.normpath(os.path.join(below, name))):
            for key in (text, os.path.splitext(text)[0]):
                found.setdefault(key, set()).add(number)
    return {key: next(iter(of_key)) for key, of_key in found.items() if len(of_key) == 1}


def _task_of(labels: Sequence[str]) -> str:
    """Returns the task of labels. Raises ValueError if they are texts that are almost all different, or none."""
    different = {*labels}
    if not all(map(DECIMAL.fullmatch, different)):
        if len(different) > MOST_CLASSES * len(labels):
            raise ValueError(f"its {len(labels):,} labels have {len(different):,} different texts")
        return CLASSIFICATION
    if not different:
        raise ValueError("it has no label")
    are_classes = len(different) <= MOST_NUMBERS and all(map(INTEGER.fullmatch, different))
    return CLASSIFICATION if are_classes else REGRESSION


def _text_of(path: Path) -> str:
    with open_file(path) as file:
        return os.fsdecode(file.read()).removeprefix("\ufeff")
