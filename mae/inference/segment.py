"""Predicts the class of each pixel of photographs, and draws the classes over them.

python -m mae.inference.segment photo.jpg --model runs/scenes/checkpoint-best.pth --out overlay.png
python -m mae.inference.segment *.jpg --model runs/scenes/checkpoint-best.pth --out overlay.png --masks masks
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mae import parallel
from mae.cli import entry_point, flags, options
from mae.evaluate import tables
from mae.evaluate.segmentation import class_title
from mae.files import atomic
from mae.files.untrusted import printable, require_files, require_outside
from mae.inference.model import Segmenter, get_model, pictures_of
from mae.inference.predict import FORMATS
from mae.settings import types

# classes in a legend; characters of a name
MAX_LEGEND = 16
MAX_NAME = 20


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Predicts the class of each pixel of photographs.")
    options.add_inference_options(parser, example="", also=" of main_segment.py", amp="auto")
    parser.add_argument(
        "--out",
        type=flags.new_file(*FORMATS),
        metavar="FILE",
        help="output picture: each image, and the classes over it",
    )
    parser.add_argument(
        "--opacity", default=0.6, type=types.share, metavar="A", help="opacity of the classes over the image"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder for the classes as indexed PNG files of the size of the images; the value of the first class is 0",
    )
    return parser


def main(args: argparse.Namespace) -> list[np.ndarray]:
    """Prints the share of each class, writes pictures, and returns the classes (H, W) of each image.

    Raises:
        ValueError: the model has no segmentation head, or an output would replace an image. With `--masks`: two images
            have the same name.
    """
    require_files(args.images)  # before the model is built
    require_outside("out", [args.out], args.images)
    model = get_model(args.model, device=parallel.choose_device(args.device), **options.chosen_settings(args))
    if not isinstance(model, Segmenter):
        raise ValueError(f"model={args.model} has no segmentation head: give a checkpoint of main_segment.py")
    masks = [args.masks / f"{Path(path).stem}.png" for path in args.images] if args.masks else []
    if masks:
        mask, count = Counter(masks).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"masks={args.masks}: {count} images have the mask {mask.name}; give a folder for each of them"
            )
        require_outside("masks", masks, args.images)
        args.masks.mkdir(parents=True, exist_ok=True)
    results = []
    # One at a time, so that results are printed before an unreadable image ends the command.
    for number, path in enumerate(args.images):
        results.append(model.segment(path, amp=args.amp))
        print(printable(str(path)))
        for label, share in class_shares(results[-1]):
            print(f"  {share:7.2%}  {class_name(model, label)}", flush=True)
        if masks:
            write_mask(results[-1], model, masks[number])
    if args.out:
        draw(pictures_of(model, args.images), results, model, args.opacity, args.out)
    return results


def class_name(model: Segmenter, label: int) -> str:
    """Returns the name of a class, as in the confusion matrix of main_segment.py."""
    return class_title(printable(model.classes[label]) if model.classes else str(label))


def class_shares(classes: np.ndarray) -> list[tuple[int, float]]:
    """Returns the labels in classes (H, W) with their shares of the pixels, the most frequent first."""
    labels, counts = np.unique(classes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return list(zip(labels[order].tolist(), (counts[order] / classes.size).tolist(), strict=True))


def write_mask(classes: np.ndarray, model: Segmenter, path: Path) -> None:
    """Writes classes (H, W) as an indexed PNG file with the colors of the model."""
    picture = Image.fromarray(classes)
    picture.putpalette(model.colors.tobytes())
    with atomic.replacing(path) as written:
        picture.save(written, "PNG")


def overlay(image: np.ndarray, classes: np.ndarray, colors: np.ndarray, opacity: float) -> np.ndarray:
    """Blends the colors of the classes (H, W) over the gray levels of an image (H, W, 3), uint8.

    The colors of the image would change the colors of the classes. Black, the color of the first class without a
    palette, is transparent, because it would hide the image.

    Args:
        colors: (number of classes, 3), uint8.
        opacity: from 0, the gray image, to 1, the colors.
    """
    gray = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    covered = colors[classes].any(axis=2, keepdims=True)
    return np.where(covered, (1 - opacity) * gray + opacity * colors[classes], gray).round().astype(np.uint8)


def legend(classes: np.ndarray, model: Segmenter) -> tuple[list[str], np.ndarray]:
    """Returns names with shares, and the colors (n, 3) from 0 to 1, of the MAX_LEGEND most frequent classes (H, W)."""
    shares = class_shares(classes)
    named = shares[:MAX_LEGEND]
    others = shares[MAX_LEGEND:]
    names = [class_name(model, label) for label, _ in named]
    texts = [f"{name[:MAX_NAME]}{'…' if len(name) > MAX_NAME else ''} {share:.1%}"
             for name, (_, share) in zip(names, named, strict=True)]  # fmt: skip
    colors = [model.colors[label] / 255 for label, _ in named]
    if others:
        texts.append(f"{len(others)} other classes {sum(share for _, share in others):.1%}")
        colors.append(np.ones(3))  # white
    return texts, np.array(colors)


def draw(images: list[np.ndarray], results: list[np.ndarray], model: Segmenter, opacity: float, path: Path) -> None:
    """Writes a picture with a row for each image: the image, the classes over it, and a legend of its classes."""
    from matplotlib.patches import Patch

    legends = [legend(classes, model) for classes in results]
    # In inches: the columns of the images are 4 wide, and a line of the legend is 0.2 high.
    heights = [max(4 * image.shape[0] / image.shape[1], 0.2 * len(texts) + 0.1)
               for image, (texts, _) in zip(images, legends, strict=True)]  # fmt: skip
    figure = tables.new_figure(10, min(sum(heights) + 0.1 * len(images), 100.0))
    rows = figure.subplots(len(images), 3, squeeze=False, width_ratios=(4, 4, 2), height_ratios=heights)
    for row, image, classes, (texts, colors) in zip(rows, images, results, legends, strict=True):
        row[0].imshow(image)
        row[1].imshow(overlay(image, classes, model.colors, opacity))
        patches = [Patch(facecolor=color if color.any() else "none", edgecolor=color, label=text)
                   for color, text in zip(colors, texts, strict=True)]  # fmt: skip
        row[2].legend(handles=patches, loc="center left", fontsize=8, frameon=False, borderaxespad=0, handlelength=1.5)
        for axes in row:
            axes.axis("off")
    tables.save(figure, path)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
