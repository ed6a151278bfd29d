"""Features of a frozen encoder for the training of its head, computed in every pass or stored."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae import parallel
from mae.checkpoints import checkpoint, run_directory
from mae.data import transforms
from mae.data.item import Batch
from mae.data.run_data import RunData
from mae.data.source import Source, versions
from mae.pooling import OF_TIMM, pooled
from mae.settings import REBUILDS, ModelSpec
from mae.settings.choices import BOTH, CLASS_TOKEN, PATCHES, TIMM
from mae.training import feature_files
from mae.training.compiling import padded
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

MAX_BATCH = 512  # images or tokens in a batch of an evaluation


def encode_images(
    data: RunData, source: Source, model: Any, batch_size: int, precision: Precision, on_bad_image: str | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Returns batches with the input of the head of a `VisionTransformer`, from `feature_files.encode`.

    Args:
        forward: computes other features in place of this input.
    """
    batches = data.eval_batches(source, batch_size, on_bad_image)
    forward = padded(forward or model.eval().forward_features, model.eval())
    return feature_files.encode(forward, batches, normalize=data.normalize, precision=precision)


def _all_poolings(model: Any, images: Tensor, **inputs: Tensor) -> Tensor:
    """Images (B, c, H, W) -> the inputs of the heads of all poolings: (B, 4 D).

    They are the class token, the mean of `global_pool`, whose norm is new, and `class_and_patch_features`.
    """
    tokens = model.get_intermediate_layers(images, norm=False, **inputs)[0]
    mean = pooled(model, tokens, PATCHES)
    mean = F.layer_norm(mean, mean.shape[-1:], eps=getattr(model.norm, "eps", 1e-6))
    tokens = model.norm(tokens)
    return torch.cat([pooled(model, tokens, CLASS_TOKEN), mean, pooled(model, tokens, BOTH)], dim=1)


class FrozenFeatures:
    """Features of a frozen encoder for the images of this process.

    Features (n, D) are stored in memory. The tokens (n, N, D) of an attentive probe are stored in fp16 in files that
    are mapped into memory (`cache_features`), or are computed in every pass.

    Args:
        spec: the model of the run.
        model: a `VisionTransformer`, with the head of a probe if the head pools. With `kept`, a pooled encoder has the
            norm of its tokens, from which all poolings come; without this norm there is one.
        sets: datasets by name.
        output_dir, resume: the settings. A run that does not resume removes the files of an earlier run.
        kept: folder of the stored features or tokens, for several runs with the same images and encoder. Features of
            all poolings are computed in one pass.

    Raises:
        ValueError: the disk has no space for the files.
    """

    def __init__(
        self, spec: ModelSpec, data: RunData, model: Any, precision: Precision, sets: Mapping[str, Source],
        batch_size: int, output_dir: Path, resume: str = "", kept: Path | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.data = data
        self.model = model
        self.precision = precision
        self.sets = sets
        self.batch_size = min(batch_size, MAX_BATCH)
        self.are_stored = data.data.cache_features or not model.head_pools
        self.kept = kept
        self.has_all = kept is not None and not model.head_pools and hasattr(model, "norm")
        self.folder = kept or output_dir / "tokens"
        if self.are_stored and model.head_pools:
            if not kept and parallel.is_main() and not run_directory.chosen(output_dir, resume):
                shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier run, which is not resumed
            self._require_space()

    def open(self, name: str) -> Callable[[], Iterable[Batch]]:
        """Returns a function that starts a pass over a dataset, in batches for `evaluate`."""
        if not self.are_stored:
            return partial(self._encode, name, self.sets[name])
        features, targets = self.load(name)
        size = self.batch_size if self.model.head_pools else 4096
        starts = range(0, len(targets), size)
        return lambda: (Batch(features[n : n + size], targets[n : n + size]) for n in starts)

    def load(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the stored features (n, D) or tokens (n, N, D) of a dataset, and its labels (n,).

        With `kept`, features are those of `_all_poolings` (n, 4 D), mapped from a file.
        """
        source = self.sets[name]
        if name == "train" and self.data.samples(source, transforms.scaled_transform(0)).augments():
            logger.warning("the dataset augments its images: each has the features of one augmentation")
        options = dict[str, Any]()
        if self.model.head_pools or self.kept:
            folder = self.folder / f"{name}-{parallel.rank()}-of-{parallel.world_size()}"
            options = {"folder": folder, "settings": self._token_settings(source)}
        if self.model.head_pools:
            options["dtype"] = torch.float16
        features, targets = feature_files.extract(partial(self._encode, name), source, **options)
        return features, targets

    def load_all(self) -> dict[str, list[np.ndarray]]:
        """Returns the features (n, D) of each dataset with `kept`, by the names of the poolings: that of the run first.

        Those of BOTH are (n, 2 D). The arrays are mapped from files: do not write to them.
        """
        stored = [self.load(name)[0].numpy() for name in self.sets]
        if not self.has_all:
            return {OF_TIMM if self.spec.model.startswith(TIMM) else PATCHES: stored}
        width = stored[0].shape[1] // 4
        parts = {CLASS_TOKEN: slice(0, width), PATCHES: slice(width, 2 * width), BOTH: slice(2 * width, None)}
        found = {name: [features[:, part] for features in stored] for name, part in parts.items()}
        first = self.spec.pool or (PATCHES if self.spec.global_pool else CLASS_TOKEN)
        return {first: found[first], **found}

    def _encode(self, name: str, source: Source) -> Iterator[Batch]:
        on_bad_image = None if name == "val" or self.data.data.on_bad_image is None else "error"
        forward = partial(_all_poolings, self.model) if self.has_all else None
        return encode_images(self.data, source, self.model, self.batch_size, self.precision, on_bad_image, forward)

    def _token_settings(self, source: Source) -> dict[str, Any]:
        """Returns all settings that the tokens depend on, as plain values."""
        spec = self.spec
        data = self.data.data
        mean, std = self.data.statistics
        return {
            "model": spec.model, "patch_size": spec.patch_size, "encoder": spec.encoder,
            "encoder_args": spec.encoder_args, "lora_alpha": spec.lora_alpha,
            "dataset": data.dataset, "data_path": data.data_path,
            **{name: value for name, value in self.data.images.record().items() if name in REBUILDS},
            "mean": list(mean), "std": list(std), "fast_jpeg": data.fast_jpeg and data.fast_jpeg_resize,
            "precision": self.precision.name, "has_all": self.has_all,
            "weights": checkpoint.compute_digest(encoder_state(self.model)),
            "images": checkpoint.compute_digest(versions(source, parallel.rank(), parallel.world_size())),
        }  # fmt: skip

    def _require_space(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        count = sum(map(len, self.sets.values()))
        size = 2 * count * self.model.num_patches * self.model.embed_dim
        existing = sum(file.stat().st_size for file in self.folder.glob(f"*-of-{parallel.world_size()}/features.*"))
        free = shutil.disk_usage(self.folder).free
        text = f"the tokens of {count:,} images take {size / 1e6:,.0f} MB in {self.folder}"
        if size - existing > free:
            raise ValueError(
                f"`cache_features`: {text}, where {free / 1e6:,.0f} MB are free: free space, give another "
                f"`output_dir`, or omit `cache_features`"
            )
        logger.info(f"`cache_features`: {text}")
        parallel.barrier()  # the free space is that before any process writes


def encoder_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a model without its head, on the host."""
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    return checkpoint.snapshot(tensors)
