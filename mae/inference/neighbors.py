"""Finds the images with the nearest features, and draws them.

    python -m mae.inference.neighbors IMAGES --model runs/mine/checkpoint-last.pth --out neighbors.png
    python -m mae.inference.neighbors IMAGES --model mae_pretrain_vit_base --query a.jpg b.jpg --out neighbors.png

The picture has a row for each of QUERIES evenly spaced images of the folder, or for each file of --query. A row shows
the image, and the NEIGHBORS other images of the folder with the nearest features, by cosine similarity. For class
folders, the command prints the share of neighbors that have the label of their image.

In Python, `find` returns features and indices:

    features, indices, similarities = find("features.npz")  # a file of mae.inference.features
    features, indices, similarities = find(model.extract_feat(images))
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae.cli import entry_point, flags
from mae.data.batches import to_device
from mae.data.loader import collate
from mae.data.source import Source, evenly_spaced
from mae.evaluate import pictures
from mae.files import atomic
from mae.files.untrusted import require_files, require_outside
from mae.inference import extraction, nearest
from mae.inference import features as feature_file
from mae.inference.classes import Model
from mae.inference.nearest import Neighbors
from mae.inference.reconstruct import SUFFIXES
from mae.training.log import start_logging

QUERIES = 12
NEIGHBORS = 6
SCORED = 5_000  # images whose neighbors are compared with their labels: 8 TFLOPs for a million images of ViT-B
SIDE = 112  # approximate width of an image in the picture, in pixels; larger images keep their size
ORDINALS = ("1st", "2nd", "3rd")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser(
        "Draws images, each with the images of a folder or a dataset whose features are nearest."
    )
    feature_file.add_options(parser)
    parser.add_argument(
        "--query", nargs="+", default=[], metavar="FILE",
        help=f"image files whose neighbors are drawn (default: {QUERIES} evenly spaced images of FOLDER)",
    )  # fmt: skip
    parser.add_argument("--out", type=flags.new_file(*SUFFIXES), required=True, metavar="FILE", help="output picture")
    return parser


def main(args: argparse.Namespace) -> Neighbors:
    """Writes the picture, prints the share of equal labels, and returns the neighbors of the images that it shows."""
    start_logging()
    require_files(args.query)  # before the features are computed
    require_outside("out", [args.out], [args.data_path, *args.query])
    extractor, source, precision = feature_file.open_extractor(args)
    model = extractor.model
    model.settings["exif"] = bool(model.settings.get("exif"))  # of the queries, as of the images
    rows = torch.from_numpy(extraction.extract(
        extractor, source, None, {}, args.batch_size, args.num_workers, precision, args.fast_jpeg
    ))  # fmt: skip
    if args.query:
        index_of = {_real_path(source.name(index)): index for index in range(len(source))}
        known = [index_of.get(_real_path(path), -1) for path in args.query]
        found = find(rows, model.extract_feat(args.query, args.pool, amp=args.amp).float().cpu(), known)
        queries = model.prepare(args.query)
        names = [Path(path).name for path in args.query]
    else:
        chosen = evenly_spaced(len(source), QUERIES)
        found = find(rows, rows[chosen], chosen)
        queries = read_images(model, source, chosen)
        names = names_of(source, chosen)
    columns = columns_of(model, source, queries, found.indices)
    pictures.show_range(model.normalize, pictures.decoded(extraction.samples_of(model, source)))
    with atomic.replacing(args.out) as written:
        Image.fromarray(draw(columns, model.normalize.displayed, names)).save(written)
    if text := agreement(source, rows):
        print(text)
    print(f"picture: {args.out}")
    return found


def _real_path(path: str) -> str:
    """Returns the path of a file in a folder that is no link."""
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


@cache
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def find(
    features: np.ndarray | Tensor | str | Path,
    queries: Tensor | None = None,
    excluded: Sequence[int] | None = None,
    k: int = NEIGHBORS,
) -> Neighbors:
    """Finds the k nearest features of each query by cosine similarity.

    Args:
        features: (n, D), or a file of mae.inference.features.
        queries: features (q, D) of other images. Default: `features`.
        excluded: for each query, the index of the feature that is none of its neighbors because it is of the same
            image; -1: none. Default: the query itself if `queries` is None, else none.
        k: number of neighbors. There are fewer if there are fewer features.

    Returns:
        The features, and the indices and cosine similarities of the neighbors, (q, k).

    Raises:
        ValueError: the features have another shape, or values that are not finite.
        OSError: the file can't be read.
    """
    if isinstance(features, str | Path):
        features = feature_file.read(features)
    bank = torch.as_tensor(features)
    if bank.ndim != 2:
        raise ValueError(f"features of shape {tuple(bank.shape)}: give (n, D), which pool=cls and pool=avg have")
    return nearest.find(bank, queries, excluded, k)


def agreement(source: Source, features: Tensor) -> str:
    """Returns a text on the share of neighbors that have the label of their query; "" without several classes.

    Args:
        source: the images of the features (n, D). SCORED evenly spaced ones are queries.
    """
    labels = torch.from_numpy(np.asarray(source.labels)) if source.classes else torch.zeros(0)
    if labels.ndim > 1 or not len(labels) or labels.min() < 0 or labels.min() == labels.max():
        return ""
    chosen = evenly_spaced(len(labels), SCORED)
    indices = find(features, features[chosen], chosen).indices
    share = float((labels[indices] == labels[chosen][:, None]).double().mean())
    counts = labels.bincount().double()
    chance = float((counts * (counts - 1)).sum()) / (len(labels) * (len(labels) - 1))
    return (
        f"{share:.1%} of the {indices.shape[1]} nearest neighbors have the label of their query; {chance:.1%} at random"
    )


def names_of(source: Source, indices: Sequence[int]) -> list[str]:
    """Returns the classes of images, or the names of their files if an image has no class."""
    labels = np.asarray(source.labels) if source.classes else np.full(len(source), -1)
    if labels.ndim > 1 or labels.min() < 0:
        return [Path(source.name(index)).name for index in indices]
    return [source.classes[labels[index]] for index in indices]


def read_images(model: Model, source: Source, indices: Sequence[int]) -> Tensor:
    """Returns images of a dataset as the input of a model (b, c, H, W), on its device."""
    samples = extraction.samples_of(model, source)
    batch = collate([samples[0, index].item for index in indices])
    return to_device(batch, model.normalize.mean.device).normalized(model.normalize)


def columns_of(model: Model, source: Source, queries: Tensor, indices: Tensor) -> list[Tensor]:
    """Returns the columns of `draw`, for queries (q, c, H, W) and the indices of their neighbors (q, k)."""
    return [queries, *(read_images(model, source, column.tolist()) for column in indices.T)]


def draw(columns: Sequence[Tensor], to_pixels: Callable[[Tensor], Tensor], labels: Sequence[str] = ()) -> np.ndarray:
    """Draws queries and their neighbors: a row for each query.

    Args:
        columns: the queries (q, c, H, W), the nearest image of each (q, c, H, W), the second nearest, and so on.
        to_pixels: as in `pictures.tile`.
        labels: of the rows; empty for none.

    Returns:
        uint8 (height, width, 3).
    """
    picture = pictures.tile(columns, to_pixels, scale_of(columns[0]))
    return pictures.with_labels(picture, titles(len(columns) - 1), labels)


def titles(k: int) -> list[str]:
    """Returns the titles of the columns of a query and its k neighbors."""
    return ["query", *[*ORDINALS, *(f"{number}th" for number in range(4, k + 1))][:k]]


def scale_of(images: Tensor) -> int:
    """Returns the factor that enlarges small images (B, c, H, W) to about SIDE pixels."""
    return max(1, round(SIDE / images.shape[3]))


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
