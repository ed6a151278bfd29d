r"""Sounds as images: log-power spectrograms of WAV files in train/CLASS/ and val/CLASS/ (pip install scipy).

These commands generate sounds of four classes, pre-train on them, evaluate the features and those of random weights,
and draw the figure of docs/data.md:

    python examples/data_spectrograms.py data/sounds
    python main_pretrain.py --dataset py:examples.data_spectrograms:open_dataset --data_path data/sounds \
        --in_chans 1 --input_size 32 64 --patch_size 8 4 --mean -1.43 --std .63 --crop none \
        --model mae_vit_mini_patch4 --hflip 0 --norm_pix_loss --batch_size 20 --blr 1e-2 --epochs 10 --warmup_epochs 2 \
        --output_dir runs/sounds
    python main_knn.py --dataset py:examples.data_spectrograms:open_dataset --data_path data/sounds --k 10 \
        --finetune runs/sounds/checkpoint-9.pth
    python main_knn.py --dataset py:examples.data_spectrograms:open_dataset --data_path data/sounds --k 10 \
        --in_chans 1 --input_size 32 64 --patch_size 8 4 --mean -1.43 --std .63 --crop none --model vit_mini_patch4
    python examples/reconstructions.py --dataset py:examples.data_spectrograms:open_dataset --data_path data/sounds \
        --model runs/sounds/checkpoint-9.pth --out sounds.png
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor
from torchvision.datasets import DatasetFolder

RATE = 8000  # samples per second; the sounds take a second
BINS = 32
FRAMES = 64


def spectrogram(file: str) -> Tensor:
    """Returns log10 of the power of a sound, (1, BINS, FRAMES), low frequencies last."""
    rate, samples = wavfile.read(file)
    if (rate, samples.shape, samples.dtype) != (RATE, (RATE,), np.int16):
        raise ValueError(f"{file}: give a second of one channel with 16 bits and {RATE} samples")
    window = torch.hann_window(2 * BINS)
    hop = RATE // FRAMES
    waves = torch.stft(torch.from_numpy(samples / 2**15).float(), 2 * BINS, hop, window=window, return_complex=True)
    return (waves[:BINS, :FRAMES].abs().square() + 1e-4).log10().flip(0)[None]


def open_dataset(split: str, data_path: str | None) -> DatasetFolder:
    """Returns the sounds of `split`."""
    sounds: Any = DatasetFolder(str(Path(data_path or ".") / split), spectrogram, (".wav",))
    sounds.labels = sounds.targets
    return sounds


def generate(folder: Path) -> None:
    """Writes rising and falling chirps, tones and trills of random pitch, onset and length, in noise."""
    time = np.arange(RATE) / RATE
    generator = np.random.default_rng(0)
    changes: dict[str, Any] = {"fall": lambda t: -900 * t, "rise": lambda t: 900 * t, "tone": lambda t: 0 * t,
                               "trill": lambda t: 250 * np.sign(np.sin(40 * t))}  # fmt: skip
    for split, count in (("train", 200), ("val", 50)):
        for name, change in changes.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pitch, start, length = generator.uniform((1200, 0, 0.25), (2800, 0.5, 0.45))
                sound = np.sin(2 * np.pi * np.cumsum(pitch + change(time - start)) / RATE)
                sound *= generator.uniform(0.1, 0.4) * ((start < time) & (time < start + length))
                sound += generator.normal(0, 0.1, RATE)
                wavfile.write(folder / split / name / f"{number}.wav", RATE, (2**14 * sound).astype(np.int16))


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
