"""From decoded pictures to training batches: statistics, augmentation, and normalisation on the device.

torchvision and timm are imported where they are used: importing them takes as long as importing PyTorch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from util.data.decode import Picture, size_of
from util.pos_embed import Size, to_pair

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Transform = Callable[[Picture], Tensor]


def channel_statistics(
    in_chans: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Mean and std of each channel, of pixels in 0 to 1: given, or ImageNet's, or for other channels its average.

    Raises:
        ValueError: `--mean` or `--std` has not one value a channel.
    """

    def choose(flag: str, values: Sequence[float] | None, imagenet: tuple[float, ...]) -> list[float]:
        if values is None:
            return list(imagenet) if in_chans == 3 else [sum(imagenet) / 3] * in_chans
        if len(values) != in_chans:
            raise ValueError(f"{flag} has {len(values)} values for {in_chans} channels; give one a channel")
        return list(values)

    return choose("--mean", mean, IMAGENET_MEAN), choose("--std", std, IMAGENET_STD)


def to_unit_range(imgs: Tensor) -> Tensor:
    """uint8 images to 0 to 1; those of deeper files are float already, and stay in their own range."""
    return imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs


class Normalize(nn.Module):
    """Images (B, c, H, W), uint8 or float, to normalised fp32 ones, on their device; and pixels back to 0 to 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.fits_bytes = all(0 <= value <= 1 for value in mean)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, imgs: Tensor) -> Tensor:
        if imgs.dtype == torch.uint8 and not self.fits_bytes:
            mean_text = " ".join(f"{value:g}" for value in self.mean.flatten().tolist())
            raise ValueError(f"--mean {mean_text}: pixels of 8 bits count as 0 to 1; divide --mean and --std by 255")
        return (to_unit_range(imgs) - self.mean) / self.std

    def inverse(self, imgs: Tensor) -> Tensor:
        """Normalised images -> values in 0 to 1, clipped, to look at."""
        if not self.fits_bytes:  # values in a range of their own: two and a half deviations about the mean
            return (imgs / 5 + 0.5).clamp(0, 1)
        return (imgs * self.std + self.mean).clamp(0, 1)


def pretrain_transform(input_size: Size, crop_scale: Sequence[float] = (0.2, 1.0), hflip: float = 0.5) -> Transform:
    """Random resized crop and flip, nothing more (He et al. 2021, A.1: "We do not use color jittering...").

    Args:
        crop_scale: least and greatest share of the image's area in a crop.
        hflip: chance of a horizontal flip.

    Raises:
        ValueError: `crop_scale` is no range within (0, 1].
    """
    from torchvision import transforms as T

    from util.data.crops import Crop

    _check_crop_scale(crop_scale)
    return T.Compose(
        [
            Crop(to_pair(input_size), tuple(crop_scale), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(hflip),
            to_tensor,
        ]
    )


def _check_crop_scale(crop_scale: Sequence[float]) -> None:
    least, greatest = crop_scale
    if not 0 < least <= greatest <= 1:
        raise ValueError(f"--crop_scale {least} {greatest}: give the least and the greatest share, above 0 and up to 1")


def finetune_transform(
    input_size: Size,
    mean: Sequence[float],
    aa: str | None = None,
    color_jitter: float | None = None,
    crop_scale: Sequence[float] = (0.08, 1.0),
    hflip: float = 0.5,
) -> Transform:
    """timm's augmentation for supervised training: crop, flip, and RandAugment or the like.

    Random erasing comes later, after normalisation, on the device.

    Args:
        mean: of each channel; the colour that fills what RandAugment's shifts and turns leave bare.
        aa: timm's name of a policy, such as rand-m9-mstd0.5-inc1; None or "none" for no such.
        color_jitter: strength of random brightness, contrast and saturation; has no effect with `aa`.
        crop_scale: least and greatest share of the image's area in a crop.
        hflip: chance of a horizontal flip.

    Raises:
        ValueError: timm has no such policy, or `crop_scale` is no range within (0, 1].
    """
    from timm.data import auto_augment, create_transform
    from torchvision import transforms as T

    _check_crop_scale(crop_scale)
    # Strong policies ask for 0 bits now and then. timm passes them on to Pillow, which refuses them.
    auto_augment.NAME_TO_OP.update(
        {name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")}
    )
    policy = None if aa in (None, "", "none") else aa
    try:
        crop, change, _ = create_transform(
            (len(mean), *to_pair(input_size)),
            is_training=True,
            scale=(crop_scale[0], crop_scale[1]),
            hflip=hflip,
            color_jitter=color_jitter,  # type: ignore[arg-type]  # None is no jitter
            auto_augment=policy,
            interpolation="bicubic",
            mean=tuple(mean),
            std=(1.0,) * len(mean),
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"--aa {aa}: timm has no such policy ({error}); give one of its policies, or none") from error
    return T.Compose(
        [crop, partial(_change_bytes, change=change), to_tensor] if change.transforms else [crop, to_tensor]
    )


def _change_bytes(picture: Picture, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if isinstance(picture, Tensor):
        raise ValueError(
            "--aa and --color_jitter change pictures of 8 bits with 1 or 3 channels only; give --aa none and no "
            "--color_jitter"
        )
    return change(picture)


def _posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keeps the highest bits of each value; with 0 bits the picture is black."""
    return ImageOps.posterize(picture, bits) if 1 <= bits <= 8 else picture.point(lambda value: value * (bits > 8))


def probe_transform(input_size: Size) -> Transform:
    """The published augmentation of linear probing: one draw of a crop (area .08 to 1), and a flip."""
    from torchvision import transforms as T

    from util.data.crops import CropOnce

    crop = CropOnce(to_pair(input_size), scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), to_tensor])


def to_tensor(picture: Picture) -> Tensor:
    """A decoded picture as it is, as a tensor (c, H, W)."""
    if isinstance(picture, Tensor):
        return picture
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(picture)


def default_crop_pct(input_size: Size) -> float:
    """.875, and 1 for squares above 224 pixels, as published."""
    height, width = to_pair(input_size)
    return 1.0 if height == width > 224 else 0.875


def eval_transform(input_size: Size, crop_pct: float | None = None) -> Transform:
    """Scales the picture to cover input_size / crop_pct and cuts out the centre.

    Args:
        crop_pct: by default .875, and 1 for squares above 224 pixels, as published. Small pictures are better seen
            whole (1).
    """
    from torchvision import transforms as T

    height, width = to_pair(input_size)
    crop_pct = crop_pct or default_crop_pct(input_size)
    scaled = (int(height / crop_pct), int(width / crop_pct))
    return T.Compose([partial(_cover, size=scaled), T.CenterCrop((height, width)), to_tensor])


def _cover(picture: Picture, size: tuple[int, int]) -> Picture:
    """Scales a picture to cover (height, width)."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    height, width = size
    own_height, own_width = size_of(picture)
    longest = int(10 * max(height / width, width / height) * min(own_height, own_width))
    if max(own_height, own_width) > longest:  # a strip, which would fill the memory before its ends are cut off
        picture = TF.center_crop(picture, [min(own_height, longest), min(own_width, longest)])
        own_height, own_width = size_of(picture)
    if height == width:
        sides = [height]  # torchvision's rounding, the published numbers'
    else:
        factor = max(height / own_height, width / own_width)
        sides = [max(height, round(own_height * factor)), max(width, round(own_width * factor))]
    return TF.resize(picture, sides, interpolation=InterpolationMode.BICUBIC)
