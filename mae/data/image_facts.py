"""Facts of the images of a dataset: sizes, channels, statistics, and which can't be read."""

import hashlib
import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from mae import errors, parallel
from mae.data import large
from mae.data.batches import Batches, up_to_cores
from mae.data.decode import find_invalid, fit_channels, is_reducible, is_turned, of_item, read, turned_upright
from mae.data.generators import preserve_generators
from mae.data.item import Item
from mae.data.loader import MAX_BAD_SHARE
from mae.data.pixels import AS_STORED, BadImage, Picture, PixelValues, size_of, to_tensor
from mae.data.source import Source, Stream, evenly_spaced, is_stream
from mae.data.transforms import Normalize, to_unit_range
from mae.files.untrusted import printable

logger = logging.getLogger(__name__)

EXAMPLES = 8  # images that `check_statistics` reads
COUNTED = 64  # images that `channels_of` reads
ROUNDING = 1e-12  # of the mean square: a smaller variance is the rounding error of a constant channel
BATCH = 16  # images that a worker process reads at a time, if there are many
BATCHES = 256  # of fewer images otherwise, for a bar that moves
PART = 2**22  # pixels whose sums are computed at a time: in fp64, a large picture would fill the memory
GRAY_MODES = ("1", "L", "LA")  # of Pillow; any other is converted to color


class ImageFacts(NamedTuple):
    """Size, channels and statistics of one image, or the reason why it can't be read."""

    label: int
    size: tuple[int, int] = (0, 0)  # height, width, as decoded
    stored_size: tuple[int, int] = (0, 0)  # in the file: larger than `size` if it is read at a reduced size
    channels: int = 0  # number of channels in the file
    are_equal: bool = False  # it has three channels, which are equal
    deep: bool = False  # more than 8 bits
    sums: np.ndarray | None = None  # (2, in_chans): sums of the valid values, in 0 to 1, and of their squares
    valid: int = 0  # number of valid pixels
    unreadable: tuple[str, str] | None = None  # name and reason
    turned: bool = False  # the EXIF data have an orientation
    low: float = np.inf  # smallest and largest valid value, scaled as in training
    high: float = -np.inf
    digest: bytes = b""  # of the decoded pixels
    warning: str = ""  # the first one of the decoder, if it has read the image


class FactsDataset(Dataset):
    """The facts of each image of a source."""

    def __init__(self, source: Source, in_chans: int, values: PixelValues = AS_STORED, upright: bool = False) -> None:
        self.source = source
        self.in_chans = in_chans
        self.values = values
        self.upright = upright

    @errors.marked()
    def __getitem__(self, index: int) -> ImageFacts:
        try:
            item = self.source[index]
        except (BadImage, OSError) as error:  # a mistake of the user's code is no unreadable image
            return _unreadable(self.source.name(index), error)
        try:
            return image_facts(item, self.in_chans, self.values, self.upright)
        except Exception as error:  # decoders raise any exception on damaged bytes
            return _unreadable(self.source.name(index), error)


def _unreadable(name: str, error: Exception) -> ImageFacts:
    reason = printable(" ".join(str(error).split()))
    return ImageFacts(-1, unreadable=(name, reason))


def image_facts(item: Item, in_chans: int, values: PixelValues = AS_STORED, upright: bool = False) -> ImageFacts:
    """Decodes the image of an item and collects its facts. `upright` is as in `decode.decode`.

    Raises:
        Exception: any exception of the decoder.
    """
    values = of_item(item, values)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large pictures are counted
        stored = read(item.image, in_chans, values=values, reduces=is_reducible(item, values))
        stored_size = large.stored_size(stored)
        turned = is_turned(stored)
        if upright:
            stored = turned_upright(item.image, stored)
        decoded = find_invalid(item, fit_channels(stored, in_chans, values), values)
    picture = to_tensor(decoded.image)
    pixels = picture.flatten(1) if decoded.valid is None else picture[:, decoded.valid]
    sums = np.zeros((2, len(pixels)))
    low = np.inf
    high = -np.inf
    for part in pixels.split(PART, dim=1) if pixels.numel() else ():
        numbers = to_unit_range(part).double()
        sums += torch.stack([numbers.sum(dim=1), numbers.square().sum(dim=1)]).numpy()
        low = min(low, numbers.min().item())
        high = max(high, numbers.max().item())
    channels = len(stored) if isinstance(stored, torch.Tensor) else len(stored.getbands())
    deep = isinstance(stored, torch.Tensor) and stored.is_floating_point()
    digest = hashlib.blake2b(picture.numpy().tobytes(), digest_size=8).digest()
    label = item.label if isinstance(item.label, int) else -1  # numbers and masks are no classes
    return ImageFacts(
        label, size_of(stored), large.stored_size(large.with_stored_size(stored, stored_size)), channels,
        channels == 3 and _channels_in(stored) == 1, deep, sums, pixels.shape[1], turned=turned, low=low, high=high,
        digest=digest, warning=str(caught[0].message) if caught else "",
    )  # fmt: skip


def progress(items: Iterable[Any], name: str, total: int, leave: bool = False) -> Iterator[Any]:
    """Iterates with a bar from the third second on; if stderr is no terminal, it is written every ten seconds."""
    every = 0.1 if sys.stderr.isatty() else 10
    hidden = not parallel.is_main()
    return iter(tqdm(items, name, total, leave, unit="image", delay=2, mininterval=every, disable=hidden))


def channels_of(source: Source | Stream, values: PixelValues = AS_STORED) -> int:
    """Returns the number of channels that the images of a dataset need, from up to COUNTED evenly spaced images.

    It is that of most images, and 3 if some are gray and some are in color. Color images whose channels are equal are
    gray. If no image can be read, it is 3.
    """
    counts = Counter[int]()
    for item in progress(examples(source, COUNTED), "channels", min(COUNTED, len(source))):
        with suppress(Exception):  # the facts have the reason
            of_values = of_item(item, values)
            counts[_channels_in(read(item.image, None, values=of_values, reduces=is_reducible(item, values)))] += 1
    if counts.keys() <= {1, 3}:
        return 1 if counts.keys() == {1} else 3
    return counts.most_common(1)[0][0]


def examples(source: Source | Stream, count: int) -> Iterator[Item]:
    """Yields up to `count` evenly spaced items as they are stored; of a stream, the first ones."""
    if is_stream(source):
        for _, _, data, label in islice(source.stream(0, 0, 1, lambda name, error: None, passes=1), count):
            yield Item(data, label)
        return
    for index in evenly_spaced(len(source), count):
        with suppress(BadImage, OSError):
            yield source[index]


def _channels_in(stored: Picture) -> int:
    """Returns the number of channels of an image as it enters the model; 1 if all three are equal."""
    if isinstance(stored, Image.Image):
        if stored.mode in GRAY_MODES:
            return 1
        stored = to_tensor(fit_channels(stored, 3))
    return 1 if len(stored) == 3 and (stored == stored[:1]).all() else len(stored)


def all_facts(
    source: Source | Stream, in_chans: int, indices: list[int], num_workers: int, values: PixelValues = AS_STORED,
    upright: bool = False,
) -> Iterator[ImageFacts]:  # fmt: skip
    """Yields the facts of the images at `indices`; of a stream, the facts of the first len(indices) images."""
    if is_stream(source):
        unreadable: list[ImageFacts] = []

        def report(name: str, error: Exception) -> None:
            unreadable.append(_unreadable(name, error))

        for _, name, data, label in islice(source.stream(0, 0, 1, report, passes=1), len(indices)):
            try:
                yield image_facts(Item(data, label), in_chans, values, upright)
            except Exception as error:
                report(name, error)
        yield from unreadable
    else:
        dataset = FactsDataset(source, in_chans, values, upright)
        size = min(BATCH, 1 + len(indices) // BATCHES)
        for batch in Batches(dataset, num_workers, batch_size=size, sampler=indices, collate_fn=list):
            yield from batch


def readable(
    source: Source, in_chans: int, num_workers: int, values: PixelValues = AS_STORED, total: int | None = None
) -> Source:
    """Returns a dataset without the images that can't be read, and logs them. All processes call it.

    Args:
        total: number of images of which the source is a part. Default: those of the source.

    Raises:
        BadImage: more than `loader.MAX_BAD_SHARE` of `total` can't be read, or all images of the source.
    """
    from mae.data.labels import Subset

    indices = list(range(parallel.rank(), len(source), parallel.world_size()))
    with preserve_generators():
        facts = all_facts(source, in_chans, indices, up_to_cores(num_workers), values)
        bar = progress(facts, "reading", len(indices))
        bad = {index: fact.unreadable for index, fact in zip(indices, bar, strict=True) if fact.unreadable}
    bad = {index: why for part in parallel.gather(bad) for index, why in part.items()}
    for name, reason in bad.values():
        logger.warning(f"{name}: {reason}; it is excluded")
    if len(bad) > MAX_BAD_SHARE * (total or len(source)) or len(bad) == len(source):
        raise BadImage(
            f"{len(bad):,} of {len(source):,} images can't be read, more than {MAX_BAD_SHARE:.0%}; one of them: "
            f"{': '.join(bad[min(bad)])}"
        )
    return Subset(source, np.delete(np.arange(len(source)), list(bad)))


def moments_of(good: list[ImageFacts]) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel over the valid pixels; of a constant channel, 0 and not 1.

    Each image has the same weight, because training scales all of them to one size.
    """
    decoded = [(fact.valid, fact.sums, math.prod(fact.size)) for fact in good if fact.sums is not None]
    shares = sum(valid / size for valid, _, size in decoded) or 1
    mean, squares = np.sum([sums / size for _, sums, size in decoded], axis=0) / shares
    variance = squares - mean**2
    return mean, np.sqrt(np.where(variance > ROUNDING * squares, variance, 0))


def rounded(mean: Sequence[float] | np.ndarray, std: Sequence[float] | np.ndarray) -> list[float]:
    """Returns means with four significant digits, or with as many as an error below .01 standard deviations needs."""
    digits = [4 + int(math.log10(max(1, abs(value / of)))) for value, of in zip(mean, std, strict=True)]
    return [float(f"{value:.{count}g}") for value, count in zip(mean, digits, strict=True)]


def statistics_of(good: list[ImageFacts]) -> tuple[str, str]:
    """Returns mean and standard deviation of each channel over the valid pixels, as arguments of --mean and --std."""
    mean, std = moments_of(good)
    std = np.where(std > 0, std, 1)  # the std of a setting is above 0
    # Without exponents, because argparse parses -1e-05 as a flag.
    means = [np.format_float_positional(value, trim="-") for value in rounded(mean, std)]
    return " ".join(means), " ".join(np.format_float_positional(value, 4, fractional=False, trim="-") for value in std)


def check_statistics(
    source: Source | Stream, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None,
    normalize: Normalize, values: PixelValues = AS_STORED,
) -> None:  # fmt: skip
    """Logs a warning if images have more than 8 bits and `--mean` or `--std` is missing. It suggests values.

    Float images are not scaled, and the statistics of ImageNet may not fit their range. The suggested values are the
    statistics of EXAMPLES images.

    Raises:
        ValueError: EXAMPLES images have 8 bits or values from 0 to 1, and the mean is not between 0 and 1. Not all
            images of 8 bits are bytes when they are normalized: they are floats beside maps, and with invalid pixels.
    """
    if is_stream(source) or (normalize.fits_bytes and ((mean and std) or not parallel.is_main())):
        return
    facts = FactsDataset(source, in_chans, values)
    with preserve_generators():  # only rank 0 may read, and a dataset of the user's code may draw random numbers
        few = [facts[index] for index in evenly_spaced(len(source), EXAMPLES)]
    good = [fact for fact in few if fact.sums is not None]
    if not good:
        return
    if not values.value_range and not any(fact.deep for fact in good):
        normalize.require_fit_to_bytes()
    suggestion = f"{len(good)} images suggest " + "mean=[{}] std=[{}]".format(
        *(text.replace(" ", ", ") for text in statistics_of(good))
    )
    sums, squares = np.sum([fact.sums for fact in good if fact.sums is not None], axis=0)
    if not normalize.fits_bytes and sums.any() and (squares <= sums).all():  # as of values from 0 to 1
        text = ", ".join(f"{value:g}" for value in mean or ())
        raise ValueError(f"mean=[{text}]: pixels are from 0 to 1 when they are normalized; {suggestion}")
    if any(fact.deep for fact in good) and not (mean and std) and parallel.is_main():
        logger.warning(
            f"the images have more than 8 bits, and without `mean` and `std` the statistics of ImageNet normalize "
            f"them; {suggestion} (python -m mae.data reads all images)"
        )
