"""Sounds as images: log-power spectrograms of WAV files in train/CLASS/ and val/CLASS/ (pip install scipy).

python examples/data_spectrograms.py FOLDER generates sounds of four classes; DATA.md has the commands that train.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor

RATE = 8000  # samples per second; the sounds take a second
BINS, FRAMES = 32, 64


class Spectrograms:
    """The sounds below a folder: log10 of the power, (1, BINS, FRAMES), low frequencies last."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*.wav"))
        self.classes = sorted({file.parent.name for file in self.files})
        self.labels = [self.classes.index(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rate, samples = wavfile.read(self.files[index])
        if (rate, samples.shape, samples.dtype) != (RATE, (RATE,), np.int16):
            raise ValueError(f"{self.files[index]}: give a second of one channel with 16 bits and {RATE} samples")
        window, hop = torch.hann_window(2 * BINS), RATE // FRAMES
        waves = torch.stft(torch.from_numpy(samples / 2**15).float(), 2 * BINS, hop, window=window, return_complex=True)
        power = waves[:BINS, :FRAMES].abs().square()
        return (power + 1e-4).log10().flip(0)[None], self.labels[index]


def open_dataset(split: str, data_path: str | None) -> Spectrograms:
    """Returns the sounds of `split`."""
    return Spectrograms(Path(data_path or ".") / split)


def generate(folder: Path) -> None:
    """Writes rising and falling chirps, tones and trills of random pitch, onset and length, in noise."""
    time, generator = np.arange(RATE) / RATE, np.random.default_rng(0)
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
