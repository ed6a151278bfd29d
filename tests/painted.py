"""Images in the layout of ImageNet's robustness test sets, whose colors encode classes, and a classifier of timm."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

from mae.evaluate import robustness

SIDE = 32


def jpeg(label: int) -> bytes:
    """A picture in the color of a class: the digits of its number are red, green and blue."""
    color = (label // 100 * 25, label // 10 % 10 * 25, label % 10 * 25)
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


JPEGS = [jpeg(label) for label in range(1000)]


def paint(folder: Path, name: str, label: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(JPEGS[label % 1000])


def class_folders(root: Path, folders: list[str], name: str, painted: Callable[[int], int]) -> Path:
    """One image a class; `painted` tells, by the class's number in ImageNet-1K, which one it looks like."""
    for number, folder in enumerate(folders):
        label = robustness.synsets().index(folder) if folder.startswith("n") else number
        paint(root / folder, name, painted(label))
    return root


def wrong_in_ten(count: int) -> Callable[[int], int]:
    """The first `count` of every ten classes have the color of the tenth class after them."""
    return lambda label: label + 10 * (label % 10 < count)


class ReadsColors(nn.Module):
    """Logits fall with the distance to the class of an image's color; of two neighbors, the lower one is likelier."""

    num_classes = 1000

    def __init__(self) -> None:
        super().__init__()
        half = (0.5, 0.5, 0.5)
        self.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "mean": half, "std": half, "crop_pct": 1.0}
        self.register_buffer("digits", torch.tensor([100, 10, 1]))

    def forward(self, images: Tensor) -> Tensor:
        colors = ((images.mean(dim=(2, 3)) * 0.5 + 0.5) * 255 / 25).round().long()
        label = (colors * self.digits).sum(dim=1, keepdim=True)
        return -(torch.arange(1000) - label + 0.25).abs()


@register_model
def reads_colors(pretrained: bool = False, **_: object) -> nn.Module:
    return ReadsColors()
