"""Where the bytes of images come from: the protocol, folders, and lists of files.

Every source keeps to one protocol, `Source`; what it holds is found once, in the main process, and handed to the
loading processes in a few arrays, which they share.
"""

import csv
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from util.cli.advice import advised
from util.data.decode import SUFFIXES, Picture
from util.files.untrusted import printable, read_file

logger = logging.getLogger(__name__)

KINDS = ", ".join(SUFFIXES)
MOST_CLASSES = 1_000_000
PATH_COLUMNS, LABEL_COLUMNS = ("path", "filename", "file", "image"), ("label", "class")  # in any case, of CSV
CSV_HEADER = f"a column {' or '.join(PATH_COLUMNS)} (and {' or '.join(LABEL_COLUMNS)})"


class Source(Protocol):
    """A data set before decoding: the bytes of image files, or what a library decodes itself, and labels.

    Labels count the entries of `classes`; they are -1 where there are none.
    """

    classes: list[str]

    @property
    def labels(self) -> np.ndarray:
        """The labels of all samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | Picture, int]:
        """Raises OSError or `BadImage` where there is nothing to be had."""

    def name(self, index: int) -> str:
        """How to call a sample, in a message; printable."""


class Strings:
    """Strings in two arrays: of a list, every process that reads it would come to hold a copy, string by string,
    because counting references writes to their memory."""

    def __init__(self, strings: Sequence[str]) -> None:
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.bytes[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


def first_few(names: Sequence[str]) -> str:
    """Five of many names, for messages."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ----------------------------------------------------------------------------------------------------------- folders


class Files:
    """Image files, found by `find_files` or `read_list`.

    Args:
        root: the folder that the names start in.
        labels: of each name, counting `classes`; -1 where there are none.
    """

    def __init__(self, root: Path, names: Sequence[str], classes: list[str], labels: np.ndarray) -> None:
        self.root = str(root)
        self.names = Strings(names)
        self.classes = classes
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_file(self._path(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return printable(self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


def find_files(root: Path) -> Files:
    """The image files below a folder, nested or flat, in the order of their names; hidden ones are passed over.

    If all of them lie in sub-folders, these are the classes, in the order of their names.

    Raises:
        ValueError: no image there.
    """
    started = time.perf_counter()
    names = sorted(os.path.relpath(path, root) for path in image_files(str(root)))
    if not names:
        error = ValueError(f"--data_path: no images under {root} (looked in all its folders for {KINDS})")
        shards = any(root.glob("*.tar"))
        raise advised(error, f"--dataset wds:{root}/*.tar reads shards of WebDataset") if shards else error
    folders = [entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and _is_folder(entry)]
    logger.info(f"{len(names):,} images under {root}, found in {time.perf_counter() - started:.1f} s")
    return Files(root, names, *classes_of(names, folders))


def image_files(root: str) -> Iterator[str]:
    """Follows links to folders; each folder counts once below every folder of `root`."""
    waiting = [(root, {_identity(root)})]
    while waiting:
        folder, ancestors = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    below = {*ancestors} if folder == root else ancestors
                    if _identity(entry.path) in below:
                        logger.warning(f"{printable(entry.path)} leads to a folder that is counted already; left out")
                        continue
                    below.add(_identity(entry.path))
                    waiting.append((entry.path, below))
                elif entry.name.lower().endswith(SUFFIXES) and (entry.is_symlink() or entry.is_file()):
                    yield entry.path


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def classes_of(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Classes and labels by the first folder of each name; none if there is a name without a folder."""
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    if not all(first):
        return [], np.full(len(names), -1)
    classes = sorted({*first, *folders})
    for empty in sorted(set(folders) - set(first)):
        logger.warning(f"the class folder {printable(empty)} holds no images; it stays a class")
    numbers = {name: number for number, name in enumerate(classes)}
    return [printable(name) for name in classes], np.array([numbers[name] for name in first])


# ------------------------------------------------------------------------------------------------------------- lists


def read_list(path: Path, root: Path | None, flag: str) -> Files:
    """The image files that a list names, in its order.

    Args:
        path: text with a path a line, and a label behind it, after blanks; CSV of path and label, with or without a
            header as CSV_HEADER has it, separated by commas or semicolons; or JSON, a list of paths, of [path, label]
            or of {"path": ..., "label": ...}. Labels are numbers from 0 or names. Or JSON of COCO's form, as
            iNaturalist's splits are: images, annotations, categories.
        root: where relative paths start; the list's own folder by default.
        flag: that named the list, for messages.

    Raises:
        ValueError: no such list, of another form, or with labels for a part of its files only.
    """
    if not path.is_file():
        raise ValueError(f"{flag}: there is no file {path}")
    text = os.fsdecode(path.read_bytes()).removeprefix("\ufeff")
    try:
        if "\0" in text:
            raise ValueError("it has a zero byte")
        names, classes, numbers = _read_rows(path.suffix.lower(), text)
    except (ValueError, KeyError, TypeError, IndexError, csv.Error, RecursionError) as error:
        raise ValueError(
            f"{flag} {path}: can't be read ({type(error).__name__}: {error}); give a path and a label a line, CSV with "
            f"{CSV_HEADER}, or JSON"
        ) from error
    if not names:
        raise ValueError(f"{flag} {path}: names no files")
    files = Files(root or path.parent, names, classes, numbers)
    if not os.path.exists(files._path(0)):
        raise ValueError(
            f"{flag} {path}: its first file, {files.name(0)}, does not exist; relative paths start at --data_path, or "
            f"where the list is" + (f"; CSV has {CSV_HEADER}, or no header" if path.suffix.lower() == ".csv" else "")
        )
    return files


Row = tuple[str, str | None]


def _read_rows(suffix: str, text: str) -> tuple[list[str], list[str], np.ndarray]:
    """Paths, classes, and labels that count them, of a list."""
    parsed = json.loads(text) if suffix == ".json" else None
    if isinstance(parsed, dict) and "images" in parsed:
        return _read_annotations(parsed)
    rows = _json_rows(parsed) if suffix == ".json" else _csv_rows(text) if suffix == ".csv" else _text_rows(text)
    labels = [label for _, label in rows if label not in (None, "", "-1")]
    if 0 < len(labels) < len(rows):
        raise ValueError(f"only {len(labels)} of its {len(rows)} files have a label")
    return [name for name, _ in rows], *_number(labels, len(rows))


def _read_annotations(document: dict[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """COCO's form. Classes are the categories in the order of their ids, those without images too."""
    paths = [image["file_name"] for image in document["images"]]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError("a file_name in it is no text")
    if not document.get("annotations"):  # of a test set
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
            raise ValueError(f"image {annotation['image_id']} has several categories, and a classifier learns one")
    unlabelled = sum(image["id"] not in label_of for image in document["images"])
    if unlabelled:
        raise ValueError(f"{unlabelled} of its {len(paths)} images have no annotation")
    return (
        paths,
        [printable(name) for name in classes],
        np.array([label_of[image["id"]] for image in document["images"]]),
    )


def _text_rows(text: str) -> list[Row]:
    """A line is a path if it ends as image files do, or has no blanks; else what is behind the last ones is a label."""
    rows: list[Row] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.lower().endswith(SUFFIXES) or len(line.split()) == 1:
            rows.append((line, None))
        else:
            path, label = line.rsplit("\t", 1) if "\t" in line else line.rsplit(maxsplit=1)
            rows.append((path.strip(), label.strip()))
    return rows


def _csv_rows(text: str) -> list[Row]:
    rows = [line for line in text.splitlines() if line.strip()]
    semicolons = all(";" in row for row in rows) and "," not in rows[0] if rows else False
    lines = [row for row in csv.reader(rows, delimiter=";" if semicolons else ",") if row]
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    path, label = 0, 1
    if any(name in header for name in PATH_COLUMNS):
        path, label = (next((header.index(name) for name in names if name in header), len(header))
                       for names in (PATH_COLUMNS, LABEL_COLUMNS))  # fmt: skip
        lines = lines[1:]
    elif all(len(row) == 1 for row in lines):  # those of Places205 have blanks for commas
        return _text_rows("\n".join(row[0] for row in lines))
    return [(row[path], row[label].strip() if len(row) > label else None) for row in lines]


def _json_rows(entries: Any) -> list[Row]:
    def row(entry: Any) -> Row:
        if isinstance(entry, str):
            return entry, None
        path, label = (entry["path"], entry.get("label")) if isinstance(entry, dict) else (entry[0], entry[1])
        return str(path), None if label is None else str(label)

    if not isinstance(entries, list):
        raise ValueError("it is no list, and has no images, annotations and categories")
    return [row(entry) for entry in entries]


def _number(labels: Sequence[str], count: int) -> tuple[list[str], np.ndarray]:
    """Numbers mean themselves; names are numbered in their order."""
    if not labels:
        return [], np.full(count, -1)
    try:
        numbers = np.array([float(label) for label in labels])
        are_numbers = bool((numbers == numbers.round()).all())
    except ValueError:
        are_numbers = False
    if are_numbers:
        if not 0 <= numbers.min() <= numbers.max() < MOST_CLASSES:
            raise ValueError(f"labels that are numbers count classes from 0; these go to {numbers.max():.0f}")
        return [str(number) for number in range(int(numbers.max()) + 1)], numbers.astype(np.int64)
    names, numbers = np.unique(labels, return_inverse=True)
    return [printable(str(name)) for name in names], numbers
