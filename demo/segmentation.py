"""Segmentation: a linear head on the last layers of a frozen encoder predicts the class of every pixel.

    python demo/segmentation.py --model demo/output/pretrain/checkpoint-31.pth --out demo/output

Each image joins two embedded garments at a random column. The head predicts for each pixel the class of its garment, or
background. It is a linear layer on the tokens of the last four blocks that predicts all pixels of a patch at once, and
is trained on 4,000 images. The encoder is frozen; the baseline is an untrained encoder. The command takes two minutes
on two CPU cores.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import util  # noqa: F401  # first: it names missing packages

# isort: split
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from tqdm import tqdm

from demo.unpack_data import ARCHIVE
from inference.maps import dense
from inference.model import Model, get_model
from util import dist
from util.cli import entry_point, flags, options
from util.files import atomic

NUM_EXAMPLES = 8
INK = 30  # gray level of 255: brighter pixels belong to a garment
EPOCHS, BATCH, LR = 15, 100, 5e-3


def make_pictures(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Joins pairs of images of the embedded dataset.

    Returns:
        Images uint8 (n, 1, 28, 28), and labels (n, 28, 28): 0 for background, or 1 + the class of the garment.
    """
    archive = np.load(ARCHIVE, allow_pickle=False)
    images, classes = archive[f"{split}_images"], archive[f"{split}_labels"]
    generator = np.random.default_rng(seed)
    left, right = generator.integers(len(images), size=(2, count))
    column = np.arange(images.shape[2])
    is_left = column < generator.integers(8, 21, size=(count, 1, 1))
    pixels = np.where(is_left, images[left], images[right])
    of_class = np.where(is_left, classes[left, None, None], classes[right, None, None]) + 1
    labels = np.where(pixels > INK, of_class, 0)
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64))


class Head(nn.Module):
    """A linear head: features (B, C, rows, columns) -> logits of each pixel (B, classes, H, W).

    Args:
        features: training features; their mean and standard deviation standardize the input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: Tensor, patch: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(dim=(0, 2, 3), keepdim=True))
        self.register_buffer("std", features.std(dim=(0, 2, 3), keepdim=True) + 1e-6)
        self.linear = nn.Conv2d(features.shape[1], num_classes * patch * patch, 1)
        self.to_pixels = nn.PixelShuffle(patch)

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.to_pixels(self.linear((features - self.mean) / self.std))
        return scores


def train(head: Head, features: Tensor, labels: Tensor) -> None:
    """Trains the head."""
    steps = EPOCHS * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    with tqdm(total=steps, desc="head", leave=False, disable=None) as bar:
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(labels)).split(BATCH):
                nn.functional.cross_entropy(head(features[chosen]), labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()


def mean_iou(predictions: Tensor, labels: Tensor, num_classes: int) -> float:
    """Intersection over union of each class over all images; the mean over the classes in percent."""
    true, predicted = labels.flatten().numpy(), predictions.flatten().numpy()
    return 100 * jaccard_score(true, predicted, labels=range(num_classes), average="macro", zero_division=0)


def segment(model: Model, training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], layers: int) -> Tensor:
    """Trains a head on the features of an encoder; returns its predictions for the test images (n, H, W)."""
    torch.manual_seed(0)

    def features_of(pictures: Tensor) -> Tensor:
        device = model.pos_embed.device
        return torch.cat([dense(model, model.normalize(part.to(device)), layers) for part in pictures.split(200)])

    features = features_of(training[0])
    head = Head(features, training[0].shape[-1] // features.shape[-1], int(training[1].max()) + 1)
    train(head, features, training[1])
    with torch.inference_mode():
        return torch.cat([head(part).argmax(dim=1) for part in features_of(test[0]).split(200)])


def draw(rows: dict[str, np.ndarray], names: list[str], path: Path) -> None:
    """Draws rows of images: gray images, and classes as colors with a legend."""
    colors = [(0.12, 0.12, 0.12), *colormaps["tab10"].colors]  # type: ignore[attr-defined]
    figure = Figure(figsize=(NUM_EXAMPLES + 2.2, len(rows) * 1.05), dpi=100)
    axes = figure.subplots(len(rows), NUM_EXAMPLES)
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        for cell, picture in zip(line, pictures[:NUM_EXAMPLES], strict=True):
            colored = picture.ndim == 2 and picture.dtype != np.uint8
            cell.imshow(np.array(colors)[picture] if colored else picture, cmap="gray")
            cell.axis("off")
        line[0].set_title(title, fontsize=8, loc="left")
    patches = [Patch(color=color) for color in colors]
    figure.legend(patches, ["background", *names], loc="center right", fontsize=8, frameon=False)
    figure.subplots_adjust(left=0.01, right=0.8, top=0.94, bottom=0.01, hspace=0.3, wspace=0.05)
    with atomic.replacing(path) as written:
        figure.savefig(written)


def get_args_parser() -> ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("Trains a linear segmentation head on a frozen encoder, on images of two garments.")
    options.add_inference_options(parser, images=False)
    parser.add_argument(
        "--layers",
        default=4,
        type=flags.positive_int,
        metavar="N",
        help="number of last blocks whose features the head uses",
    )
    parser.add_argument(
        "--pictures", default=4000, type=flags.positive_int, metavar="N", help="number of training images"
    )
    parser.add_argument("--out", default="demo/output", type=Path, metavar="DIR", help="folder of segmentation.png")
    return parser


def main(args: Namespace) -> dict[str, float]:
    """Prints and returns the mean intersection over union of each encoder; draws eight images."""
    device = dist.choose_device(args.device)
    model = get_model(args.model, device=device)
    if model.in_chans != 1 or model.settings["input_size"] != 28:
        raise ValueError(
            f"--model {args.model}: the images are gray and have 28 x 28 pixels; give a checkpoint of ./run demo"
        )
    if args.layers > len(model.blocks):
        raise ValueError(f"--layers {args.layers}: the encoder has {len(model.blocks)} blocks; give at most as many")
    torch.manual_seed(0)
    untrained = type(model)(model.settings).to(device)
    training, test = make_pictures("train", args.pictures, seed=0), make_pictures("val", 1000, seed=1)
    names = [str(name) for name in np.load(ARCHIVE, allow_pickle=False)["classes"]]
    rows = {"image": test[0][:, 0].numpy(), "ground truth": test[1].numpy()}
    scores = {}
    print(f"| linear head on {args.layers} layers | mean IoU |\n|---|---|")
    for title, encoder in (("untrained encoder", untrained), ("pre-trained encoder", model)):
        predictions = segment(encoder, training, test, args.layers)
        scores[title] = mean_iou(predictions, test[1], len(names) + 1)
        rows[f"{title}, mean IoU {scores[title]:.1f}%"] = predictions.numpy()
        print(f"| {title} | {scores[title]:.1f}% |", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(rows, names, args.out / "segmentation.png")
    print(f"\npicture: {args.out / 'segmentation.png'}")
    return scores


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
