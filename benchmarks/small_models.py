"""Training of the demo's small model on two CPU cores: images/s as in ./run demo, and as earlier versions trained.

    python demo/unpack_data.py
    python benchmarks/small_models.py --data_path demo/data/fashion_mnist

The ways to train alternate. The figure of each is the median of the last epochs of its runs.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import machine, scripts
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.training import log

MODEL = ["--patch_size", 7, "--input_size", 28, "--in_chans", 1, "--mean", 0.286, "--std", 0.353]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
PRETRAIN = ["main_pretrain.py", "--config", "recipes/pretrain_fashion_mnist.yaml", "--epochs", 3, "--warmup_epochs", 0]
FINETUNE = ["main_finetune.py", "--config", "recipes/finetune_fashion_mnist.yaml", "--epochs", 2, "--warmup_epochs", 0]
# In fp32, one process decodes the files in a worker, crops, and mixes images.
EARLIER = [*MODEL, "--amp", "off", "--warmup_epochs", 0, "--batch_size", 64, "--num_workers", 1]
WAYS: dict[str, list[object]] = {
    "pre-training: one process, fp32, images from files": [
        "main_pretrain.py", "--model", "mae_vit_mini_patch4", *EARLIER, "--epochs", 2, "--crop_scale", 0.6, 1],
    "pre-training": [*TWO, *PRETRAIN],
    "pre-training, compiled": [*TWO, *PRETRAIN, "--compile"],
    "fine-tuning: fp32, images from files, mixup": [
        "main_finetune.py", "--model", "vit_mini_patch4", *EARLIER, "--epochs", 2, "--aa", "none", "--reprob", 0,
        "--crop_scale", 0.7, 1, "--mixup", 0.8, "--cutmix", 1, "--eval_every", 2],
    "fine-tuning": FINETUNE,
}  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Prints images/s, and writes them as JSON."""
    scripts.require_images(args.data_path)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(args.rounds):
        for name, command in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                scripts.run(*command, "--data_path", args.data_path, "--output_dir", folder, threads=1)
                rates[name].append(log.read(Path(folder))[-1]["images_per_s"])
        print(f"round {number + 1} of {args.rounds} is done", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(markdown(["", "images/s"], [[name, f"{rate:,.0f}"] for name, rate in medians.items()]))
    machine.write("small_models_cpu", torch.device("cpu"), vars(args), {"images_per_second": medians}, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Images/s of the demo's small model in training.")
    parser.add_argument(
        "--data_path", default="demo/data/fashion_mnist", type=Path, metavar="DIR", help="of demo/unpack_data.py"
    )
    parser.add_argument("--rounds", default=3, type=int, metavar="N", help="runs of each way to train")
    parser.add_argument("--out", type=Path, metavar="DIR", help=machine.OUT_HELP)
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
