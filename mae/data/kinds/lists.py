"""Lists of image files: CSV with a header, JSON, text, and the annotations of iNaturalist."""

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mae.data import extra_inputs
from mae.data.decode import SUFFIXES
from mae.data.kinds.listing import Files, Listing, MaskFiles
from mae.files import spreadsheet
from mae.files.spreadsheet import DECIMAL
from mae.files.untrusted import open_file, printable
from mae.settings.choices import CLASSIFICATION, REGRESSION

if TYPE_CHECKING:
    from mae.data.segmentation_masks import MaskFormat

logger = logging.getLogger(__name__)

INTEGER = re.compile("0|-?[1-9][0-9]*")  # the text of an integer, str(int(text)) == text
SEPARATORS = re.compile(r"[|,/+&()\[\]{}]")  # characters other than ; that may separate labels
BOOLEANS = {"true": "1", "false": "0"}  # as JSON and pandas write them
# Names of columns in lower case and without blanks, hyphens and underscores: "File Name" is filename.
PATH_COLUMNS = ("path", "filename", "file", "image", "filepath")
LABEL_COLUMNS = ("label", "class", "groundtruth")
MASK_COLUMNS = ("mask", "annotation")
UNLABELED = ("", "nan", "-1")
JSON_FORMS = (
    '[PATH, ...], [[PATH, LABEL], ...], [{"path": PATH, "label": LABEL}, ...], or the annotations of iNaturalist'
)
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, csv.Error, RecursionError)  # of a wrong list


class Table(NamedTuple):
    """The rows of a list."""

    paths: Sequence[str]
    columns: Mapping[str, Sequence[str]]  # the other columns, as text


def read_list(
    path: Path, data_path: Path | None, flag: str, task: str | None = CLASSIFICATION,
    columns: Sequence[str] | None = None, input_columns: Sequence[str] | None = None, masks: "MaskFormat | None" = None,
) -> Listing:  # fmt: skip
    """Reads a list of image files. The order of the list is kept.

    If all labels are integers as Python writes them, they are numbers, in this order. Otherwise all labels are names.

    Args:
        path: the list. Its suffix determines the format:
            .csv: a header with one of PATH_COLUMNS and, for labels, one of LABEL_COLUMNS;
            .json: a list of PATH, of [PATH, LABEL], or of dicts with the keys of a CSV header; or the annotations of
            iNaturalist 2017 to 2019 (images, annotations, categories);
            others: lines PATH or PATH LABEL. Only a PATH with the suffix of an image may contain blanks.
        data_path: the folder that relative paths start from, or an archive with the files, as in `_files_named`.
        flag: the flag of the list, for messages.
        task: what the labels mean, one of `choices.TASK_CHOICES`. None: labels are not read.
        columns: the columns with the labels.
        input_columns: the columns of extra inputs, numbers.
        masks: decodes the masks of one of MASK_COLUMNS, which are the labels. Any suffix but .json is then CSV.

    Raises:
        ValueError: the list has another format, different labels for a file, or an image without a mask.
        OSError: the list can't be read.
    """
    origin = f"{flag} {path}"
    with _named(origin):
        document = _read(path)
        table = PARSERS.get(path.suffix.lower(), _csv_table if masks else _text_table)(document)
        if not table.paths or not all(table.paths):
            raise ValueError("a row has no path" if table.paths else "the list is empty")
        if task == CLASSIFICATION and isinstance(document, dict):
            classes, labels = _categories(**document)
        else:
            classes, labels = _labels_of(table, task, columns)
        inputs = _inputs(table, input_columns) if input_columns else {}
        if task != REGRESSION:  # an image may be measured several times
            _check_repeated(origin, table.paths, labels, inputs, task)
        mask_names = _masks_of(table) if masks else []
        files = _files_named(table.paths, data_path, path.parent)
        mask_files = MaskFiles(_files_named(mask_names, data_path, path.parent), masks) if masks else None
    has_ids = task == CLASSIFICATION and not isinstance(document, dict) and are_ids(classes)
    _warn_of_names(origin, classes, task)
    return Listing(files, classes, labels, inputs, mask_files, has_ids)


def _files_named(names: Sequence[str], data_path: Path | None, beside: Path) -> Files:
    """Returns the files that a list names.

    Names are relative to `data_path`. If it is an archive, they are relative to the folder of the list if the first
    file is there, and otherwise members of the archive.

    Args:
        beside: the folder of the list, which names without a `data_path` are relative to.

    Raises:
        ValueError: the first file does not exist, or a file is not in the archive.
    """
    is_archive = data_path is not None and data_path.is_file()
    folder = Files(beside if data_path is None or is_archive else data_path, names)
    is_in_folder = os.path.exists(folder.path(0))
    if is_archive:
        logger.info(f"the list names files of {printable(str(beside if is_in_folder else data_path))}")
    if is_in_folder:
        return folder
    if data_path and is_archive:
        from mae.data.kinds.archives import members_named

        return members_named(data_path, names)
    raise ValueError(
        f"its first file, {folder.name(0)}, does not exist; paths are relative to `data_path`, or to the folder of the "
        f"list"
    )


@contextmanager
def _named(origin: str) -> Iterator[None]:
    """Puts the flag and the path of a list in front of an error about its content."""
    try:
        yield
    except UNREADABLE as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{origin}: {reason}") from error


def _read(path: Path) -> Any:
    """Returns the text of a list, or its JSON document."""
    with open_file(path) as file:
        text = os.fsdecode(file.read()).removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError("it contains a zero byte")
    return json.loads(text) if path.suffix.lower() == ".json" else text


def _text_table(text: str) -> Table:
    """Parses lines PATH or PATH LABEL."""
    paths = []
    labels = []
    for line in filter(None, map(str.strip, text.splitlines())):
        parts = [line] if line.lower().endswith(SUFFIXES) else line.rsplit(maxsplit=1)
        if not parts[0].lower().endswith(SUFFIXES) and len(parts[0].split()) > 1:
            raise ValueError(
                f"the line {printable(line)[:80]!r} is neither PATH nor PATH LABEL; labels with blanks need a CSV file "
                f"with the header path,label"
            )
        paths.append(parts[0])
        labels.append(parts[1] if len(parts) > 1 else "")
    return Table(paths, {"label": labels} if any(labels) else {})


def _csv_table(text: str) -> Table:
    """Parses CSV with a header."""
    lines = [[value.strip() for value in row] for row in spreadsheet.read(text)]
    header, *rows = [row for row in lines if any(row)] or [["path"]]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"the row of {printable(row[0])} and the header have {len(row)} and {len(header)} cells; correct the "
                f"row, with quotes around a text that contains a comma"
            )
    return _with_paths(header, list(zip(*rows, strict=True)) or [()] * len(header))


def _json_table(document: Any) -> Table:
    """Parses a JSON list; of the annotations of iNaturalist, the paths."""
    if isinstance(document, dict) and "images" in document:
        return Table([image["file_name"] for image in document["images"]], {})
    if not isinstance(document, list) or not all(isinstance(entry, str | list | dict) for entry in document):
        raise ValueError(f"it is none of {JSON_FORMS}")
    pairs = [[entry, None] if isinstance(entry, str) else entry for entry in document]
    rows = [dict(zip(("path", "label"), row, strict=True)) if isinstance(row, list) else row for row in pairs]
    titles = list(dict.fromkeys(title for row in rows for title in row)) or ["path"]
    return _with_paths(titles, [[_text_of(row.get(title)) for row in rows] for title in titles])


PARSERS: dict[str, Callable[[Any], Table]] = {".csv": _csv_table, ".json": _json_table}  # by suffix; else text


def _text_of(value: Any) -> str:
    """Returns a value of JSON as the cell of a list. Several labels are separated by semicolons."""
    return "" if value is None else ";".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_paths(titles: Sequence[str], columns: Sequence[Sequence[str]]) -> Table:
    """Separates the column of paths from the others."""
    title = _find(titles, PATH_COLUMNS)
    repeated, count = Counter(filter(None, titles)).most_common(1)[0]
    if count > 1:
        raise ValueError(f"two columns have the name {printable(repeated)}; rename one")
    if title is None:
        raise ValueError(
            f"none of its columns {printable(', '.join(titles))[:80]} has the name {' or '.join(PATH_COLUMNS)}: CSV "
            f"needs a header, such as path,label, and lines PATH LABEL need the suffix .txt"
        )
    others = dict(zip(titles, columns, strict=True))
    return Table(others.pop(title), others)


def _find(titles: Iterable[str], names: Sequence[str]) -> str | None:
    """Returns the column with the first of `names`. Warns if other columns have one of the names, too."""
    plain = {title: re.sub(r"[\s_-]", "", title).lower() for title in titles}
    found = [title for name in names for title in plain if plain[title] == name]
    if len(found) > 1:
        used = printable(found[0])
        others = printable(", ".join(found[1:]))
        remedy = "; give label_columns=NAME to read another" if names == LABEL_COLUMNS else ""
        logger.warning(f"the list has the columns {used} and {others}, and {used} is read{remedy}")
    return found[0] if found else None


def _rows(table: Table, columns: Sequence[str], flag: str) -> list[tuple[str, ...]]:
    """Returns the cells of some columns, row by row."""
    if missing := [name for name in columns if name not in table.columns]:
        found = printable(", ".join(["path", *table.columns]))
        raise ValueError(f"it has no column {printable(missing[0])} for {flag}, but {found}")
    return list(zip(*(table.columns[name] for name in columns), strict=True))


def _labels_of(table: Table, task: str | None, columns: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Returns the classes and labels (n,); or the names of the targets, and the targets (n, C)."""
    unlabeled: tuple[list[str], np.ndarray] = [], np.full(len(table.paths), -1)
    if task is None:
        return unlabeled
    if not columns:
        title = _find(table.columns, LABEL_COLUMNS)
        if title is None and task == CLASSIFICATION:
            if table.columns:
                found = printable(", ".join(table.columns))
                logger.warning(f"the list has no labels: none of its columns {found} is {' or '.join(LABEL_COLUMNS)}")
            return unlabeled
        if title is None:
            raise ValueError(f"it has no column {' or '.join(LABEL_COLUMNS)}; give label_columns=NAME ...")
        table = Table(table.paths, {"label": table.columns[title]})
        columns = ["label"]
    rows = _rows(table, columns, "`label_columns`")
    if task == CLASSIFICATION and len(columns) > 1:
        raise ValueError(f"task=classification has one label column; give one of {', '.join(columns)}")
    if task == CLASSIFICATION:
        is_labelled = np.array([text.lower() not in UNLABELED for (text,) in rows])
        classes, numbers = number_labels([text for (text,) in rows if text.lower() not in UNLABELED])
        labels = np.full(len(rows), -1)
        labels[is_labelled] = numbers
        return classes, labels
    names = [printable(name) for name in columns]
    if task == REGRESSION:
        return names, _numbers(table, columns, rows, np.isfinite, "task=regression needs a finite number")
    if all(text.lower() in BOOLEANS for row in rows for text in row):
        rows = [tuple(BOOLEANS[text.lower()] for text in row) for row in rows]
    if len(columns) == 1 and _are_names([text for (text,) in rows]):
        return _tags([text for (text,) in rows])
    return names, _numbers(table, columns, rows, lambda values: np.isin(values, (0, 1)), "task=multilabel needs 0 or 1")


def _numbers(
    table: Table, columns: Sequence[str], rows: list[tuple[str, ...]], are_valid: Callable[[np.ndarray], np.ndarray],
    rule: str,
) -> np.ndarray:  # fmt: skip
    """Returns the numbers in some columns (n, C).

    Args:
        are_valid: whether numbers are valid, NaN if the cell is no number.
        rule: what the numbers must be, for the error.
    """
    values = np.array([[float(text) if DECIMAL.fullmatch(text) else np.nan for text in row] for row in rows])
    for row, column in np.argwhere(~are_valid(values))[:1]:
        name, path, text = (printable(part) for part in (columns[column], table.paths[row], rows[row][column]))
        raise ValueError(f"the {name} of {path} is {text or 'empty'}; {rule}")
    return values


def _masks_of(table: Table) -> Sequence[str]:
    """Returns the paths of the masks. Raises ValueError if an image has none."""
    count = len(table.paths)
    masks = table.columns.get(_find(table.columns, MASK_COLUMNS) or "", [""] * count)
    if missing := masks.count(""):
        raise ValueError(f"{count - missing} of its {count} rows have an image and a mask; the header is image,mask")
    return masks


def _inputs(table: Table, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the extra inputs (n,) of a list by name."""
    for name in columns:
        extra_inputs.check_name(name)
    rule = f"`extras` are {extra_inputs.FP32}"
    values = _numbers(table, columns, _rows(table, columns, "`extras`"), extra_inputs.fit_fp32, rule)
    return dict(zip(columns, values.T.astype("f4"), strict=True))


def _are_names(texts: Sequence[str]) -> bool:
    """Whether the cells of a column are names of classes, such as a;b. Beside 0 and 1, other cells are mistakes."""
    are_numbers = [_is_0_or_1(text) for text in texts]
    return not all(are_numbers) and (not any(are_numbers) or any(";" in text for text in texts))


def _is_0_or_1(text: str) -> bool:
    return bool(DECIMAL.fullmatch(text)) and float(text) in (0, 1)


def _are_separated_by_blanks(texts: Sequence[str]) -> bool:
    """Whether words are probably labels: there are fewer words than other cells, and one is a cell of its own."""
    words = {word for text in texts for word in text.split()}
    inner = {word for text in texts if len(text.split()) > 1 for word in text.split()}
    return len(words) < len({*texts}) and not inner.isdisjoint(texts)


def _tags(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the classes in the cells of a column, such as a;b, and the labels (n, C), 0 or 1.

    Raises:
        ValueError: another character may separate labels: each combination would be a class. Or the labels are a vector
            of 0 and 1, which would be two classes.
    """
    has_several = any(";" in text for text in texts)
    wrong = [text for text in texts if text.lower() == "nan" or (not has_several and SEPARATORS.search(text))]
    if not has_several and _are_separated_by_blanks(texts):
        wrong += [text for text in texts if len(text.split()) > 1]
    if wrong:
        raise ValueError(
            f"the label {printable(wrong[0])} may be several labels or none: separate labels by ;, and end a single "
            f"label that contains this text with ;"
        )
    parts = [[part.strip() for part in text.split(";") if part.strip()] for text in texts]
    rows = [{*labels} for labels in parts]
    lengths = {len(labels) for labels in parts if labels}
    found = {BOOLEANS.get(name.lower(), name) for name in set().union(*rows)}
    if len(lengths) == 1 and max(lengths) > 1 and all(map(_is_0_or_1, found)):
        vector = printable(max(texts, key=len))
        raise ValueError(f"the labels {vector} are a vector of 0 and 1: give a column for each class")
    classes = sorted(set().union(*rows))
    return [printable(name) for name in classes], np.array([[name in row for name in classes] for row in rows])


def _categories(
    images: list[dict], annotations: Sequence[dict] = (), categories: Sequence[dict] = (), **_: Any
) -> tuple[list[str], np.ndarray]:
    """Returns the classes of iNaturalist's annotations, also those without images, by their ids, and the labels (n,).

    Raises:
        ValueError: an image has several categories or none, as in annotations for detection.
    """
    if not annotations:  # a test set
        return [], np.full(len(images), -1)
    ordered = sorted(categories, key=lambda category: category["id"])
    classes = [str(category.get("name", category["id"])) for category in ordered]
    if len(set(classes)) < len(classes):
        classes = [f"{category['id']} {name}" for category, name in zip(ordered, classes, strict=True)]
    number_of = {category["id"]: number for number, category in enumerate(ordered)}
    pairs = {(annotation["image_id"], number_of[annotation["category_id"]]) for annotation in annotations}
    label_of = dict(pairs)
    if len(pairs) > len(label_of) or not label_of.keys() >= {image["id"] for image in images}:
        raise ValueError("an image has several categories or none: only annotations as of iNaturalist are labels")
    return [printable(name) for name in classes], np.array([label_of[image["id"]] for image in images])


def _check_repeated(
    origin: str, paths: Sequence[str], labels: np.ndarray, inputs: Mapping[str, np.ndarray], task: str | None
) -> None:
    """Raises ValueError if a file has several labels with the same extra inputs. Pre-training logs a warning."""
    repeated = len(paths) - len({*paths})
    if not repeated:
        return
    label_of: dict[tuple, Any] = {}
    for sample, label in zip(zip(paths, *inputs.values(), strict=True), labels.tolist(), strict=True):
        if label_of.setdefault(sample, label) != label:
            raise ValueError(
                f"{printable(sample[0])} is in several rows with different labels; give it one row (task=multilabel "
                f"takes a;b as two classes)"
            )
    if task is None and not inputs:
        logger.warning(
            f"{origin}: {repeated:,} of its {len(paths):,} rows repeat a file, which is then read more often than "
            f"others"
        )


def are_ids(classes: Sequence[str]) -> bool:
    """Whether the names of classes are integers as Python writes them, `str(int(name)) == name`."""
    return bool(classes) and all(map(INTEGER.fullmatch, classes))


def number_labels(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the classes that occur, and the labels as indices into them. Labels that spell numbers are in order."""
    texts = {*labels}
    words = {text.lower() for text in texts if not DECIMAL.fullmatch(text)}
    if words == {"nan"}:
        raise ValueError("a label is nan, and the others are numbers: every file needs a label")
    names = sorted(texts) if words else sorted(texts, key=lambda text: (Decimal(text), text))
    if are_ids(names) and names[0].startswith("-"):
        raise ValueError(f"labels that are numbers are 0 or larger, and one is {names[0]}")
    number_of = {name: number for number, name in enumerate(names)}
    return [printable(name) for name in names], np.array([number_of[label] for label in labels])


def _warn_of_names(origin: str, classes: Sequence[str], task: str | None) -> None:
    """Logs a warning if names of classes are combinations of labels, or spellings of one number: 1, 001 and 1.0."""
    if task == CLASSIFICATION and (joined := [name for name in classes if ";" in name or "|" in name]):
        logger.warning(
            f"{origin}: each text, such as {joined[0]!r}, is one class; if it has several labels, task=multilabel "
            f"takes them separated by ;"
        )
    spellings: dict[Decimal, list[str]] = {}
    for name in filter(DECIMAL.fullmatch, classes):
        spellings.setdefault(Decimal(name), []).append(name)
    if same := next((names for names in spellings.values() if len(names) > 1), None):
        logger.warning(
            f"{origin}: {', '.join(same)} are different classes, and the same number; if they are one class, write it "
            f"in one way"
        )
