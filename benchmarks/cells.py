"""Cells: gray images of 32 x 32 pixels as of a microscope, generated, of 8 classes.

A class is a combination of three properties: filled cells or rings, round or elongated ones, scattered or clustered
ones. Number, size, contrast and sharpness of the cells, and the illumination, are random.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
COUNTS = {"train": 1000, "val": 250}  # images of a class
CLASSES = ["_".join(names) for names in itertools.product(("filled", "ring"), ("round", "long"), ("scattered", "near"))]


def image(name: str, draw: np.random.Generator) -> np.ndarray:
    """Returns an image of a class, (SIDE, SIDE), with values from 0 to 1."""
    interior, shape, layout = name.split("_")
    number = draw.integers(3, 7)
    centers = draw.uniform(3, SIDE - 3, (number, 2))
    if layout == "near":
        centers = draw.uniform(10, SIDE - 10, 2) + draw.normal(0, 3, (number, 2))
    grid = np.mgrid[:SIDE, :SIDE]
    rows, columns = grid[:, None] - centers.T[:, :, None, None]  # (number, SIDE, SIDE) each
    angle = draw.uniform(0, np.pi, (number, 1, 1))
    radius = draw.uniform(3, 5, (number, 1, 1))
    elongation = draw.uniform(1.5, 2, (number, 1, 1)) if shape == "long" else np.ones((number, 1, 1))
    along = (columns * np.cos(angle) + rows * np.sin(angle)) / elongation
    across = (rows * np.cos(angle) - columns * np.sin(angle)) * elongation
    outside = np.hypot(along, across) - radius  # about the distance from the border, in pixels
    width = draw.uniform(0.6, 1.4)
    profile = np.exp(-((outside / width) ** 2)) if interior == "ring" else 1 / (1 + np.exp(2 * outside / width))
    drawn = (profile * draw.uniform(0.6, 1, (number, 1, 1))).max(axis=0)
    slope = draw.uniform(-0.05, 0.05, 2)
    background = draw.uniform(0.05, 0.15) + np.tensordot(slope, grid / SIDE - 0.5, axes=1)
    return np.clip(background + draw.uniform(0.5, 0.85) * drawn, 0, 1)


def write(folder: Path, counts: Mapping[str, int] = COUNTS) -> None:
    """Writes the images to folder/train and folder/val, with a folder for each class.

    Args:
        counts: images of a class.
    """
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for name in CLASSES:
            out = folder / split / name
            out.mkdir(parents=True)
            for number in range(count):
                pixels = (255 * image(name, draw)).round().astype(np.uint8)
                Image.fromarray(pixels).save(out / f"{number:04}.png")
