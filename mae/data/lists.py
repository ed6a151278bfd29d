"""Lists of image files: text, CSV, JSON, and the JSON format of COCO and iNaturalist."""

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from mae.data import extras as extra_inputs
from mae.data.decode import SUFFIXES
from mae.data.sources import Files
from mae.files.untrusted import open_file, printable
from mae.settings.choices import CLASSIFICATION, MULTILABEL, REGRESSION

logger = logging.getLogger(__name__)

INTEGER = re.compile("0|-?[1-9][0-9]*")  # the text of an integer, str(int(text)) == text
# Numbers as CSV files have them. float() also takes 1_5 for 15, and digits of other scripts.
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
# Names of columns in lower case and without blanks, hyphens and underscores: "File Name" is filename.
PATH_COLUMNS, LABEL_COLUMNS = ("path", "filename", "file", "image", "filepath"), ("label", "class", "groundtruth")
MASK_COLUMNS = ("mask", "annotation", *LABEL_COLUMNS)
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, csv.Error, RecursionError)  # of a wrong list


def read_list(
    path: Path, root: Path | None, flag: str, task: str | None = CLASSIFICATION,
    columns: Sequence[str] | None = None, extras: Sequence[str] | None = None,
) -> Files:  # fmt: skip
    """Reads a list of image files. The order of the list is kept.

    If all labels are integers as Python writes them, they are numbers, in this order. Otherwise all labels are names.

    Args:
        path: the list, in one of these formats:
            text: one path per line, optionally followed by whitespace and a label;
            CSV: path and label, separated by commas, with or without a header of PATH_COLUMNS and LABEL_COLUMNS;
            JSON: a list of paths, of [path, label], or of {"path": ..., "label": ...};
            JSON of COCO and iNaturalist: images, annotations, categories.
        root: the folder that relative paths start from. Default: the folder of the list.
        flag: the flag of the list, for messages.
        task: what the labels mean, one of `choices.TASK_CHOICES`. None: labels are not read.
        columns: the columns of CSV or keys of JSON with the labels.
        extras: the columns or keys of extra inputs, numbers.

    Raises:
        ValueError: the list has another format, has labels for some of its files only, or different labels for a file.
        OSError: the list can't be read.
    """
    text, suffix = _read_text(path), path.suffix.lower()
    try:
        if "\0" in text:
            raise ValueError("it contains a zero byte")
        document: Any = json.loads(text) if suffix == ".json" else text
        if task is None:
            names, classes = _read_names(suffix, document), list[str]()
            numbers = np.full(len(names), -1)
        elif task == CLASSIFICATION and not columns:
            names, classes, numbers = _read_rows(suffix, document)
        else:
            names, titles, cells = _read_cells(suffix, document, columns)
            classes, numbers = _targets(names, titles, cells, task)
        if not names:
            raise ValueError("the list is empty")
        inputs = _extras(suffix, document, extras) if extras else {}
        if task != REGRESSION and (repeated := len(names) - len({*names})):  # an image may be measured several times
            _require_one_label(names, numbers, inputs)
            if task is None and not inputs:
                logger.warning(
                    f"{flag} {path}: {repeated:,} of its {len(names):,} rows repeat a file, which is then read more "
                    f"often than others"
                )
        has_ids = task == CLASSIFICATION and not isinstance(document, dict) and are_ids(classes)
        files = Files(root or path.parent, names, classes, numbers, inputs, has_ids)
    except UNREADABLE as error:
        raise _of_list(flag, path, error) from error
    require_first(f"{flag} {path}", files.path(0))
    _warn_of_names(f"{flag} {path}", classes, task)
    return files


def require_first(origin: str, file: str) -> None:
    """Raises ValueError if the first file of a list does not exist.

    Args:
        origin: the flag and the path of the list.
    """
    if not os.path.exists(file):
        raise ValueError(
            f"{origin}: its first file, {printable(file)}, does not exist; paths are relative to `data_path`, or to "
            f"the folder of the list"
        )


def _of_list(flag: str, path: Path, error: Exception) -> ValueError:
    """Returns the error about a list that can't be read."""
    reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return ValueError(f"{flag} {path}: {reason}")


def read_pairs(path: Path, flag: str) -> tuple[list[str], list[str]]:
    """Reads a CSV file of images and masks: a row `image,mask` for each pair, with or without a header.

    Args:
        flag: the flag of the list, for messages.

    Returns:
        The paths of the images and of the masks.

    Raises:
        ValueError: the file is empty, or has a row without a mask.
        OSError: the file can't be read.
    """
    text = _read_text(path)
    try:
        rows = _csv_rows(text, MASK_COLUMNS)
        pairs = [(image, mask) for image, mask in rows if mask]
        if not rows or len(pairs) < len(rows) or "\0" in text:
            raise ValueError(f"{len(pairs)} of its {len(rows)} rows have an image and a mask, separated by a comma")
    except UNREADABLE as error:
        raise _of_list(flag, path, error) from error
    return [image for image, _ in pairs], [mask for _, mask in pairs]


def _read_text(path: Path) -> str:
    with open_file(path) as file:
        return os.fsdecode(file.read()).removeprefix("\ufeff")


Row = tuple[str, str | None]


def _read_rows(suffix: str, document: Any) -> tuple[list[str], list[str], np.ndarray]:
    """Parses a list: paths, classes, and labels, which are indices into the classes."""
    if isinstance(document, dict) and "images" in document:
        return _read_annotations(document)
    rows = PARSERS.get(suffix, _text_rows)(document)
    labels = [label for _, label in rows if label not in (None, "", "-1")]
    if 0 < len(labels) < len(rows):
        raise ValueError(f"only {len(labels)} of its {len(rows)} files have a label; an empty label and -1 are none")
    return [name for name, _ in rows], *number_labels(labels, len(rows))


def _read_names(suffix: str, document: Any) -> list[str]:
    """Parses a list: paths without labels."""
    if isinstance(document, dict) and "images" in document:
        return _files_of_annotations(document)
    rows = PARSERS[suffix](document, ()) if suffix in PARSERS else _text_rows(document)
    return [name for name, _ in rows]


def _files_of_annotations(document: dict[str, Any]) -> list[str]:
    return [image["file_name"] for image in document["images"]]


def _read_annotations(document: dict[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """Parses the format of COCO. All categories are classes, also those without images, in the order of their ids.

    Images with several categories or without an annotation, as for detection, have no labels.
    """
    paths = _files_of_annotations(document)
    if not document.get("annotations"):  # a test set
        return paths, [], np.full(len(paths), -1)
    categories = sorted(document["categories"], key=lambda category: category["id"])
    number_of = {category["id"]: number for number, category in enumerate(categories)}
    classes = [str(category.get("name", category["id"])) for category in categories]
    if len(set(classes)) < len(classes):
        classes = [f"{category['id']} {name}" for category, name in zip(categories, classes, strict=True)]
    label_of: dict[Any, int] = {}
    for annotation in document["annotations"]:
        number = number_of[annotation["category_id"]]
        if label_of.setdefault(annotation["image_id"], number) != number:
            return _unlabeled(paths, f"image {annotation['image_id']} has several categories")
    unlabeled = sum(image["id"] not in label_of for image in document["images"])
    if unlabeled:
        return _unlabeled(paths, f"{unlabeled} of {len(paths)} images have no annotation")
    return (
        paths,
        [printable(name) for name in classes],
        np.array([label_of[image["id"]] for image in document["images"]]),
    )


def _unlabeled(paths: list[str], reason: str) -> tuple[list[str], list[str], np.ndarray]:
    logger.warning(f"the annotations are not used as labels, because {reason}")
    return paths, [], np.full(len(paths), -1)


def _extras(suffix: str, document: Any, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the extra inputs (n,) of a list by name."""
    for name in columns:
        extra_inputs.check_name(name)
    names, _, cells = _read_cells(suffix, document, columns, "`extras`")
    values = np.array([[_value_of(cell, REGRESSION, False) for cell in row] for row in cells])
    with np.errstate(invalid="ignore", over="ignore"):
        wrong = ~np.isfinite(values) | ((values % 1 == 0) & (values.astype("f4") != values))
    for row, column in np.argwhere(wrong)[:1]:
        cell = printable(cells[row][column]) or "empty"
        raise ValueError(
            f"the {printable(columns[column])} of {printable(names[row])} is {cell}; `extras` are finite numbers in "
            f"fp32, whose integers are exact up to 16,777,216"
        )
    return dict(zip(columns, values.T.astype("f4"), strict=True))


def _require_one_label(names: Sequence[str], labels: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a file has several labels with the same extra inputs."""
    label_of: dict[tuple, Any] = {}
    for sample, label in zip(zip(names, *inputs.values(), strict=True), labels.tolist(), strict=True):
        if label_of.setdefault(sample, label) != label:
            raise ValueError(
                f"{printable(sample[0])} is in several rows with different labels; give it one row (task=multilabel "
                f"takes a;b as two classes)"
            )


def _read_cells(
    suffix: str, document: Any, columns: Sequence[str] | None, flag: str = "`label_columns`"
) -> tuple[list[str], list[str], list[list[str]]]:
    """Parses a list with any number of labels: paths, names of the labels, and the labels of each path as text."""
    if not columns:
        rows = PARSERS.get(suffix, _text_rows)(document)
        if any(label is None for _, label in rows):
            raise ValueError(f"it has no column {' or '.join(LABEL_COLUMNS)}; give label_columns=NAME ...")
        return [name for name, _ in rows], ["label"], [[str(label)] for _, label in rows]
    if suffix == ".csv":
        lines = _csv_lines(document)
        if twice := {title for title in lines[0] if lines[0].count(title) > 1} & {*columns}:
            raise ValueError(f"two columns have the name {printable(min(twice))}; rename one")
        _require_cells(lines)
        entries = [dict(zip(map(str.strip, lines[0]), map(str.strip, row), strict=True)) for row in lines[1:]]
    elif isinstance(document, list) and all(isinstance(entry, dict) for entry in document):
        entries = [{key: _text_of(value) for key, value in entry.items()} for entry in document]
    else:  # no columns
        entries = []
    titles = list(entries[0]) if entries else []
    if missing := [name for name in columns if name not in titles]:
        found = printable(", ".join(titles)) or "no header"
        raise ValueError(f"it has no column {printable(missing[0])} for {flag}, but {found}")
    path = next((title for name in PATH_COLUMNS for title in titles if _plain(title) == name), None)
    if path is None:
        raise ValueError(f"it has no column of paths; give it the name {' or '.join(PATH_COLUMNS)}")
    return [entry[path] for entry in entries], [*columns], [[entry.get(c, "") for c in columns] for entry in entries]


def _targets(
    names: Sequence[str], titles: Sequence[str], cells: Sequence[Sequence[str]], task: str
) -> tuple[list[str], np.ndarray]:
    """Returns the classes and labels (n,); or the names of the targets, and the targets (n, C)."""
    if task == CLASSIFICATION and len(titles) > 1:
        raise ValueError(f"task=classification has one label column; give one of {', '.join(titles)}")
    has_names = task == CLASSIFICATION or (
        task == MULTILABEL and len(titles) == 1 and _are_names([row[0] for row in cells])
    )
    values = [[_value_of(cell, task, has_names) for cell in row] for row in cells]
    for row, column in np.argwhere(np.isnan(values)):
        kind = "a label" if has_names else "0 or 1" if task == MULTILABEL else "a finite number"
        cell = printable(cells[row][column]) or "empty"
        raise ValueError(
            f"the {printable(titles[column])} of {printable(names[row])} is {cell}; task={task} needs {kind}"
        )
    if task == CLASSIFICATION:
        return number_labels([row[0] for row in cells], len(names))
    if not has_names:
        return [printable(title) for title in titles], np.array(values)
    _require_semicolons([row[0] for row in cells])
    several = [{part.strip() for part in row[0].split(";")} - {""} for row in cells]
    classes = sorted(set().union(*several))
    return [printable(name) for name in classes], np.array([[name in own for name in classes] for own in several])


def _are_names(cells: Sequence[str]) -> bool:
    """Whether the cells of a column are names of classes, such as a;b. Beside 0 and 1, other cells are mistakes."""
    are_numbers = [not np.isnan(_value_of(cell, MULTILABEL, False)) for cell in cells]
    return not all(are_numbers) and (not any(are_numbers) or any(";" in cell for cell in cells))


def _value_of(cell: str, task: str, is_name: bool) -> float:
    """Returns the number in a cell, 0 for a name; NaN if the cell is wrong."""
    if is_name:
        return np.nan if cell.lower() == "nan" or (not cell and task == CLASSIFICATION) else 0.0
    if not DECIMAL.fullmatch(cell.strip()):
        return np.nan
    value = float(cell)
    return value if np.isfinite(value) and (task != MULTILABEL or value in (0, 1)) else np.nan


def _plain(title: str) -> str:
    return re.sub(r"[\s_-]", "", title).lower()


def _text_rows(text: str) -> list[Row]:
    """Parses text. A line without whitespace, or with the suffix of an image file, is a path.

    In any other line, the text after the last tab, or else after the last whitespace, is the label.
    """
    rows: list[Row] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.lower().endswith(SUFFIXES) or len(line.split()) == 1:
            rows.append((line, None))
        else:
            path, label = line.rsplit("\t", 1) if "\t" in line else line.rsplit(maxsplit=1)
            rows.append((path.strip(), label.strip()))
    return rows


def _csv_lines(text: str) -> list[list[str]]:
    return [row for row in csv.reader(line for line in text.splitlines() if line.strip()) if row]


def _require_cells(lines: list[list[str]]) -> None:
    """Raises ValueError if a row has more or fewer cells than the header: its cells would be of other columns."""
    for row in lines:
        if len(row) != len(lines[0]):
            raise ValueError(
                f"the row of {printable(row[0])} and the header have {len(row)} and {len(lines[0])} cells; correct the "
                f"row, with quotes around a text that contains a comma"
            )


def _column_of(header: Sequence[str], names: Sequence[str]) -> int:
    """Returns the index of a column, by the first of `names` that is in the header; else the length of the header.

    Warns if other columns have one of the names, too.
    """
    columns = [column for name in names for column, title in enumerate(header) if title == name]
    if len(columns) > 1:
        used, *others = (header[column] for column in columns)
        remedy = "; give label_columns=NAME to read another" if names == LABEL_COLUMNS else ""
        logger.warning(f"the list has the columns {used} and {', '.join(others)}, and {used} is read{remedy}")
    return columns[0] if columns else len(header)


def _csv_rows(text: str, label_columns: Sequence[str] = LABEL_COLUMNS) -> list[Row]:
    """Parses CSV. Without `label_columns`, no labels are read from a list with a header."""
    lines = _csv_lines(text)
    header = [_plain(cell) for cell in lines[0]] if lines else []
    path, label = 0, 1
    if any(name in header for name in PATH_COLUMNS):
        path, label = _column_of(header, PATH_COLUMNS), _column_of(header, label_columns)
        if label_columns and label == len(header) > 1:
            others = ", ".join(cell.strip() for number, cell in enumerate(lines[0]) if number != path)
            logger.warning(
                f"the CSV file has no labels: none of its columns {printable(others)} is named "
                f"{' or '.join(label_columns)}"
            )
        _require_cells(lines)
        lines = lines[1:]
    elif all(len(row) == 1 for row in lines):  # the CSV files of Places205 have blanks instead of commas
        return _text_rows("\n".join(row[0] for row in lines))
    return [(row[path].strip(), row[label].strip() if len(row) > label else None) for row in lines]


def _text_of(value: Any) -> str:
    """Returns a value of JSON as the cell of a list. Several labels are separated by semicolons."""
    return "" if value is None else ";".join(map(str, value)) if isinstance(value, list) else str(value)


def _json_rows(entries: Any, label_columns: Sequence[str] = LABEL_COLUMNS) -> list[Row]:
    """Parses JSON. Without `label_columns`, labels of dictionaries are not read."""

    def row(entry: Any) -> Row:
        if isinstance(entry, str):
            return entry, None
        if isinstance(entry, dict):
            keys = {_plain(key): key for key in entry}
            path, label = (next((entry[keys[name]] for name in names if name in keys), None)
                           for names in (PATH_COLUMNS, label_columns))  # fmt: skip
        else:
            path, label = [*entry, None][:2]
        if not isinstance(path, str):
            raise ValueError(
                f"an entry has no text with the key {' or '.join(PATH_COLUMNS)}: {printable(str(entry))[:80]}"
            )
        return path, None if label is None else _text_of(label)

    if entries and isinstance(entries[0], dict):
        for names in (PATH_COLUMNS, label_columns):
            _column_of([_plain(key) for key in entries[0]], names)  # says which of several is read
    return [row(entry) for entry in entries]


PARSERS: dict[str, Callable[..., list[Row]]] = {".json": _json_rows, ".csv": _csv_rows}  # by suffix; else text


def are_ids(classes: Sequence[str]) -> bool:
    """Whether the names of classes are integers as Python writes them, `str(int(name)) == name`."""
    return bool(classes) and all(map(INTEGER.fullmatch, classes))


def number_labels(labels: Sequence[str], count: int) -> tuple[list[str], np.ndarray]:
    """Returns the classes that occur, and the labels as indices into them. Labels that spell numbers are in order."""
    if not labels:
        return [], np.full(count, -1)
    texts = {*labels}
    words = {text.lower() for text in texts if not DECIMAL.fullmatch(text)}
    if words == {"nan"}:
        raise ValueError("a label is nan, and the others are numbers: every file needs a label")
    names = sorted(texts) if words else sorted(texts, key=lambda text: (Decimal(text), text))
    if all(map(INTEGER.fullmatch, names)) and names[0].startswith("-"):
        raise ValueError(f"labels that are numbers are 0 or larger, and one is {names[0]}")
    number_of = {name: number for number, name in enumerate(names)}
    return [printable(name) for name in names], np.array([number_of[label] for label in labels])


def _separator_of(labels: Collection[str], separators: str) -> str:
    """Returns the separator that joins several labels: a part of a label is in another label, too. "" if there is none.

    A vertical bar separates in any case.
    """
    for separator in separators:
        parts = [{part.strip() for part in label.split(separator)} for label in {*labels}]
        counts = Counter(part for own in parts for part in own)
        if any(len(own) > 1 and (separator == "|" or max(counts[part] for part in own) > 1) for own in parts):
            return separator
    return ""


def _require_semicolons(texts: Sequence[str]) -> None:
    """Raises ValueError if other characters than semicolons separate labels, as each combination would be a class."""
    if any(";" in text for text in texts):
        return
    several = [text for text in texts if text[:1] + text[-1:] in ("[]", "()", "{}")]
    if not several and (separator := _separator_of(texts, "|,/+&")):
        several = [text for text in texts if separator in text]
    if several:
        raise ValueError(
            f"the label {printable(several[0])} has several labels: separate labels by ;, and end a single label that "
            f"contains this text with ;"
        )


def _warn_of_names(origin: str, classes: Sequence[str], task: str | None) -> None:
    """Logs a warning if names of classes are combinations of labels, or spellings of one number: 1, 001 and 1.0."""
    if task == CLASSIFICATION and (separator := _separator_of(classes, ";|")):
        label = next(name for name in classes if separator in name)
        logger.warning(
            f"{origin}: each text, such as {label!r}, is one class; if it has several labels, task=multilabel takes "
            f"them separated by ;"
        )
    spellings: dict[Decimal, list[str]] = {}
    for name in filter(DECIMAL.fullmatch, classes):
        spellings.setdefault(Decimal(name), []).append(name)
    if same := next((names for names in spellings.values() if len(names) > 1), None):
        logger.warning(
            f"{origin}: {', '.join(same)} are different classes, and the same number; if they are one class, write it "
            f"in one way"
        )
