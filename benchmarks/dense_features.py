"""Memory of the features of all patches of one large image: the table in FINETUNE.md.

    python benchmarks/dense_features.py                              # three minutes on two CPU cores
    python benchmarks/dense_features.py --size 512 1024 --models vit_base_patch16

The peak is that of the process on the CPU in fp32, less its peak after loading the model. Each model has a process of
its own.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from inference import get_model
from inference.maps import dense
from util.evaluation.tables import markdown

LAYERS = 4


def peak() -> int:
    """Returns the largest resident memory of this process so far, in bytes. That of getrusage includes its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(name: str, size: tuple[int, int]) -> tuple[str, str, str, str]:
    """Returns the column of a model: name, patches, memory of the features, and peak."""
    model = get_model(name)
    loaded = peak()
    features = dense(model, torch.randn(1, 3, *size), layers=LAYERS)
    rows, columns = features.shape[2:]
    return name, f"{rows} × {columns}", f"{features.nbytes / 1e6:.0f} MB", f"{(peak() - loaded) / 1e6:.0f} MB"


def main(args: argparse.Namespace) -> None:
    """Prints the table."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        columns = list(pool.map(measure, args.models, [tuple(args.size)] * len(args.models)))
    names, *rows = zip(*columns, strict=True)
    titles = "patches", f"features, {LAYERS} layers", "peak memory, excluding weights"
    print(markdown(["", *names], [(title, *row) for title, row in zip(titles, rows, strict=True)]))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME", help="models of models_vit")
    parser.add_argument("--size", nargs=2, type=int, default=[1024, 2048], metavar=("H", "W"), help="in pixels")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
