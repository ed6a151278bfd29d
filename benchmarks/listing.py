"""Time and memory to open a dataset of many images: a folder, a list and archives, compared with torchvision.

    python benchmarks/listing.py                        # 1,280,000 images, the size of ImageNet; ten minutes
    python benchmarks/listing.py --images 100000 --kinds folder torchvision   # less than a minute

The files are empty, in 1,000 class folders. Each measurement is a process of its own, and the kinds take turns. The
memory is the growth of the resident memory, of the process alone, and of 16 processes that it forks and that read all
names and labels, as the workers of a DataLoader do (proportional set size).
"""

import argparse
import importlib
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from util.cli import entry_point, flags
from util.evaluation.tables import markdown

CLASSES, WORKERS = 1_000, 16
FOLDER, LIST, TORCHVISION = "folder", "list", "torchvision"
KINDS = (FOLDER, LIST, "zip", "tar", TORCHVISION)


def write_files(folder: Path, count: int) -> dict[str, Path]:
    """Writes the same images as a folder, a list, a tar and a zip file; returns the paths by kind."""
    names = [f"n{number % CLASSES:08d}/n{number % CLASSES:08d}_{number}.JPEG" for number in range(count)]
    paths = {FOLDER: folder / "images", LIST: folder / "images" / "list.txt", "zip": folder / "images.zip",
             "tar": folder / "images.tar"}  # fmt: skip
    for number in range(min(CLASSES, count)):
        (paths[FOLDER] / f"n{number:08d}").mkdir(parents=True)
    for name in names:
        (paths[FOLDER] / name).touch()
    paths[LIST].write_text("".join(f"{name} {number % CLASSES}\n" for number, name in enumerate(names)))
    with zipfile.ZipFile(paths["zip"], "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with tarfile.open(paths["tar"], "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return {**paths, TORCHVISION: paths[FOLDER]}


def open_images(kind: str, path: Path) -> Any:
    """Opens a dataset of one of the kinds."""
    if kind == TORCHVISION:
        from torchvision.datasets import ImageFolder

        return ImageFolder(str(path))
    from util.datasets import open_source

    return open_source("train", None, str(path)) if kind == LIST else open_source("train", str(path))


def measure(kind: str, path: Path, workers: int) -> dict[str, float]:
    """Opens a dataset; returns seconds, bytes, and the bytes with workers that have read all names and labels."""
    for module in ("torchvision.datasets", "util.datasets"):
        importlib.import_module(module)  # their memory and time do not count
    before = resident(os.getpid())
    started = time.perf_counter()
    data = open_images(kind, path)
    result = {"seconds": time.perf_counter() - started, "bytes": resident(os.getpid()) - before}
    context = multiprocessing.get_context("fork")
    queue, done = context.SimpleQueue(), context.Event()
    processes = [context.Process(target=read_all, args=(data, queue, done)) for _ in range(workers)]
    for process in processes:
        process.start()
    pids = [os.getpid(), *(queue.get() for _ in processes)]
    result["bytes_with_workers"] = sum(map(resident, pids)) - before
    done.set()
    for process in processes:
        process.join()
    return result


def read_all(data: Any, queue: Any, done: Any) -> None:
    """Reads all names and labels, as a worker does in an epoch, and waits."""
    samples = data.samples if hasattr(data, "samples") else zip(data.names, data.labels, strict=True)
    for _ in samples:
        pass
    queue.put(os.getpid())
    done.wait()


def resident(pid: int) -> int:
    """Proportional set size of a process in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def in_new_process(kind: str, path: Path, workers: int) -> dict[str, float]:
    """Calls `measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, kind, path, workers).result()


def main(args: argparse.Namespace) -> None:
    """Prints the table and writes it as JSON."""
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        paths = {kind: path for kind, path in write_files(Path(root), args.images).items() if kind in args.kinds}
        seconds: dict[str, list[float]] = {kind: [] for kind in paths}
        for _ in range(args.rounds):
            for kind, path in paths.items():
                seconds[kind].append(in_new_process(kind, path, 0)["seconds"])
        memory = {kind: in_new_process(kind, path, WORKERS) for kind, path in paths.items()}
    rows, results = [], {}
    for kind, values in seconds.items():
        median = statistics.median(values)
        results[kind] = {**memory[kind], "seconds": median, "all_seconds": values}
        sizes = (memory[kind][name] / 2**20 for name in ("bytes", "bytes_with_workers"))
        rows.append([kind, f"{median:.1f}", *(f"{size:,.0f}" for size in sizes)])
    titles = [f"{args.images:,} images", "seconds", "MiB", f"MiB with {WORKERS} workers"]
    print(markdown(titles, rows))
    machine.write("listing", torch.device("cpu"), vars(args), {"results": results}, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("Measures the time and memory to open a dataset of many images.")
    parser.add_argument("--images", default=1_280_000, type=flags.positive_int, metavar="N", help="number of images")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="K", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--rounds", default=3, type=flags.positive_int, metavar="N", help="measurements of each kind")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for the files (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=machine.OUT_HELP)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
