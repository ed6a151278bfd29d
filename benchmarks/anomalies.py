"""Defects by a memory of patches, and by the nearest whole image: the table of anomalies.md.

    OMP_NUM_THREADS=1 python benchmarks/anomalies.py
    OMP_NUM_THREADS=1 python benchmarks/anomalies.py --anomalib PYTHON

Images: cells (cells.py) of 32 x 32 pixels. 400 of the training images are the normal images. 200 held-out images are
good, and 200 others have a scratch, a bent line about a pixel wide. The pixels of which it covers at least a quarter
are the mask. Encoders: ViT-mini, pre-trained on the 8,000 training images, which have no scratch, for two minutes of a
core; the pixels of a patch themselves, 4 x 4; and a small convolutional network of timm with random weights, whose grid
of 20 x 20 patches is finer than 8 x 8, and which therefore gets every sixth normal image. The memory has a tenth of the
patches.

PYTHON is that of an environment with anomalib (`pip install anomalib`): its PatchCore gets the outputs of the same
blocks, and the command writes the table to anomalies.md.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score
from torch import Tensor

import main_pretrain
from benchmarks import cells, leaderboard, scripts
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.evaluate.tables import markdown
from mae.files import atomic
from mae.inference import anomalies, get_model

PAGE = Path(__file__).with_suffix(".md")
WORK = scripts.ROOT / "runs/anomalies"
NORMAL = 400
TESTED = 200  # good images, and images with a scratch
MEMORY = 2_560
EPOCHS = 12
TIMM = "test_resnet"  # of 160 x 160 pixels
PRETRAIN = {
    "model": "mae_vit_mini_patch4", "input_size": 32, "in_chans": 1, "mean": [0.1875], "std": [0.1795], "crop": "none",
    "hflip": 0.5, "uniformity": 0.1, "batch_size": 128, "optimizer": "muon", "lr": 2e-3, "cache_images": True,
    "num_workers": 0, "epochs": EPOCHS, "warmup_epochs": EPOCHS / 20, "save_every": EPOCHS, "vis_every": 0,
    "resume": "auto",
}  # fmt: skip
DRAWS = 1_000  # of the bootstrap


class Pixels:
    """The pixels of a patch as its features, as `anomalies.Memory` takes an encoder."""

    settings = {"input_size": cells.SIDE}  # noqa: RUF012
    blocks = (None,)

    def evaluating(self, *unused: str) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, images: Tensor) -> Tensor:
        return images / 255

    def get_intermediate_maps(self, imgs: Tensor, n: Sequence[int]) -> list[Tensor]:
        """Images (B, 1, H, W) -> pixels of patches (B, 16, H / 4, W / 4)."""
        return [torch.nn.functional.pixel_unshuffle(imgs, 4)]

    def extract_feat(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 255


def scratched(pixels: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a bright scratch on an image (SIDE, SIDE), uint8. Returns it and its mask, bool (SIDE, SIDE)."""
    scale = 8
    angle = draw.uniform(0, np.pi)
    along = draw.uniform(3, 7) * np.array([np.cos(angle), np.sin(angle)])
    bend = draw.uniform(-2, 2) * np.array([-np.sin(angle), np.cos(angle)])
    center = draw.uniform(6, cells.SIDE - 6, 2)
    large = Image.new("L", (scale * cells.SIDE, scale * cells.SIDE))
    points = [tuple(scale * (center + offset)) for offset in (-along, bend, along)]
    ImageDraw.Draw(large).line(points, fill=255, width=round(scale * draw.uniform(0.8, 1.4)))
    cover = np.asarray(large.resize((cells.SIDE, cells.SIDE), Image.Resampling.BOX)) / 255
    brighter = np.clip(pixels + cover * draw.uniform(70, 140), 0, 255)
    return brighter.round().astype(np.uint8), cover > 0.25


def read_images() -> tuple[Tensor, Tensor, Tensor]:
    """Returns normal images (NORMAL, 1, H, W) and tested ones, uint8, and the masks of the latter, bool (n, H, W).

    The first TESTED images are good.
    """
    folder = WORK / "images"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(folder) as written:
            cells.write(written)

    def read(split: str, count: int, start: int = 0) -> np.ndarray:
        per_class = count // len(cells.CLASSES)
        files = [
            folder / split / name / f"{number:04}.png"
            for name in cells.CLASSES
            for number in range(start, start + per_class)
        ]
        return np.stack([np.asarray(Image.open(file)) for file in files])

    draw = np.random.default_rng(0)
    good = read("val", TESTED)
    pairs = [scratched(pixels, draw) for pixels in read("val", TESTED, TESTED)]
    tested = np.concatenate([good, [pixels for pixels, _ in pairs]])
    masks = np.concatenate([np.zeros(good.shape, bool), [mask for _, mask in pairs]])
    normal, tested = (torch.from_numpy(images)[:, None] for images in (read("train", NORMAL), tested))
    return normal, tested, torch.from_numpy(masks)


def encoders() -> Iterator[tuple[str, Any, int]]:
    """Yields the names of encoders, the encoders, and the step between the normal images that they get."""
    settings = {**PRETRAIN, "data_path": WORK / "images", "output_dir": WORK / "run"}
    file = WORK / "run" / f"checkpoint-{EPOCHS - 1}.pth"
    store.run_once(WORK / "run", Script(main_pretrain), settings, lambda *_: {})
    yield "the run", get_model(file), 1
    yield "raw pixels", Pixels(), 1
    torch.manual_seed(0)
    torch.save(timm.create_model(TIMM).state_dict(), WORK / "timm.pth")
    yield f"timm:{TIMM}, random weights", get_model(f"{WORK / 'timm.pth'}#timm:{TIMM}", in_chans=1), 6


def areas(scores: Tensor, maps: Tensor | None, masks: Tensor) -> list[str]:
    """Returns the AUROC of images, with a 95 % interval of the bootstrap over images, and that of pixels.

    Args:
        scores: (n,); the first TESTED images are good.
        maps: heat maps (n, h, w). None: no AUROC of pixels.
        masks: (n, H, W), scaled to the heat maps.
    """
    good, bad = scores[:TESTED].double().numpy(), scores[TESTED:].double().numpy()
    is_higher = (bad[:, None] > good).astype(float) + 0.5 * (bad[:, None] == good)
    draw = np.random.default_rng(0)
    draws = [
        is_higher[draw.integers(0, len(bad), len(bad))][:, draw.integers(0, len(good), len(good))].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    image = f"{is_higher.mean():.3f} ({low:.3f} to {high:.3f})"
    if maps is None:
        return [image, ""]
    scaled = torch.nn.functional.interpolate(masks[:, None].float(), maps.shape[1:])[:, 0] > 0
    return [image, f"{roc_auc_score(scaled.flatten().numpy(), maps.flatten().numpy()):.3f}"]


def of_anomalib(python: str, memory: anomalies.Memory, normal: Tensor, tested: Tensor) -> dict[str, Tensor]:
    """Returns what anomalib_patchcore.py writes, for the outputs of the blocks before the average."""
    given: dict[str, Any] = {"size": MEMORY, "input_size": memory.model.prepare(tested[:1]).shape[2:]}
    for name, images in (("normal", normal), ("tested", tested)):
        with torch.inference_mode():
            batches = [
                memory.model.get_intermediate_maps(memory.model.prepare(part), memory.blocks)
                for part in images.split(50)
            ]
        given |= {f"{name}{number}": torch.cat(maps).numpy() for number, maps in enumerate(zip(*batches, strict=True))}
    files = [WORK / f"{name}.npz" for name in ("given", "result")]
    np.savez(files[0], **given)
    script = Path(__file__).with_name("anomalib_patchcore.py")
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([python, str(script), *map(str, files)], check=True, env=os.environ | quiet | {"PYTHONPATH": ""})
    with np.load(files[1]) as result:
        return {name: torch.from_numpy(result[name]) for name in result.files}


def rows_of(
    name: str, encoder: Any, normal: Tensor, tested: Tensor, masks: Tensor, python: str | None
) -> Iterator[list[str]]:
    """Yields the rows of the table of an encoder."""
    whole = anomalies.nearest(*(features_of(encoder, images) for images in (tested, normal)))
    yield [name, "nearest whole image", *areas(whole, None, masks)]
    for average in (1, 3):
        memory = anomalies.fit(encoder, normal, average=average, size=MEMORY)
        default = " (default)" if average == anomalies.Memory(encoder).average else ""
        yield [name, f"memory of patches, average {average}{default}", *areas(*memory(tested), masks)]
    if python:
        result = of_anomalib(python, memory, normal, tested)
        distances = result["distances"]
        sides = memory.model.prepare(tested[:1]).shape[2:]
        ours = anomalies.heat_maps(distances, *sides)
        yield [name, "patch distances of anomalib, our scores", *areas(distances.amax(dim=(1, 2)), ours, masks)]
        yield [name, "PatchCore of anomalib", *areas(result["scores"], result["maps"], masks)]
        exact = torch.cdist(result["embeddings"].double(), result["memory"].double()).amin(dim=1)
        found = anomalies.nearest(result["embeddings"], result["memory"])
        for who, values in (("ours", found), ("anomalib", distances[0].flatten())):
            print(f"{name}: largest error of a distance, {who}: {float((values - exact).abs().max()):.2g}")


@torch.inference_mode()
def features_of(encoder: Any, images: Tensor) -> Tensor:
    """Returns the features (n, D) of whole images."""
    return torch.cat([encoder.extract_feat(part) for part in images.split(50)])


def main(args: argparse.Namespace) -> None:
    """Prints the table, and writes it with --anomalib."""
    os.chdir(scripts.ROOT)
    normal, tested, masks = read_images()
    rows = []
    for name, encoder, step in encoders():
        for row in rows_of(name, encoder, normal[::step], tested, masks, args.anomalib):
            print(" | ".join(row), flush=True)
            rows.append(row)
    table = markdown(["encoder", "method", "image AUROC (95 % interval)", "pixel AUROC"], rows)
    if args.anomalib:
        leaderboard.write_table("python benchmarks/anomalies.py --anomalib PYTHON", table, PAGE)
    print(table)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Compares ways to find scratched images: AUROC of images and pixels.")
    text = "Python of an environment with anomalib, whose PatchCore is also run, on the same features"
    parser.add_argument("--anomalib", metavar="PYTHON", help=text)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
