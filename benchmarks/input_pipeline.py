"""Throughput from JPEG files to training batches, compared with the usual torchvision pipeline.

    python benchmarks/input_pipeline.py          # three minutes on two CPU cores

The classic pipeline is Pillow with torchvision's RandomResizedCrop (bicubic), RandomHorizontalFlip, ToTensor and
Normalize. The files have 500 x 375 pixels and JPEG quality 95; they are crops of photographs of scikit-image and
scikit-learn. `examples/resize_folder.py` writes the resized copy. All pipelines take turns, first in
one process and then in a DataLoader with one worker process per core.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, scripts
from mae.cli import entry_point
from mae.data import loader, transforms
from mae.data.decode import MAX_PIXELS
from mae.data.item import Item
from mae.data.jpeg import decode_rgb
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.evaluate.tables import markdown
from mae.settings import DataSpec

BATCH = 64
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg",
               "rocket.jpg", "china.jpg", "flower.jpg", "grass.png", "gravel.png", "brick.png")  # fmt: skip
OF_SCIKIT_LEARN = ("china.jpg", "flower.jpg")  # where scikit-image is not installed
FILES = 1280  # different files; the others are links to them
CROPS = 200  # random crops whose pixels are compared

CLASSIC = T.Compose([
    T.RandomResizedCrop(224, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
    T.RandomHorizontalFlip(),
    T.ToTensor(),
    T.Normalize(transforms.IMAGENET_MEAN, transforms.IMAGENET_STD),
])  # fmt: skip


def find(name: str) -> Path:
    """Returns the path of a photograph in the package of scikit-image or scikit-learn."""
    package = "sklearn.datasets.images" if name in OF_SCIKIT_LEARN else "skimage.data"
    return Path(str(resources.files(package))) / name


def write_photographs(folder: Path, count: int, names: Sequence[str] = PHOTOGRAPHS) -> None:
    """Writes JPEG files of 500 x 375 pixels, crops of the photographs of these names, to a class folder.

    At most FILES of them are different.
    """
    draw = random.Random(0)
    out = folder / "train" / "photograph"
    out.mkdir(parents=True)
    pictures = itertools.cycle([Image.open(find(name)).convert("RGB") for name in names])
    for number, picture in zip(range(min(count, FILES)), pictures, strict=False):
        width = min(picture.width, picture.height * 4 / 3) * draw.uniform(0.8, 1)
        left, top = draw.uniform(0, picture.width - width), draw.uniform(0, picture.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        part = picture.resize((500, 375), Image.Resampling.BICUBIC, box=box)
        part.save(out / f"{number:04}.jpg", quality=95)
    for number in range(FILES, count):
        (out / f"link{number:07}.jpg").symlink_to(out / f"{number % FILES:04}.jpg")


def classic(folder: Path, workers: int) -> Callable[[], Iterator[Any]]:
    """Batches of the classic pipeline."""
    data = ImageFolder(str(folder / "train"), CLASSIC)
    keep = workers > 0
    return DataLoader(
        data, BATCH, sampler=RandomSampler(data), drop_last=True, num_workers=workers, persistent_workers=keep
    ).__iter__


def our_samples(folder: Path, **options: Any) -> Samples:
    """The samples of main_pretrain.py."""
    transform = transforms.pretrain_transform(224)
    source = open_source(DataSpec(data_path=str(folder)), "train")
    return Samples(source, transform, in_chans=3, seed=0, draw_noise=partial(torch.rand, 196), **options)


def ours(folder: Path, workers: int, repeats: int = 1, **options: Any) -> Callable[[], Iterator[Any]]:
    """Batches of the pipeline of main_pretrain.py."""
    return loader.TrainLoader(
        our_samples(folder, **options), BATCH, 0, workers, pin_memory=False, repeats=repeats
    ).__iter__


def rate(batches: Callable[[], Iterator[Any]], limit: int) -> float:
    """Images/s over `limit` batches of an epoch, without the first batch, which includes the start of the workers."""
    iterator = batches()
    next(iterator)
    started, count = time.perf_counter(), 0
    for _ in itertools.islice(iterator, limit):
        count += BATCH
    return count / (time.perf_counter() - started)


class Sent(Dataset):
    """A dataset whose worker processes allocate and send batches (BATCH, 3, 224, 224) of bytes, without other work."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((BATCH, 3, 224, 224), number, dtype=torch.uint8)


def profile(folder: Path, rounds: int) -> dict[str, float]:
    """Microseconds per image of each stage of --fast_jpeg in one process, and of the transfer from a worker process."""
    samples, transform = our_samples(folder, fast_jpeg=True), transforms.pretrain_transform(224)
    source: Any = samples.source
    runs: list[dict[str, float]] = []
    for number in range(rounds + 1):  # the first one does not count
        times = dict.fromkeys(("read", "decode", "crop, resize, flip", "random numbers and other", "collate"), 0.0)
        batch = list(range(BATCH))

        def timed(stage: str, compute: Callable[..., Any], *args: Any, times: dict[str, float] = times) -> Any:
            started = time.perf_counter()
            result = compute(*args)
            times[stage] += 1e6 * (time.perf_counter() - started) / BATCH
            return result

        files = timed("read", lambda: [source[index] for index in range(BATCH)])
        pictures = timed("decode", list, map(samples.decode, files))
        timed("crop, resize, flip", list, map(transform, pictures))
        augmented = timed("random numbers and other", samples.__getitems__, [(number, index) for index in batch])
        times["random numbers and other"] -= sum(times.values()) - times["random numbers and other"]
        timed("collate", loader._collate, augmented)
        runs.append(times)
    sent = iter(DataLoader(Sent(), batch_size=None, num_workers=1))
    next(sent)
    started = time.perf_counter()
    count = sum(1 for _ in sent)
    stages = {stage: statistics.median(run[stage] for run in runs[1:]) for stage in runs[0]}
    return {**stages, "transfer": 1e6 * (time.perf_counter() - started) / count / BATCH}


def differences(folder: Path) -> dict[str, float]:
    """The share of pixel values at each difference between --fast_jpeg and Pillow, on the same random crops."""
    files = sorted((folder / "train" / "photograph").iterdir())
    transform = transforms.pretrain_transform(224)
    counts = np.zeros(256, dtype=np.int64)
    for number in range(CROPS):
        data, versions = files[number % len(files)].read_bytes(), []
        pixels = decode_rgb(data, MAX_PIXELS)
        assert pixels is not None
        for picture in (pixels, Image.open(files[number % len(files)])):
            torch.manual_seed(number)
            versions.append(transform(Item(picture)).image.numpy().astype(int))
        counts += np.bincount(np.abs(versions[0] - versions[1]).ravel(), minlength=256)
    return {str(level): float(share) for level, share in enumerate(counts / counts.sum()) if share}


def main(args: argparse.Namespace) -> None:
    """Prints the tables and writes them as JSON."""
    if args.images < 2 * BATCH:
        raise ValueError(f"--images {args.images} is less than two batches of {BATCH}; give {2 * BATCH} or more")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder, copy = Path(root, "originals"), Path(root, "copy")
        write_photographs(folder, args.images)
        scripts.run("examples/resize_folder.py", folder, copy)
        ways: dict[str, Callable[[int], Callable[[], Iterator[Any]]]] = {
            "classic": partial(classic, folder),
            "ours": partial(ours, folder),
            "ours, --fast_jpeg": partial(ours, folder, fast_jpeg=True),
            "ours, resized copy, --fast_jpeg": partial(ours, copy, fast_jpeg=True),
            "ours, --fast_jpeg --repeated_sampling 4": partial(ours, folder, fast_jpeg=True, repeats=4),
        }
        results: dict[str, Any] = {}
        cores = os.cpu_count() or 1
        for title, workers in (("one process", 0), (f"DataLoader, {cores} workers", cores)):
            batches = {name: way(workers) for name, way in ways.items()}
            runs = [
                {name: rate(way, args.images // BATCH - 1) for name, way in batches.items()} for _ in range(args.rounds)
            ]
            rates = {name: statistics.median(run[name] for run in runs) for name in ways}
            ratios = {name: statistics.median(run[name] / run["classic"] for run in runs) for name in ways}
            results[title] = {"images_per_second": rates, "to_classic": ratios}
            rows = [(name, f"{rates[name]:,.0f}", f"{ratios[name]:.2f}") for name in ways]
            print(f"\n{markdown([title, 'images/s', 'relative to classic'], rows)}", flush=True)
            del batches
        stages = profile(folder, args.rounds)
        shares = differences(folder)
        # One core decodes faster than the ViT-S trains.
        epochs = scripts.pretrain(
            folder, Path(root, "run"), "--model", "mae_vit_small_patch16", "--amp", "bf16", "--device", "cpu",
            "--num_workers", 1, "--batch_size", 32, "--epochs", 2, "--warmup_epochs", 1,
        )  # fmt: skip
        data_wait = epochs[1]["data_wait"]
    print(f"\nmain_pretrain.py: data loading takes {data_wait:.1%} of the second epoch")
    total = sum(stages.values())
    rows = [(stage, f"{value:.0f}", f"{value / total:.0%}") for stage, value in stages.items()]
    print(f"\n{markdown(['stage of --fast_jpeg', 'µs per image', 'share'], rows)}")
    print(f"\nvalues of {CROPS} crops, --fast_jpeg compared with Pillow: " + ", ".join(
        f"{share:.4%} differ by {level}" for level, share in shares.items()
    ))  # fmt: skip
    settings = {**vars(args), "batch": BATCH}
    results |= {"profile": stages, "differences": shares, "data_wait": data_wait}
    machine.write("input_pipeline", torch.device("cpu"), settings, results, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Throughput from JPEG files to training batches, compared with Pillow and torchvision.")
    parser.add_argument("--images", default=1280, type=int, metavar="N", help="number of image files")
    parser.add_argument(
        "--rounds", default=7, type=int, metavar="N", help="repetitions; each measures every pipeline once"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=machine.OUT_HELP)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
