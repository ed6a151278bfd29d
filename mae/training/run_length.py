"""How many images a pre-training processes, and how many measured runs needed (docs/small_data.md)."""

import logging

logger = logging.getLogger(__name__)

# that the measured runs process at least, whichever is more
PASSES = 80
IMAGES = 800_000
SHORT = 0.1  # share of these images, below which a run has a warning


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
