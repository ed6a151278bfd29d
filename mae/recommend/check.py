"""Checks a dataset before training, and writes a recipe for it.

    python -m mae.data IMAGES
    python -m mae.data IMAGES.zip --recipe mine.yaml --minutes 30
    python -m mae.data IMAGES --recipe mine.yaml --minutes 30 --init_from facebook/dinov2-small
    python -m mae.data LABELLED --recipe tuned.yaml --for finetune --finetune runs/mine/checkpoint-99.pth

The command prints the number of images, their sizes, channels and classes, the unreadable images with the reason, the
mean and standard deviation of each channel (for --mean and --std), and the decoding throughput in images/s. With
--recipe, it measures the training for some seconds, writes the settings of main_pretrain.py with their reasons, and
prints the command that runs them. With --init_from, they continue an encoder (docs/start_from.md). With --for finetune,
they are those of main_finetune.py for the labels.
"""

import argparse
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mae.data import equal_images, large
from mae.data.batches import up_to_cores
from mae.data.image_facts import ImageFacts, all_facts, channels_of, progress, statistics_of
from mae.data.labels import has_class_numbers, has_ids, is_placeholder
from mae.data.loader import MAX_BAD_SHARE
from mae.data.open import open_source
from mae.data.pixels import MAX_PIXELS, BadImage, PixelValues
from mae.data.run_data import RunData
from mae.data.source import OpenDataset, Source, Stream, evenly_spaced, first_few, is_stream
from mae.files.untrusted import printable
from mae.plurals import counted
from mae.recommend import check_flags
from mae.recommend.check_flags import (
    ENCODER,
    FINETUNING,
    LABELS,
    MASKS,
    NAMES_LABELS,
    NOT_OF_FINETUNING,
    OF_FINETUNING,
    ON_BAD_IMAGE,
    OTHERS,
    PRETRAIN,
    READ,
)
from mae.settings import ImageSpec, Run
from mae.settings.arguments import in_words
from mae.settings.choices import CLASSIFICATION
from mae.user_code import dataset_of

if TYPE_CHECKING:
    from mae.data.segmentation_masks import MaskFormat
    from mae.recommend.continued import Start

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # unreadable images that are listed


def report_on(
    source: Source | Stream, facts: list[ImageFacts], seconds: float, in_chans: int, task: str = CLASSIFICATION,
    exif: bool = False,
) -> list[str]:  # fmt: skip
    """Returns the lines of the report.

    Args:
        in_chans: number of channels that the model gets.
        facts: the facts of the images that were read.
        seconds: the duration of reading them.
        task: what the labels mean, one of `choices.TASK_CHOICES`.
        exif: the orientation in EXIF data is applied.
    """
    good = [fact for fact in facts if fact.sums is not None]
    bad = [fact.unreadable for fact in facts if fact.unreadable]
    read = f", of which {len(facts):,} were read" if len(facts) < len(source) else ""
    lines = [f"images      {len(source):,}{read}"]
    counts = Counter(fact.label for fact in good if fact.label >= 0)
    if counts and has_class_numbers(source):
        named = [label for label, name in enumerate(source.classes) if not (has_ids(source) or is_placeholder(name))]
        of_each = [counts[label] for label in {*counts, *named}]
        fewest = "" if min(of_each) == max(of_each) else f"{min(of_each):,} to "
        of_sample = " that were read" if read else ""
        text = f"{len(of_each)}, of {fewest}{counted(max(of_each), 'image')}{of_sample}: {first_few(source.classes)}"
        if len(of_each) == 1:  # such as a folder with all images, and no class
            (label,) = {*counts, *named}
            name = source.classes[label] if label < len(source.classes) else label
            text = f"none: all images are of {name}; pre-training needs no labels"
        if lacking := sum(fact.label < 0 for fact in good):
            text += f"; {counted(lacking, 'image')} without a label"
        lines.append(f"classes     {text}")
    elif task != CLASSIFICATION:
        lines.append(f"labels      {len(source.classes)} for each image: {first_few(source.classes)}")
    else:
        lines.append("classes     none: pre-training needs no labels")
    listed = "".join(f"\n            {name}: {why}" for name, why in bad[:MAX_LISTED])
    more = f"\n            and {len(bad) - MAX_LISTED:,} more" if len(bad) > MAX_LISTED else ""
    lines.append(f"unreadable  {len(bad):,}{listed}{more}")
    if good:
        heights, widths = np.array([fact.stored_size for fact in good]).T
        spread = f"; {heights.min()} to {heights.max()} x {widths.min()} to {widths.max()}"
        (size, most), *others = Counter(fact.stored_size for fact in good).most_common()
        different: dict[tuple[Any, bytes], int] = {}  # the first label of equal images
        relabelled = sum(different.setdefault((fact.size, fact.digest), fact.label) != fact.label for fact in good)
        of_others = f", {relabelled:,} with another label" if relabelled else ""
        among = f" among the {len(facts):,} that were read" if read else ""
        pixels = sum(math.prod(fact.size) for fact in good)
        valid = sum(fact.valid for fact in good)
        lines += [
            f"sizes       {size[0]} x {size[1]} (height x width): {counted(most, 'image')}{spread if others else ''}",
            f"channels    {channels_text(good, in_chans)}",
            f"depth       {counted(sum(fact.deep for fact in good), 'image')} of more than 8 bits",
            f"values      {min(fact.low for fact in good):.4g} to {max(fact.high for fact in good):.4g}, when scaled",
            f"duplicates  {counted(len(good) - len(different), 'image')}{among}{of_others}",
        ]
        if reduced := sum(fact.size != fact.stored_size for fact in good):
            lines.append(
                f"large       {counted(reduced, 'image')} of more than {large.PIXELS:,} pixels: 1/{large.FACTOR} of "
                f"the sides is read, one image at a time in up to {MAX_PIXELS * 4 / 1e6:,.0f} MB"
            )
        if warned := [fact.warning for fact in good if fact.warning]:
            lines.append(f"warnings    {counted(len(warned), 'image')}, such as: {printable(warned[0])}")
        if valid < pixels:
            lines.append(f"invalid     {1 - valid / pixels:.2%} of the pixels")
        turned = sum(fact.turned for fact in good)
        use = "applied (exif=true)" if exif else "ignored in training"
        lines.append(f"rotated     {counted(turned, 'image')} by EXIF data, which is {use}")
    lines.append(f"speed       {len(facts) / seconds:,.0f} images/s read and decoded")
    return lines


def channels_text(good: list[ImageFacts], in_chans: int) -> str:
    """Returns the numbers of channels in the files, and the number that the model gets if it is another one."""
    counts = Counter((fact.channels, fact.are_equal) for fact in good).most_common()
    text = ", ".join(
        f"{channels}: {counted(count, 'image')}{' of equal channels' if are_equal else ''}"
        for (channels, are_equal), count in counts
    )
    if all(fact.channels == in_chans for fact in good):
        return text
    return f"{text}; the model gets {in_chans}{' (gray)' if in_chans == 1 else ''}"


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return check_flags.get_args_parser()


def main(args: argparse.Namespace, source: OpenDataset | None = None) -> None:
    """Prints the report, and writes the recipe.

    Args:
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.

    Raises:
        ValueError: the dataset can't be opened, or there is no recipe for it or for the encoder of `init_from`.
        BadImage: an image can't be read, and `on_bad_image` is not "skip"; or more than `loader.MAX_BAD_SHARE` can't.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    given = check_flags.given_of(args)
    _warn_of_idle(args, given)
    named = {"dataset": dataset_of(source, given.get("dataset"))} if source else {}
    run = Run.of({**given, **named})
    encoder = _encoder(args.init_from, args.in_chans) if args.init_from else None
    images = open_images(run, args.split, source)
    if args.split == "train" and run.explicit.isdisjoint(NAMES_LABELS) and run.data.data_path:
        images, labels_of_file = labelled(args, run, images)
        if labels_of_file:
            given |= labels_of_file
            run = Run.of({**given, **named})
    indices = evenly_spaced(len(images), args.limit or len(images))
    values = PixelValues(run.images.nodata, run.images.value_range, run.images.channels_last)
    in_chans = args.in_chans or (encoder.in_chans if encoder else channels_of(images, values))
    exif = bool(run.images.exif)
    facts_of = all_facts(images, in_chans, indices, up_to_cores(args.num_workers), values, exif)
    started = time.perf_counter()
    facts = list(progress(facts_of, "reading", len(indices), leave=True))
    seconds = time.perf_counter() - started
    print("\n".join(report_on(images, facts, seconds, in_chans, run.images.task, exif)))
    if not (run.data.dataset or source) and (equal := equal_images_of(run, args.split, images)):
        print(f"held-out    {equal}")
    num_bad = sum(bool(fact.unreadable) for fact in facts)
    if not args.recipe and num_bad < len(facts):  # a recipe has them
        mean, std = statistics_of(facts)
        print(f"--in_chans  {in_chans}\n--mean      {mean}\n--std       {std}")
    skips = given.get(ON_BAD_IMAGE, "skip" if args.recipe else "error") == "skip"
    text = f"{num_bad:,} of {len(facts):,} images can't be read"
    if num_bad > (MAX_BAD_SHARE * len(facts) if skips else 0):
        raise BadImage(f"{text}; on_bad_image=skip leaves out up to {MAX_BAD_SHARE:.0%} of an epoch")
    if num_bad:
        logger.warning(f"{text}: on_bad_image=skip leaves them out of the training")
    if args.recipe:
        facts_of_images = (given, images, facts, in_chans, len(facts) / seconds)
        if args.purpose == FINETUNING:
            write_finetuning(args, run, source, *facts_of_images)
        else:
            write_pretraining(args, encoder, *facts_of_images)


def labelled(args: argparse.Namespace, run: Run, images: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the images with the labels of a CSV file beside them, and the settings of the list for a recipe.

    Raises:
        ValueError: as in `label_files.Labels.write`.
    """
    from mae.recommend import label_files

    data_path = Path(str(run.data.data_path))
    found, lines = label_files.find(images, data_path, args.task)
    print("".join(f"{line}\n" for line in lines), end="")
    finetunes = args.purpose == FINETUNING
    if not found or not args.recipe or (found.task != CLASSIFICATION and not finetunes):  # pre-training has no labels
        return (found.applied_to(images) if found else images), {}
    path = args.recipe.with_name(f"{args.recipe.stem}_labels.csv")
    return found.applied_to(images), found.write(path, images, data_path, only_labelled=finetunes)


def _warn_of_idle(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Logs a warning for the arguments that have no effect on the check."""
    finetunes = bool(args.recipe and args.purpose == FINETUNING)
    idle = [name for name in OTHERS if not (finetunes and name in OF_FINETUNING)]
    idle += [] if args.recipe else PRETRAIN
    idle += [name for name in NOT_OF_FINETUNING if finetunes and name != "num_images"]
    idle = [name for name in idle if name in given and not (name == "nb_classes" and _has_masks(given))]
    if idle:
        logger.warning(f"no effect on the check: {in_words({name: given[name] for name in idle})}")


def _encoder(name: str, in_chans: int | None) -> "Start":
    """Reads the encoder to continue.

    Raises:
        ValueError: it has other input channels than those that are given; or as in `continued.read`.
    """
    from mae.recommend import continued

    encoder = continued.read(name)
    if in_chans not in (None, encoder.in_chans):
        raise ValueError(f"in_chans={in_chans}: {name} has {encoder.in_chans} input channels; omit `in_chans`")
    return encoder


def _has_masks(given: Collection[str]) -> bool:
    return any(name in given for name in MASKS)


def open_images(run: Run, split: str, function: OpenDataset | None) -> Source | Stream:
    """Opens the images. If their labels can't be read, a warning says why, unless their task or columns are given."""
    data = replace(run.data, val_list=run.data.val_list if split == "val" else None)
    if _has_masks(run.explicit):
        return open_source(data, split, masks=mask_format(run.images, run.model.nb_classes), function=function)
    try:
        columns = run.images.label_columns
        return open_source(data, split, task=run.images.task, label_columns=columns, function=function)
    except ValueError as error:
        is_list = data.train_list if split == "train" else data.val_list
        if not is_list or not run.explicit.isdisjoint(LABELS[:2]):
            raise
        images = open_source(data, split, function=function, task=None)
        logger.warning(f"{error}. Pre-training does not read the labels")
        return images


def equal_images_of(run: Run, split: str, images: Any) -> str:
    """Returns what `equal_images.in_files` says of the images of both splits; "" if one of them has none."""
    try:
        other: Any = open_images(run, "train" if split == "val" else "val", None)
    except ValueError:  # the check is of `images`
        return ""
    train, val = (other, images) if split == "val" else (images, other)
    return equal_images.in_files(train, val)


def mask_format(images: ImageSpec, nb_classes: int | None) -> "MaskFormat":
    """Returns what the masks of the images may contain: `nb_classes` classes, or the colors of `palette`."""
    from mae.data.segmentation_masks import MOST_CLASSES, MaskFormat, read_palette
    from mae.files import recipes

    if images.palette:
        names, colors = read_palette(Path(recipes.find(images.palette, ".txt")))
        return MaskFormat(names, images.reduce_zero_label, colors)
    return MaskFormat(list(map(str, range(nb_classes or MOST_CLASSES))), images.reduce_zero_label)


def write_pretraining(
    args: argparse.Namespace, encoder: "Start | None", given: Mapping[str, Any], source: Source | Stream,
    facts: list[ImageFacts], in_chans: int, decoding: float,
) -> None:  # fmt: skip
    """Writes the recipe, and prints the command that runs it.

    Args:
        encoder: what the recipe continues, if anything.
        given: the arguments that are given. Those of main_pretrain.py are in the recipe.
        decoding: images/s that are read and decoded.

    Raises:
        ValueError: as in `recommend.recipe.write`.
    """
    from mae.recommend import recipe
    from mae.recommend.facts import Images

    found = Images.of(facts, len(source), in_chans, has_own_values(args))
    settings = {name: given[name] for name in ("data_path", *READ, *PRETRAIN, ON_BAD_IMAGE) if name in given}
    machine = recipe.this_machine(can_cache=not is_stream(source) and not getattr(source, "runs_code", False))
    is_labelled = _is_classified(source, facts, given)
    lines = recipe.write(args.recipe, found, machine, settings, args.minutes, decoding, encoder, is_labelled)
    print("\n".join(lines))


def has_own_values(args: argparse.Namespace) -> bool:
    """Whether arguments are in the units of the files, so that a recipe derives no range."""
    return any(value is not None for value in (args.value_range, args.mean, args.std))


def _is_classified(source: Source | Stream, facts: list[ImageFacts], given: Mapping[str, Any]) -> bool:
    """Whether main_pretrain.py, which has no flags for labels, reads a class for each image, and there are several."""
    labels = {fact.label for fact in facts if fact.sums is not None}
    has_labels = len(labels) > 1 and min(labels) >= 0
    return (
        has_labels and not is_stream(source) and has_class_numbers(source) and given.keys().isdisjoint(LABELS + MASKS)
    )


def write_finetuning(
    args: argparse.Namespace, run: Run, function: OpenDataset | None, given: Mapping[str, Any],
    source: Source | Stream, facts: list[ImageFacts], in_chans: int, decoding: float,
) -> None:  # fmt: skip
    """Writes a recipe of main_finetune.py, as `write_pretraining`.

    Raises:
        ValueError: as in `recommend.finetuning.write`, or the images have no labels.
    """
    from mae.recommend import finetuning, recipe
    from mae.recommend.facts import Images

    found = Images.of(facts, len(source), in_chans, has_own_values(args))
    mean = run.images.mean or list(found.mean)
    images = replace(run.images, in_chans=in_chans, mean=mean, std=run.images.std or list(found.std))
    data = RunData(images, run.data, torch.device("cpu"), function)
    train, val, _ = data.open_pair(run.model.nb_classes)
    labels = finetuning.Labels.of(train, val, run.images.task)
    names = ("data_path", *READ, *PRETRAIN, "in_chans", ON_BAD_IMAGE, *LABELS, *OF_FINETUNING, *ENCODER)
    settings = {name: given[name] for name in names if name in given and name not in NOT_OF_FINETUNING}
    machine = recipe.this_machine(can_cache=not getattr(source, "runs_code", False))
    start = finetuning.Start.of(run.machine.finetune)
    print("\n".join(finetuning.write(
        args.recipe, found, labels, start, machine, settings, args.minutes, decoding
    )))  # fmt: skip
