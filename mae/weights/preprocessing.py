"""Preprocessing of images by the settings of a file."""

import logging
from collections.abc import Sequence

from mae.checkpoints.checkpoint import CheckpointError
from mae.data.transforms import channel_statistics
from mae.position_tables import Size
from mae.settings.arguments import in_words
from mae.settings.choices import default_crop_pct, published_crop_pct
from mae.weights import shapes
from mae.weights.candidates import warn_once
from mae.weights.model_zoo import CLASSIFIER, SEGMENTER
from mae.weights.reading import Weights

logger = logging.getLogger(__name__)


def statistics(
    file: Weights | None, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Returns `mean` and `std`. If one is None, it is taken from the run of a file with the same number of channels.

    A warning names each value that differs from the value of that run.

    Raises:
        CheckpointError: as in `require_statistics`.
    """
    if file and file.needs_statistics:
        require_statistics(file, mean, std)
    records = file is not None and file.settings.keys() & {"in_chans", "mean", "std"}
    if not file or not records:
        return mean, std
    patches = file.tensors.get(shapes.PATCHES)  # an encoder of the user's code may have none
    if in_chans != (file.settings.get("in_chans") if patches is None else patches.shape[1]):
        return mean, std
    theirs = file.settings.get("mean"), file.settings.get("std")
    chosen = mean or theirs[0], std or theirs[1]
    pairs = zip(channel_statistics(in_chans, *chosen), channel_statistics(in_chans, *theirs), strict=True)
    for name, (used, recorded) in zip(("mean", "std"), pairs, strict=True):
        if used != recorded:
            now, then = (
                in_words({name: values[0] if len(values) == 1 else values}) for values in (list(used), list(recorded))
            )
            logger.warning(f"{now} is used, and {file.origin} was made with {then}")
    return chosen


def require_statistics(file: Weights, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises CheckpointError if a file may have been made with any statistics, and they are not given."""
    if file.needs_statistics and (mean is None or std is None):
        raise CheckpointError(
            f"{file.origin} is of mmpretrain, whose configuration is not read: give mean and std of RGB images from 0 "
            f"to 1, which are those of its data_preprocessor divided by 255; a model without to_rgb=True is converted "
            f"as in docs/migrating.md"
        )


def crop_pct_of_earlier_version(file: Weights, input_size: Size) -> float | None:
    """Returns the crop ratio of the evaluation of a trained head whose file records none: the published default.

    For other files it returns None. A file is named once, if the default has changed since.
    """
    if file.kind not in (CLASSIFIER, SEGMENTER) or file.settings.get("crop_pct") is not None:
        return None
    crop_pct = published_crop_pct(input_size)
    if crop_pct != default_crop_pct(input_size):
        warn_once(f"{file.origin} records no crop ratio, and {crop_pct} is used, the default of its time")
    return crop_pct
