"""Prints the number of epochs of ./run demo for this machine: one of three, by the speed of a short run.

    python demo/epochs.py demo/output/speed

times.md has the time of the demo.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

from mae.cli import entry_point
from mae.training import log

EPOCHS = (45, 60, 90)  # fewer make the features worse
IMAGES = 10_000
SECONDS = 150  # of the pre-training, so that the demo takes four minutes


def epochs_for(images_per_s: float) -> int:
    """Returns the largest number of epochs that take at most SECONDS, or the smallest number."""
    fitting = [epochs for epochs in EPOCHS if epochs * IMAGES / images_per_s <= SECONDS]
    return max(fitting, default=EPOCHS[0])


def main(args: argparse.Namespace) -> None:
    """Prints the number of epochs, and the reason to stderr."""
    rate = log.read(args.run_directory)[-1]["images_per_s"]  # the first epoch is slower
    epochs = epochs_for(rate)
    print(f"{rate:,.0f} images/s: {epochs} epochs (of {', '.join(map(str, EPOCHS))})", file=sys.stderr)
    print(epochs)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Prints the number of epochs of ./run demo for this machine.")
    parser.add_argument("run_directory", type=Path, metavar="DIR", help="run directory of a short pre-training")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
