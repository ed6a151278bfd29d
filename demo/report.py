"""The results of pre-training: reconstructions, nearest neighbors and tables of accuracy.

    python demo/report.py --checkpoint demo/output/pretrained.pth --data_path demo/data/fashion_mnist \\
        --out demo/output
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import numpy as np
import torch
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from mae.cli import entry_point
from mae.compare import summary
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.data.source import evenly_spaced
from mae.data.transforms import scaled_transform
from mae.evaluate import knn, pictures, tables
from mae.files import atomic
from mae.inference.model import Autoencoder, get_model
from mae.inference.neighbors import QUERIES, draw, find
from mae.settings import DataSpec

PICTURES = 12
TRIPLES = 3  # in a row of the picture
SIDE = 112  # pixels up to which images are enlarged, by a whole factor
NEIGHBORS = 20
STRENGTHS = (0.1, 1.0)  # inverse regularization strengths; chosen for each row on held-out training images
HELD_OUT = 0.2
ITERATIONS = 100
FEW_LABELS = {  # row of main_compare.py -> its title here
    "pixels (logistic regression)": "raw pixels, logistic regression",
    "pixels (RBF-SVM)": "raw pixels, RBF-SVM",
    "scratch (fine-tuned)": "transformer from scratch",
    "pretrained (fine-tuned)": "the same, fine-tuned from the pre-trained encoder",
}


def read_images(model: Autoencoder, data_path: str, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """All images of a split, uint8 (n, c, H, W), and their labels (n,)."""
    # Without a transform: the images have the size of the model, and a center crop would remove their borders.
    source = open_source(DataSpec(data_path=data_path), split)
    samples = Samples(source, scaled_transform(0), in_chans=model.in_chans, seed=0)
    items = [samples[0, index].item for index in range(len(samples))]
    return torch.stack([item.image for item in items]), np.array([item.label for item in items])


@torch.inference_mode()
def encode(model: Autoencoder, images: torch.Tensor) -> np.ndarray:
    """Class token and mean of the patch tokens of unmasked images: (n, 2 D)."""
    parts = []
    for batch in images.split(500):
        tokens = model.forward_features(model.normalize(batch))
        parts.append(torch.cat([model.class_features(tokens), model.patch_tokens(tokens).mean(dim=1)], dim=1))
    return torch.cat(parts).numpy()


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Test accuracy of logistic regression, with the same number of iterations for every row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # every row stops after ITERATIONS
        order = np.random.default_rng(0).permutation(len(labels))
        held_out, rest = np.split(order, [int(HELD_OUT * len(order))])
        search = GridSearchCV(LogisticRegression(max_iter=ITERATIONS), {"C": STRENGTHS}, cv=[(rest, held_out)])
        return search.fit(train, labels).score(test, test_labels)


def draw_reconstructions(model: Autoencoder, images: torch.Tensor, path: Path) -> None:
    """Draws test images of all classes as in figure 2 of the paper: masked, reconstruction + visible, original."""
    chosen = images[evenly_spaced(len(images), PICTURES)]
    noise = torch.rand(PICTURES, model.num_patches, generator=torch.Generator().manual_seed(0))
    ratio = model.settings["mask_ratio"]
    result = model.reconstruct(model.normalize(chosen), ratio, noise=noise)
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


def few_labels(folder: Path) -> tuple[int, dict[str, summary.Entry]]:
    """The number of labels of a comparison of main_compare.py, and the accuracies of each row of FEW_LABELS.

    Raises:
        ValueError: the comparison has several numbers of labels, or lacks a row.
    """
    entries = summary.entries_of(summary.read(folder))
    counts = summary.columns_of(entries)
    if len(counts) != 1:
        raise ValueError(f"--comparison {folder} has results for {counts} labels: give one with one number of --labels")
    missing = [row for row in FEW_LABELS if row not in entries]
    if missing:
        raise ValueError(f"--comparison {folder} has no row {missing[0]}: ./run demo has the command that writes it")
    return counts[0], {title: entries[row][counts[0]] for row, title in FEW_LABELS.items()}


def main(args: argparse.Namespace) -> None:
    """Writes reconstructions.png, neighbors.png, table.md and results.json, and prints the table."""
    number, few = few_labels(args.comparison) if args.comparison else (0, {})
    args.out.mkdir(parents=True, exist_ok=True)
    model: Any = get_model(args.checkpoint)
    torch.manual_seed(0)
    untrained = Autoencoder(model.settings)
    train, labels = read_images(model, args.data_path, "train")
    test, test_labels = read_images(model, args.data_path, "val")
    draw_reconstructions(model, test, args.out / "reconstructions.png")

    def raw(images: torch.Tensor) -> np.ndarray:
        return images.flatten(1).numpy() / 255

    encoders = {
        "raw pixels": raw,
        "untrained encoder": lambda images: encode(untrained, images),
        "pre-trained encoder": lambda images: encode(model, images),
    }
    results: dict[str, float] = {}
    for name, encoder in encoders.items():
        features = encoder(train), labels, encoder(test), test_labels
        results[name] = probe(*features)
        results[f"{name}, neighbours"] = knn.accuracy(*features, NEIGHBORS)
    bank, _, queries, _ = features  # of the last encoder
    chosen = evenly_spaced(len(test), QUERIES)
    found = find(bank, torch.from_numpy(queries[chosen]))
    columns = [test[chosen], *(train[column] for column in found.indices.T)]
    with atomic.replacing(args.out / "neighbors.png") as written:
        Image.fromarray(draw(columns, lambda images: images / 255)).save(written)
    titles = [f"{len(labels):,} labels", "logistic regression", f"{NEIGHBORS} nearest neighbors"]
    table = tables.markdown(
        titles, [[name, f"{results[name]:.1%}", f"{results[f'{name}, neighbours']:.1%}"] for name in encoders]
    )
    if few:
        results |= {f"{number} labels: {name}": entry.mean / 100 for name, entry in few.items()}
        few_rows = [
            [name, f"{entry.mean:.1f}%", "one draw" if entry.spread is None else f"{entry.spread:.1f}"]
            for name, entry in few.items()
        ]
        table += "\n\n" + tables.markdown([f"{number} labels", "test accuracy", "standard deviation"], few_rows)
    atomic.write_text(args.out / "table.md", table + "\n")
    atomic.write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\naccuracy on {len(test_labels):,} test images:\n\n{table}")
    shown = args.out / "reconstructions.png", args.out / "neighbors.png"
    print(f"\npictures: {shown[0]}, {shown[1]}; table: {args.out / 'table.md'}")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Writes reconstructions and accuracies of a pre-training run.")
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
    parser.add_argument(
        "--comparison",
        type=Path,
        metavar="DIR",
        help="output of main_compare.py, with the encoders scratch, pixels and pretrained=CHECKPOINT",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and tables")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
