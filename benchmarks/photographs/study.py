"""Reconstruction of a held-out photograph with 75 % of its patches masked: a ViT-Ti/16 at 224 pixels and two baselines.

    python benchmarks/photographs/study.py --work runs/photographs         # 45 minutes on two CPU cores

The script pre-trains on random crops of photographs of scikit-image and scikit-learn, and reconstructs a photograph
that is held out. It writes results.json, table.md and picture.png beside this file: the PSNR of the masked pixels in
dB, compared with the mean color of the visible pixels and with scikit-image's biharmonic inpainting. The same command
resumes an interrupted run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage.restoration import inpaint_biharmonic
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import scripts
from inference.model import get_model
from util.files import atomic

HERE = Path(__file__).parent
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg",
               "rocket.jpg", "china.jpg", "flower.jpg", "grass.png", "gravel.png", "brick.png")  # fmt: skip
HELD_OUT = "coffee.png"
CROPS = 64  # of each photograph in an epoch
EPOCHS = 50
WINDOWS = 4  # crops of the held-out photograph, of 224 x 224 pixels each


def find(name: str) -> Path:
    """Returns the path of a photograph in the package of scikit-image or scikit-learn."""
    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    return next(folder / name for folder in folders if (folder / name).exists())


def train(work: Path) -> Path:
    """Pre-trains, or resumes; returns the last checkpoint."""
    work.mkdir(parents=True, exist_ok=True)
    crops = work / "train.txt"  # each photograph many times, with a different crop each time
    crops.write_text("".join(f"{find(name)}\n" * CROPS for name in PHOTOGRAPHS))
    out = work / "pretrain"
    command = [
        "main_pretrain.py", "--model", "mae_vit_tiny_patch16", "--train_list", crops,
        "--output_dir", out,
        "--epochs", EPOCHS, "--warmup_epochs", 4, "--batch_size", 32, "--lr", 1e-3, "--crop_scale", 0.05, 0.5,
        "--vis_every", 10, "--num_workers", 1, "--resume", "auto",
    ]  # fmt: skip
    scripts.run(*command, threads=1)
    return out / f"checkpoint-{EPOCHS - 1}.pth"


def windows() -> torch.Tensor:
    """Crops of the held-out photograph at a height of 320 pixels: uint8 (WINDOWS, 3, 224, 224)."""
    picture = Image.open(find(HELD_OUT)).convert("RGB")
    picture = picture.resize((round(320 * picture.width / picture.height), 320), Image.Resampling.BICUBIC)
    lefts = np.linspace(0, picture.width - 224, WINDOWS, dtype=int).tolist()
    return torch.stack([pil_to_tensor(picture.crop((left, 48, left + 224, 272))) for left in lefts])


def psnr(result: np.ndarray, original: np.ndarray, masked: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the masked pixels in dB; pictures (n, H, W, c) in 0 to 1, masked (n, H, W)."""
    return float(-10 * np.log10(((result - original) ** 2)[masked].mean()))


def main(args: argparse.Namespace) -> None:
    """Pre-trains, reconstructs, and writes the comparison."""
    model: Any = get_model(train(args.work.resolve()))
    images = windows()
    noise = torch.rand(WINDOWS, model.num_patches, generator=torch.Generator().manual_seed(0))
    result = model.reconstruct(model.normalize(images), noise=noise)
    original, ours = (
        model.normalize.inverse(part).permute(0, 2, 3, 1).numpy() for part in (result.original, result.pasted)
    )
    patches = result.mask.bool().view(WINDOWS, 14, 14)
    masked = patches.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2).numpy()
    mean = np.where(masked[..., None], 0, original)
    for number in range(WINDOWS):
        mean[number][masked[number]] = original[number][~masked[number]].mean(axis=0)
    print(f"biharmonic inpainting of {WINDOWS} crops, about a minute each", flush=True)
    smooth = np.stack(
        [
            inpaint_biharmonic(np.where(h[..., None], 0, o), h, channel_axis=-1)
            for o, h in zip(original, masked, strict=True)
        ]
    )
    ways = {"mean of the visible pixels": mean, "biharmonic inpainting": smooth.clip(0, 1), "masked autoencoder": ours}
    results = {name: psnr(picture, original, masked) for name, picture in ways.items()}
    record = {"psnr": results, "held_out": HELD_OUT, "epochs": EPOCHS}
    atomic.write_text(HERE / "results.json", json.dumps(record, indent=1) + "\n")
    lines = ["| reconstruction | PSNR, dB |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in results.items()]
    atomic.write_text(HERE / "table.md", "\n".join(lines) + "\n")
    print(*lines, sep="\n")

    columns = {"original": original, "masked": np.where(masked[..., None], 0.5, original), **ways}
    figure = Figure(figsize=(2 * len(columns), 2.05 * WINDOWS), layout="constrained")
    axes = figure.subplots(WINDOWS, len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        for row in range(WINDOWS):
            axes[row, column].imshow(pictures[row].clip(0, 1))
            axes[row, column].axis("off")
        axes[0, column].set_title(title, fontsize=8)
    figure.savefig(HERE / "picture.png", dpi=80)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the run")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
