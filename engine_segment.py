"""The loss of segmentation, and evaluation of segmentation models."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mae import parallel
from mae.data.batches import prefetch
from mae.data.item import IGNORED, Batch
from mae.evaluate import score_files
from mae.evaluate.segmentation import Scores, class_title, confusion_matrix, predict_classes
from mae.training.compiling import padded
from mae.training.precision import Precision

logger = logging.getLogger(__name__)


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Returns the cross-entropy of the pixels that are not ignored, divided by the number of all pixels.

    This divisor does not depend on the masks. The loss of an update is therefore the mean of those of its batches, and
    a batch of ignored pixels has the loss 0. The gradient still depends on the split of the effective batch size,
    because the batch norm of the heads normalizes each batch of a process by the statistics of its own images.

    Args:
        logits: (B, classes, H, W).
        masks: classes (B, H, W), or IGNORED.
    """
    return F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum") / masks.numel()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader: Iterable[Batch],
    *,
    normalize: Callable[[Tensor], Tensor],
    precision: Precision,
    num_classes: int,
    window: tuple[int, int],
    batch_size: int,
) -> Scores:
    """Evaluates a model by windows on the images of this process, at the resolution of the masks.

    The counts of all processes are added, so that the scores do not depend on the number of processes.

    Args:
        data_loader: batches of one image each, distributed as in `loader.eval_loader`.
        window: (h, w) of the windows.
        batch_size: number of windows in a batch.
    """
    # Images differ in their number of windows. Powers of two are few graphs, and less than double the computation.
    forward = padded(model.eval(), model, lambda count: min(batch_size, 2 ** (count - 1).bit_length()))

    def predict(windows: Tensor, **inputs: Tensor) -> Tensor:
        with precision.autocast():
            return forward(windows, **inputs).float()

    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=precision.device)
    batches = tqdm(data_loader, desc="evaluation", unit="img", leave=False, disable=None)
    for batch in prefetch(batches, precision.device):
        size = (batch.labels.shape[1], batch.labels.shape[2])
        image = batch.normalized(normalize)[0]
        predictions = predict_classes(predict, image, size, window, batch_size, batch.inputs)
        matrix += confusion_matrix(batch.labels[0], predictions, num_classes)
    return Scores(sum(parallel.gather(matrix.cpu().numpy())))


def warn_of_lacking_classes(found: Sequence[int], classes: Sequence[str], split: str) -> None:
    """Logs a warning if the pixels of masks have one of several classes, or none.

    Args:
        found: the classes in the masks.
        split: the set of the masks, such as "the validation".
    """
    if len(found) >= min(2, len(classes)):
        return
    only = f"{class_title(classes[found[0]])}, or " if len(found) else ""
    logger.warning(
        f"all pixels of {split} masks are {only}{IGNORED}, which is ignored; in masks of two classes with the "
        f"values 0 and {IGNORED}, write 1 in place of {IGNORED}"
    )


def report_scores(scores: Scores, classes: list[str], folder: str | None) -> None:
    """Logs the scores, and writes the files of `--report` to a folder."""
    logger.info(str(scores))
    warn_of_lacking_classes(np.flatnonzero(scores.matrix.sum(axis=1)).tolist(), classes, "the validation")
    if folder and parallel.is_main():
        score_files.write_matrix(
            Path(folder), [*map(class_title, classes)], scores.matrix, "pixels", {"iou": scores.iou}
        )
