"""Images without labels for pre-training, and the probe of a pre-training that has labels."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mae import parallel
from mae.context import STEPS
from mae.data import extra_inputs, loader, transforms
from mae.data.generators import preserve_generators
from mae.data.item import Batch
from mae.data.run_data import RunData
from mae.data.samples import Samples
from mae.data.source import Source, Stream
from mae.settings import AugmentationSpec, EvaluationSpec, ModelSpec
from mae.training.loop import Loss
from models_mae import TARGET_EPS, MaskedAutoencoderViT

logger = logging.getLogger(__name__)

CHECKED = 8  # images from which `check_targets` decides


def with_required_terms(
    loss: Callable[[nn.Module, Batch], Loss], spec: ModelSpec
) -> Callable[[nn.Module, Batch], Loss]:
    """Returns the same loss, which raises ValueError if it lacks a term that the settings ask for.

    A `forward` of the user's code may return a loss without it.
    """
    required = {name for name in ("uniformity", "preserve") if getattr(spec, name)}

    def checked(model: nn.Module, batch: Batch) -> Loss:
        value = loss(model, batch)
        if missing := required - set(value if isinstance(value, Mapping) else ()):
            raise ValueError(
                f"`{min(missing)}`: the `forward` of the model class has no such term of the loss: add it by "
                f"`with_terms` (docs/method.md)"
            )
        return value

    return checked


def open_images(data: RunData, evaluation: EvaluationSpec) -> Source | Stream:
    """Opens the training images. The random numbers, which the initial weights depend on, do not change.

    Raises:
        ValueError: they can't be opened, or there is no `probe_path`.
    """
    path = evaluation.probe_path
    if evaluation.probe_every and path and not Path(path).exists():
        raise ValueError(f"probe_path={path}: there is no such folder or archive")
    reads_labels = bool(evaluation.probe_every and not path)  # the probe classifies the training images
    with preserve_generators():
        return data.open_split("train", reads_labels)


def open_samples(
    data: RunData, source: Source | Stream, augmentation: AugmentationSpec, draw_noise: Callable[[], Tensor],
    model: MaskedAutoencoderViT, num_visible: int,
) -> tuple[Samples, Samples]:  # fmt: skip
    """Returns the training images: augmented, and as in an evaluation. Enough of their patches are valid.

    It warns as `check_targets`.
    """
    extra_inputs.require_fitting(model, source, steps=STEPS)
    data.check_statistics(source)
    (source,) = data.cached(source)
    images = data.images
    augment = transforms.augmentation_of(images, augmentation)
    # a patch may have several tokens
    patch_size = model.patch_embed.patch_size
    tokens = model.num_patches
    patches = math.prod(side // p for side, p in zip(model.patch_embed.img_size, patch_size, strict=True))
    visible_patches = math.ceil(num_visible * patches / tokens)
    whole: transforms.Transform = transforms.eval_transform(images.input_size, crop=images.crop)
    augment, whole = (
        transforms.WithValidPatches(transform, patch_size, images.min_valid, visible_patches)
        for transform in (augment, whole)
    )
    augmented = data.samples(source, augment, data.data.on_bad_image, draw_noise)
    # An image that has enough valid patches in random crops only does not end the run when examples are drawn.
    full_images = data.samples(source, whole, "skip", draw_noise)
    if model.norm_pix_loss and model.predicts_pixels and parallel.is_main():
        check_targets(model, loader.examples(full_images, CHECKED, data.data.num_workers), data.normalize.std)
    return augmented, full_images


def check_targets(model: MaskedAutoencoderViT, batch: Batch, std: Tensor) -> None:
    """Logs a warning if `norm_pix_loss` does not bring the targets to a variance near 1.

    The published formula adds TARGET_EPS to the variance of a patch. It is small for normalized images. The mean over
    the patches of several images decides, so that images with many flat patches are no reason for a warning.

    Args:
        batch: as a data loader returns it.
        std: standard deviation that normalizes them, as in `Normalize`.
    """
    images = transforms.to_unit_range(batch.images)
    if batch.valid is not None:
        images = images.masked_fill(~batch.valid[:, None], math.nan)
    normalized = (images - images.nanmean(dim=(2, 3), keepdim=True)) / std.cpu()  # no channel offsets
    deviation = math.sqrt(model.patchify(normalized).var(dim=-1).nanmean())
    if deviation**2 < TARGET_EPS:
        logger.warning(
            f"`norm_pix_loss` hardly scores these images: the normalized pixels of a patch have a standard deviation "
            f"of {deviation:.1g}, and the loss adds {TARGET_EPS:g} to its square; give value_range=[MIN, MAX], or "
            f"`mean` and `std` of these images, which mae.data prints"
        )


def open_online_probe(evaluation: EvaluationSpec, *arguments: Any) -> Any:
    """Returns an `online_probe.OnlineProbe`, or None without `probe_every`; as `online_probe.open_probe`."""
    if not (evaluation.probe_every or evaluation.probe_path):
        return None
    from mae.training import online_probe  # which a run without it does not need

    return online_probe.open_probe(evaluation.probe_every, evaluation.probe_path, *arguments)
