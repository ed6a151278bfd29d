"""Folders of labeled images with the augmentation of fine-tuning; `python -m util.datasets` is `python -m mae.data`."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms
from torchvision.datasets import ImageFolder


def build_dataset(is_train: bool, args: Namespace) -> ImageFolder:
    """Opens `args.data_path`/train or /val, folders with a subfolder for each class."""
    folder = Path(args.data_path, "train" if is_train else "val")
    return ImageFolder(str(folder), transform=build_transform(is_train, args))


def build_transform(is_train: bool, args: Namespace) -> Callable[[Any], Any]:
    """Returns the transform of fine-tuning (He et al. 2021, table 9), or of evaluation: pictures -> tensors (3, H, W).

    Args:
        args: has `input_size`; for training also `color_jitter`, `aa`, `reprob`, `remode` and `recount`.
    """
    statistics: dict[str, Any] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if is_train:
        return create_transform(
            input_size=args.input_size, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
            interpolation="bicubic", re_prob=args.reprob, re_mode=args.remode, re_count=args.recount, **statistics,
        )  # fmt: skip
    resized = int(args.input_size / (224 / 256 if args.input_size <= 224 else 1))  # larger images are not cropped
    return transforms.Compose([
        transforms.Resize(resized, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(args.input_size),
        transforms.ToTensor(),
        transforms.Normalize(**statistics),
    ])  # fmt: skip


if __name__ == "__main__":
    from mae.cli import entry_point
    from mae.recommend.check import get_args_parser, main

    entry_point.run(main, get_args_parser())
