"""Features of all images of a dataset."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae.data import loader
from mae.data.item import Batch
from mae.data.samples import Samples
from mae.data.source import Source, Stream
from mae.inference.classes import NOT_IN_FEATURES
from mae.inference.model import Model
from mae.training import feature_files
from mae.training.compiling import padded
from mae.training.precision import Precision


def samples_of(
    model: Model, source: Source | Stream, fast_jpeg: bool = False, draw_noise: Callable[[], torch.Tensor] | None = None
) -> Samples:
    """Returns the images of a dataset as a model gets them in an evaluation.

    Args:
        fast_jpeg: as in `decode`.
        draw_noise: as in `Samples`.
    """
    return Samples(
        source, model.preprocess, in_chans=model.in_chans, seed=0, draw_noise=draw_noise, on_bad_image="error",
        fast_jpeg=fast_jpeg, exif=bool(model.settings.get("exif")), values=model.values,
    )  # fmt: skip


class Extractor(torch.nn.Module):
    """Normalized images (B, c, H, W) -> features, as a module, which can be compiled.

    Args:
        pool: as in `ModelMixin.extract_feat`.
    """

    def __init__(self, model: Model, pool: str | None) -> None:
        super().__init__()
        self.model = model
        self.pool = pool

    def forward(self, imgs: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model.compute_features(imgs, self.pool, **inputs)


def extract(
    extractor: Extractor,
    source: Source,
    folder: Path | None,
    settings: dict[str, Any],
    batch_size: int,
    num_workers: int,
    precision: Precision,
    fast_jpeg: bool = False,
) -> np.ndarray:
    """Computes features (n, D), or (n, T + N, D) for tokens, in fp32.

    Args:
        folder: folder of the features, which are mapped into memory, and of their progress. If it exists with the same
            settings, the run is resumed. None: they are in memory.
        settings: what the features depend on, for a folder.
        fast_jpeg: as in `decode`.

    Raises:
        OSError: the disk is full. The same command resumes the run.
        BadImage: an image can't be read.
    """
    model = extractor.model

    def encode(rest: Source) -> Iterator[Batch]:
        samples = samples_of(model, rest, fast_jpeg)
        batches = loader.eval_loader(samples, batch_size, num_workers, pin_memory=precision.device.type == "cuda")
        return feature_files.encode(
            padded(extractor, extractor), batches, normalize=model.normalize, precision=precision
        )

    with model.evaluating(*NOT_IN_FEATURES):
        return feature_files.extract(encode, source, folder, settings)[0].numpy()
