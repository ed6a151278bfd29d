"""Predicts the class of each pixel of photographs, and draws the classes over them.

python -m inference.segment photo.jpg --model runs/scenes/checkpoint-best.pth --out overlay.png
python -m inference.segment *.jpg --model runs/scenes/checkpoint-best.pth --out overlay.png --masks masks
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from inference.model import Segmenter, get_model, open_image
from inference.predict import FORMATS
from util import dist
from util.cli import entry_point, flags, options
from util.files import atomic
from util.files.untrusted import printable


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Predicts the class of each pixel of photographs.")
    options.add_inference_options(parser)
    parser.add_argument(
        "--out",
        type=flags.new_file(*FORMATS),
        metavar="FILE",
        help="output picture: each image, and the classes over it",
    )
    parser.add_argument(
        "--opacity", default=0.6, type=flags.share, metavar="A", help="opacity of the classes over the image"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder for the classes as indexed PNG files of the size of the images",
    )
    return parser


def main(args: argparse.Namespace) -> list[np.ndarray]:
    """Prints the share of each class, writes pictures, and returns the classes (H, W) of each image.

    Raises:
        ValueError: the model has no segmentation head.
    """
    model = get_model(args.model, device=dist.choose_device(args.device))
    results = []
    for path in args.images:  # one at a time, so that results are printed before an unreadable image ends the command
        results.append(model.segment(path))
        assert isinstance(model, Segmenter)  # otherwise, segment raises an error
        shares = np.bincount(results[-1].ravel(), minlength=model.num_classes) / results[-1].size
        print(printable(str(path)))
        for label in np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)]:
            print(f"  {shares[label]:7.2%}  {class_name(model, label)}", flush=True)
        if args.masks:
            args.masks.mkdir(parents=True, exist_ok=True)
            write_mask(results[-1], model, args.masks / f"{Path(path).stem}.png")
    if args.out and isinstance(model, Segmenter):
        images = [np.asarray(open_image(path, 3)) for path in args.images]
        draw(images, results, model, args.opacity, args.out)
    return results


def class_name(model: Segmenter, label: int) -> str:
    """Returns the name of a class."""
    return printable(model.classes[label]) if model.classes else f"class {label}"


def write_mask(classes: np.ndarray, model: Segmenter, path: Path) -> None:
    """Writes classes (H, W) as an indexed PNG file with the colors of the model."""
    picture = Image.fromarray(classes)
    picture.putpalette(model.colors.tobytes())
    with atomic.replacing(path) as written:
        picture.save(written, "PNG")


def overlay(image: np.ndarray, classes: np.ndarray, colors: np.ndarray, opacity: float) -> np.ndarray:
    """Blends the colors of the classes (H, W) over an image (H, W, 3), uint8.

    Args:
        colors: (number of classes, 3), uint8.
        opacity: from 0, the image, to 1, the colors.
    """
    return ((1 - opacity) * image + opacity * colors[classes]).round().astype(np.uint8)


def draw(images: list[np.ndarray], results: list[np.ndarray], model: Segmenter, opacity: float, path: Path) -> None:
    """Writes a picture with a row for each image: the image, the classes over it, and a legend of its classes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = sum(7 * image.shape[0] / (2 * image.shape[1]) for image in images) + 0.2 * len(images)
    figure = Figure((9, max(2.0, min(height, 100.0))), dpi=100, layout="constrained")
    rows = figure.subplots(len(images), 2, squeeze=False)
    for (left, right), image, classes in zip(rows, images, results, strict=True):
        left.imshow(image)
        right.imshow(overlay(image, classes, model.colors, opacity))
        present = np.flatnonzero(np.bincount(classes.ravel())).tolist()
        patches = [Patch(color=model.colors[label] / 255, label=class_name(model, label)) for label in present]
        right.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
        for axes in (left, right):
            axes.axis("off")
    with atomic.replacing(path) as written:
        figure.savefig(written)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
