"""Datasets that commands write: digits of 8 x 8 pixels, squares of photographs, JPEG files of them, and letters."""

import itertools
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

from benchmarks import letters
from benchmarks.scripts import ROOT
from mae.files import atomic, locks

WORK = Path("runs/small_data")
OF_SCIKIT_LEARN = ("china.jpg", "flower.jpg")  # where scikit-image is not installed
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg", *OF_SCIKIT_LEARN,
)  # fmt: skip
OF_JPEG_FILES = (
    "astronaut.png", "chelsea.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg",
    "rocket.jpg", *OF_SCIKIT_LEARN, "grass.png", "gravel.png", "brick.png",
)  # fmt: skip
BORDER = 0.6  # of the width of a photograph, between training and test images
COUNTS = {"train": 60, "val": 40}  # squares of a photograph
SIDES = 64, 160  # pixels of a square before it is resized
SIDE = 96  # of a square, after it is resized
TRAIN_DIGITS = 1_200


def read(name: str) -> Image.Image:
    """Reads a photograph of scikit-image or scikit-learn."""
    package = "sklearn.datasets.images" if name in OF_SCIKIT_LEARN else "skimage.data"
    with resources.as_file(resources.files(package) / name) as file:
        return Image.open(file).convert("RGB")


def write_jpeg_files(folder: Path, count: int, names: Sequence[str] = OF_JPEG_FILES, num_different: int = 1280) -> None:
    """Writes JPEG files of 500 x 375 pixels and quality 95, crops of photographs, to folder/train/photograph.

    The first `num_different` of them are different. The others are links to them.
    """
    draw = random.Random(0)
    out = folder / "train" / "photograph"
    out.mkdir(parents=True)
    pictures = itertools.cycle([read(name) for name in names])
    for number, picture in zip(range(min(count, num_different)), pictures, strict=False):
        width = min(picture.width, picture.height * 4 / 3) * draw.uniform(0.8, 1)
        left = draw.uniform(0, picture.width - width)
        top = draw.uniform(0, picture.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        picture.resize((500, 375), Image.Resampling.BICUBIC, box=box).save(out / f"{number:04}.jpg", quality=95)
    for number in range(num_different, count):
        (out / f"link{number:07}.jpg").symlink_to(out / f"{number % num_different:04}.jpg")


def write_digits(folder: Path) -> None:
    """Writes the digits of scikit-learn as images."""
    digits = sklearn.datasets.load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)  # of 0 to 16
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        out = folder / ("train" if number < TRAIN_DIGITS else "val") / str(label)
        out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(out / f"{number:04}.png")


def write_photographs(folder: Path) -> None:
    """Writes random squares of the photographs as images."""
    generator = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photograph = read(name)
        border = round(BORDER * photograph.width)
        for split, (left, right) in {"train": (0, border), "val": (border, photograph.width)}.items():
            out = folder / split / Path(name).stem
            out.mkdir(parents=True)
            for number in range(COUNTS[split]):
                side = int(generator.integers(SIDES[0], min(SIDES[1], right - left, photograph.height), endpoint=True))
                x = int(generator.integers(left, right - side, endpoint=True))
                y = int(generator.integers(0, photograph.height - side, endpoint=True))
                square = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
                square.save(out / f"{number:03}.png")


WRITERS = {"digits": write_digits, "photographs": write_photographs, "letters": letters.write}


def images_of(name: str) -> Path:
    """Returns the folder of the images of a dataset, which are written if they are absent."""
    folder = WORK / name / "images"
    with locks.locked((ROOT / folder).parent, waits=True):  # a study may run once per core
        if not (ROOT / folder).exists():
            with atomic.replacing(ROOT / folder) as temporary:
                WRITERS[name](temporary)
    return folder
