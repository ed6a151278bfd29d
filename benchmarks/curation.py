"""What the lists of `mae map` find of planted images: the table of curation.md.

    OMP_NUM_THREADS=1 python benchmarks/curation.py             # six minutes of a core
    OMP_NUM_THREADS=1 python benchmarks/curation.py cells       # one kind

Among 2,000 images of each of three kinds (squares of photographs that do not overlap, cells as of a microscope,
spectrograms), the command plants 12 equal images; 8 near-duplicates, two of each change: JPEG of quality 50, shifted by
2 pixels, 10 % brighter, a crop of 95 % that is resized; 10 images of another kind; 15 wrong labels. It pre-trains a
small encoder on all of them, and counts what the first 20 of each list find: with the features of the encoder, and with
raw pixels in place of them. The last columns are the pairs of near-duplicates that are listed, with and without those
that are planted.
"""

import argparse
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image

from benchmarks import cells, scripts
from benchmarks.image_sets import PHOTOGRAPHS, read
from mae.cli import entry_point
from mae.data import raw_pixels
from mae.data.labels import Subset
from mae.data.source import Source, require_random_access
from mae.evaluate import tables
from mae.files import atomic
from mae.inference import extraction, features, get_model, image_map, map_lists
from mae.settings import DataSpec, ImageSpec
from mae.training.precision import Precision

WORK = scripts.ROOT / "runs/curation"
IMAGES = 2_000
DUPLICATES = 12
OTHERS = 10
WRONG_LABELS = 15
EPOCHS = 60  # about two minutes of a core
FIRST = 20  # entries of a list
DRAW = 2  # of the images and of what is planted; the list of outliers was chosen with 0, that of near-duplicates with 1
TITLES = (
    "images", "features", "equal", "near-duplicates", "another kind", "wrong labels", "k-NN", "pairs listed",
    "pairs listed without planted ones",
)  # fmt: skip
PAGE = """# What the lists of a map find

`OMP_NUM_THREADS=1 python benchmarks/curation.py` writes this page in six minutes of a core; its docstring says how.
Among 2,000 images of each kind, it plants 12 equal images, 8 near-duplicates, 10 images of another kind and 15 wrong
labels. A cell counts those among the first 20 entries of a list. k-NN is the share of images whose neighbors vote for
their label, wrong ones included; planted equal images count as right. "Pairs" counts the near-duplicates that are
listed: of all images, and of the 2,000.

{table}

- Squares of photographs are of sky, cloth and tissue, too: pairs that nobody planted look alike.
- Outliers are found where the images are alike, as cells and spectrograms are. Squares of 16 photographs differ as much
  among each other as from spectrograms, and no list finds these.
- Where k-NN is near 50 % or below, the list of labels finds few: 0 to 6 of 15. Where it is above 85 %, 11 to 14.
- Raw pixels suffice for the labels of spectrograms, whose classes are positions. They find no outliers among cells, and
  fewer wrong labels than the encoder among photographs.
"""
SQUARE = 48  # pixels of an image; cells have 32
FLAT = 8  # standard deviation of the values of a square below which it has no content: borders of photographs
SOUNDS = ("rising", "falling", "steady", "chord", "clicks", "vibrato")


def photographs(draw: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    """Yields squares of a grid and their photographs, IMAGES in all."""
    found = []
    for name in PHOTOGRAPHS:
        picture = read(name)
        corners = itertools.product(
            range(0, picture.width - SQUARE + 1, SQUARE), range(0, picture.height - SQUARE + 1, SQUARE)
        )
        squares = [picture.crop((x, y, x + SQUARE, y + SQUARE)) for x, y in corners]
        found += [(Path(name).stem, square) for square in squares if np.std(np.asarray(square)) >= FLAT]
    for index in np.sort(draw.choice(len(found), IMAGES, replace=False)):
        yield found[index]


def microscope(draw: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    """Yields cells and their classes."""
    for _, name in zip(range(IMAGES), itertools.cycle(cells.CLASSES), strict=False):
        yield name, Image.fromarray((255 * cells.image(name, draw)).round().astype(np.uint8))


def spectrograms(draw: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    """Yields spectrograms of noisy sounds and their classes: time to the right, frequency upward."""
    frequency, time = np.mgrid[SQUARE:0:-1, :SQUARE] / SQUARE
    for _, name in zip(range(IMAGES), itertools.cycle(SOUNDS), strict=False):
        start = draw.uniform(0.2, 0.5)
        slope = draw.uniform(0.3, 0.5)
        width = draw.uniform(0.01, 0.03)
        rate = draw.uniform(1.5, 4)
        phase = draw.uniform(0, 1)
        centers = {
            "rising": [start + slope * (time - 0.2)], "falling": [start + slope * (0.8 - time)],
            "steady": [start + 0 * time], "chord": [start * factor + 0 * time for factor in (0.5, 1, 1.5, 2)],
            "vibrato": [start + 0.08 * np.sin(2 * np.pi * (rate * time + phase))],
        }  # fmt: skip
        if name == "clicks":
            power = np.exp(-(((rate * time + phase) % 1 - 0.5) ** 2) / width**2 / 4) * (1 - 0.5 * frequency)
        else:
            power = np.max([np.exp(-(((frequency - center) / width) ** 2)) for center in centers[name]], axis=0)
        envelope = np.clip((time - draw.uniform(0, 0.3)) * 8, 0, 1)
        noise = draw.gamma(1, draw.uniform(0.05, 0.12), time.shape)
        values = 255 * np.clip(draw.uniform(0.5, 0.9) * power * envelope + noise, 0, 1)
        yield name, Image.fromarray(values.round().astype(np.uint8))


KINDS: dict[str, Callable[[np.random.Generator], Iterator[tuple[str, Image.Image]]]] = {
    "photographs": photographs, "cells": microscope, "spectrograms": spectrograms,
}  # fmt: skip
OTHER_KIND = {"photographs": "spectrograms", "cells": "photographs", "spectrograms": "cells"}


def compressed(image: Image.Image) -> Image.Image:
    """Returns an image as a JPEG file of quality 50 has it."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=50)
    return Image.open(file).convert(image.mode)


def shifted(image: Image.Image) -> Image.Image:
    """Shifts an image by two pixels to the right and down. Its borders are repeated."""
    pixels = np.asarray(image)
    rows, columns = (np.maximum(np.arange(side) - 2, 0) for side in pixels.shape[:2])
    return Image.fromarray(pixels[rows][:, columns])


def brighter(image: Image.Image) -> Image.Image:
    """Multiplies the values of an image by 1.1."""
    return image.point(lambda value: min(255, round(1.1 * value)))


def cropped(image: Image.Image) -> Image.Image:
    """Resizes the middle 95 % of an image to its size."""
    border = 0.025 * image.width
    box = (border, border, image.width - border, image.height - border)
    return image.resize(image.size, Image.Resampling.BICUBIC, box)


SHAPES: dict[str, list[Any]] = {
    "photographs": [
        "--input_size", 48, "--patch_size", 8, "--in_chans", 3, "--mean", *[0.45] * 3, "--std", *[0.25] * 3,
    ],
    "cells": ["--input_size", 32, "--patch_size", 4, "--in_chans", 1, "--mean", 0.25, "--std", 0.25],
    "spectrograms": ["--input_size", 48, "--patch_size", 8, "--in_chans", 1, "--mean", 0.12, "--std", 0.17],
}  # fmt: skip
CHANGES = (compressed, shifted, brighter, cropped)


def plant(folder: Path, kind: str) -> None:
    """Writes the images to folder/images/CLASS, and what is planted to folder/planted.json: names of files."""
    draw = np.random.default_rng(DRAW)
    images = [*KINDS[kind](draw)]
    chosen = draw.choice(IMAGES, DUPLICATES + 2 * len(CHANGES) + WRONG_LABELS, replace=False).tolist()
    originals = chosen[:DUPLICATES]
    changed = chosen[DUPLICATES:-WRONG_LABELS]
    wrong = chosen[-WRONG_LABELS:]
    classes = sorted({label for label, _ in images})
    for index in wrong:
        label, image = images[index]
        images[index] = draw.choice([name for name in classes if name != label]).item(), image
    copies = [images[index] for index in originals]
    near = [(images[index][0], change(images[index][1])) for index, change in zip(changed, 2 * CHANGES, strict=True)]
    every = [image for _, image in KINDS[OTHER_KIND[kind]](draw)]
    one = images[0][1]
    others = [
        (draw.choice(classes).item(), every[index].resize(one.size, Image.Resampling.BICUBIC).convert(one.mode))
        for index in draw.choice(IMAGES, OTHERS, replace=False)
    ]
    planted = [*copies, *near, *others]
    numbers = draw.permutation(IMAGES + len(planted)).tolist()  # of the files, so that no order says what is planted
    names = []
    for number, (label, image) in zip(numbers, [*images, *planted], strict=True):
        out = folder / "images" / label
        out.mkdir(parents=True, exist_ok=True)
        image.save(out / f"{number:04}.png")
        names.append(f"{label}/{number:04}.png")
    added = names[IMAGES:]
    found = {
        "duplicates": list(zip([names[index] for index in originals], added[:DUPLICATES], strict=True)),
        "near_duplicates": list(zip([names[index] for index in changed], added[DUPLICATES:-OTHERS], strict=True)),
        "outliers": added[-OTHERS:], "labels": [names[index] for index in wrong],
    }  # fmt: skip
    (folder / "planted.json").write_text(json.dumps(found, indent=1) + "\n")


def pretrain(folder: Path, kind: str) -> Path:
    """Pre-trains an encoder on the images, if there is none. Returns the checkpoint."""
    file = folder / "run" / f"checkpoint-{EPOCHS - 1}.pth"
    if not file.exists():
        scripts.run_python(
            "main_pretrain.py", "--data_path", folder / "images", "--model", "mae_vit_mini_patch4", *SHAPES[kind],
            "--crop", "random", "--crop_scale", 0.6, 1, "--norm_pix_loss", "--uniformity", 0.1, "--batch_size", 64,
            "--epochs", EPOCHS, "--warmup_epochs", 4, "--blr", 4e-3, "--cache_images", "--num_workers", 0,
            "--output_dir", folder / "run", "--vis_every", 0, "--resume", "auto", threads=1,
        )  # fmt: skip
    return file


def lists_of(
    source: Source, features: torch.Tensor, looks: image_map.Looks, chosen: np.ndarray, pooling: str
) -> dict[str, map_lists.Listed]:
    """Returns the lists of the images at `chosen`."""
    images = map_lists.images_of(Subset(source, chosen), np.zeros(len(chosen), int), "")
    digests = [looks.digests[index] for index in chosen]
    return map_lists.all_of(images, features[chosen], digests, looks.grays[chosen], looks.colors[chosen], pooling)


def pairs_in(rows: Iterable[Sequence[str]]) -> set[frozenset[str]]:
    """Returns the unordered pairs of the first two cells."""
    return {frozenset(row[:2]) for row in rows}


def measure(kind: str) -> list[list[str]]:
    """Returns the rows of the table for a kind: with the features of an encoder, and with raw pixels."""
    folder = WORK / kind
    if not (folder / "planted.json").exists():
        plant(folder, kind)
    planted = json.loads((folder / "planted.json").read_text())
    source = require_random_access(features.open_labelled(DataSpec(data_path=str(folder / "images")), "train"))
    model = get_model(pretrain(folder, kind))
    looks = image_map.look_at(image_map.Pictures(model, source), len(source), 0)
    precision = Precision("off", torch.device("cpu"))
    spaces = {
        "encoder": extraction.extract(extraction.Extractor(model, None), source, None, {}, 128, 0, precision),
        "raw pixels": raw_pixels.read(source, ImageSpec.of(model.settings), 0),
    }
    names = ["/".join(Path(source.name(index)).parts[-2:]) for index in range(len(source))]
    added = {copy for _, copy in planted["duplicates"] + planted["near_duplicates"]} | {*planted["outliers"]}
    rest = np.array([index for index, name in enumerate(names) if name not in added])
    table = []
    for title, values in spaces.items():
        rows = torch.from_numpy(values)
        pooling = model.pooling.name if title == "encoder" else ""
        lists = lists_of(source, rows, looks, np.arange(len(source)), pooling)
        # The folder of a name is its class, so that the names in two parts are unique.
        cells_of = {
            name: [["/".join(Path(str(value)).parts[-2:]) for value in row] for row in each.rows[1:]]
            for name, each in lists.items()
        }
        groups = [
            [image for _, image, *_ in group]
            for _, group in itertools.groupby(cells_of["duplicates"], lambda row: row[0])
        ]
        found = {
            "duplicates": len(pairs_in(groups[:FIRST]) & pairs_in(planted["duplicates"])),
            "near_duplicates": len(
                pairs_in(cells_of["near_duplicates"][:FIRST]) & pairs_in(planted["near_duplicates"])
            ),
            **{
                name: len({row[0] for row in cells_of[name][:FIRST]} & {*planted[name]})
                for name in ("outliers", "labels")
            },
        }
        knn = 1 - len(cells_of["labels"]) / len(source)
        without = lists_of(source, rows, looks, rest, pooling)["near_duplicates"].rows[1:]
        table.append([
            kind, title, *(f"{count} of {len(planted[name])}" for name, count in found.items()), f"{knn:.1%}",
            str(len(cells_of["near_duplicates"])), str(len(without)),
        ])  # fmt: skip
    return table


def main(args: argparse.Namespace) -> None:
    """Prints the table, and writes it if it has all kinds."""
    kinds = [args.kind] if args.kind else [*KINDS]
    table = [row for kind in kinds for row in measure(kind)]
    text = tables.markdown(TITLES, table)
    print(text)
    if not args.kind:
        atomic.write_text(scripts.ROOT / "benchmarks/curation.md", PAGE.format(table=text))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Counts what the lists of `mae map` find of planted images.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="kind of the images (default: each)")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
