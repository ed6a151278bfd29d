"""Labelled data and trained weights for supervised training and evaluation: of classifiers, probes and k-NN."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import mae.build
from mae.data import equal_images, extra_inputs, labels
from mae.data.run_data import RunData
from mae.data.source import Source
from mae.evaluate.imagenet import synsets
from mae.settings import ImageSpec, ModelSpec
from mae.settings.choices import CLASSIFICATION, REGRESSION
from mae.weights import loading, reading, shapes

logger = logging.getLogger(__name__)


def open_labelled(
    data: RunData, nb_classes: int | None, reads_in_order: bool = False
) -> tuple[Source, Source, dict[str, Any]]:
    """Opens the training and the validation set, as `RunData.open_pair` does.

    Returns:
        The sets, in which numbers are standardized on the training set; and, as settings, what identifies the chosen
        images, and mean and standard deviation of the numbers.
    """
    train, val, record = data.open_pair(nb_classes, reads_in_order)
    equal_images.warn(train, val)
    if data.images.task == CLASSIFICATION:
        return train, val, record
    mean, std = labels.statistics(train, data.images.task)
    train, val = (labels.standardized(source, mean, std) for source in (train, val))
    units = {"target_mean": mean, "target_std": std} if data.images.task == REGRESSION else {}
    return train, val, record | units


def load_for_evaluation(
    build: Callable[[ModelSpec, ImageSpec], nn.Module],
    spec: ModelSpec,
    file: reading.Weights,
    data: RunData,
) -> tuple[nn.Module, Source]:
    """Loads the classifier of a file, and converts the labels of the validation set to indices into its classes.

    A warning says that other training images are held out than in the training of the file.

    Raises:
        ValueError: the file has another architecture, or the dataset has classes that the classifier does not have.
    """
    val, chosen = data.open_val()
    num_classes = file.num_classes
    task = data.images.task
    recorded, current = (found.get("held_out_images") for found in (file.settings, chosen))
    if current and recorded != current:
        logger.warning(
            f"the training of {file.origin} held out {recorded or 'none of its images, or does not record them'}, and "
            f"now {current} are held out: images that it was trained on may be among them"
        )
    if task != file.settings.get("task", CLASSIFICATION):
        recorded = file.settings.get("task", CLASSIFICATION)
        raise ValueError(f"task={task}: {file.origin} was trained with task={recorded}; omit `task`")
    classes = file.settings.get("classes")
    names = file.settings.get("label_names")
    if not classes and names and set(val.classes) <= set(names):
        classes = names
    if spec.nb_classes not in (None, num_classes):
        raise ValueError(f"{file.origin} has {num_classes} classes, and `nb_classes` is {spec.nb_classes}")
    if task == CLASSIFICATION and num_classes != len(val.classes):
        val = labels.without_placeholders(val)
    if task == REGRESSION:
        units = ("target_mean", "target_std")
        shapes.require_settings(file.settings, units, file.origin, "it predicts numbers; train a head")
    if not classes and task == CLASSIFICATION and labels.has_ids(val):
        classes = labels.outputs(num_classes)
    if not classes and len(val.classes) != num_classes:
        raise ValueError(f"{file.origin} has {num_classes} classes, and the validation set has {len(val.classes)}")
    if not classes and names and val.classes != synsets():
        ours, other = next(pair for pair in zip(val.classes, names, strict=True) if pair[0] != pair[1])
        logger.warning(
            f"{file.origin} has other names of classes: its labels are taken in the order of the validation set, such "
            f"as {other!r} for {ours!r}"
        )
    val = labels.counted_as(val, classes or val.classes, task)
    if task == REGRESSION:
        val = labels.standardized(val, file.settings["target_mean"], file.settings["target_std"])
    model = build(replace(spec, nb_classes=num_classes), data.images)
    loading.load_classifier(model, file)
    extra_inputs.require_fitting(model, val)
    return model, val


def load_frozen(
    model: nn.Module, file: reading.Weights | None, adapt_input: str, classes: Sequence[str] | None = None
) -> None:
    """Loads the encoder of a file, as `loading.load_encoder` does. Without a file, it logs a warning."""
    if file:
        loading.load_encoder(model, file, adapt_input, classes)
    else:
        logger.warning("no `finetune`: the features are from an untrained encoder with random weights")


def build_frozen(spec: ModelSpec, images: ImageSpec, file: reading.Weights | None, encoder: Any, has_all: bool) -> Any:
    """Builds the encoder of a run without a head, with the weights of a file.

    Args:
        encoder: as in `mae.build.frozen_encoder`.
        has_all: whatever `global_pool` is, the encoder has the norm of its tokens, as `FrozenFeatures` needs it for
            all poolings; unless the file is a classifier without this norm.
    """
    if has_all and not (file and "fc_norm.weight" in file.tensors):
        spec = replace(spec, global_pool=False)
    model = mae.build.frozen_encoder(spec, images, encoder)
    load_frozen(model, file, spec.adapt_input)
    return model
