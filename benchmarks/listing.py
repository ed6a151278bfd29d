"""Time and memory to open a dataset of many images: a folder, a list and archives, compared with torchvision.

    python benchmarks/listing.py                        # 1,280,000 images, the size of ImageNet; ten minutes
    python benchmarks/listing.py --images 100000 --kinds folder torchvision   # less than a minute

The files are empty, in 1,000 class folders. Each measurement is a process of its own, and the kinds take turns. The
memory is the growth of the resident memory (proportional set size).
"""

import argparse
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from mae.cli import entry_point
from mae.data.open import open_source
from mae.evaluate.tables import markdown
from mae.settings import types

CLASSES = 1_000
FOLDER, LIST, TORCHVISION = "folder", "list", "torchvision"
KINDS = (FOLDER, LIST, "zip", "tar", TORCHVISION)


def write_files(folder: Path, count: int) -> dict[str, Path]:
    """Writes the same images as a folder, a list, a tar and a zip file; returns the paths by kind."""
    names = [f"n{number % CLASSES:08d}/n{number % CLASSES:08d}_{number}.JPEG" for number in range(count)]
    paths = {FOLDER: folder / "images", LIST: folder / "list.txt", TORCHVISION: folder / "images"}
    for number in range(min(CLASSES, count)):
        (paths[FOLDER] / f"n{number:08d}").mkdir(parents=True)
    for name in names:
        (paths[FOLDER] / name).touch()
    paths[LIST].write_text("".join(f"images/{name} {number % CLASSES}\n" for number, name in enumerate(names)))
    return paths | {kind: Path(shutil.make_archive(str(paths[FOLDER]), kind, paths[FOLDER])) for kind in ("zip", "tar")}


def open_images(kind: str, path: Path) -> Any:
    """Opens a dataset of one of the kinds."""
    if kind == TORCHVISION:
        return ImageFolder(str(path))
    return open_source("train", None, str(path)) if kind == LIST else open_source("train", str(path))


def measure(kind: str, path: Path) -> dict[str, float]:
    """Opens a dataset; returns seconds and bytes."""
    before, started = resident(), time.perf_counter()
    data = open_images(kind, path)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": resident() - before, "images": len(data)}


def resident() -> int:
    """Proportional set size of this process in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def in_new_process(kind: str, path: Path) -> dict[str, float]:
    """Calls `measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, kind, path).result()


def main(args: argparse.Namespace) -> None:
    """Prints the table and writes it as JSON."""
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        paths = {kind: path for kind, path in write_files(Path(root), args.images).items() if kind in args.kinds}
        rounds = [{kind: in_new_process(kind, path) for kind, path in paths.items()} for _ in range(args.rounds)]
    results = {
        kind: {what: statistics.median(one[kind][what] for one in rounds) for what in ("seconds", "bytes")}
        for kind in paths
    }
    rows = [[kind, f"{one['seconds']:.1f}", f"{one['bytes'] / 2**20:,.0f}"] for kind, one in results.items()]
    print(markdown([f"{args.images:,} images", "seconds", "MiB"], rows))
    machine.write("listing", torch.device("cpu"), vars(args), {"results": results, "rounds": rounds}, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("Measures the time and memory to open a dataset of many images.")
    parser.add_argument("--images", default=1_280_000, type=types.positive_int, metavar="N", help="number of images")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="K", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--rounds", default=3, type=types.positive_int, metavar="N", help="measurements of each kind")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for the files (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=machine.OUT_HELP)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
