"""What the rules of a recipe know about a dataset and a machine, and what is wrong with a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mae.data.image_facts import ImageFacts, moments_of
from mae.plurals import counted

MEASURED_IMAGES = 1000  # fewer were not measured
ASPECT_SPREAD = 1.1  # ratio of aspect ratios, up to which they count as equal
MAX_STDS = 1000  # ratio of the standard deviations of channels that share a range of values
MAX_ASPECT = 4  # ratio of the sides, above which square patches fit badly
MAX_CROPPED = 2  # ratio of the sides, above which crops show too little
CROP_ASPECT = 4 / 3  # the longest crops, as published
FILLS = (-999, -9999, -99999, -32768, float(np.finfo(np.float32).min))


@dataclass(frozen=True)
class Images:
    """What the rules know about a dataset.

    Args:
        count: number of images that can be read.
        distinct: number of different images among them; of a sample, its copies only are known.
        bad: share of the images that can't be read.
        height, width, shorter: sides that half of the images do not exceed, in pixels.
        spread: range of the shorter side in pixels.
        has_one_shape: the aspect ratios of nine tenths of the images are equal.
        mean, std: of each channel.
        value_range: the smallest and the largest value, if they should become 0 and 1; else None, such as for channels
            with other units.
        is_deep: all images have more than 8 bits.
        num_bytes: size of all decoded images.
        smallest: the smallest value.
    """

    count: int
    distinct: int
    bad: float
    height: int
    width: int
    shorter: int
    spread: tuple[int, int]
    has_one_shape: bool
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    value_range: tuple[float, float] | None
    is_deep: bool
    num_bytes: float
    smallest: float = 0.0

    @property
    def elongation(self) -> float:
        """Ratio of the longer to the shorter side."""
        return max(self.height / self.width, self.width / self.height)

    @property
    def total(self) -> int:
        """Number of images of an epoch: other images take the place of those that can't be read."""
        return round(self.count / (1 - self.bad))

    @classmethod
    def of(cls, facts: list[ImageFacts], total: int, in_chans: int, has_range: bool) -> "Images":
        """Summarizes the facts of images.

        Args:
            facts: of all images, or of a sample.
            total: number of images of the dataset.
            has_range: `value_range` is given, or `mean` or `std` of the values in the files.

        Raises:
            ValueError: the images have nothing to learn.
        """
        good = [fact for fact in facts if fact.sums is not None]
        heights, widths = np.array([fact.size for fact in good]).T
        shorter = np.minimum(heights, widths)
        aspect = heights / widths
        narrow, wide = np.quantile(aspect, (0.05, 0.95))
        mean, std = moments_of(good)
        if not std.any():
            raise ValueError(f"every pixel has the value {' '.join(f'{value:g}' for value in mean)}: nothing to learn")
        low = min(fact.low for fact in good)
        high = max(fact.high for fact in good)
        is_deep = all(fact.deep for fact in good)
        # One range for units that differ so much would leave a channel with few values.
        has_one_unit = std.max() <= MAX_STDS * std[std > 0].min()
        count = round(total * len(good) / len(facts))
        return cls(
            count=count,
            # A copy is rarely in a sample together with its original: those that were found, and no more, are known.
            distinct=count - len(good) + len({(fact.size, fact.digest) for fact in good}),
            bad=1 - len(good) / len(facts),
            height=_median(heights),
            width=_median(widths),
            shorter=_median(shorter),
            spread=(int(shorter.min()), int(shorter.max())),
            has_one_shape=bool(wide <= ASPECT_SPREAD * narrow),
            in_chans=in_chans,
            mean=mean.tolist(),
            std=np.where(std > 0, std, 1).tolist(),
            value_range=(low, high) if is_deep and has_one_unit and not has_range and (low < 0 or high > 1) else None,
            is_deep=is_deep,
            num_bytes=float((heights * widths).mean()) * in_chans * count,
            smallest=low,
        )


class Machine(NamedTuple):
    """What the rules know about a machine."""

    gpus: int
    cores: int
    cache_bytes: float  # that decoded images may take; 0: they can't be kept

    def threads(self, processes: int) -> int:
        """Returns the number of threads of each process that computes on the cores."""
        return max(1, self.cores // processes)


def warnings_of(images: Images) -> list[str]:
    """Returns what is wrong with a dataset."""
    found = []
    if images.distinct < MEASURED_IMAGES:
        found.append(
            f"{images.distinct:,} different images are few: fewer than {MEASURED_IMAGES:,} were not measured. Compare "
            f"the encoder with released weights (docs/small_data.md)"
        )
    if repeated := images.count - images.distinct:
        verb = "equals" if repeated == 1 else "equal"
        found.append(
            f"{counted(repeated, 'image')} {verb} another one: an epoch shows these more than once. If held-out images "
            f"equal training images, accuracies are too high"
        )
    if not images.has_one_shape and images.elongation > MAX_CROPPED:
        found.append(
            f"a crop shows at most {largest_crop(images):.0%} of an image of {images.height} x {images.width} pixels: "
            f"cut such images to pieces, or give crop=none and input_size"
        )
    if images.smallest in FILLS:
        found.append(
            f"the smallest value is {images.smallest:g}, a usual mark of missing pixels: if it is one, give "
            f"nodata={images.smallest:g}"
        )
    if images.has_one_shape and images.elongation > MAX_ASPECT:
        found.append(
            f"images of {images.height} x {images.width} pixels may need patches that are no squares (docs/data.md, "
            f"signals)"
        )
    return found


def largest_crop(images: Images) -> float:
    """Returns the largest share of an image that a crop shows."""
    return min(1.0, CROP_ASPECT / images.elongation)


def _median(sides: np.ndarray) -> int:
    return int(np.quantile(sides, 0.5, method="lower"))  # a side that an image has
