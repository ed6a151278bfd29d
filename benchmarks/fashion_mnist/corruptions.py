"""Robustness of two classifiers of the Fashion-MNIST study to corruptions: one pre-trained, one trained from scratch.

    python benchmarks/fashion_mnist/corruptions.py --pretrained runs/study/pre-trained/checkpoint-39.pth \\
        --scratch runs/study/scratch/checkpoint-39.pth

README.md beside this file has the commands that train both. They are evaluated on the 2,000 embedded images of the test
set under six corruptions with five severities each (Hendrycks & Dietterich 2019 have fifteen for photographs). The
script writes corruptions.json, corruptions.md and corruptions.png beside this file, or to --out.
"""

import io
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[2]))

from demo.unpack_data import ARCHIVE, folder_of
from inference.model import Classifier, get_model
from util.cli import entry_point
from util.evaluation.tables import markdown
from util.files import atomic

HERE = Path(__file__).parent
EXAMPLE = 8016  # the image of the training set in the picture


def noise(image: Image.Image, sigma: float, generator: np.random.Generator) -> Image.Image:
    """Adds Gaussian noise; sigma in gray levels."""
    pixels = np.asarray(image) + generator.normal(scale=sigma, size=image.size[::-1])
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, radius: float, generator: np.random.Generator) -> Image.Image:
    """Applies a Gaussian blur; radius in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def contrast(image: Image.Image, factor: float, generator: np.random.Generator) -> Image.Image:
    """Scales the deviations from the mean."""
    return ImageEnhance.Contrast(image).enhance(factor)


def jpeg(image: Image.Image, quality: float, generator: np.random.Generator) -> Image.Image:
    """Compresses as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return Image.open(file)


def occlusion(image: Image.Image, side: float, generator: np.random.Generator) -> Image.Image:
    """Covers a random square with gray; side in pixels."""
    left, top = (int(place) for place in generator.integers(0, np.array(image.size) - int(side) + 1))
    covered = image.copy()
    covered.paste(128, (left, top, left + int(side), top + int(side)))
    return covered


def rotation(image: Image.Image, degrees: float, generator: np.random.Generator) -> Image.Image:
    """Rotates to a random side."""
    return image.rotate(degrees * generator.choice((-1, 1)), Image.Resampling.BILINEAR)


Corruption = Callable[[Image.Image, float, np.random.Generator], Image.Image]
CORRUPTIONS: dict[Corruption, tuple[float, ...]] = {
    noise: (10, 20, 35, 50, 80),
    blur: (0.5, 0.8, 1.1, 1.5, 2),
    contrast: (0.75, 0.5, 0.35, 0.2, 0.1),
    jpeg: (40, 25, 15, 8, 4),
    occlusion: (4, 7, 10, 13, 16),
    rotation: (10, 20, 30, 45, 60),
}


def corrupt(images: np.ndarray, corruption: Corruption, severity: int) -> np.ndarray:
    """Corrupts images uint8 (n, H, W); severity 1 to 5. The random numbers depend on the severity and the index."""
    amount = CORRUPTIONS[corruption][severity - 1]
    results = [
        corruption(Image.fromarray(image), amount, np.random.default_rng([severity, number]))
        for number, image in enumerate(images)
    ]
    return np.stack([np.asarray(image) for image in results])


def load(file: str) -> Classifier:
    """Loads a classifier of Fashion-MNIST.

    Raises:
        ValueError: the file contains another model.
    """
    model = get_model(file)
    names = {folder_of(str(name)) for name in np.load(ARCHIVE, allow_pickle=False)["classes"]}
    if not isinstance(model, Classifier) or {folder_of(name) for name in model.classes or []} != names:
        raise ValueError(
            f"{file} is no classifier of Fashion-MNIST; give a checkpoint of main_finetune.py --dataset FashionMNIST"
        )
    return model


@torch.inference_mode()
def accuracy(model: Classifier, images: np.ndarray, names: list[str]) -> float:
    """Accuracy in percent, without a center crop.

    Args:
        names: the class of each image in the names of the dataset; the model may use the names of class folders.
    """
    assert model.classes
    numbers = {folder_of(name): number for number, name in enumerate(model.classes)}
    labels = np.array([numbers[folder_of(name)] for name in names])
    correct = 0
    for pixels, true in zip(np.array_split(images, 10), np.array_split(labels, 10), strict=True):
        logits = model(model.normalize(torch.from_numpy(pixels)[:, None]))
        correct += int((logits.argmax(dim=1).numpy() == true).sum())
    return 100 * correct / len(labels)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """The table in Markdown: accuracy without corruption, and the mean over the severities, absolute and relative."""
    clean = {title: scores["none"][0] for title, scores in results.items()}
    names = [corruption.__name__ for corruption in CORRUPTIONS]
    means = {title: {name: np.mean(scores[name]) for name in names} for title, scores in results.items()}
    for of_corruptions in means.values():
        of_corruptions["mean"] = np.mean(list(of_corruptions.values()))
    rows = [
        [name, *(f"{means[title][name]:.1f} | {means[title][name] / clean[title]:.2f}" for title in results)]
        for name in (*names, "mean")
    ]
    rows.insert(0, ["no corruption", *(f"{accuracy:.1f} | " for accuracy in clean.values())])
    titles = [column for title in results for column in (title, "relative")]
    return markdown(["test accuracy, %", *titles], rows) + "\n"


def draw(results: dict[str, dict[str, list[float]]], examples: np.ndarray, path: Path) -> None:
    """Draws a panel per corruption: accuracy over severity, and an image at severities 1, 3 and 5 below it."""
    figure = Figure(figsize=(13, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(CORRUPTIONS), height_ratios=(3, 1))
    for column, corruption in enumerate(CORRUPTIONS):
        above, below = axes[:, column]
        for title, scores in results.items():
            above.plot(range(6), [scores["none"][0], *scores[corruption.__name__]], marker=".", label=title)
        above.set(title=corruption.__name__, xlabel="severity", ylim=(0, 100), xticks=range(6))
        above.grid(alpha=0.3)
        below.imshow(np.hstack([corrupt(examples, corruption, severity)[0] for severity in (1, 3, 5)]), cmap="gray",
                     vmin=0, vmax=255)  # fmt: skip
        below.set_title("severity 1, 3, 5", fontsize=8)
        below.axis("off")
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[0, 0].legend(fontsize=8)
    with atomic.replacing(path) as written:
        figure.savefig(written)


def get_args_parser() -> ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("A pre-trained and a from-scratch classifier of Fashion-MNIST under six corruptions.")
    parser.add_argument(
        "--pretrained", required=True, metavar="FILE", help="classifier fine-tuned from the pre-trained encoder"
    )
    parser.add_argument(
        "--scratch", required=True, metavar="FILE", help="classifier trained from scratch on the same labels"
    )
    parser.add_argument("--out", default=HERE, type=Path, metavar="DIR", help="folder of results, table and picture")
    return parser


def main(args: Namespace) -> None:
    """Prints the table and writes it."""
    archive = np.load(ARCHIVE, allow_pickle=False)
    images, names = archive["val_images"], [str(name) for name in archive["classes"][archive["val_labels"]]]
    models = {"pre-trained": load(args.pretrained), "from scratch": load(args.scratch)}
    results = {title: {"none": [accuracy(model, images, names)]} for title, model in models.items()}
    for corruption in CORRUPTIONS:
        for severity in range(1, 6):
            corrupted = corrupt(images, corruption, severity)
            for title, model in models.items():
                results[title].setdefault(corruption.__name__, []).append(accuracy(model, corrupted, names))
        summary = "; ".join(f"{title} {scores[corruption.__name__]}" for title, scores in results.items())
        print(f"{corruption.__name__}: {summary}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.out / "corruptions.json", json.dumps(results, indent=1) + "\n")
    atomic.write_text(args.out / "corruptions.md", table(results))
    draw(results, archive["train_images"][EXAMPLE, None], args.out / "corruptions.png")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
