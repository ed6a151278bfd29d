"""The results of ./run demo: a picture of reconstructions, and the accuracies of its two comparisons.

    python demo/report.py --checkpoint demo/output/pretrained.pth --data_path demo/data/fashion_mnist \\
        --answer demo/output/pretrain/answer.json --comparison demo/output/few_labels --out demo/output
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import numpy as np
import torch
from PIL import Image

from mae.cli import entry_point
from mae.compare import answer, summary, verdict
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.data.source import evenly_spaced
from mae.data.transforms import scaled_transform
from mae.evaluate import pictures, tables
from mae.files import atomic
from mae.inference.model import Autoencoder, get_model
from mae.settings import DataSpec

PICTURES = 12
TRIPLES = 3  # in a row of the picture
SIDE = 112  # pixels up to which images are enlarged, by a whole factor
TITLES = {"scratch": "transformer from scratch", "pretrained": verdict.ENCODER}  # of encoders of main_compare.py

# The accuracies of the draws in percent, by the title of a row, by the number of labels.
Accuracies = dict[str, dict[str, list[float]]]


def read_images(model: Autoencoder, data_path: str) -> torch.Tensor:
    """Returns evenly spaced test images, uint8 (PICTURES, c, H, W)."""
    # Without a transform: the images have the size of the model, and a center crop would remove their borders.
    source = open_source(DataSpec(data_path=data_path), "val")
    samples = Samples(source, scaled_transform(0), in_chans=model.in_chans, seed=0)
    return torch.stack([samples[0, index].item.image for index in evenly_spaced(len(samples), PICTURES)])


def draw_reconstructions(model: Autoencoder, images: torch.Tensor, path: Path) -> None:
    """Draws images as in figure 2 of the paper: masked, reconstruction + visible, original."""
    noise = torch.rand(PICTURES, model.num_patches, generator=torch.Generator().manual_seed(0))
    ratio = model.settings["mask_ratio"]
    result = model.reconstruct(model.normalize(images), ratio, noise=noise)
    scale = max(1, SIDE // images.shape[2])
    triple = (result.masked, result.pasted, result.original)
    blocks = [
        pictures.tile([part[column::TRIPLES] for part in triple], model.normalize.inverse, scale)
        for column in range(TRIPLES)
    ]
    gap = ((0, 0), (0, 4 * pictures.GAP), (0, 0))
    picture = np.concatenate([np.pad(block, gap, constant_values=255) for block in blocks], axis=1)
    titles = (f"masked {ratio:.0%}", "reconstruction + visible", "original") * TRIPLES
    with atomic.replacing(path) as written:
        Image.fromarray(pictures.with_labels(picture, titles, labels=())).save(written)


def of_answer(found: Mapping[str, Any]) -> Accuracies:
    """Returns the accuracies of an answer.json."""
    return {
        str(labels): {
            summary.row_of(title, use): (100 * verdict.scores_of(found, title, use, labels).mean(axis=1)).tolist()
            for title in (verdict.PIXELS, verdict.RANDOM, verdict.ENCODER)
            for use in found["rows"][title]["uses"]
        }
        for labels in verdict.sizes_of(found)
    }  # fmt: skip


def of_comparison(folder: Path) -> Accuracies:
    """Returns the accuracies of a comparison of main_compare.py.

    Raises:
        ValueError: an encoder has no row.
    """
    entries = summary.entries_of(summary.read(folder))
    named = {entry.encoder for by_labels in entries.values() for entry in by_labels.values()}
    if missing := [name for name in TITLES if name not in named]:
        raise ValueError(
            f"--comparison {folder} has no encoder {missing[0]}: ./run demo has the command that writes it"
        )
    found: Accuracies = {}
    for by_labels in entries.values():
        for labels, entry in by_labels.items():
            row = summary.row_of(TITLES.get(entry.encoder, entry.encoder), entry.protocol)
            found.setdefault(str(labels), {})[row] = [*entry.by_draw.values()]
    return found


def table(accuracies: Accuracies) -> str:
    """Returns a table, with the standard deviation over the draws."""
    titles = ["accuracy on test images, %", *(f"{int(labels):,} labels" for labels in accuracies)]
    rows = [
        [row, *(shown(by_row[row]) for by_row in accuracies.values())] for row in next(iter(accuracies.values()))
    ]  # fmt: skip
    return tables.markdown(titles, rows)


def shown(values: Sequence[float]) -> str:
    """Returns the mean, with the standard deviation of several values."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main(args: argparse.Namespace) -> None:
    """Writes reconstructions.png; with the comparisons also table.md and results.json, and prints the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    model: Any = get_model(args.checkpoint)
    picture = args.out / "reconstructions.png"
    draw_reconstructions(model, read_images(model, args.data_path), picture)
    print(f"picture: {picture}")
    if not (args.answer and args.comparison):
        return
    found = answer.read(args.answer)
    if not answer.is_complete(found):
        raise ValueError(f"--answer {args.answer} is no complete answer: python -m mae.inference.report writes it")
    compared = {"frozen": of_answer(found), "trained": of_comparison(args.comparison)}
    text = "\n\n".join([*map(table, compared.values()), f"The answer of the page: “{found['sentences'][0]}”"])
    atomic.write_text(args.out / "table.md", text + "\n")
    atomic.write_text(args.out / "results.json", json.dumps(compared, indent=1) + "\n")
    print(f"\n{text}\n\npage: {args.answer.with_name('report.html')}; table: {args.out / 'table.md'}")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Draws reconstructions of a pre-training run, and tabulates its comparisons.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="checkpoint of main_pretrain.py",
    )
    parser.add_argument(
        "--data_path", required=True, metavar="PATH", help="dataset with class folders in train/ and val/"
    )
    parser.add_argument("--answer", type=Path, metavar="FILE", help="answer.json, which the page of the run has made")
    parser.add_argument(
        "--comparison",
        type=Path,
        metavar="DIR",
        help="output of main_compare.py, with the encoders scratch, pixels and pretrained=CHECKPOINT",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the picture and the tables")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
