"""From decoded pictures to training batches: statistics, augmentation, and normalisation on the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from util.decode import Picture, size_of
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

    def choose(flag: str, given: Sequence[float] | None, imagenet: tuple[float, ...]) -> list[float]:
        if given is None:
            return list(imagenet) if in_chans == 3 else [sum(imagenet) / 3] * in_chans
        if len(given) != in_chans:
            raise ValueError(f"{flag} has {len(given)} values for {in_chans} channels; give one a channel")
        return list(given)

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
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, imgs: Tensor) -> Tensor:
        if imgs.dtype == torch.uint8 and not self.fits_bytes:
            given = " ".join(f"{value:g}" for value in self.mean.flatten().tolist())
            raise ValueError(f"--mean {given}: pixels of 8 bits count as 0 to 1; divide --mean and --std by 255")
        return (to_unit_range(imgs) - self.mean) / self.std

    def inverse(self, imgs: Tensor) -> Tensor:
        """Normalised images -> values in 0 to 1, clipped."""
        return (imgs * self.std + self.mean).clamp(0, 1)


def pretrain_transform(input_size: Size, crop_scale: Sequence[float] = (0.2, 1.0), hflip: float = 0.5) -> Transform:
    """Random resized crop and flip, nothing more (He et al. 2021, A.1: "We do not use color jittering...").

    Args:
        crop_scale: least and greatest share of the image's area in a crop.
        hflip: chance of a horizontal flip.

    Raises:
        ValueError: `crop_scale` is no range within (0, 1].
    """
    least, greatest = crop_scale
    if not 0 < least <= greatest <= 1:
        raise ValueError(f"--crop_scale {least} {greatest}: give the least and the greatest share, above 0 and up to 1")
    return T.Compose(
        [
            T.RandomResizedCrop(to_pair(input_size), tuple(crop_scale), interpolation=InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(hflip),
            to_tensor,
        ]
    )


def to_tensor(picture: Picture) -> Tensor:
    """A decoded picture as it is, as a tensor (c, H, W)."""
    return picture if isinstance(picture, Tensor) else TF.pil_to_tensor(picture)


def eval_transform(input_size: Size) -> Transform:
    """Scales the picture to cover input_size / .875 (a square above 224 pixels: input_size) and cuts out the centre."""
    height, width = to_pair(input_size)
    crop_ratio = 1.0 if height == width > 224 else 0.875
    scaled = (int(height / crop_ratio), int(width / crop_ratio))

    def transform(picture: Picture) -> Tensor:
        if scaled[0] == scaled[1]:
            size: list[int] = [scaled[0]]  # torchvision's rounding, the published numbers'
        else:
            own_height, own_width = size_of(picture)
            factor = max(scaled[0] / own_height, scaled[1] / own_width)
            size = [max(scaled[0], round(own_height * factor)), max(scaled[1], round(own_width * factor))]
        picture = TF.resize(picture, size, interpolation=InterpolationMode.BICUBIC)
        return to_tensor(TF.center_crop(picture, [height, width]))

    return transform
