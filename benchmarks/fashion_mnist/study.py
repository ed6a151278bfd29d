"""Fashion-MNIST with few and many labels, with and without masked pre-training; two CPU cores.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist/study.py pretrain   # 75 minutes; writes encoder.safetensors
    OMP_NUM_THREADS=1 python benchmarks/fashion_mnist/study.py compare    # 1 h 45 min, started twice at once
    python benchmarks/fashion_mnist/study.py images     # image files, for benchmarks/leaderboard.py

The first two parts are commands of this library, which are printed. The same command resumes an interrupted part.
`compare` writes results.csv and table.md of main_compare.py next to this file.
"""

import argparse
import gzip
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from torchvision.datasets import FashionMNIST

from benchmarks import scripts
from demo.unpack_data import write_split
from mae.files import atomic

HERE = Path(__file__).parent
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
WORK = Path("runs/study")
DATA = ["--dataset", "FashionMNIST", "--data_path", WORK / "data"]
ENCODER = HERE.relative_to(scripts.ROOT) / "encoder.safetensors"
EPOCHS = 80  # of recipes/pretrain_fashion_mnist_full.yaml
# Number of labels -> random subsets, and epochs of fine-tuning
LABELS = {100: (3, 200), 500: (3, 100), 2_000: (3, 40), 10_000: (1, 20), "all": (1, 15)}
RESULTS = ("results.csv", "table.md")

PRETRAIN = [
    "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "main_pretrain.py", "--config",
    "recipes/pretrain_fashion_mnist_full.yaml", *DATA, "--num_workers", 0, "--output_dir", WORK / "pretrain",
    "--resume", "auto",
]  # fmt: skip
EXPORT = [
    "-m", "mae.inference.export", "--model", WORK / "pretrain" / f"checkpoint-{EPOCHS - 1}.pth", "--to", "safetensors",
    "--encoder_only", "--out", ENCODER,
]  # fmt: skip
COMPARE = [
    "main_compare.py", *DATA, "--input_size", 28, "--in_chans", 1, "--crop_pct", 1, "--num_workers", 1, "--amp", "bf16",
    "--encoders", f"pre-trained={ENCODER}", "scratch", "pixels", "--protocols", "knn", "linear", "finetune",
    "--labels", *LABELS, "--draws", *(draws for draws, _ in LABELS.values()),
    "--budget", *(epochs for _, epochs in LABELS.values()),
    "--recipes", "finetune=recipes/finetune_fashion_mnist_full.yaml", "--output_dir", WORK / "compare",
]  # fmt: skip


def prepare(data: Path) -> None:
    """Unpacks the four files of Debian's package into torchvision's layout, unless they are there."""
    raw = data / "FashionMNIST" / "raw"
    if raw.exists():
        return
    if not DEBIAN.is_dir():
        raise SystemExit(f"{DEBIAN} does not exist: apt-get install dataset-fashion-mnist, or put the files in {raw}")
    raw.mkdir(parents=True)
    for path in DEBIAN.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def images() -> None:
    """Writes the images to runs/study/images/{train,val}/CLASS/NNNNN.png."""
    with atomic.replacing(scripts.ROOT / WORK / "images") as written:
        for split in ("train", "val"):
            dataset = FashionMNIST(scripts.ROOT / WORK / "data", train=split == "train")
            write_split(written / split, dataset.classes, dataset)


def pretrain() -> None:
    """Pre-trains the encoder; writes its weights and its log next to this file."""
    scripts.run(*PRETRAIN, threads=1)
    scripts.run(*EXPORT)
    shutil.copy(scripts.ROOT / WORK / "pretrain" / "log.txt", HERE / "logs" / f"pretrain-{EPOCHS}.txt")


def compare() -> None:
    """Compares it with random weights and with raw pixels; writes the results next to this file."""
    out = scripts.ROOT / WORK / "compare"
    try:
        scripts.run(*COMPARE)
    finally:
        for name in RESULTS:
            if (out / name).exists():
                shutil.copy(out / name, HERE)


PARTS = {part.__name__: part for part in (pretrain, compare, images)}


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=" or ".join(PARTS))
    return parser


def main() -> None:
    """Runs the parts."""
    args = get_args_parser().parse_args()
    prepare(scripts.ROOT / WORK / "data")
    for name in args.parts:
        PARTS[name]()


if __name__ == "__main__":
    main()
