"""Transforms of decoded pictures: augmentation, evaluation crops, and normalization on the device.

torchvision and timm are imported inside functions, because importing them takes as long as importing PyTorch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from mae.data import stages
from mae.data.item import Item
from mae.data.pixels import BadImage
from mae.settings.choices import CROP_CHOICES, NO_CROP, default_crop_pct
from mae.settings.images import AugmentationSpec, ImageSpec
from mae.sizes import Size, to_pair

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BEYOND = 2.0  # no pixel from 0 to 1; bicubic scaling exceeds 1 slightly
CROP_RATIO = (3 / 4, 4 / 3)  # aspect ratio of random crops, relative to the aspect ratio of the input

MAX_CROPS = 10  # of an image, until one has enough valid patches

Transform = Callable[[Item], Item]  # of a decoded item; the result has tensors


def channel_statistics(
    in_chans: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Returns mean and std of each channel, for pixels from 0 to 1.

    Default: the statistics of ImageNet. If `in_chans` is not 3, every channel has their average.

    Raises:
        ValueError: `mean` or `std` does not have one value per channel.
    """

    def choose(flag: str, values: Sequence[float] | None, imagenet: tuple[float, ...]) -> list[float]:
        if values is None:
            return list(imagenet) if in_chans == 3 else [sum(imagenet) / 3] * in_chans
        if len(values) != in_chans:
            raise ValueError(
                f"{flag} has {len(values)} values for {in_chans} channels; give one value per channel, or in_chans="
                f"{len(values)}"
            )
        return list(values)

    return choose("`mean`", mean, IMAGENET_MEAN), choose("`std`", std, IMAGENET_STD)


def renormalization(
    in_chans: int,
    of_input: tuple[Sequence[float] | None, Sequence[float] | None],
    of_model: tuple[Sequence[float] | None, Sequence[float] | None],
) -> tuple[Tensor, Tensor]:
    """Returns what converts normalized images to the mean and std of a second model: the images are multiplied by the
    first tensor (c, 1, 1), and the second one (c, 1, 1) is added.

    Args:
        of_input: mean and std that normalized the images, as in `channel_statistics`.
        of_model: those of the second model. If they are of colors and the images are not, every channel has their
            average.

    Raises:
        ValueError: only one of both has the mean of pixels from 0 to 1.
    """
    if of_model[0] and of_model[1] and len(of_model[0]) != in_chans:
        of_model = ([sum(of_model[0]) / len(of_model[0])] * in_chans, [sum(of_model[1]) / len(of_model[1])] * in_chans)
    (mean, std), (mean_of_model, std_of_model) = (
        torch.tensor(channel_statistics(in_chans, *pair))[..., None, None] for pair in (of_input, of_model)
    )
    if len({bool(((means >= 0) & (means <= 1)).all()) for means in (mean, mean_of_model)}) > 1:
        raise ValueError(
            f"mean={mean.flatten().tolist()}: the mean of the other model is {mean_of_model.flatten().tolist()}, of "
            f"pixels in other units; give value_range=[MIN, MAX], and mean and std of pixels from 0 to 1"
        )
    return std / std_of_model, (mean - mean_of_model) / std_of_model


def to_unit_range(imgs: Tensor) -> Tensor:
    """Scales uint8 images to the range 0 to 1. Float images (more than 8 bits) are unchanged."""
    return imgs.float() / 255 if imgs.dtype == torch.uint8 else imgs


def of_one_range(images: list[Tensor]) -> list[Tensor]:
    """Scales images to the range 0 to 1 if some are bytes and some are not."""
    return [to_unit_range(image) for image in images] if len({image.dtype for image in images}) > 1 else images


class Normalize(nn.Module):
    """Normalizes images (B, c, H, W), uint8 or float, to fp32 on their device. `inverse` maps them back to 0 to 1.

    If mean and std are of pixels from 0 to 1, float images of another range have one warning. On a GPU, the first batch
    only is checked, because the host waits for it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.fits_bytes = all(0 <= value <= 1 for value in mean)
        pairs = list(zip(mean, std, strict=True))
        # The std of values from 0 to 1 with mean m is at most that of black and white pixels, (m (1 - m))^0.5.
        self.fits_unit_range = all(0 < m < 1 and 0 < s**2 <= 1.01 * m * (1 - m) for m, s in pairs)
        self.checks_range = self.fits_unit_range
        self.highest = max((BEYOND - m) / s for m, s in pairs) if self.checks_range else float("inf")  # normalized
        self.shown: tuple[float, float] | None = None  # the pixels that are black and white in pictures; None: 0 and 1
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Normalize":
        # half() and to(torch.bfloat16) of a model would round mean and std: the mean 4005 to 4000 in bf16.
        mean = self.mean
        std = self.std
        super()._apply(fn, recurse)
        self.mean = mean.to(self.mean.device)
        self.std = std.to(self.std.device)
        return self

    def forward(self, imgs: Tensor) -> Tensor:
        if imgs.dtype == torch.uint8:
            self.require_fit_to_bytes()
        elif self._may_check(imgs) and (imgs > BEYOND).any():
            self._warn_of_range(imgs, "scale the images to 0 to 1, or give their own `mean` and `std`")
        return (to_unit_range(imgs) - self.mean) / self.std

    def check_input(self, imgs: Tensor) -> None:
        """Logs one warning if the values of the input of a model are those of images that were not normalized."""
        if self._may_check(imgs) and ((imgs > self.highest).any() or (imgs.min() >= 0 and 0.5 < imgs.max() <= 1)):
            self._warn_of_range(imgs, "normalize float tensors (model.normalize), or give uint8 tensors")

    def _may_check(self, imgs: Tensor) -> bool:
        if torch.compiler.is_compiling() or not self.checks_range:
            return False
        self.checks_range = imgs.device.type == "cpu"
        return True

    def _warn_of_range(self, imgs: Tensor, remedy: str) -> None:
        self.checks_range = False
        values = imgs[imgs.isfinite()]
        logger.warning(
            f"float images have values from {float(values.min()):.4g} to {float(values.max()):.4g}, and mean and std "
            f"are those of pixels from 0 to 1: {remedy}"
        )

    def require_fit_to_bytes(self) -> None:
        """Raises ValueError if the mean is not one of 8-bit pixels."""
        if not self.fits_bytes:
            mean_text = ", ".join(f"{value:g}" for value in self.mean.flatten().tolist())
            raise ValueError(f"mean=[{mean_text}]: 8-bit pixels are scaled to 0 to 1; divide `mean` and `std` by 255")

    def inverse(self, imgs: Tensor) -> Tensor:
        """Maps normalized images (B, c, H, W) to pixels from 0 to 1. Values outside are clipped."""
        if not self.fits_bytes:  # the range is unknown: 2.5 standard deviations to either side
            return (imgs / 5 + 0.5).clamp(0, 1)
        return (imgs * self.std + self.mean).clamp(0, 1)

    def displayed(self, imgs: Tensor) -> Tensor:
        """Maps normalized images (B, c, H, W) to 0 to 1 for pictures: the range `shown`, or as `inverse`."""
        if self.shown is None:
            return self.inverse(imgs)
        low, high = self.shown
        return ((imgs * self.std + self.mean - low) / (high - low)).clamp(0, 1)


@dataclass
class WithValidPatches:
    """Applies a transform such that enough patches are valid for pre-training.

    All pixels of a patch with few valid pixels become invalid. If an image has too few valid patches left, the
    transform is applied again, up to MAX_CROPS times, because another crop may have more.

    Args:
        transform: an augmentation or an evaluation transform.
        patch_size: (rows, columns) of pixels in a patch.
        min_valid: minimum share of valid pixels of a patch.
        num_visible: minimum number of valid patches of an image.

    Raises (when called):
        BadImage: no result of the transform has enough valid patches.
    """

    transform: Transform
    patch_size: tuple[int, int]
    min_valid: float
    num_visible: int

    def __call__(self, item: Item) -> Item:
        for _ in range(MAX_CROPS):
            transformed = self.transform(item)
            if transformed.valid is None:
                return transformed
            shares = nn.functional.avg_pool2d(transformed.valid[None].double(), self.patch_size)[0]
            patches = shares >= self.min_valid
            count = int(patches.sum())
            if count >= self.num_visible:
                rows, columns = self.patch_size
                inside = patches.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
                return transformed._replace(valid=transformed.valid & inside)
        raise BadImage(
            f"{count} of its {patches.numel()} patches have valid pixels (at least {self.min_valid:.0%}), and "
            f"{self.num_visible} are visible to the encoder"
        )

    def flips_of(self, size: tuple[int, int]) -> list[stages.RandomFlip] | None:
        """As `flips_of`, for images without invalid pixels."""
        return flips_of(self.transform, size)


def flips_of(transform: Transform, size: tuple[int, int]) -> list[stages.RandomFlip] | None:
    """Returns the flips, if a transform changes images of a size (height, width) by flips only.

    Returns:
        None if other stages change them, or if it is not known: the transform is not one of this module.
    """
    method = getattr(transform, "flips_of", None)
    return method(size) if method else None


def pretrain_transform(
    input_size: Size,
    crop_scale: Sequence[float] = (0.2, 1.0),
    hflip: float = 0.5,
    *,
    crop: str = "random",
    crop_ratio: Sequence[float] = CROP_RATIO,
    vflip: float = 0.0,
    rotate90: bool = False,
) -> Transform:
    """The augmentation of pre-training: random resized crop and horizontal flip (He et al. 2021, appendix A.1).

    Args:
        crop_scale: minimum and maximum area of a crop, as a fraction of the image.
        hflip: probability of a horizontal flip.
        crop: "random"; or "none", the whole image, scaled to `input_size`.
        crop_ratio: minimum and maximum aspect ratio of a crop, relative to the aspect ratio of `input_size`.
        vflip: probability of a vertical flip.
        rotate90: rotate by a random multiple of 90 degrees.

    Raises:
        ValueError: `crop_scale` or `crop_ratio` is not a range, or `rotate90` is set and `input_size` is not a square.
    """
    from mae.data import augment

    first = augment.first_stage(input_size, crop, crop_scale, crop_ratio)
    flip = stages.RandomFlip(augment.F.horizontal_flip, hflip)
    return stages.Stages(first, flip, *augment.flip_and_rotate(input_size, vflip, rotate90))


def augmentation_of(images: ImageSpec, augmentation: AugmentationSpec) -> Transform:
    """The augmentation of a pre-training with these settings, as `pretrain_transform`."""
    return pretrain_transform(
        images.input_size, images.crop_scale, images.hflip, crop=images.crop, crop_ratio=images.crop_ratio,
        vflip=augmentation.vflip, rotate90=augmentation.rotate90,
    )  # fmt: skip


def finetune_transform(
    input_size: Size,
    mean: Sequence[float],
    aa: str | None = None,
    color_jitter: float | None = None,
    crop_scale: Sequence[float] = (0.08, 1.0),
    hflip: float = 0.5,
    *,
    crop: str = "random",
    crop_ratio: Sequence[float] = CROP_RATIO,
    vflip: float = 0.0,
    rotate90: bool = False,
) -> Transform:
    """timm's augmentation for supervised training: random resized crop, flip, and a policy such as RandAugment.

    Random erasing is applied later, on the device, after normalization.

    Args:
        mean: mean of each channel; fills the areas that shifts and rotations of the policy leave empty.
        aa: name of an augmentation policy of timm, such as rand-m9-mstd0.5-inc1; None or "none": no policy.
        color_jitter: strength of random brightness, contrast and saturation; has no effect with `aa`.
        crop_scale, hflip, crop, crop_ratio, vflip, rotate90: as in `pretrain_transform`.

    Raises:
        ValueError: timm has no such policy, or as in `pretrain_transform`.
    """
    from timm.data import auto_augment, create_transform
    from timm.data.transforms import RandomResizedCropAndInterpolation

    from mae.data import augment

    # Strong policies sometimes posterize to 0 bits. timm passes this to Pillow, which raises an error.
    auto_augment.NAME_TO_OP.update(
        {name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")}
    )
    try:
        _, policy, _ = create_transform(
            (len(mean), *to_pair(input_size)),
            is_training=True,
            scale=(crop_scale[0], crop_scale[1]),
            ratio=(crop_ratio[0], crop_ratio[1]),
            hflip=hflip,
            color_jitter=color_jitter,  # type: ignore[arg-type]  # None: no jitter
            auto_augment=None if aa in (None, "", "none") else aa,
            interpolation="bicubic",
            mean=tuple(mean),
            std=(1.0,) * len(mean),
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"aa={aa}: timm has no such policy ({error}); give rand-m9-mstd0.5-inc1, for example, or none"
        ) from error
    height, width = to_pair(input_size)
    # timm samples empty crops of signals with one row.
    sample = RandomResizedCropAndInterpolation.get_params if height == width else None
    first = augment.first_stage(input_size, crop, crop_scale, crop_ratio, sample)
    flip = [stages.RandomFlip(augment.F.horizontal_flip, hflip)] if hflip > 0 else []
    policies = [augment.ChangeImage(policy)] if policy.transforms else []
    return stages.Stages(first, *flip, *policies, *augment.flip_and_rotate(input_size, vflip, rotate90))


def _posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keeps the highest bits of each value; with 0 bits the picture is black."""
    return ImageOps.posterize(picture, bits) if 1 <= bits <= 8 else picture.point(lambda value: value * (bits > 8))


def probe_transform(input_size: Size, crop: str = "random", hflip: float = 0.5) -> Transform:
    """The published augmentation of linear probing: a crop that is sampled once (area 0.08 to 1), and a flip.

    A crop that is sampled once is clipped to the picture, which may distort it further. If `input_size` is not a
    square, the crop is sampled as in pre-training.
    """
    from mae.data import augment

    height, width = to_pair(input_size)
    sample = augment.sample_once if height == width else None
    first = augment.first_stage(input_size, crop, (0.08, 1.0), CROP_RATIO, sample)
    return stages.Stages(first, stages.RandomFlip(augment.F.horizontal_flip, hflip))


def eval_transform(
    input_size: Size, crop_pct: float | None = None, crop: str | None = None, interpolation: str | None = None
) -> stages.Stages:
    """Scales the picture to cover input_size / crop_pct and crops its center.

    Args:
        crop_pct: crop ratio. Default: `default_crop_pct`.
        crop: "none" for the whole picture, scaled to `input_size`; None or "random" for the center.
        interpolation: one of `stages.MODES`. Default: bicubic.

    Raises:
        ValueError: `crop` or `interpolation` has another value.
    """
    if crop not in (None, *CROP_CHOICES):
        raise ValueError(f"crop {crop!r} is not {' or '.join(CROP_CHOICES)}")
    height, width = to_pair(input_size)
    mode = interpolation or stages.BICUBIC
    if mode not in stages.MODES:
        raise ValueError(f"interpolation {mode!r} is not one of {', '.join(stages.MODES)}")
    if crop == NO_CROP:
        return stages.Stages(stages.Scale((height, width), mode))
    crop_pct = crop_pct or default_crop_pct(input_size)
    scaled = (int(height / crop_pct), int(width / crop_pct))
    return stages.Stages(stages.Cover(scaled, mode), stages.CenterCrop((height, width)))


def segmentation_transform(
    size: Size, short_side: int, scale: Sequence[float], hflip: float, mean: Sequence[float]
) -> Transform:
    """Returns the random scale, random crop and horizontal flip of an image and its mask, `augment.ScaleAndCrop`.

    Raises:
        ValueError: `scale` is no range above 0.
    """
    from mae.data import augment

    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale=[{scale[0]}, {scale[1]}]: give the minimum and the maximum, above 0")
    return stages.Stages(augment.ScaleAndCrop(to_pair(size), short_side, scale, hflip, mean))


def scaled_transform(short_side: int) -> Transform:
    """Scales images so that their shorter side has `short_side` pixels; 0: unchanged. Masks keep their size."""
    from mae.data import augment

    return stages.Stages(augment.ShortSide(short_side))
