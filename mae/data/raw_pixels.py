"""Small pictures as features, which an encoder is compared with."""

import numpy as np
import torch

from mae.data import loader, transforms
from mae.data.pixels import PixelValues
from mae.data.samples import Samples
from mae.data.source import Source
from mae.data.stages import Scale, Stages
from mae.settings import ImageSpec
from mae.sizes import to_pair

VERSION = 2  # of what `read` returns, for results that are kept
SIDE = 32  # pixels per side, to which larger images are resized


def read(source: Source, images: ImageSpec, num_workers: int) -> np.ndarray:
    """Reads the images of a source: float32 (n, c·h·w), preprocessed as in an evaluation, without normalization.

    Channels may have several units, and large values would hide the others. So the values are normalized if the images
    are neither gray nor RGB, or if the statistics are not those of values in [0, 1]. Each side has at most SIDE pixels.
    Invalid pixels have the mean of the image, as `decode.decode_item` decodes them.
    """
    height, width = to_pair(images.input_size)
    size = min(height, SIDE), min(width, SIDE)
    crop_pct = images.crop_pct or transforms.default_crop_pct(images.input_size)
    transform = transforms.eval_transform(size, crop_pct, images.crop)
    if size[0] * width != size[1] * height:  # the crop has another aspect ratio: it precedes the scaling
        whole = transforms.eval_transform(images.input_size, crop_pct, images.crop)
        transform = Stages(*whole.stages, Scale(size))
    samples = Samples(
        source, transform, in_chans=images.in_chans, seed=0, exif=bool(images.exif),
        values=PixelValues(images.nodata, images.value_range, images.channels_last),
    )  # fmt: skip
    normalize = transforms.Normalize(*transforms.channel_statistics(images.in_chans, images.mean, images.std))
    has_units = images.in_chans not in (1, 3) or not normalize.fits_unit_range
    prepared = normalize if has_units else transforms.to_unit_range
    batches = loader.eval_loader(samples, 256, num_workers, False)
    return torch.cat([prepared(batch.images) for batch in batches]).flatten(1).numpy()
