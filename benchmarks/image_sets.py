"""Images of scikit-learn and scikit-image: digits of 8 x 8 pixels, and squares of photographs of 96 x 96 pixels."""

from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

from benchmarks.input_pipeline import find
from benchmarks.scripts import ROOT
from mae.files import atomic

WORK = Path("runs/small_data")
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg", "china.jpg",
    "flower.jpg",
)  # fmt: skip
BORDER = 0.6  # of the width of a photograph, between training and test images
COUNTS = {"train": 60, "val": 40}  # squares of a photograph
SIDES = 64, 160  # pixels of a square before it is resized
SIDE = 96  # of a square, after it is resized
TRAIN_DIGITS = 1_200


def write_digits(folder: Path) -> None:
    """Writes the digits of scikit-learn as images."""
    digits = sklearn.datasets.load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)  # of 0 to 16
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        place = folder / ("train" if number < TRAIN_DIGITS else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:04}.png")


def write_photographs(folder: Path) -> None:
    """Writes random squares of the photographs as images."""
    generator = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photograph = Image.open(find(name)).convert("RGB")
        border = round(BORDER * photograph.width)
        for split, (left, right) in {"train": (0, border), "val": (border, photograph.width)}.items():
            place = folder / split / Path(name).stem
            place.mkdir(parents=True)
            for number in range(COUNTS[split]):
                side = int(generator.integers(SIDES[0], min(SIDES[1], right - left, photograph.height), endpoint=True))
                x = int(generator.integers(left, right - side, endpoint=True))
                y = int(generator.integers(0, photograph.height - side, endpoint=True))
                square = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
                square.save(place / f"{number:03}.png")


WRITERS = {"digits": write_digits, "photographs": write_photographs}


def images_of(name: str) -> Path:
    """Returns the folder of the images of a dataset, which are written if they are absent."""
    folder = WORK / name / "images"
    if not (ROOT / folder).exists():
        (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(ROOT / folder) as temporary:
            WRITERS[name](temporary)
    return folder
