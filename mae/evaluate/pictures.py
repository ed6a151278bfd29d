"""Converts tensors to pictures."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.data import loader
from mae.data.item import NO_INPUTS
from mae.data.samples import Samples
from mae.data.transforms import Normalize

GAP = 2  # pixels between pictures
HEADER = 18  # pixels above pictures with titles
MIN_WIDTH = 120  # pixels of a column with a title
MAX_LABEL = 24  # characters
TITLES = ("original", "masked", "reconstruction", "reconstruction + visible")  # of the parts of a `Reconstruction`
NOTE = "At visible patches, the reconstruction is not trained."


def tile(columns: Sequence[Tensor], to_pixels: Callable[[Tensor], Tensor], scale: int = 1) -> np.ndarray:
    """Tiles batches of images to one picture: a row for each image, a column for each batch.

    Args:
        columns: batches (B, c, H, W), such as the first four results of `MaskedAutoencoderViT.reconstruct`.
        to_pixels: maps their values to 0 to 1 (`transforms.Normalize.inverse`).
        scale: side of the square that replaces each pixel.

    Returns:
        uint8 (height, width, 1 or 3), with white gaps. Images with more than 3 channels show the first three, images
        with 2 channels the first.
    """
    channels = 3 if columns[0].shape[1] >= 3 else 1
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
    picture = tile(result[:4], normalize.inverse, scale)
    if labels is None:
        return picture
    return with_labels(picture, titled(float(result.mask.mean())), labels, NOTE)


def titled(masked: float) -> list[str]:
    """Returns TITLES with the share of masked patches, whose number is whole: it may differ from the mask ratio."""
    return [f"{title} {masked:.0%}" if title == "masked" else title for title in TITLES]


def reconstructed_examples(
    model: Any, samples: Samples, count: int, normalize: Normalize, mask_ratio: float
) -> np.ndarray:
    """Draws reconstructions of evenly spaced samples with their names, as in `reconstruction`."""
    batch = loader.examples(samples, count)
    names = loader.example_names(samples, count)
    return reconstruction(model, batch.images, batch.noise, normalize, mask_ratio, labels=names, context=batch.context)
