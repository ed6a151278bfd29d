"""Linear and attentive probes of one encoder on the embedded images: the mean and the spread of three seeds.

    python benchmarks/fashion_mnist/probes.py --encoder demo/output/pretrain/checkpoint-119.pth --work runs/probes

All probes have the settings of recipes/linprobe_attentive_fashion_mnist.yaml, and linear probes have larger and more
learning rates. The seed determines the initial weights, the order of the images, and the held-out images, which select
the rate. Each run evaluates the 2,000 test images once, after its last epoch. Other flags are those of
main_linprobe.py. The same command resumes an interrupted comparison.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import scripts
from mae.evaluate.tables import markdown
from mae.training import log

RECIPE = scripts.ROOT / "recipes" / "linprobe_attentive_fashion_mnist.yaml"
LINEAR = ["--probe", "linear", "--blr", "1", "3", "10", "30", "100", "300"]
PROBES = {
    "linear, class token": LINEAR,
    "linear, mean of patches": [*LINEAR, "--global_pool"],
    "attentive": ["--probe", "attentive"],
}
SEEDS = range(3)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, metavar="FILE", help="checkpoint of pre-training")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the probes and prints the table."""
    args, others = get_args_parser().parse_known_args(argv)
    rows = []
    for title, flags in PROBES.items():
        accuracies = []
        for seed in SEEDS:
            out = args.work.resolve() / title.replace(", ", "-").replace(" ", "_") / str(seed)
            scripts.run(
                "main_linprobe.py", "--config", RECIPE, "--finetune", args.encoder.resolve(), "--output_dir", out,
                "--resume", "auto", "--seed", seed, *flags, *others,
            )  # fmt: skip
            accuracies.append(log.read(out)[-1]["test_acc1"])
        cells = [f"{accuracy:.1f}" for accuracy in accuracies]
        rows.append([title, *cells, f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}"])
    print(markdown(["test accuracy, %", *(f"seed {seed}" for seed in SEEDS), "mean and standard deviation"], rows))


if __name__ == "__main__":
    main()
