"""Defects by a memory of patches, and by the nearest whole image: the table of anomalies.md.

    OMP_NUM_THREADS=1 python benchmarks/anomalies.py
    OMP_NUM_THREADS=1 python benchmarks/anomalies.py --anomalib PYTHON

Images: cells (cells.py) of 32 x 32 pixels. As in MVTec AD, each of the eight classes has a memory, and an AUROC is the
mean over classes. Of a class, 200 training images are the normal images, 100 held-out images are good, and 100 others
have a scratch, a bent line about a pixel wide. The pixels of which it covers at least a quarter are the mask.

Encoders: ViT-mini, pre-trained on the 8,000 training images, which have no scratch, for two minutes of a core; the
pixels of a patch themselves, 4 x 4; and a small convolutional network of timm with random weights. Its grid of 20 x 20
patches is finer than 8 x 8, and it therefore gets every sixth normal image. The memory has a tenth of the patches.

PYTHON is that of an environment with anomalib (`pip install anomalib`): its PatchCore gets the outputs of the same
blocks, and the command writes the rows to anomalies.jsonl, and the table to anomalies.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

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
from mae.pooling import Pooling
from mae.settings.choices import CLASS_TOKEN

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).with_suffix(".md")
COLUMNS = ["encoder", "method", "image AUROC", "filled cells", "rings", "pixel AUROC"]
WORK = scripts.ROOT / "runs/anomalies"
NORMAL = 200  # images of a class
TESTED = 100  # good images, and images with a scratch
EPOCHS = 12
TIMM = "test_resnet"  # of 160 x 160 pixels
PRETRAIN = {
    "model": "mae_vit_mini_patch4", "input_size": 32, "in_chans": 1, "mean": [0.1875], "std": [0.1795], "crop": "none",
    "hflip": 0.5, "uniformity": 0.1, "batch_size": 128, "optimizer": "muon", "lr": 2e-3, "cache_images": True,
    "num_workers": 0, "epochs": EPOCHS, "warmup_epochs": EPOCHS / 20, "save_every": EPOCHS, "vis_every": 0,
    "resume": "auto",
}  # fmt: skip


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


class Images(NamedTuple):
    """The images of a class, uint8 (n, 1, H, W). The first TESTED of those that are tested are good."""

    name: str
    normal: Tensor
    tested: Tensor
    masks: Tensor  # bool (n, H, W)


def read_images() -> list[Images]:
    """Returns the images of each class, which are written if they are absent."""
    folder = WORK / "images"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(folder) as written:
            cells.write(written)

    def read(split: str, name: str, start: int, count: int) -> np.ndarray:
        files = [folder / split / name / f"{number:04}.png" for number in range(start, start + count)]
        return np.stack([np.asarray(Image.open(file)) for file in files])

    draw = np.random.default_rng(0)
    classes = []
    for name in cells.CLASSES:
        good = read("val", name, 0, TESTED)
        bad, masks = zip(*[scratched(pixels, draw) for pixels in read("val", name, TESTED, TESTED)], strict=True)
        normal = torch.from_numpy(read("train", name, 0, NORMAL))[:, None]
        tested = torch.from_numpy(np.concatenate([good, bad]))[:, None]
        classes.append(
            Images(name, normal, tested, torch.from_numpy(np.concatenate([np.zeros(good.shape, bool), masks])))
        )
    return classes


def encoders() -> Iterator[tuple[str, Any, int]]:
    """Yields the names of encoders, the encoders, and the step between the normal images that they get."""
    settings = {**PRETRAIN, "data_path": WORK / "images", "output_dir": WORK / "run"}
    file = WORK / "run" / f"checkpoint-{EPOCHS - 1}.pth"
    store.run_once(WORK / "run", Script(main_pretrain), settings, lambda *_: {})
    model = get_model(file)
    model.pooling = Pooling(CLASS_TOKEN, "as given")  # of "nearest whole image"
    yield "the run", model, 1
    yield "raw pixels", Pixels(), 1
    torch.manual_seed(0)
    torch.save(timm.create_model(TIMM).state_dict(), WORK / "timm.pth")
    yield f"timm:{TIMM}, random weights", get_model(f"{WORK / 'timm.pth'}#timm:{TIMM}", in_chans=1), 6


def areas(scores: Tensor, maps: Tensor | None, masks: Tensor) -> tuple[float, float]:
    """Returns the AUROC of images and that of pixels.

    Args:
        scores: (n,); the first TESTED images are good.
        maps: heat maps (n, h, w). None: the AUROC of pixels is NaN.
        masks: (n, H, W), scaled to the heat maps.
    """
    image = float(roc_auc_score(np.arange(len(scores)) >= TESTED, scores.numpy()))
    if maps is None:
        return image, float("nan")
    scaled = torch.nn.functional.interpolate(masks[:, None].float(), maps.shape[1:])[:, 0] > 0
    return image, float(roc_auc_score(scaled.flatten().numpy(), maps.flatten().numpy()))


def of_anomalib(python: str, memory: anomalies.Memory, classes: Sequence[Images]) -> list[dict[str, Tensor]]:
    """Returns what anomalib_patchcore.py writes for each class, of the outputs of the blocks before the average."""
    files = []
    for images in classes:
        given: dict[str, Any] = {"input_size": memory.model.prepare(images.tested[:1]).shape[2:]}
        for name, pictures in (("normal", images.normal), ("tested", images.tested)):
            with torch.inference_mode():
                parts = [memory.model.prepare(part) for part in pictures.split(50)]
                batches = [memory.model.get_intermediate_maps(part, memory.blocks) for part in parts]
            maps = [torch.cat(block).numpy() for block in zip(*batches, strict=True)]
            given |= {f"{name}{number}": values for number, values in enumerate(maps)}
        files += [str(WORK / f"{name}-{images.name}.npz") for name in ("given", "result")]
        np.savez(files[-2], **given)
    script = Path(__file__).with_name("anomalib_patchcore.py")
    # Its coreset frees and allocates 10 MB a step. Without the threshold, the heap of one thread grows to gigabytes.
    settings = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": "", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    subprocess.run([python, str(script), *files], check=True, env=os.environ | settings)
    return [{name: torch.from_numpy(value) for name, value in np.load(file).items()} for file in files[1::2]]


def measure(name: str, encoder: Any, classes: Sequence[Images], python: str | None) -> Iterator[list[str]]:
    """Yields the rows of the table of an encoder."""

    def row(method: str, found: Sequence[tuple[float, float]]) -> list[str]:
        image, pixel = np.array(found).T
        filled = np.array([images.name.startswith("filled") for images in classes])
        parts = (image.mean(), image[filled].mean(), image[~filled].mean(), pixel.mean())
        return [name, method, *("" if np.isnan(part) else f"{part:.3f}" for part in parts)]

    whole = [
        anomalies.nearest(features_of(encoder, images.tested), features_of(encoder, images.normal))
        for images in classes
    ]
    yield row(
        "nearest whole image", [areas(one, None, images.masks) for one, images in zip(whole, classes, strict=True)]
    )
    for average in (1, 3):
        found = []
        for images in classes:
            size = len(anomalies.fit(encoder, images.normal, average=average, size=10**9).rows) // 10
            memory = anomalies.fit(encoder, images.normal, average=average, size=size)
            found.append(areas(*memory(images.tested), images.masks))
        default = " (default)" if average == anomalies.Memory(encoder).average else ""
        yield row(f"memory of patches, average {average}{default}", found)
    if not python:
        return
    of_others = []
    mixed = []
    errors = []
    for images, result in zip(classes, of_anomalib(python, memory, classes), strict=True):
        of_others.append(areas(result["scores"], result["maps"], images.masks))
        distances = result["distances"]
        maps = anomalies.heat_maps(distances, *result["maps"].shape[1:])
        mixed.append(areas(distances.amax(dim=(1, 2)), maps, images.masks))
        exact = torch.cdist(result["embeddings"].double(), result["memory"].double()).amin(dim=1)
        ours = anomalies.nearest(result["embeddings"], result["memory"])
        errors.append([float((one - exact).abs().max()) for one in (ours, distances[0].flatten())])
    yield row("distances of anomalib, our scores and heat maps", mixed)
    yield row("PatchCore of anomalib", of_others)
    print(f"{name}: largest error of a distance: {max(ours for ours, _ in errors):.1g}; of anomalib: "
          f"{max(other for _, other in errors):.1g}")  # fmt: skip


@torch.inference_mode()
def features_of(encoder: Any, images: Tensor) -> Tensor:
    """Returns the features (n, D) of whole images."""
    return torch.cat([encoder.extract_feat(part) for part in images.split(50)])


def table(rows: Sequence[Sequence[str]] | None = None) -> str:
    """Returns the table of rows. Default: those that the command wrote."""
    return markdown(COLUMNS, [json.loads(line) for line in ROWS.read_text().splitlines()] if rows is None else rows)


def main(args: argparse.Namespace) -> None:
    """Prints the table, and writes it with --anomalib."""
    os.chdir(scripts.ROOT)
    classes = read_images()
    rows = []
    for name, encoder, step in encoders():
        given = [images._replace(normal=images.normal[::step]) for images in classes]
        for row in measure(name, encoder, given, args.anomalib):
            print(" | ".join(row), flush=True)
            rows.append(row)
    if args.anomalib:
        atomic.write_text(ROWS, "".join(f"{json.dumps(row)}\n" for row in rows))
        leaderboard.write_table("python benchmarks/anomalies.py --anomalib PYTHON", table(rows), PAGE)
    print(table(rows))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Compares ways to find scratched images: AUROC of images and pixels.")
    text = "Python of an environment with anomalib, whose PatchCore is also run, on the same features"
    parser.add_argument("--anomalib", metavar="PYTHON", help=text)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
