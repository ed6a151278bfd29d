"""Images in the layout of ImageNet's robustness test sets, whose colors encode classes, and a classifier."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from mae.data.pixels import to_tensor
from mae.evaluate.imagenet import synsets
from mae.inference import get_model

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
        label = synsets().index(folder) if folder.startswith("n") else number
        paint(root / folder, name, painted(label))
    return root


def wrong_in_ten(count: int) -> Callable[[int], int]:
    """The first `count` of every ten classes have the color of the tenth class after them."""
    return lambda label: label + 10 * (label % 10 < count)


def reader(file: Path, **settings: object) -> Path:
    """Writes a classifier that knows the color of each class: by the nearest features of an encoder at random."""
    torch.manual_seed(0)
    model = get_model("vit_mini_patch4", **{"input_size": 16, "nb_classes": 1000} | settings)
    images = torch.stack([to_tensor(Image.open(io.BytesIO(data)).resize((16, 16))) for data in JPEGS])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
        features = model.forward_features(model.normalize(images))
        model.head.weight.copy_(2 * features)
        model.head.bias.copy_(-features.square().sum(dim=1))
    torch.save({"model": model.state_dict(), "args": model.settings}, file)
    return file
