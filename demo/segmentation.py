"""Segmentation of garments: a frozen encoder before and after pre-training, and full fine-tuning.

    python demo/segmentation.py --model demo/output/pretrained.pth --out demo/output/segmentation

The command writes pictures of garments on textures with their masks, trains and evaluates main_segment.py on them for
each encoder and seed, and prints a table of the mean IoU. The same command resumes an interrupted comparison. With
three seeds it takes a few minutes on two CPU cores.
"""

import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from tqdm import tqdm

import main_segment
from demo.unpack_data import ARCHIVE
from mae.checkpoints import checkpoint
from mae.cli import entry_point, options
from mae.cli.script import Script
from mae.compare import store
from mae.data.segmentation_masks import default_colors, read_palette
from mae.evaluate.tables import markdown, save
from mae.files import atomic
from mae.inference.model import get_model
from mae.settings import types
from mae.training import log

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "segment_garments.yaml"
# pixels of a picture, and of the largest shift of its garment
SIDE = 28
SHIFT = 4
INK = 30  # gray level of 255: brighter pixels belong to a garment
VALIDATION = 300  # pictures
EXAMPLES = 8
# The rows of the table: the start, and further flags of main_segment.py.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "untrained encoder, frozen": ("untrained", {}),
    "pre-trained encoder, frozen": ("pretrained", {}),
    "pre-trained encoder, fine-tuned": ("pretrained", {"unfreeze_blocks": "all", "lr": 1e-3}),
}


def make_textures(count: int, generator: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Returns textures uint8 (count, side, side): smooth noise with waves of random direction and frequency."""
    coarse = generator.random((count, 6, 6), dtype=np.float32)
    resize = partial(Image.Image.resize, size=(side, side), resample=Image.Resampling.BICUBIC)
    noise = np.stack([np.asarray(resize(Image.fromarray(one))) for one in coarse])
    direction, frequency, phase = (most * generator.random((count, 1, 1)) for most in (np.pi, 0.25, 2 * np.pi))
    rows, columns = np.mgrid[:side, :side]
    waves = np.sin(2 * np.pi * frequency * (np.cos(direction) * rows + np.sin(direction) * columns) + phase)
    contrast = generator.uniform(20, 120, size=(count, 1, 1))
    return (contrast * np.clip(0.5 * noise + 0.25 * (1 + waves), 0, 1)).astype(np.uint8)


def make_pictures(split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Composes garments of the embedded dataset on textures, each shifted by up to SHIFT pixels.

    Returns:
        Pictures uint8 (count, SIDE, SIDE), and masks of the same shape: 0 for the texture, or 1 + the class of the
        garment.
    """
    archive = np.load(ARCHIVE, allow_pickle=False)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(archive[f"{split}_images"]), size=count)
    garments = np.pad(archive[f"{split}_images"][chosen], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    starts = generator.integers(0, 2 * SHIFT + 1, size=(count, 2))
    cut = [one[top : top + SIDE, left : left + SIDE] for one, (top, left) in zip(garments, starts, strict=True)]
    shifted = np.stack(cut)
    classes = archive[f"{split}_labels"][chosen].astype(np.uint8)
    is_garment = shifted > INK
    pictures = np.where(is_garment, shifted, make_textures(count, generator))
    return pictures, np.where(is_garment, classes[:, None, None] + np.uint8(1), np.uint8(0))


def write_pictures(folder: Path, count: int) -> None:
    """Writes the pictures and masks of both splits in the layout of ADE20K, and palette.txt. It does so once."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = ["texture", *(str(name) for name in np.load(ARCHIVE, allow_pickle=False)["classes"])]
    with atomic.replacing(folder) as written:
        for split, part, number, seed in (("training", "train", count, 0), ("validation", "val", VALIDATION, 1)):
            for kind, arrays in zip(("images", "annotations"), make_pictures(part, number, seed), strict=True):
                out = written / kind / split
                out.mkdir(parents=True)
                for index, array in enumerate(tqdm(arrays, desc=f"{kind}/{split}", leave=False, disable=None)):
                    Image.fromarray(array).save(out / f"{index:05}.png")
        colors = default_colors(len(names))
        lines = [f"{red} {green} {blue} {name}" for (red, green, blue), name in zip(colors, names, strict=True)]
        (written / "palette.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(files: dict[str, Path], data: Path, path: Path) -> None:
    """Draws the first pictures of the validation set, their masks, and the predictions of models, with a legend."""
    pictures, masks = ([data / kind / "validation" / f"{index:05}.png" for index in range(EXAMPLES)]
                       for kind in ("images", "annotations"))  # fmt: skip
    rows = {"picture": [np.asarray(Image.open(file)) for file in pictures],
            "mask": [np.asarray(Image.open(file)) for file in masks]}  # fmt: skip
    for title, file in files.items():
        model: Any = get_model(file)
        rows[title] = model.segment(pictures)
    names, colors = read_palette(data / "palette.txt")
    figure = Figure(figsize=(EXAMPLES + 2.2, len(rows) * 1.15), dpi=100)
    for line, (title, arrays) in zip(figure.subplots(len(rows), EXAMPLES), rows.items(), strict=True):
        for axes, array in zip(line, arrays, strict=True):
            axes.imshow(array if title == "picture" else np.array(colors)[array], cmap="gray", vmin=0, vmax=255)
            axes.axis("off")
        line[0].set_title(title, fontsize=8, loc="left")
    patches = [Patch(color=(red / 255, green / 255, blue / 255)) for red, green, blue in colors]
    figure.legend(patches, names, loc="center right", fontsize=8, frameon=False)
    figure.subplots_adjust(left=0.01, right=0.8, top=0.94, bottom=0.01, hspace=0.3, wspace=0.05)
    save(figure, path)


def get_args_parser() -> ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("Compares encoders by the segmentation of garments on textures.")
    options.add_inference_options(parser, images=False, example="mae_pretrain_vit_base")
    for flag, default, text in (
        ("--pictures", 2000, "number of training pictures"),
        ("--seeds", 3, "number of runs of each encoder, with the seeds 0, 1, ..."),
    ):
        parser.add_argument(flag, default=default, type=types.positive_int, metavar="N", help=text)
    parser.add_argument(
        "--out", default="demo/output/segmentation", type=Path, metavar="DIR", help="folder of pictures, runs and table"
    )
    return parser


def main(args: Namespace) -> dict[str, list[float]]:
    """Prints and returns the mean IoU of each run by seed; draws examples of the first seed."""
    model = get_model(args.model)
    if model.in_chans != 1 or model.settings["input_size"] != SIDE:
        raise ValueError(
            f"--model {args.model}: the pictures are gray, with garments of 28 x 28 pixels; give a checkpoint of "
            f"./run demo"
        )
    data = args.out / f"pictures_{args.pictures}"
    args.out.mkdir(parents=True, exist_ok=True)
    write_pictures(data, args.pictures)
    for seed in range(args.seeds):
        torch.manual_seed(seed)  # the random weights with which the pre-training of the model begins
        start = {"model": type(model)(model.settings).state_dict(), "args": model.settings}
        checkpoint.write(start, args.out / f"untrained_{seed}.pth")

    def run(title: str, seed: int) -> float:
        start, others = RUNS[title]
        weights = args.out / f"untrained_{seed}.pth" if start == "untrained" else Path(args.model)
        settings = {"config": RECIPE, "data_path": data, "palette": data / "palette.txt", "finetune": weights}
        out = args.out / run_name(title, seed)
        settings |= {"seed": seed, "device": args.device, "output_dir": out, "resume": "auto", **others}
        return store.run_once(out, Script(main_segment), settings, lambda out, _: log.read(out)[-1])["test_miou"]

    scores = {title: [run(title, seed) for seed in range(args.seeds)] for title in RUNS}
    print(table(scores))
    draw(
        {title: args.out / run_name(title, 0) / "checkpoint-best.pth" for title in RUNS},
        data,
        args.out / "segmentation.png",
    )
    print(f"\npicture: {args.out / 'segmentation.png'}")
    return scores


def run_name(title: str, seed: int) -> str:
    """Returns the name of a run and of its folder."""
    return f"{title.replace(', ', '_').replace(' ', '_')}_{seed}"


def table(scores: dict[str, list[float]]) -> str:
    """Returns the mean and the standard deviation over the seeds as a Markdown table."""
    rows = []
    for title, values in scores.items():
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        rows.append([title, f"{np.mean(values):.1f}%{spread}", " ".join(f"{value:.1f}" for value in values)])
    return markdown(["linear head", "mean IoU", "seeds"], rows)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
