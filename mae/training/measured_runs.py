"""What measured runs needed (docs/small_data.md), and which of them are near to other images."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# that the measured runs process at least, whichever is more
PASSES = 80
IMAGES = 800_000
SHORT = 0.1  # share of these images, below which a run has a warning
# Largest ratios of the sides and of the numbers of images up to which images are near.
NEAR_SIDE = 2
NEAR_IMAGES = 6


def images_needed(count: int) -> int:
    """Returns the number of images with which measured runs on `count` images had most of their gain.

    The pre-training of a larger model processes as many at least.
    """
    return max(IMAGES, PASSES * count)


def share_text(processed: float, count: int) -> str:
    """Returns how many of `images_needed` a pre-training on `count` images processes, in words."""
    needed = images_needed(count)
    share = processed / needed
    percent = f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
    times = f"{share:.2g} times" if share >= 1 else f"{percent} of"
    return f"{processed:,.0f} images, {times} the {needed:,} that measured runs needed"


def warn_of_short_run(processed: float, count: int) -> None:
    """Logs a warning if a pre-training on `count` images processes less than SHORT of `images_needed`."""
    if processed < SHORT * images_needed(count):
        logger.warning(
            f"the epochs of this run process {share_text(processed, count)}: the encoder may be no better than raw "
            f"pixels (docs/small_data.md)"
        )


def near(rows: Iterable[Mapping[str, Any]], channels: int, side: int, count: int) -> list[Mapping[str, Any]]:
    """Returns the measured runs whose images have these channels, and about this size and number.

    Args:
        rows: runs with `channels`, `side` and `images`.
        side: shorter side in pixels.
        count: number of images.
    """
    return [
        row
        for row in rows
        if row["channels"] == channels
        and ratio(row["side"], side) <= NEAR_SIDE
        and ratio(row["images"], count) <= NEAR_IMAGES
    ]


def ratio(first: float, second: float) -> float:
    """Returns the ratio of two numbers, at least 1."""
    return max(first / second, second / first)
