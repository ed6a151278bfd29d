"""Small pictures as features, which an encoder is compared with."""

import numpy as np
import torch

from mae.data import loader, transforms
from mae.data.pixels import PixelValues
from mae.data.samples import Samples
from mae.data.source import Source
from mae.position_tables import to_pair
from mae.settings import ImageSpec

SIDE = 32  # images are resized to at most this many pixels per side


def read(source: Source, images: ImageSpec, num_workers: int) -> np.ndarray:
    """Reads the images of a source: float32 (n, c·h·w) in [0, 1], preprocessed as in an evaluation.

    Invalid pixels have the mean of the image, as `decode.decode_item` decodes them.
    """
    height, width = to_pair(images.input_size)
    scale = min(1.0, SIDE / max(height, width))
    crop_pct = images.crop_pct or transforms.default_crop_pct(images.input_size)
    transform = transforms.eval_transform((round(height * scale), round(width * scale)), crop_pct, images.crop)
    samples = Samples(
        source, transform, in_chans=images.in_chans, seed=0, exif=bool(images.exif),
        values=PixelValues(images.nodata, images.value_range, images.channels_last),
    )  # fmt: skip
    batches = loader.eval_loader(samples, 256, num_workers, False)
    return torch.cat([transforms.to_unit_range(batch.images) for batch in batches]).flatten(1).numpy()
