"""A recipe of fine-tuning: settings with their reasons, from the facts of images, labels, an encoder and a machine.

The numbers come from the paper (He et al. 2021, appendix A.1), docs/small_data.md and recipes/finetune_*.yaml.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae.data.extra_inputs import shapes_of
from mae.data.source import Source
from mae.plurals import counted
from mae.recommend import recipe, rules, trial
from mae.recommend.facts import Images, Machine, warnings_of
from mae.recommend.rules import Line
from mae.settings.choices import CLASSIFICATION, NO_CROP, SMALL, TIMM
from mae.sizes import Size, side_or_sides, to_pair
from mae.weights import model_settings, reading, shapes
from mae.weights.formats import ours
from models_vit import SIZES

SCRIPT = "main_finetune"
PUBLISHED_LABELS = 1_281_167  # ImageNet-1K
MANY_LABELS = 100_000  # from which the published recipe is used
FEW_LABELS = 1_000  # up to which its augmentation is used; measured with 200 (benchmarks/finetune_rule.md)
# Measured on small images with few labels.
LR = 1e-3
WIDTH = 128
BATCH = 32
MAX_BATCH = 1024  # images per update, as published
UPDATES_PER_EPOCH = 600  # at least, before a batch grows: 10,000 labels have batches of 32, 60,000 of 64
LEAST_UPDATES = 3  # of an epoch: batches of few images are smaller
DEEP = 12  # blocks, from which the published layer decay is used
EPOCHS = (15, 200)  # least and most that were measured: with 60,000 and 100 labels
EPOCHS_OF_ONE = 2000  # epochs = this / root of the labels: about the 200, 100 and 40 of 100, 500 and 2,000 labels
AUGMENTED = 2.6  # times as many with the augmentation of few labels: 368 with 200
MOST_EVALUATIONS = 20
EVALUATION_SPEED = 2.0  # times the throughput of the training
HELD_OUT = 0.2  # of the images of a trial run
MOST_TRIED = 20_000  # images of a trial run
CROPS = ("crop", "crop_scale", "hflip", "vflip", "value_range")
VALUES = ("in_chans", "mean", "std")


class Labels(NamedTuple):
    """What the rules know about the labels of a dataset.

    Args:
        images: number of labelled training images.
        classes: number of classes or targets.
        fewest: number of training images of the smallest class, at least 1; 0 if an image has no single class.
        validation: number of images of the validation set.
        has_inputs: the images have extra inputs, which are not mixed.
    """

    images: int
    classes: int
    fewest: int
    validation: int
    has_inputs: bool = False

    @classmethod
    def of(cls, train: Source, val: Source, task: str) -> "Labels":
        """Summarizes the labels of a training and a validation set."""
        fewest = 0
        if task == CLASSIFICATION:
            fewest = max(1, int(np.bincount(train.labels, minlength=len(train.classes)).min()))
        return cls(len(train), len(train.classes), fewest, len(val), bool(shapes_of(train)))


class Start(NamedTuple):
    """What the rules know about the encoder that a fine-tuning starts from.

    Args:
        name: the file or published name; "" for random weights.
        width: channels of a token.
        depth: number of blocks.
        in_chans: channels of the images of the file.
        input_size, patch_size: in pixels; None: the file does not tell.
        has_images: the file records size, crops and flips of its images, which a fine-tuning takes from it.
    """

    name: str
    width: int
    depth: int
    in_chans: int | None = None
    input_size: Size | None = None
    patch_size: Size | None = None
    has_images: bool = False

    @classmethod
    def of(cls, name: str) -> "Start":
        """Reads an encoder.

        Raises:
            ValueError: there is no such file or name, or it is a model that is not fine-tuned.
            CheckpointError: as in `reading.read`.
        """
        if not name:
            size = SIZES[rules.MODELS[0]]
            return cls("", size["embed_dim"], size["depth"])
        file = reading.read(name)
        if str(file.settings.get("model")).startswith(TIMM):
            raise ValueError(f"finetune={name}: models of timm are frozen encoders, and are not fine-tuned")
        settings = model_settings.classifier_settings(file)
        width, depth = shapes.width_and_depth({key: tensor.shape for key, tensor in file.tensors.items()})
        patches = file.tensors.get(shapes.PATCHES)
        patch_size = None if patches is None else (patches.shape[2], patches.shape[3])
        is_ours = file.format == ours.NAME and "model" in file.settings
        return cls(name, width, depth, settings.get("in_chans"), settings.get("input_size"), patch_size, is_ours)


def has_few(labels: Labels) -> bool:
    """Whether the labels are so few that a training sees each of them hundreds of times. Mixup needs pairs of them."""
    return labels.fewest > 0 and labels.images <= FEW_LABELS and effective_batch(labels) > 1


def is_published(images: Images, labels: Labels) -> bool:
    """Whether images and labels are enough for the published augmentation."""
    return labels.images >= MANY_LABELS and images.shorter >= SMALL


def input_lines(images: Images, start: Start, input_size: Size | None = None) -> list[Line]:
    """Returns the settings of the input, as far as the file of the encoder does not record them.

    Args:
        input_size: the size that is given.

    Raises:
        ValueError: as `rules.image_lines`.
    """
    if start.has_images:
        return []
    lines = rules.image_lines(images, input_size, start.patch_size)
    if not start.name:
        model = Line("model", f"vit_{rules.MODELS[0]}", "the smallest model, because its weights are random")
        return [model, *lines]
    found = []
    largest = max(to_pair(start.input_size or rules.MAX_SIDE))
    if largest > rules.MAX_SIDE and start.patch_size:
        sides = [rules.MAX_SIDE // side * side for side in to_pair(start.patch_size)]
        reason = f"the file has {largest} pixels, which take {(largest / max(sides)) ** 2:.0f} times the computation"
        found.append(Line("input_size", side_or_sides(sides), reason))
    names: Collection[str] = CROPS
    if start.in_chans and images.in_chans not in (1, 3, start.in_chans):
        reason = f"the file has {start.in_chans} channels: each one here starts from the mean of them"
        found.append(Line("adapt_input", "mean", reason))
        names = (*CROPS, *VALUES)
    return [*found, *(line for line in lines if line.name in names)]


def augmentation_lines(images: Images, labels: Labels, has_invalid: bool = False) -> list[Line]:
    """Returns the settings of augmentation and regularization, besides crops and flips.

    Args:
        has_invalid: pixels may be invalid, which RandAugment does not move with the image.
    """
    published = f"the published recipe, for {PUBLISHED_LABELS:,} labels of {rules.MAX_SIDE} pixels"
    values: dict[str, Any] = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25}
    of_classes: dict[str, Any] = {"smoothing": 0.1}
    if not labels.has_inputs:
        of_classes |= {"mixup": 0.8, "cutmix": 1.0}
    if is_published(images, labels):
        values |= {"drop_path": 0.1} | (of_classes if labels.fewest else {})
        return [Line(name, value, f"as in {published}") for name, value in values.items()]
    regular = Line("drop_path", 0, "above 0 for a large model that overfits")
    if has_few(labels):
        if images.in_chans not in (1, 3) or images.is_deep or images.value_range or has_invalid:
            values["aa"] = "none"  # RandAugment is for colors and gray values of 8 bits
        reason = (
            f"as in {published}: up to {FEW_LABELS:,} labels; with 200, it is better than crops alone "
            f"(benchmarks/finetune_rule.md)"
        )
        return [*(Line(name, value, reason) for name, value in (values | of_classes).items()), regular]
    lines = [
        Line("aa", "none", f"RandAugment is of {published}; with fewer epochs, crops are better"),
        Line("reprob", 0, "random erasing: as for aa"),
        regular,
    ]
    if labels.fewest:
        lines.append(Line("smoothing", 0, "as for aa; mixup and CutMix are off (recipes/finetune_fashion_mnist_full)"))
    return lines


def effective_batch(labels: Labels) -> int:
    """Returns the number of images per update: a power of two, at most a third of the images."""
    wanted = min(MAX_BATCH, max(BATCH, labels.images // UPDATES_PER_EPOCH))
    return 2 ** int(math.log2(min(wanted, max(1, labels.images // LEAST_UPDATES))))


def processes_of(machine: Machine, labels: Labels) -> int:
    """Returns the number of processes: one for each GPU or core that has enough images of a batch."""
    return min(machine.gpus or machine.cores, max(1, effective_batch(labels) // rules.MIN_PROCESS_BATCH))


def optimization_lines(labels: Labels, start: Start, machine: Machine) -> list[Line]:
    """Returns the settings of the batches and the learning rate."""
    processes = processes_of(machine, labels)
    batches = rules.batch_lines(labels.images, effective_batch(labels), processes)
    effective = rules.images_per_update(batches, processes)
    lr = LR * WIDTH / max(start.width, 1) * math.sqrt(effective / BATCH)
    decay = Line("layer_decay", 1, "no layer has pre-trained weights")
    if start.name and start.depth < DEEP:
        decay = Line("layer_decay", 0.9, f"{start.depth} blocks; as published, .75, from {DEEP} blocks on")
    elif start.name:
        decay = Line("layer_decay", 0.75, "as published")
    rate = (
        f"{LR:g} for {WIDTH} channels and {BATCH} images per update; a wider encoder has a smaller rate, a larger "
        f"batch one that grows with its root"
    )
    return [*batches, decay, Line("lr", float(f"{lr:.2g}"), rate)]


def most_epochs(images: Images, labels: Labels, start: Start) -> int:
    """Returns the number of epochs if there is time for them."""
    if is_published(images, labels):
        return 100 if start.width <= SIZES["base_patch16"]["embed_dim"] else 50
    return epochs_of(labels)


def epochs_of(labels: Labels) -> int:
    """Returns the number of epochs of fewer than MANY_LABELS labels."""
    least, most = EPOCHS
    epochs = min(most, max(least, EPOCHS_OF_ONE / math.sqrt(labels.images)))
    return round(epochs * (AUGMENTED if has_few(labels) else 1))


def seconds_of(epochs: int, labels: Labels, measured: trial.Trial, in_epoch: int) -> float:
    """Returns the time of a run.

    Args:
        in_epoch: images of the complete updates of an epoch.
    """
    evaluations = math.ceil(epochs / math.ceil(epochs / MOST_EVALUATIONS))
    images = epochs * in_epoch + evaluations * labels.validation / EVALUATION_SPEED
    return measured.startup + images / measured.images_per_s


def length_lines(
    images: Images, labels: Labels, start: Start, measured: trial.Trial, in_epoch: int, seconds: float
) -> list[Line]:
    """Returns the number of epochs, the warm-up, and the epochs after which the run evaluates and saves.

    Args:
        in_epoch: images of the complete updates of an epoch.
        seconds: time of the run.
    """
    most = most_epochs(images, labels, start)
    fitting = [epochs for epochs in range(1, most + 1) if seconds_of(epochs, labels, measured, in_epoch) <= seconds]
    epochs = max(fitting, default=1)
    reason = f"{most} are enough for {labels.images:,} labels (docs/small_data.md: many epochs if labels are few)"
    if is_published(images, labels):
        reason = "as published"
    if epochs < most:
        reason = f"they fit the time at {measured.images_per_s:,.0f} images/s, measured here; {most} need more time"
    if not fitting:
        minutes = seconds_of(1, labels, measured, in_epoch) / 60
        reason = f"one epoch exceeds the time: the run takes {minutes:,.1f} minutes"
    return [
        Line("epochs", epochs, reason, is_warning=not fitting),
        Line("warmup_epochs", epochs / 10, "a tenth of the epochs"),
        Line("eval_every", math.ceil(epochs / MOST_EVALUATIONS), f"at most {MOST_EVALUATIONS} evaluations"),
        Line("save_every", epochs, "checkpoint-best.pth is the best evaluation, checkpoint-last.pth resumes"),
    ]


def of_trial(labels: Labels, effective: int) -> dict[str, Any] | None:
    """Returns the settings that make a trial run short; None: there is no short one, because a class is too small."""
    settings = {"eval_every": trial.EPOCHS, "val_fraction": HELD_OUT}
    needed = math.ceil(trial.UPDATES * effective / (1 - HELD_OUT))
    if labels.images <= needed:
        return settings
    per_class = min(labels.fewest, math.ceil(needed / labels.classes))
    if per_class * labels.classes * (1 - HELD_OUT) >= effective:
        return {**settings, "train_per_class": per_class}
    return settings if labels.images <= MOST_TRIED else None


def write(
    path: Path, images: Images, labels: Labels, start: Start, machine: Machine, given: Mapping[str, Any],
    minutes: float | None, decoding: float,
) -> list[str]:  # fmt: skip
    """Writes a recipe that fine-tunes.

    Args:
        path: the file.
        given: settings of the dataset and the encoder, by name.
        minutes: time of the run, with its start; None: as long as `most_epochs`.
        decoding: images/s that are read and decoded.

    Returns:
        The lines that the command prints: what is wrong with the images, and the command that runs the recipe.

    Raises:
        ValueError: the images are too small, the trial run failed, or none is short enough to fit a time.
    """
    fixed, flags = recipe.split_given(given)
    found = [
        *input_lines(images, start, given.get("input_size")), *augmentation_lines(images, labels, "nodata" in given),
        *optimization_lines(labels, start, machine), *rules.loading_lines(images, machine),
    ]  # fmt: skip
    left_out = {*given, "crop_scale"} if given.get("crop") == NO_CROP else {*given}
    lines = [*fixed, *(line for line in found if line.name not in left_out)]
    settings = {line.name: line.value for line in lines}
    processes = processes_of(machine, labels)
    threads = machine.threads(processes)
    effective = rules.images_per_update(lines, processes)
    short = of_trial(labels, effective)
    if short is None:
        raise ValueError(
            f"a class has {labels.fewest} of {labels.images:,} images, so that no short run measures the speed: give "
            f"train_list=FILE without such classes"
        )
    measured = recipe.tried(lines, processes, threads, flags, script=SCRIPT, settings=short)
    if settings.get("cache_images"):
        measured = measured._replace(startup=measured.startup + images.count / decoding)
    in_epoch = labels.images // effective * effective
    length = length_lines(images, labels, start, measured, in_epoch, 60 * minutes if minutes else math.inf)
    epochs = length[0].value
    takes = seconds_of(epochs, labels, measured, in_epoch) / 60
    trains = f"{counted(epochs, 'epoch')} {'takes' if epochs == 1 else 'take'} {recipe.minutes_text(takes)}"
    command = recipe.launch(path, processes, 0 if machine.gpus else threads, flags, SCRIPT)
    recipe.save(path, "Fine-tuning", takes, command, [*lines, *length])
    return [
        f"training    {measured.images_per_s:,.0f} images/s: {trains}",
        *[f"warning     {text}" for text in warnings_of(images)],
        *_warnings(labels, start),
        *[f"warning     {line.reason}" for line in length if line.is_warning],
        f"recipe      {path}\n",
        command,
    ]


def _warnings(labels: Labels, start: Start) -> list[str]:
    found = []
    error = 50 / math.sqrt(labels.validation)
    if labels.fewest and error > 1:
        found.append(
            f"warning     {labels.validation:,} validation images are few: the standard error of an accuracy is up to "
            f"{error:.1f} points"
        )
    if not start.name:
        text = "no `finetune`: the weights are random, and with few labels a fine-tuned encoder is better"
        found.append(f"warning     {text}")
    return found
