"""Linear and attentive probes of one encoder on the embedded images: the mean and the spread of three seeds.

    python benchmarks/fashion_mnist/probes.py --encoder demo/output/pretrain/checkpoint-31.pth --work runs/probes

All probes have the settings of recipes/linprobe_attentive_fashion_mnist.yaml, and linear probes have larger and more
learning rates. The seed determines the initial weights, the order of the images, and the held-out images, which select
the rate. Each run evaluates the 2,000 test images once, after its last epoch. Other flags are those of
main_linprobe.py. The same command resumes an interrupted comparison.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from util.evaluation.tables import markdown

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "linprobe_attentive_fashion_mnist.yaml"
LINEAR = ["--probe", "linear", "--blr", "1", "3", "10", "30", "100", "300"]
PROBES = {
    "linear, class token": LINEAR,
    "linear, mean of patches": [*LINEAR, "--global_pool"],
    "attentive": ["--probe", "attentive"],
}
SEEDS = range(3)


def run(arguments: Sequence[str]) -> None:
    """Runs main_linprobe.py."""
    subprocess.run([sys.executable, "main_linprobe.py", *arguments], cwd=ROOT, check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the probes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, metavar="FILE", help="checkpoint of pre-training")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    args, others = parser.parse_known_args(argv)
    rows = []
    for title, flags in PROBES.items():
        accuracies = []
        for seed in SEEDS:
            out = args.work.resolve() / title.replace(", ", "-").replace(" ", "_") / str(seed)
            run(["--config", str(RECIPE), "--finetune", str(args.encoder.resolve()), "--output_dir", str(out),
                 "--resume", "auto", "--seed", str(seed), *flags, *others])  # fmt: skip
            accuracies.append(json.loads((out / "log.txt").read_text().splitlines()[-1])["test_acc1"])
        cells = [f"{accuracy:.1f}" for accuracy in accuracies]
        rows.append([title, *cells, f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}"])
    print(markdown(["test accuracy, %", *(f"seed {seed}" for seed in SEEDS), "mean and standard deviation"], rows))


if __name__ == "__main__":
    main()
