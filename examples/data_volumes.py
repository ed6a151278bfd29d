r"""Volumes, from files SPLIT/CLASS/NAME.npy (slices, H, W). The slices are channels.

These commands generate noisy ellipsoids, pre-train on them, evaluate the features and those of random weights, and
draw the figure of docs/data.md:

    python examples/data_volumes.py data/volumes
    python main_pretrain.py --dataset py:examples.data_volumes:open_dataset --data_path data/volumes \
        --encoder examples.tubes:Tubes --encoder_args tube=4 --in_chans 16 --input_size 24 --patch_size 6 \
        --mean .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 \
        --std .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 --crop none --vflip .5 \
        --model mae_vit_mini_patch4 --batch_size 20 --blr 1e-2 --epochs 30 --warmup_epochs 4 --output_dir runs/volumes
    python main_knn.py --dataset py:examples.data_volumes:open_dataset --data_path data/volumes --k 10 \
        --encoder examples.tubes:Tubes --finetune runs/volumes/checkpoint-29.pth
    python main_knn.py --dataset py:examples.data_volumes:open_dataset --data_path data/volumes --k 10 \
        --encoder examples.tubes:Tubes --encoder_args tube=4 --in_chans 16 --input_size 24 --patch_size 6 \
        --mean .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 .04 \
        --std .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 .3 --crop none --model vit_mini_patch4
    python examples/reconstructions.py --dataset py:examples.data_volumes:open_dataset --data_path data/volumes \
        --encoder examples.tubes:Tubes --model runs/volumes/checkpoint-29.pth --frames 4 --out volumes.png
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SLICES = 16  # of a sample
SHAPE = (20, 24, 24)  # of a generated volume
SOLIDS = {"ball": (1, 1, 1), "bar": (0.8, 0.8, 1.6), "disk": (0.6, 1.3, 1.3), "needle": (1.6, 0.8, 0.8)}  # half-axes
COUNTS = {"train": 800, "val": 200}


class Volumes:
    """The volumes of a split, images (SLICES, H, W): random consecutive slices in training, else the middle ones."""

    def __init__(self, folder: Path) -> None:
        self.is_training = folder.name == "train"
        self.files = sorted(folder.glob("*/*.npy"))
        names = [file.parent.name for file in self.files]
        self.classes = sorted(set(names))
        self.labels = [self.classes.index(name) for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        volume = np.load(self.files[index], mmap_mode="r")
        rest = len(volume) - SLICES
        first = int(torch.randint(rest + 1, ())) if self.is_training else rest // 2
        return torch.from_numpy(volume[first : first + SLICES].astype(np.float32)), self.labels[index]

    def name(self, index: int) -> str:
        """Returns the path of a volume, for messages."""
        return str(self.files[index])


def open_dataset(split: str, data_path: str | None) -> Volumes:
    """Returns the volumes of `split`."""
    return Volumes(Path(data_path or ".") / split)


def draw(axes: tuple[float, float, float], generator: np.random.Generator) -> np.ndarray:
    """Returns a noisy volume (SHAPE) with an ellipsoid of a random size at a random place."""
    radii = generator.uniform(3.5, 5) * np.array(axes)
    center = generator.uniform(radii, np.array(SHAPE) - radii)
    offsets = (np.moveaxis(np.indices(SHAPE), 0, -1) - center) / radii  # (slices, H, W, 3)
    return (np.square(offsets).sum(axis=-1) < 1) + generator.normal(0, 0.1, SHAPE)


def generate(folder: Path, counts: dict[str, int] = COUNTS) -> None:
    """Writes volumes of all classes."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for name, axes in SOLIDS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count // len(SOLIDS)):
                np.save(folder / split / name / f"{number:03}.npy", draw(axes, generator).astype(np.float16))


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
