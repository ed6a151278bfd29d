"""Evaluation of segmentation: windows over large images, the confusion matrix, and the scores."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

STRIP_VALUES = 2**24  # logits that are scaled at once, 64 MB


def window_starts(length: int, window: int) -> list[int]:
    """Returns the first pixels of windows that cover a side of `length` pixels, which is at least the side of a window.

    The stride is two thirds of the window. The last window ends at the last pixel.
    """
    stride = max(1, 2 * window // 3)
    return [*range(0, length - window, stride), length - window]


def predict_windows(
    model: Callable[..., Tensor], image: Tensor, window: tuple[int, int], batch_size: int,
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:  # fmt: skip
    """Averages the logits of overlapping windows.

    An image that is smaller than a window is padded with zeros at the bottom and at the right, which is the mean of
    normalized images.

    Args:
        model: images (n, c, h, w) of the size of a window, and extra inputs -> logits (n, classes, h, w).
        image: normalized image (c, H, W).
        window: (h, w).
        batch_size: number of windows in a batch.
        inputs: extra inputs of the image (1, ...), which all windows have.

    Returns:
        Logits (classes, H, W), fp32.
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    starts = [window_starts(length, side) for length, side in zip(image.shape[1:], window, strict=True)]
    areas = [
        (..., slice(top, top + window[0]), slice(left, left + window[1])) for top in starts[0] for left in starts[1]
    ]
    total: Tensor | None = None
    count = torch.zeros(image.shape[1:], device=image.device)
    for first in range(0, len(areas), batch_size):
        batch = areas[first : first + batch_size]
        repeated = {name: value.expand(len(batch), *value.shape[1:]) for name, value in inputs.items()}
        for area, logits in zip(batch, model(torch.stack([image[area] for area in batch]), **repeated), strict=True):
            if total is None:
                total = logits.new_zeros(len(logits), *image.shape[1:], dtype=torch.float32)
            total[area] += logits
            count[area] += 1
    assert total is not None
    return total.div_(count)[:, :height, :width]


def predict_classes(
    model: Callable[..., Tensor], image: Tensor, size: tuple[int, int], window: tuple[int, int], batch_size: int,
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:  # fmt: skip
    """Returns the most likely class of each pixel.

    Args:
        model, image, window, batch_size, inputs: as in `predict_windows`, which needs 4 bytes for each class and pixel
            of the image.
        size: (H, W) of the result. The logits are scaled to it before the classes are compared.

    Returns:
        (H, W), int64.
    """
    return most_likely(predict_windows(model, image, window, batch_size, inputs), size)


def most_likely(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Scales logits (classes, h, w) bilinearly, corners aligned, and returns the most likely classes (H, W), int64.

    Strips of rows are scaled one after the other: the logits of a photograph of 12 million pixels need 7 GB for the 150
    classes of ADE20K.

    Args:
        size: (H, W).
    """
    # Double precision: a row of the result that is a row of the logits has the weights 1 and 0.
    rows = torch.linspace(0, logits.shape[1] - 1, size[0], dtype=torch.float64)
    weights = (rows - rows.floor()).float()[:, None]
    height = max(1, STRIP_VALUES // (len(logits) * size[1]))
    # Indices on the device: indexing by tensors of the host waits for the device, as does a copy that blocks.
    parts = [
        values.to(logits.device, non_blocking=logits.is_cuda).split(height)
        for values in (rows.floor().long(), rows.ceil().long(), weights)
    ]
    strips = []
    for above, below, weight in zip(*parts, strict=True):
        scaled = torch.lerp(logits[:, above], logits[:, below], weight)
        scaled = F.interpolate(scaled[None], (len(weight), size[1]), mode="bilinear", align_corners=True)[0]
        strips.append(scaled.argmax(dim=0))
    return torch.cat(strips)


def confusion_matrix(targets: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts the pixels of each pair of true class (row) and predicted class (column), int64 (classes, classes).

    Args:
        targets: true classes, of any shape. Pixels with another value, such as 255, are ignored.
        predictions: predicted classes, of the same shape.
    """
    # Without boolean indices, for whose number the host waits. Ignored pixels are counted behind all pairs.
    pairs = torch.where(targets < num_classes, targets.long() * num_classes + predictions, num_classes**2).flatten()
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=pairs.device)
    return counts.scatter_add_(0, pairs, torch.ones_like(pairs))[:-1].view(num_classes, num_classes)


def class_title(name: str) -> str:
    """Returns the name of a class for tables and pictures; without a palette, the names are numbers."""
    return f"class {name}" if name.isdecimal() else name


class Scores(NamedTuple):
    """Scores of a segmentation.

    The intersection and the union of a class are counted over all images (Everingham et al. 2010).
    """

    matrix: np.ndarray  # (classes, classes), pixels: rows are true classes, columns predicted classes

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class in percent, (classes,); NaN for classes without a pixel in both."""
        union = self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - self.matrix.diagonal()
        return 100 * self.matrix.diagonal() / np.where(union, union, np.nan)

    @property
    def miou(self) -> float:
        """Mean intersection over union of the classes in percent; classes without a pixel are left out.

        Without any pixel, it is NaN, and the accuracy too.
        """
        return float(np.nanmean(self.iou)) if self.matrix.any() else np.nan

    @property
    def accuracy(self) -> float:
        """Correct pixels in percent."""
        return 100 * float(self.matrix.trace() / self.matrix.sum()) if self.matrix.any() else np.nan

    def stats(self) -> dict[str, float]:
        """Returns the entries of log.txt."""
        return {"test_miou": self.miou, "test_pixel_acc": self.accuracy}

    def __str__(self) -> str:
        present = int(np.isfinite(self.iou).sum())
        absent = f" ({present} of {len(self.matrix)} classes)" if present < len(self.matrix) else ""
        return f"* mIoU {self.miou:.3f}{absent} pixel accuracy {self.accuracy:.3f}"
