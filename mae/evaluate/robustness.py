"""The robustness test sets of ImageNet: their folders, classes, labels and scores.

A suite consists of cells. A cell is a folder of images with a score of its own: ImageNet-C has 75 cells, the others
have one or three.
"""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae.data.archives import Archive
from mae.data.labels import Subset
from mae.data.sources import Files, find_files, first_few, strays_of

# The published top-1 errors of AlexNet, means over five severities, by the families of the archives (Hendrycks &
# Dietterich 2019).
ALEXNET = {
    "noise": {"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    "blur": {"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360},
    "weather": {"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    "digital": {
        "contrast": 0.853204,
        "elastic_transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    },
}
CORRUPTIONS = {name: error for family in ALEXNET.values() for name, error in family.items()}
SEVERITIES = range(1, 6)

# The paper's fine-tuned models (He et al. 2021, appendix B): top-1 accuracy in percent; mCE for ImageNet-C.
PUBLISHED = {
    "imagenet-c": {"ViT-B/16": 51.7, "ViT-L/16": 41.8, "ViT-H/14": 33.8, "ViT-H/14, 448": 36.8},
    "imagenet-a": {"ViT-B/16": 35.9, "ViT-L/16": 57.1, "ViT-H/14": 68.2, "ViT-H/14, 448": 76.7},
    "imagenet-r": {"ViT-B/16": 48.3, "ViT-L/16": 59.9, "ViT-H/14": 64.4, "ViT-H/14, 448": 66.5},
    "imagenet-sketch": {"ViT-B/16": 34.5, "ViT-L/16": 45.3, "ViT-H/14": 49.6, "ViT-H/14, 448": 50.9},
}
VARIANTS = ("matched-frequency", "threshold", "top")  # of ImageNetV2: its folders are imagenetv2-VARIANT...
# Images per cell. For ReaL: the number of ImageNet's 50,000 validation images that have a label.
IMAGES = {"imagenet-a": 7_500, "imagenet-r": 30_000, "imagenet-sketch": 50_889, "imagenet-v2": 10_000,
          "imagenet-real": 46_837, "imagenet-c": 50_000}  # fmt: skip
SUITES = tuple(IMAGES)
NUM_CLASSES = 1000


class Suite(NamedTuple):
    """A robustness suite.

    Attributes:
        name: one of SUITES.
        root: folder or archive of all cells.
        cells: the folder or archive of each cell, by its name in the table.
        folders: the class folders, in the order of labels; empty if class folders have no effect.
        columns: the class of ImageNet-1K of each folder, as a column of the logits.
    """

    name: str
    root: Path
    cells: dict[str, Path]
    folders: list[str]
    columns: list[int]


class Cell(NamedTuple):
    """The images of a cell.

    Attributes:
        source: the images; labels are indices of the suite's classes.
        answers: all correct labels of each image, if there may be several.
    """

    source: Subset
    answers: list[list[int]] | None = None


@cache
def synsets() -> list[str]:
    """Returns the WordNet ids of the classes of ImageNet-1K, in the order of labels."""
    from timm.data import ImageNetInfo  # takes more than a second

    return ImageNetInfo("imagenet-1k").label_names()


@cache
def imagenet_classes() -> list[str]:
    """Returns the names of the classes of ImageNet-1K, by label."""
    from timm.data import ImageNetInfo  # takes more than a second

    return list(ImageNetInfo("imagenet-1k").label_descriptions())


def subset(name: str) -> list[str]:
    """Returns the sorted WordNet ids of the 200 classes of imagenet-a or imagenet-r, from timm."""
    listed = resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_synsets.txt"
    return sorted(listed.read_text().split())


def find(name: str, root: Path) -> Suite:
    """Finds the folders of a suite.

    Args:
        root: the unpacked folder of the published archive, or the folder in which all archives of the suite were
            unpacked. For a suite with one folder, also an uncompressed tar or zip file.

    Raises:
        ValueError: a part of the folder is missing.
    """
    root = root.absolute()  # the name of the folder contains the variant of ImageNetV2
    cells, folders, columns = {name: root}, synsets(), list(range(NUM_CLASSES))
    if name in ("imagenet-a", "imagenet-r"):
        folders = subset(name)
        columns = [synsets().index(synset) for synset in folders]
    elif name == "imagenet-v2":
        cells, folders = _variants(root), [str(number) for number in range(NUM_CLASSES)]
        root = root.parent if root in cells.values() else root
    elif name == "imagenet-real":
        cells, folders = {name: root / "val" if (root / "val").is_dir() else root}, []
    elif name == "imagenet-c":
        cells = _corruptions(root)
    return Suite(name, root, cells, folders, columns)


def _variants(root: Path) -> dict[str, Path]:
    """Returns the folders of the variants of ImageNetV2 that exist; `root` may be one of them."""
    folders = [path for path in [root, *sorted(root.glob("*"))] if path.is_dir()]
    folders_of = {v: [path for path in folders if path.name.startswith(f"imagenetv2-{v}")] for v in VARIANTS}
    if twice := [paths for paths in folders_of.values() if len(paths) > 1]:
        raise ValueError(
            f"data_path={root}: {twice[0][0].name} and {twice[0][1].name} are of the same variant; give one of them"
        )
    cells = {variant: paths[0] for variant, paths in folders_of.items() if paths}
    if not cells:
        raise ValueError(
            f"data_path={root}: it contains no folder of an archive of ImageNetV2, such as imagenetv2-{VARIANTS[0]}"
        )
    return cells


def _corruptions(root: Path) -> dict[str, Path]:
    """Returns the 75 folders of ImageNet-C: CORRUPTION/SEVERITY, in `root` or in the folder of a family."""
    cells: dict[str, Path] = {}
    for family, errors in ALEXNET.items():
        for corruption in errors:
            above = root / family if (root / family / corruption).is_dir() else root
            cells |= {f"{corruption}/{severity}": above / corruption / str(severity) for severity in SEVERITIES}
    missing = [name for name, folder in cells.items() if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"data_path={root}: {len(missing)} of the {len(cells)} folders CORRUPTION/SEVERITY of ImageNet-C are "
            f"missing, in it or in its subfolders: {first_few(missing)}"
        )
    return cells


def open_cell(suite: Suite, name: str, limit: int | None = None) -> Cell:
    """Opens the images of a cell.

    Args:
        limit: number of evenly spaced images to use (None: all).

    Raises:
        ValueError: there are no images, a class folder is missing, or a folder is not a class of the suite.
    """
    path = suite.cells[name]
    images = Archive(path, None) if path.is_file() else find_files(path)
    if not suite.folders:
        return _with_real_labels(images, path, limit)
    there = {images.classes[number] for number in np.unique(images.labels)} if images.classes else set()
    unknown, missing = sorted(there - {*suite.folders}), sorted({*suite.folders} - there)
    if strays := strays_of(images.names):
        raise ValueError(f"data_path={path}: these images are in no class folder: {strays}; remove them")
    if unknown or missing:
        raise ValueError(
            f"data_path={path}: its class folders are not the {len(suite.folders)} of {suite.name}: unknown are "
            f"{first_few(unknown) or 'none'}, and missing or empty {first_few(missing) or 'none'}"
        )
    number_of = {folder: number for number, folder in enumerate(suite.folders)}
    numbers = np.array([number_of.get(folder, -1) for folder in images.classes])  # -1: an empty folder, of any name
    return Cell(Subset(images, _spread(np.arange(len(images)), limit), suite.folders, numbers))


def _with_real_labels(images: Files | Archive, path: Path, limit: int | None) -> Cell:
    """Returns the validation images of ImageNet that have a label of ReaL (Beyer et al. 2020), which timm contains.

    Labels are looked up by the number in the file name, so class folders have no effect.
    """
    from timm.data import RealLabelsImagenet

    labels = RealLabelsImagenet([""] * 50_000).real_labels
    files = [Path(images.names[index]).name for index in range(len(images))]
    strange = [name for name in files if name not in labels]
    if strange:
        raise ValueError(
            f"data_path={path}: {len(strange)} files, such as {strange[0]}, do not have the names of the published "
            f"files, ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00050000.JPEG; ReaL's labels need them"
        )
    chosen = _spread(np.array([index for index, name in enumerate(files) if labels[name]], dtype=np.int64), limit)
    if not len(chosen):
        raise ValueError(f"data_path={path}: none of its {len(files)} images has a ReaL label")
    images.classes = synsets()
    images.labels = np.array([(labels[name] or [0])[0] for name in files])
    return Cell(Subset(images, chosen), [labels[files[index]] for index in chosen])


def _spread(indices: np.ndarray, limit: int | None) -> np.ndarray:
    return indices[np.linspace(0, len(indices) - 1, min(limit or len(indices), len(indices)), dtype=int)]


class CorruptionErrors(NamedTuple):
    """Errors on ImageNet-C in percent (Hendrycks & Dietterich 2019)."""

    mean: dict[str, float]  # mean error of each corruption over the severities
    normalized: dict[str, float]  # CE: the mean divided by the mean of AlexNet
    unnormalized: float  # mean of `mean`
    mce: float  # mCE: mean of `normalized`


def corruption_errors(errors: dict[str, float]) -> CorruptionErrors:
    """Summarizes the errors of the cells, CORRUPTION/SEVERITY -> percent, by corruption."""
    of = {name: np.array([errors[f"{name}/{severity}"] for severity in SEVERITIES]) for name in CORRUPTIONS}
    mean = {name: float(five.mean()) for name, five in of.items()}
    normalized = {
        name: 100 * float(five.sum()) / (len(SEVERITIES) * 100 * CORRUPTIONS[name]) for name, five in of.items()
    }
    return CorruptionErrors(mean, normalized, float(np.mean([*mean.values()])), float(np.mean([*normalized.values()])))
