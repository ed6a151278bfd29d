"""Checks a dataset before training, and writes a recipe for it.

    python -m mae.data IMAGES
    python -m mae.data IMAGES.zip --recipe mine.yaml --minutes 30

The command prints the number of images, their sizes, channels and classes, the unreadable images with the reason, the
mean and standard deviation of each channel (for --mean and --std), and the decoding throughput in images/s. With
--recipe, it measures the training for some seconds, writes the settings of main_pretrain.py with their reasons, and
prints the command that runs them.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from mae.cli import entry_point, flags, options
from mae.data.batches import up_to_cores
from mae.data.image_facts import ImageFacts, all_facts, channels_of, statistics_of
from mae.data.labels import has_class_numbers, has_ids, is_placeholder
from mae.data.loader import MAX_BAD_SHARE
from mae.data.open import open_source
from mae.data.pixels import BadImage, PixelValues
from mae.data.source import OpenDataset, Source, Stream, evenly_spaced, is_stream
from mae.settings import Run, types
from mae.user_code import with_source

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # unreadable images that are listed
MINUTES = 30  # of a recipe
GIVEN = (  # settings that a recipe has if they are given
    "data_path", "dataset", "train_list", "num_images", "nodata", "value_range", "channels_last",
)  # fmt: skip


def report_on(source: Source | Stream, facts: list[ImageFacts], seconds: float) -> list[str]:
    """Returns the lines of the report.

    Args:
        facts: the facts of the images that were read.
        seconds: the duration of reading them.
    """
    good = [fact for fact in facts if fact.sums is not None]
    bad = [fact.unreadable for fact in facts if fact.unreadable]
    lines = [f"images      {len(source):,}" + (f", of which {len(facts):,} were read" * (len(facts) < len(source)))]
    counts = Counter(fact.label for fact in good if fact.label >= 0)
    if counts and has_class_numbers(source):
        named = [label for label, name in enumerate(source.classes) if not (has_ids(source) or is_placeholder(name))]
        of_each = [counts[label] for label in {*counts, *named}]
        lines.append(f"classes     {len(of_each)}, of {min(of_each):,} to {max(of_each):,} images")
    else:
        lines.append("classes     none: pre-training needs no labels")
    listed = "".join(f"\n            {name}: {why}" for name, why in bad[:MAX_LISTED])
    more = f"\n            and {len(bad) - MAX_LISTED:,} more" * (len(bad) > MAX_LISTED)
    lines.append(f"unreadable  {len(bad):,}{listed}{more}")
    if good:
        heights, widths = np.array([fact.size for fact in good]).T
        spread = f"; {heights.min()} to {heights.max()} x {widths.min()} to {widths.max()}"
        (size, most), *others = Counter(fact.size for fact in good).most_common()
        channels = Counter(fact.channels for fact in good).most_common()
        different = {(fact.size, fact.digest) for fact in good}
        pixels, valid = int((heights * widths).sum()), sum(fact.valid for fact in good)
        lines += [
            f"sizes       {size[0]} x {size[1]} (height x width): {most:,} images" + spread * bool(others),
            "channels    " + ", ".join(f"{number}: {count:,} images" for number, count in channels),
            f"depth       {sum(fact.deep for fact in good):,} images of more than 8 bits",
            f"values      {min(fact.low for fact in good):.4g} to {max(fact.high for fact in good):.4g}, when scaled",
            f"duplicates  {len(good) - len(different):,} images equal another one",
            *[f"invalid     {1 - valid / pixels:.2%} of the pixels"] * (valid < pixels),
            f"rotated     {sum(fact.turned for fact in good):,} images by EXIF data, which is ignored in training",
        ]
    lines.append(f"speed       {len(facts) / seconds:,.0f} images/s read and decoded")
    return lines


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Checks a dataset before training. The exit code is 1 if images can't be read.")
    parser.add_argument("data_path", nargs="?", metavar="PATH", help="as --data_path of main_pretrain.py")
    channels = "input channels: 3 RGB, 1 gray (default: those of the images)"
    options.add_source_options(parser, default=None, help=channels)
    options.add_to(parser, "nodata", "value_range", "channels_last", "num_images")
    parser.add_argument("--val_list", metavar="FILE", help="as --train_list, for --split val")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="training or validation set")
    parser.add_argument(
        "--limit", type=types.positive_int, metavar="N", help="check N evenly spaced images (default: all)"
    )
    parser.add_argument(
        "--recipe", type=flags.new_file(".yaml"), metavar="FILE", help="write a recipe for main_pretrain.py --config"
    )
    parser.add_argument(
        "--minutes", type=types.positive, metavar="M", help=f"time of the pre-training of --recipe (default: {MINUTES})"
    )
    return parser


def main(args: argparse.Namespace, source: OpenDataset | None = None) -> None:
    """Prints the report, and writes the recipe.

    Args:
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.

    Raises:
        ValueError: the dataset can't be opened, or there is no recipe for it.
        BadImage: an image can't be read; with a recipe, more than `loader.MAX_BAD_SHARE` of the images.
    """
    if args.minutes and not args.recipe:
        raise ValueError(f"minutes={args.minutes:g} is the time of a recipe: give recipe=FILE")
    if args.recipe and args.split != "train":
        raise ValueError(f"split={args.split}: a recipe is for the training set")
    if args.recipe and args.extras:
        raise ValueError("`extras`: a recipe has no `encoder` for them; give both to main_pretrain.py beside `config`")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    data = with_source(Run.of(args), source).data
    data = replace(data, val_list=data.val_list if args.split == "val" else None)
    try:
        images = open_source(data, args.split, function=source)
    except ValueError as error:
        if not (data.train_list if args.split == "train" else data.val_list):
            raise
        images = open_source(data, args.split, function=source, task=None)
        logger.warning(f"{error}. Pre-training does not read the labels")
    indices = evenly_spaced(len(images), args.limit or len(images))
    workers = up_to_cores(args.num_workers)
    values = PixelValues(args.nodata, args.value_range, args.channels_last)
    in_chans = args.in_chans or channels_of(images, values)
    facts_of = all_facts(images, in_chans, indices, workers, values)
    started = time.perf_counter()
    facts = list(tqdm(facts_of, total=len(indices), disable=None))
    seconds = time.perf_counter() - started
    print("\n".join(report_on(images, facts, seconds)))
    bad = [fact for fact in facts if fact.unreadable]
    if not args.recipe and len(bad) < len(facts):  # a recipe has them
        mean, std = statistics_of(facts)
        print(f"--in_chans  {in_chans}\n--mean      {mean}\n--std       {std}")
    if len(bad) > (MAX_BAD_SHARE * len(facts) if args.recipe else 0):
        raise BadImage(
            f"{len(bad):,} of {len(facts):,} images can't be read; on_bad_image=skip of main_pretrain.py excludes up "
            f"to {MAX_BAD_SHARE:.0%} of an epoch"
        )
    if args.recipe:
        write_recipe(args, images, facts, in_chans, len(facts) / seconds)


def write_recipe(
    args: argparse.Namespace, source: Source | Stream, facts: list[ImageFacts], in_chans: int, decoding: float
) -> None:
    """Writes the recipe, and prints the command that runs it.

    Args:
        decoding: images/s that are read and decoded.

    Raises:
        ValueError: as in `recommend.recipe.write`.
    """
    from mae.recommend import recipe
    from mae.recommend.facts import Images

    found = Images.of(facts, len(source), in_chans, args.value_range is not None)
    given = {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
    machine = recipe.this_machine(can_cache=not is_stream(source) and not getattr(source, "runs_code", False))
    print("\n".join(recipe.write(args.recipe, found, machine, given, args.minutes or MINUTES, decoding)))
