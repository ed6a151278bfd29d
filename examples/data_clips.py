r"""Video clips, from arrays: SPLIT.npy (clips, FRAMES, SIZE, SIZE), uint8, and SPLIT_labels.npy. Frames are channels.

These commands write clips of garments that move in four directions over a black background, pre-train on them,
evaluate the features and those of random weights, and draw the figure of docs/data.md. The labels are the directions:

    python examples/data_clips.py data/clips
    python main_pretrain.py --dataset py:examples.data_clips:open_dataset --data_path data/clips \
        --encoder examples.tubes:Tubes --in_chans 8 --input_size 32 --patch_size 8 \
        --mean .13 .13 .13 .13 .13 .13 .13 .13 --std .28 .28 .28 .28 .28 .28 .28 .28 --crop none --hflip 0 \
        --model mae_vit_mini_patch4 --batch_size 20 --blr 1e-2 --epochs 30 --warmup_epochs 4 --output_dir runs/clips
    python main_knn.py --dataset py:examples.data_clips:open_dataset --data_path data/clips --k 10 \
        --encoder examples.tubes:Tubes --finetune runs/clips/checkpoint-29.pth
    python main_knn.py --dataset py:examples.data_clips:open_dataset --data_path data/clips --k 10 \
        --encoder examples.tubes:Tubes --in_chans 8 --input_size 32 --patch_size 8 --crop none \
        --mean .13 .13 .13 .13 .13 .13 .13 .13 --std .28 .28 .28 .28 .28 .28 .28 .28 --model vit_mini_patch4
    python examples/reconstructions.py --dataset py:examples.data_clips:open_dataset --data_path data/clips \
        --encoder examples.tubes:Tubes --model runs/clips/checkpoint-29.pth --frames 4 --out clips.png
"""

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# pixels
FRAMES = 8
SIZE = 32
GARMENT = 20
MOVES = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}  # rows, columns
COUNTS = {"train": 800, "val": 200}
ARCHIVE = Path(__file__).parents[1] / "demo/data/fashion_mnist_12k.npz"


class Clips:
    """The clips of a split, images (FRAMES, SIZE, SIZE). The label is the direction, which no frame shows alone."""

    classes: ClassVar = list(MOVES)

    def __init__(self, folder: Path, split: str) -> None:
        self.clips = np.load(folder / f"{split}.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{split}_labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.clips[index].copy()), self.labels[index]


def open_dataset(split: str, data_path: str | None) -> Clips:
    """Returns the clips of `split`."""
    return Clips(Path(data_path or "."), split)


def draw(garment: np.ndarray, move: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Returns a clip (FRAMES, SIZE, SIZE) of a garment that moves by a random distance from a random place."""
    small = np.asarray(Image.fromarray(garment).resize((GARMENT, GARMENT)))
    distance = generator.integers(6, SIZE - GARMENT + 1)
    room = SIZE - GARMENT
    path = np.linspace((0, 0), np.array(move) * distance, FRAMES).round().astype(int)  # (row, column) in each frame
    start = generator.integers(-path.min(axis=0), room - path.max(axis=0) + 1)
    clip = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
    for frame, (top, left) in zip(clip, start + path, strict=True):
        frame[top : top + GARMENT, left : left + GARMENT] = small
    return clip


def generate(folder: Path, counts: dict[str, int] = COUNTS) -> None:
    """Writes clips of the first garments of the embedded images, which move in all directions."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    archive = np.load(ARCHIVE)
    for split, count in counts.items():
        labels = np.arange(count) % len(MOVES)
        moves = [[*MOVES.values()][label] for label in labels]
        pairs = zip(archive[f"{split}_images"][:count], moves, strict=True)
        np.save(folder / f"{split}.npy", [draw(garment, move, generator) for garment, move in pairs])
        np.save(folder / f"{split}_labels.npy", labels)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
