"""Draws a map of images, and lists what stands out among them: equal ones, near-duplicates, outliers, wrong labels.

    python -m mae.inference.image_map IMAGES --model CHECKPOINT --out map.html
    python -m mae.inference.image_map IMAGES --model timm:vit_small_patch14_dinov2.lvd142m --out map.html

The images need no labels. They may be in a folder, an archive, a list or a dataset. The page is one
file, which loads nothing else. CSV files beside it have the complete lists: map_duplicates.csv, and so on. `mae report
RUN --map` writes the same to the page of a run.
"""

import argparse
import base64
import copy
import hashlib
import html
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from mae import errors
from mae.cli import entry_point, flags
from mae.data.batches import Batches, up_to_cores
from mae.data.labels import Subset
from mae.data.pixels import Picture, to_tensor
from mae.data.source import Source, evenly_spaced
from mae.evaluate.pictures import decoded, show_range
from mae.files import atomic, spreadsheet
from mae.files.untrusted import require_outside
from mae.inference import curation, extraction, map_lists, nearest, neighbors, page
from mae.inference import features as feature_file
from mae.inference.classes import Model
from mae.inference.features import POOLS
from mae.inference.model import colors_of, to_bytes
from mae.training.log import start_logging

logger = logging.getLogger(__name__)

IMAGES = 20_000  # images that are compared; of more, evenly spaced ones
ON_MAP = 5_000  # images whose positions t-SNE computes: half a minute of a core
SIDES = (64, 48, 32, 16)  # of a thumbnail, in pixels: multiples of the blocks of JPEG, which then do not overlap
SHEET = 2_048  # largest side of a sheet of thumbnails, which a phone draws
SHEETS = 4_000_000  # bytes of all sheets, above which thumbnails are smaller; a page takes 4/3 of them
QUALITY = 80
LISTED = 20  # entries of a list that are drawn
PICTURE = 108  # largest side of a picture in a list
SMALL = 48  # side up to which it is a PNG file, which a browser enlarges
NEAR = 8  # neighbors that the map shows
TEMPLATE = Path(__file__).with_name("map.html")


class Looks(NamedTuple):
    """What images look like."""

    digests: Sequence[bytes]  # equal for images of equal size and pixels
    grays: Tensor  # (n, GRAY, GRAY)
    colors: Tensor  # uint8 (n, GRAY, GRAY, 3)
    thumbnails: Sequence[np.ndarray]  # uint8 (height, width, 3), at most SIDES[0] a side


class Survey(NamedTuple):
    """The map and the lists."""

    sections: list[str]
    facts: dict[str, str]
    tables: dict[str, list[list[Any]]]  # of CSV files, by the end of their names


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser(
        "Draws a map of images, and lists equal images, near-duplicates, outliers, and labels that the neighbors do "
        f"not have. Up to {IMAGES:,} images are compared; of more, evenly spaced ones."
    )
    feature_file.add_options(parser)
    parser.add_argument(
        "--out", type=flags.new_file(".html"), required=True, metavar="FILE",
        help="output page. CSV files with the complete lists are beside it",
    )  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> Path:
    """Writes the page and the CSV files, and returns the path of the page."""
    start_logging()
    require_outside("out", [args.out], [args.data_path])  # the lists could be taken for labels
    every = feature_file.open_images(args)
    extractor, source, precision = feature_file.open_extractor(args, some_of(every))
    rows = torch.from_numpy(extraction.extract(
        extractor, source, None, {}, args.batch_size, args.num_workers, precision, args.fast_jpeg
    ))  # fmt: skip
    pool = args.pool or extractor.model.pooling.name
    survey = take(extractor.model, source, rows, len(every), args.num_workers, pool)
    write_tables(args.out, survey)
    images = args.dataset or args.data_path
    pooling = POOLS[args.pool] if args.pool else extractor.model.pooling
    about = f"{among(len(source), len(every))} of {images}. Features: {args.model}, {pooling}."
    atomic.write_text(args.out, page.render(f"Map of {Path(images).name}", about, survey.facts, survey.sections))
    print(f"page: {args.out}")
    return args.out


def some_of(source: Source) -> Source:
    """Returns a source, or IMAGES evenly spaced images of it."""
    return source if len(source) <= IMAGES else Subset(source, np.array(evenly_spaced(len(source), IMAGES)))


def among(count: int, total: int) -> str:
    """Returns how many images were compared."""
    return f"{count:,} evenly spaced images of the {total:,}" if count < total else f"{total:,} images"


def take(model: Model, source: Source, features: Tensor, total: int, num_workers: int, pooling: str) -> Survey:
    """Draws the map of images, and lists what stands out among them.

    Args:
        source: the images, at most IMAGES.
        features: their features (n, D).
        total: the number of images of which they are a part.
        pooling: of the features, a key of `mae.pooling.TITLES`.

    Raises:
        ValueError: too few images differ.
    """
    pictures = Pictures(model, source)
    looks = look_at(pictures, len(source), num_workers)
    if (count := len(set(looks.digests))) <= curation.NEIGHBORS:
        raise ValueError(f"{count} different images are too few: a map compares each with {curation.NEIGHBORS} others")
    components = curation.reduced(features)
    images = map_lists.images_of(source, curation.clusters(components), among(len(source), total))
    lists = map_lists.all_of(images, features, looks.digests, looks.grays, looks.colors, pooling)
    listed = {index for each in lists.values() for shown, _ in each.entries[:LISTED] for index in shown}
    chosen = on_map(len(source), sorted(listed))
    names = relative(images.names)
    logger.info(f"map: t-SNE of {len(chosen):,} images")
    shown = map_of(images, names, features, components, looks.thumbnails, chosen)
    about = about_map(source, features, len(chosen))
    sections = [page.section("Map", page.paragraph(f"{about} {pictures.range}") + shown)]
    number_of = {index: number for number, index in enumerate(chosen)}
    sections += [page.section(each.title, drawn(each, pictures, number_of, names)) for each in lists.values()]
    facts = {"images": f"{len(source):,}"}
    facts |= {each.title.lower(): f"{len(each.entries):,}" for name, each in lists.items() if name != "outliers"}
    return Survey(sections, facts, {name: each.rows for name, each in lists.items()})


def about_map(source: Source, features: Tensor, count: int) -> str:
    """Returns how the map of `count` images is made."""
    text = f"{count:,} images"
    if count < len(source):
        text += f" of the {len(source):,} that are compared: those of the lists below, and others, evenly spaced"
    agreement = neighbors.agreement(source, features)
    return (
        f"{text}. The positions are t-SNE of the first {curation.COMPONENTS} principal components of the features: "
        f"near images are alike; the distances between groups and their sizes mean nothing. The clusters are those of "
        f"k-means, always {curation.CLUSTERS}. The nearest images of the map are those with the highest cosine of the "
        f"features. {agreement}{'.' if agreement else ''}"
    )


class Pictures(Dataset):
    """Digest, small picture in gray (GRAY, GRAY) and in colors, and thumbnail (height, width, 3) of each image."""

    def __init__(self, model: Model, source: Source) -> None:
        self.samples = extraction.samples_of(model, source)
        self.normalize = copy.deepcopy(model.normalize).cpu()  # for worker processes
        self.range = show_range(self.normalize, decoded(self.samples))  # a sentence, or ""

    @errors.marked()
    def __getitem__(self, index: int) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
        stored = self.samples.read(index).image
        pixels = to_tensor(stored)
        content = f"{tuple(pixels.shape)} {pixels.dtype}".encode() + pixels.numpy().tobytes()
        picture = self.displayed(stored)
        size = (map_lists.GRAY, map_lists.GRAY)
        gray = picture.convert("L").resize(size, Image.Resampling.BILINEAR)
        colors = picture.resize(size, Image.Resampling.BILINEAR)
        picture.thumbnail((SIDES[0], SIDES[0]))
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return digest, np.asarray(gray, np.float32), np.asarray(colors), np.asarray(picture)

    def displayed(self, stored: Picture) -> Image.Image:
        """Returns a decoded image in colors for display, in its own size."""
        if isinstance(stored, Image.Image):
            return stored.convert("RGB")
        return Image.fromarray(to_bytes(colors_of(self.normalize.displayed(self.normalize(stored)))))

    def file(self, index: int) -> tuple[bytes, str]:
        """Returns the picture of an image in a list, and the format of the file."""
        picture = self.displayed(self.samples.read(index).image)
        picture.thumbnail((PICTURE, PICTURE))
        kind = "png" if max(picture.size) <= SMALL else "jpeg"
        content = io.BytesIO()
        picture.save(content, kind, quality=QUALITY)
        return content.getvalue(), kind


def look_at(pictures: Pictures, count: int, num_workers: int) -> Looks:
    """Reads all images."""
    batches = Batches(pictures, up_to_cores(num_workers), batch_size=16, sampler=range(count), collate_fn=list)
    bar = tqdm(chain.from_iterable(batches), "reading", count, unit="image", leave=False, disable=None)
    digests, grays, colors, thumbnails = zip(*bar, strict=True)
    return Looks(digests, torch.from_numpy(np.stack(grays)), torch.from_numpy(np.stack(colors)), thumbnails)


def on_map(count: int, listed: Sequence[int]) -> list[int]:
    """Returns the images of a map: all, or those that are listed, and evenly spaced others, ON_MAP together."""
    if count <= ON_MAP:
        return list(range(count))
    others = np.setdiff1d(np.arange(count), listed)
    return sorted([*listed, *others[evenly_spaced(len(others), ON_MAP - len(listed))].tolist()])


def map_of(
    images: map_lists.Images, names: Sequence[str], features: Tensor, components: np.ndarray,
    thumbnails: Sequence[np.ndarray], chosen: Sequence[int],
) -> str:  # fmt: skip
    """Returns the map of the images at `chosen`, as HTML."""
    found = nearest.find(features[chosen], k=NEAR)
    side, columns, files = sheets_of([thumbnails[index] for index in chosen])
    colorings = [{"title": "cluster", "names": [str(number + 1) for number in range(curation.CLUSTERS)],
                  "groups": images.clusters[chosen].tolist()}]  # fmt: skip
    if images.classes:
        colorings.insert(0, {"title": "class", "names": images.classes, "groups": images.labels[chosen].tolist()})
    x, y = curation.positions(components[chosen]).T.round(4).tolist()
    data = {
        "names": [names[index] for index in chosen], "x": x, "y": y, "colorings": colorings,
        "neighbors": found.indices.tolist(), "cosines": (1000 * found.similarities).round().int().tolist(),
        "side": side, "columns": columns,
        "sheets": [f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" for file in files],
    }  # fmt: skip
    # In a script element, "</script>" and "<!--" of a name are no text.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", text)


def sheets_of(thumbnails: Sequence[np.ndarray]) -> tuple[int, int, list[bytes]]:
    """Draws thumbnails (height, width, 3) to sheets of at most SHEET pixels a side.

    Returns:
        The side of a thumbnail, the number of columns of a sheet, which is also the most rows, and the JPEG files.
    """
    largest = max(max(thumbnail.shape[:2]) for thumbnail in thumbnails)
    for side in SIDES[sum(side >= largest for side in SIDES) - 1 :]:
        columns = min(SHEET // side, math.ceil(math.sqrt(len(thumbnails))))
        files = [
            sheet_of(thumbnails[start : start + columns**2], side, columns)
            for start in range(0, len(thumbnails), columns**2)
        ]
        if sum(map(len, files)) <= SHEETS:
            break
    return side, columns, files


def sheet_of(thumbnails: Sequence[np.ndarray], side: int, columns: int) -> bytes:
    """Draws thumbnails in rows, each in the middle of a square. Returns a JPEG file."""
    sheet = Image.new("RGB", (columns * side, math.ceil(len(thumbnails) / columns) * side), "white")
    for number, thumbnail in enumerate(thumbnails):
        picture = Image.fromarray(thumbnail)
        picture.thumbnail((side, side))
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * side + (side - picture.width) // 2, row * side + (side - picture.height) // 2))
    file = io.BytesIO()
    sheet.save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def drawn(listed: map_lists.Listed, pictures: Pictures, number_of: Mapping[int, int], names: Sequence[str]) -> str:
    """Returns the first LISTED entries of a list, as HTML. A picture is a button that selects it on the map."""
    figures = []
    for shown, caption in listed.entries[:LISTED]:
        buttons = "".join(
            f'<button type="button" class="pick" data-image="{number_of[index]}">'
            f"{page.image(*pictures.file(index), names[index])}</button>" for index in shown
        )  # fmt: skip
        lines = "<br>".join(html.escape(text) for text in (caption, *(names[index] for index in shown)))
        figures.append(f"<figure><div>{buttons}</div><figcaption>{lines}</figcaption></figure>")
    text = listed.text
    if len(listed.entries) > LISTED:
        text += f" The first {LISTED} are drawn; the CSV file has all."
    style = "listed" if any(len(shown) > 1 for shown, _ in listed.entries) else "listed single"
    return page.paragraph(text) + (
        f'<div class="{style}">{"".join(figures)}</div>' if figures else page.paragraph("There are none.")
    )


def relative(names: Sequence[str]) -> list[str]:
    """Returns names without the folder that they have in common."""
    folders = {os.path.dirname(name) for name in names}
    common = os.path.commonpath(folders) if len({os.path.isabs(folder) for folder in folders}) == 1 else ""
    return [name.removeprefix(f"{common}/") if common else name for name in names]


def write_tables(path: Path, survey: Survey) -> None:
    """Writes the complete lists beside a page, as NAME_LIST.csv."""
    files = {name: path.with_name(f"{path.stem}_{name}.csv") for name in survey.tables}
    for name, file in files.items():
        spreadsheet.write(file, survey.tables[name])
    print("lists:", *files.values())


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
