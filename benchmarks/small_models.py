"""Images/s of the pre-training of the demo's small model, in two processes as in ./run demo.

    python demo/unpack_data.py
    python benchmarks/small_models.py

The figure of a run is that of its last epoch.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import machine, scripts, timing
from mae.cli import entry_point
from mae.training import log

WAYS: dict[str, list[str]] = {
    "pre-training": [],
    "pre-training, compiled": ["--compile"],
    "pre-training, Muon": ["--optimizer", "muon"],
}


def measure(flags: list[str]) -> float:
    """Images/s of a run."""
    with tempfile.TemporaryDirectory() as folder:
        scripts.run_python(
            *scripts.TWO_PROCESSES, "main_pretrain.py", "--config", "recipes/pretrain_fashion_mnist.yaml",
            "--epochs", 3, "--warmup_epochs", 0, "--output_dir", folder, *flags, threads=1,
        )  # fmt: skip
        return log.read(Path(folder))[-1]["images_per_s"]


def main(args: argparse.Namespace) -> None:
    """Prints images/s, and writes them as JSON."""
    measures = {name: partial(measure, flags) for name, flags in WAYS.items()}
    found = timing.report("", timing.take_turns(measures, args.rounds, warm_ups=0))
    machine.write("small_models_cpu", torch.device("cpu"), vars(args), found, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return machine.parser("Images/s of the pre-training of the demo's small model.", rounds=3)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
