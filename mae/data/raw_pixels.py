"""Small pictures as features, which an encoder is compared with."""

import numpy as np
import torch

from mae.data import loader, transforms
from mae.data.pixels import PixelValues
from mae.data.samples import Samples
from mae.data.source import Source
from mae.position_tables import to_pair
from mae.settings import ImageSpec

SIDE = 32  # pixels per side, to which larger images are resized


def read(source: Source, images: ImageSpec, num_workers: int) -> np.ndarray:
    """Reads the images of a source: float32 (n, c·h·w), preprocessed as in an evaluation, without normalization.

    Values of several units are normalized, because large ones would hide the others: if the statistics are not those of
    values in [0, 1], or the images are neither gray nor RGB. Each side has at most SIDE pixels. Invalid pixels have the
    mean of the image, as `decode.decode_item` decodes them.
    """
    height, width = (min(side, SIDE) for side in to_pair(images.input_size))
    crop_pct = images.crop_pct or transforms.default_crop_pct(images.input_size)
    transform = transforms.eval_transform((height, width), crop_pct, images.crop)
    samples = Samples(
        source, transform, in_chans=images.in_chans, seed=0, exif=bool(images.exif),
        values=PixelValues(images.nodata, images.value_range, images.channels_last),
    )  # fmt: skip
    normalize = transforms.Normalize(*transforms.channel_statistics(images.in_chans, images.mean, images.std))
    has_units = images.in_chans not in (1, 3) or not normalize.fits_unit_range
    prepared = normalize if has_units else transforms.to_unit_range
    batches = loader.eval_loader(samples, 256, num_workers, False)
    return torch.cat([prepared(batch.images) for batch in batches]).flatten(1).numpy()
