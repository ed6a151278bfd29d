"""What changes the images and targets of a batch in fine-tuning (erasing, mixup, cutmix, smoothing), and the loss."""

import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mae.settings.arguments import advice, in_words
from mae.settings.choices import CLASSIFICATION
from mae.settings.images import AugmentationSpec

logger = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, C), labels -> ()


def make_erasing(changes: AugmentationSpec, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Returns the random erasing of `reprob`; None if it is 0."""
    if not changes.reprob:
        return None
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(changes.reprob, mode=changes.remode, max_count=changes.recount, device=str(device))


def make_mixup(
    changes: AugmentationSpec, task: str, class_weight: str | None, smoothing: float, batch_size: int, num_classes: int,
    extra_names: Collection[str] = (),
) -> Callable[..., Any] | None:  # fmt: skip
    """Returns mixup and cutmix of timm, or None if both are disabled.

    Args:
        task, class_weight, smoothing, batch_size: the settings.
        extra_names: the extra inputs of the images.

    Raises:
        ValueError: the classes have weights; the images have extra inputs, which are not mixed; the batch size is odd,
            and images are mixed in pairs; or the range of `cutmix_minmax` is empty.
    """
    if not (changes.mixup or changes.cutmix or changes.cutmix_minmax):
        return None
    if class_weight or task != CLASSIFICATION or extra_names:
        off = {"mixup": 0, "cutmix": 0, "cutmix_minmax": None}
        mixes = {name: value for name, value in changes.record().items() if name in off and value}
        disabled = advice({name: off[name] for name in mixes})
        if extra_names:
            names = ", ".join(sorted(extra_names))
            raise ValueError(
                f"{in_words(mixes)}: images are mixed, and their extra inputs ({names}) are not: {disabled}"
            )
        other = f"class_weight={class_weight}" if task == CLASSIFICATION else f"task={task}"
        raise ValueError(f"{in_words(mixes)} {other}: mixed images have no single class: {disabled}")
    if changes.cutmix_minmax and changes.cutmix_minmax[0] >= changes.cutmix_minmax[1]:
        raise ValueError("`cutmix_minmax`: give the smaller fraction first")
    if batch_size % 2:
        raise ValueError(f"batch_size={batch_size}: `mixup` and `cutmix` mix pairs; give an even number")
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=changes.mixup,
        cutmix_alpha=changes.cutmix,
        cutmix_minmax=changes.cutmix_minmax,
        prob=changes.mixup_prob,
        switch_prob=changes.mixup_switch_prob,
        mode=changes.mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def make_criterion(
    loss: Loss | None, of_task: Callable[..., Tensor], smoothing: float, mixes: bool, explicit: frozenset[str]
) -> Loss:
    """Returns the loss of a run. A warning names settings that have no effect on that of the user's code.

    Args:
        loss: of the user's code, if any.
        of_task: the loss of --task, with the argument `smoothing`.
        mixes: labels are shares of the classes (B, C), because images are mixed.
        explicit: names of the explicit settings.
    """
    if loss:
        for name in sorted(explicit & {"class_weight", "regression_loss", "smoothing"}):
            logger.warning(f"`{name}` has no effect on the `loss` that is given")
        return loss
    if not mixes:
        return partial(of_task, smoothing=smoothing)
    from timm.loss import SoftTargetCrossEntropy  # timm takes more than a second

    found: Loss = SoftTargetCrossEntropy()
    return found


def smoothing_of(smoothing: float, task: str, is_explicit: bool) -> float:
    """Returns the label smoothing of the training; 0 if the labels are not classes.

    Raises:
        ValueError: it is given, and the labels are not classes.
    """
    if task == CLASSIFICATION:
        return smoothing
    if smoothing and is_explicit:
        raise ValueError(f"smoothing={smoothing:g}: task={task} has no label smoothing: give smoothing=0")
    return 0.0
