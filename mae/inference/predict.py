"""Classifies photographs.

python -m mae.inference.predict photo.jpg --model mae_finetuned_vit_base
python -m mae.inference.predict demo/photos/*.jpg --model runs/tuned/checkpoint-best.pth --json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mae import parallel
from mae.cli import entry_point, flags, options
from mae.evaluate import tables
from mae.files.untrusted import printable, require_files, require_outside
from mae.inference.model import get_model, pictures_of
from mae.settings import types

FORMATS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".tif",
    ".tiff",
    ".pdf",
    ".svg",
    ".eps",
)  # suffixes of --out that matplotlib writes


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Classifies photographs and prints the most likely classes.")
    options.add_inference_options(parser)
    parser.add_argument("--topk", default=5, type=types.positive_int, metavar="K", help="number of classes per image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image instead of a table")
    parser.add_argument(
        "--out",
        type=flags.new_file(*FORMATS),
        metavar="FILE",
        help="output picture with the images and their scores",
    )
    return parser


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and returns the predictions for each image."""
    require_files(args.images)  # before the model is built
    require_outside("out", [args.out], args.images)
    model = get_model(
        args.model, pretrained=True, device=parallel.choose_device(args.device), **options.chosen_settings(args),
    )  # fmt: skip
    predictions = []
    for path in args.images:  # one at a time, so that results are printed before an unreadable image ends the command
        predictions.append(model.predict(path, args.topk, amp=args.amp))
        if args.json:
            of_all = ("pred_scores", "classes", "pred_values")
            entry = {key: value for key, value in predictions[-1].items() if key not in of_all}
            print(json.dumps({"image": path, **entry}), flush=True)
        else:
            values = predictions[-1].get("values", {})
            lines = [f"  {value:12.6g}  {printable(name)}" for name, value in values.items()]
            lines += [f"  {score:7.2%}  {printable(name)}" for name, score in predictions[-1].get("top", [])]
            print(printable(str(path)), *lines, sep="\n", flush=True)
    if args.out:
        draw(args.images, pictures_of(model, args.images), predictions, args.out)
    return predictions


def draw(names: list[str], images: list[np.ndarray], predictions: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture with a row for each image (H, W, 3): its file name, the image, and a bar for each class."""
    figure = tables.new_figure(8, 2.6 * len(images))
    rows = figure.subplots(len(images), 2, squeeze=False)
    for (left, right), name, image, prediction in zip(rows, names, images, predictions, strict=True):
        left.set_title(printable(Path(name).name), fontsize=9)
        left.imshow(image)
        left.axis("off")
        if "values" in prediction:
            lines = [f"{name}: {value:.6g}" for name, value in prediction["values"].items()]
            right.text(0, 0.5, "\n".join(lines), va="center")
            right.axis("off")
            continue
        classes, scores = zip(*reversed(prediction["top"]), strict=True)
        # Positions, because two classes of ImageNet-1K are named crane.
        right.barh(range(len(classes)), [100 * score for score in scores], tick_label=classes)
        right.set(xlim=(0, 100), xlabel="probability (%)")
        right.tick_params(axis="y", labelsize=8)
        right.spines[["top", "right"]].set_visible(False)
    tables.save(figure, path)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
