"""Converts tensors to pictures."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.data import image_facts
from mae.data.generators import preserve_generators
from mae.data.item import NO_INPUTS, Batch
from mae.data.pixels import BadImage, Picture, size_of, to_tensor
from mae.data.samples import Samples
from mae.data.transforms import Normalize

GAP = 2  # pixels between pictures
HEADER = 18  # pixels above pictures with titles
MIN_WIDTH = 120  # pixels of a column with a title
MAX_LABEL = 24  # characters
TITLES = ("original", "masked", "reconstruction", "reconstruction + visible")  # of the parts of a `Reconstruction`
SAMPLED = 32  # images whose values say what is black and white
QUANTILES = (0.005, 0.995)  # of these values: a few bright pixels would darken all others
ALL_VALUES = (0, 1)  # quantiles of values that are mostly equal, such as counts of few photons
VALUES_A_SIDE = 256  # of an image
NOTE = "At visible patches, the reconstruction is not trained."


def decoded(samples: Samples) -> Iterator[Picture]:
    """Yields up to SAMPLED evenly spaced images that can be read, as they are decoded; of a stream, the first ones."""
    for item in image_facts.examples(samples.source, SAMPLED):
        with suppress(BadImage, OSError):
            yield samples.decode(item).image


def show_range(normalize: Normalize, images: Iterable[Picture]) -> str:
    """Sets the range that pictures show, `Normalize.shown`, if all images have more than 8 bits.

    Their values may be a small part of those of the type: 12 bits in files of 16 are nearly black without the range. It
    is that of the channels that `tile` shows.

    Args:
        images: decoded pictures.

    Returns:
        A sentence that names the range; "" if pictures show the values from 0 to 1, or those around the mean.
    """
    normalize.shown = None
    if not normalize.fits_bytes:
        return ""
    parts = []
    with preserve_generators():  # a dataset of the user's code may draw random numbers
        for image in images:
            pixels = to_tensor(image)
            if not pixels.is_floating_point():
                return ""
            step = max(1, min(size_of(pixels)) // VALUES_A_SIDE)
            parts.append(pixels[: shown_channels(len(pixels)), ::step, ::step].flatten())
    values = torch.cat([torch.empty(0), *parts])
    values = values[values.isfinite()]  # invalid pixels may be NaN
    for quantiles in (QUANTILES, ALL_VALUES):
        low, high = np.quantile(values.numpy(), quantiles).tolist() if len(values) else (0, 0)
        if low < high:
            normalize.shown = (low, high)
            return f"Pictures show values from {low:.4g} (black) to {high:.4g} (white), scaled as in training."
    return ""


def shown_channels(channels: int) -> int:
    """Returns how many of the channels of an image a picture shows: the first three, or the first."""
    return 3 if channels >= 3 else 1


def tile(columns: Sequence[Tensor], to_pixels: Callable[[Tensor], Tensor], scale: int = 1) -> np.ndarray:
    """Tiles batches of images to one picture: a row for each image, a column for each batch.

    Args:
        columns: batches (B, c, H, W), such as the first four results of `MaskedAutoencoderViT.reconstruct`.
        to_pixels: maps their values to 0 to 1 (`transforms.Normalize.displayed`).
        scale: side of the square that replaces each pixel.

    Returns:
        uint8 (height, width, 1 or 3), with white gaps. Images with more than 3 channels show the first three, images
        with 2 channels the first.
    """
    channels = shown_channels(columns[0].shape[1])
    rows = torch.stack([to_pixels(column.float())[:, :channels] for column in columns], dim=1)  # (B, columns, c, H, W)
    rows = rows.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    rows = torch.nn.functional.pad(rows, (0, GAP, 0, GAP), value=1.0)
    B, count, c, height, width = rows.shape
    picture = rows.permute(0, 3, 1, 4, 2).reshape(B * height, count * width, c)[:-GAP, :-GAP]
    return (picture * 255).round().to(torch.uint8).cpu().numpy()


def with_labels(picture: np.ndarray, titles: Sequence[str], labels: Sequence[str], note: str = "") -> np.ndarray:
    """Adds a title above each column of a picture of `tile`, a label at the left of each row, and a note below.

    Args:
        picture: uint8 (height, width, 1 or 3).
        labels: of the rows; empty for none.

    Returns:
        uint8 (height, width, 3).
    """
    labels = [label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…" for label in labels]
    font = ImageFont.load_default()
    margin = max((ceil(font.getlength(label)) + 2 * GAP for label in labels), default=0)
    sheet = Image.new("RGB", (margin + picture.shape[1], HEADER + len(picture) + HEADER * bool(note)), "white")
    sheet.paste(Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture), (margin, HEADER))
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((margin + (column + 0.5) * picture.shape[1] / len(titles), 3), title, fill="black", anchor="ma")
    for row, label in enumerate(labels):
        pen.text((GAP, HEADER + row * (len(picture) + GAP) / len(labels)), label, fill="black")
    pen.text((GAP, HEADER + len(picture) + GAP), note, fill="black")
    return np.asarray(sheet)


def reconstruction(
    model: Any,
    images: Tensor,
    noise: Tensor | None,
    normalize: Normalize,
    mask_ratio: float = 0.75,
    scale: int = 1,
    labels: Sequence[str] | None = None,
    context: Mapping[str, Tensor] = NO_INPUTS,
) -> np.ndarray:
    """Reconstructs images with a masked autoencoder. A row has the parts that TITLES names.

    Args:
        model: a `MaskedAutoencoderViT`. Its `reconstruct` documents the treatment of normalized targets.
        images: uint8 (B, c, H, W).
        noise: (B, N), determines the masks. None: random masks.
        normalize: images -> the input of the model.
        mask_ratio: fraction of masked patches.
        scale: as in `tile`.
        labels: add titles and these labels of the images, as `with_labels` does; small images are enlarged.
        context: further inputs of the images, and their valid pixels, as in `Batch`.

    Returns:
        As `tile`.
    """
    scale = scale if labels is None else max(scale, ceil(MIN_WIDTH / images.shape[3]))
    device = normalize.mean.device
    noise = None if noise is None else noise.to(device)
    options = {name: value.to(device) for name, value in context.items()}
    result = model.reconstruct(normalize(images.to(device)), mask_ratio, noise=noise, **options)
    picture = tile(result[:4], normalize.displayed, scale)
    if labels is None:
        return picture
    return with_labels(picture, titled(float(result.mask.mean())), labels, NOTE)


def titled(masked: float) -> list[str]:
    """Returns TITLES with the share of masked patches, whose number is whole: it may differ from the mask ratio."""
    return [f"{title} {masked:.0%}" if title == "masked" else title for title in TITLES]


def reconstructed_examples(
    model: Any, batch: Batch, names: Sequence[str], normalize: Normalize, mask_ratio: float
) -> np.ndarray:
    """Draws reconstructions of the images of a batch with their names, as in `reconstruction`."""
    show_range(normalize, batch.images)
    return reconstruction(model, batch.images, batch.noise, normalize, mask_ratio, labels=names, context=batch.context)
