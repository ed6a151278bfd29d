r"""Images of four bands with clouds, whose masks are files next to the images: NAME.npy and NAME_clouds.npy.

These commands generate images of four classes, pre-train on them, evaluate the features and those of random weights,
and draw the figure of docs/data.md:

    python examples/data_bands.py data/bands
    python main_pretrain.py --dataset py:examples.data_bands:open_dataset --data_path data/bands \
        --in_chans 4 --input_size 32 --mean .12 .14 .1 .33 --std .05 .04 .04 .11 --value_range 0 10000 --crop none \
        --model mae_vit_mini_patch4 --batch_size 20 --blr 1e-2 --epochs 10 --warmup_epochs 2 --output_dir runs/bands
    python main_knn.py --dataset py:examples.data_bands:open_dataset --data_path data/bands --k 10 \
        --finetune runs/bands/checkpoint-9.pth
    python main_knn.py --dataset py:examples.data_bands:open_dataset --data_path data/bands --k 10 \
        --in_chans 4 --input_size 32 --mean .12 .14 .1 .33 --std .05 .04 .04 .11 --value_range 0 10000 --crop none \
        --model vit_mini_patch4
    python examples/reconstructions.py --dataset py:examples.data_bands:open_dataset --data_path data/bands \
        --model runs/bands/checkpoint-9.pth --out bands.png
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 32  # pixels
# Reflectance x 10,000 of red, green, blue and near infrared.
MEADOW = (600, 900, 500, 3000)
SURFACES = {"forest": (300, 500, 250, 3600), "lake": (400, 600, 700, 300), "soil": (2000, 1500, 1000, 2500),
            "town": (1700, 1600, 1600, 1800)}  # fmt: skip


class Bands:
    """The images in the class folders of a folder, (4, SIDE, SIDE), with masks of their valid pixels."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.glob("*/*.npy") if not file.stem.endswith("_clouds"))
        self.classes = sorted({file.parent.name for file in self.files})
        self.labels = [self.classes.index(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        clouds = np.load(file.with_name(f"{file.stem}_clouds.npy"))
        return {"image": np.load(file), "label": self.labels[index], "valid": ~clouds}


def open_dataset(split: str, data_path: str | None) -> Bands:
    """Returns the images of `split`."""
    return Bands(Path(data_path or ".") / split)


def draw(surface: str, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image of a spot in a meadow, and its clouds. Places, sizes, light and haze are random."""
    y, x = np.mgrid[:SIDE, :SIDE]

    def disk(smallest: float, largest: float) -> np.ndarray:
        left, top, radius = generator.uniform((0, 0, smallest), (SIDE, SIDE, largest))
        return (x - left) ** 2 + (y - top) ** 2 < radius**2

    colors = np.where(disk(6, 11)[..., None], SURFACES[surface], MEADOW).transpose(2, 0, 1)
    image = colors * generator.uniform(0.5, 1.5) + generator.uniform(0, 1000)
    image += generator.normal(0, 100, image.shape)
    clouds = disk(4, 8)
    image[:, clouds] = generator.normal(7000, 500, (1, clouds.sum()))
    return image.clip(0, 10000).astype(np.int16), clouds


def generate(folder: Path) -> None:
    """Writes images of all classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 200), ("val", 50)):
        for name in SURFACES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image, clouds = draw(name, generator)
                np.save(folder / split / name / f"{number}.npy", image)
                np.save(folder / split / name / f"{number}_clouds.npy", clouds)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
