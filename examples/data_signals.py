r"""Signals of several leads, such as an ECG, from arrays: SPLIT.npy (signals, LEADS, SAMPLES), and SPLIT_labels.npy.

These commands generate signals of four classes, pre-train on them, evaluate the features and those of random weights,
and draw the figure of docs/data.md:

    python examples/data_signals.py data/signals
    python main_pretrain.py --dataset py:examples.data_signals:open_dataset --data_path data/signals \
        --in_chans 1 --input_size 8 64 --patch_size 1 8 --mean .06 --std .3 --crop none \
        --model mae_vit_mini_patch4 --hflip 0 --batch_size 20 --blr 1e-2 --epochs 10 --warmup_epochs 2 \
        --output_dir runs/signals
    python main_knn.py --dataset py:examples.data_signals:open_dataset --data_path data/signals --k 10 \
        --finetune runs/signals/checkpoint-9.pth
    python main_knn.py --dataset py:examples.data_signals:open_dataset --data_path data/signals --k 10 \
        --in_chans 1 --input_size 8 64 --patch_size 1 8 --mean .06 --std .3 --crop none --model vit_mini_patch4
    python examples/reconstructions.py --dataset py:examples.data_signals:open_dataset --data_path data/signals \
        --model runs/signals/checkpoint-9.pth --out signals.png
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RATE = 64  # samples per second
LEADS = 8
SAMPLES = 64
CLASSES = ["elevated", "inverted", "normal", "wide"]
# The height of the R wave in the leads I, II and V1 to V6.
HEIGHTS = np.array((0.8, 1.0, -0.6, -0.2, 0.4, 0.9, 1.2, 1.0))
# Onset in seconds before or after the R wave, width in seconds, and height relative to it.
WAVES = {"P": (-0.16, 0.03, 0.15), "R": (0, 0.02, 1), "S": (0.05, 0.02, -0.3), "T": (0.25, 0.05, 0.4)}


class Signals:
    """The signals of a split, images (1, LEADS, SAMPLES)."""

    classes = CLASSES

    def __init__(self, folder: Path, split: str) -> None:
        self.signals = np.load(folder / f"{split}.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{split}_labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.signals[index].astype(np.float32))[None], self.labels[index]


def open_dataset(split: str, data_path: str | None) -> Signals:
    """Returns the signals of `split`."""
    return Signals(Path(data_path or "."), split)


def draw(name: str, generator: np.random.Generator) -> np.ndarray:
    """Returns a heartbeat (LEADS, SAMPLES) of a class, at a random time, with a random amplitude, drift and noise."""
    time = np.arange(SAMPLES) / RATE - generator.uniform(0.2, 0.7)
    beat = np.zeros(SAMPLES)
    for wave, (onset, width, height) in WAVES.items():
        scale = 2.5 if name == "wide" and wave in "RS" else 1
        shape = height * np.exp(-(((time - scale * onset) / (scale * width)) ** 2) / 2)
        if wave == "T" and name == "elevated":
            shape += 0.5 * ((time > 0.06) & (time < 0.25))
        beat += -shape if wave == "T" and name == "inverted" else shape
    heights = (HEIGHTS + generator.normal(0, 0.2, LEADS)) * generator.uniform(0.5, 1.5)
    drift = generator.uniform(-0.2, 0.2, (LEADS, 1)) + generator.uniform(-0.3, 0.3, (LEADS, 1)) * time
    return heights[:, None] * beat + drift + generator.normal(0, 0.1, (LEADS, SAMPLES))


def generate(folder: Path) -> None:
    """Writes signals of all classes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 800), ("val", 200)):
        labels = np.arange(count) % len(CLASSES)
        np.save(folder / f"{split}.npy", [draw(CLASSES[label], generator) for label in labels])
        np.save(folder / f"{split}_labels.npy", labels)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
