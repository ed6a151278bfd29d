"""Opens any dataset, and checks a dataset before training.

    python -m util.datasets IMAGES
    python -m util.datasets IMAGES.zip --in_chans 1

The command prints the number of images, their sizes, channels and classes, the unreadable images with the reason, the
mean and standard deviation of each channel (for --mean and --std), and the decoding throughput in images/s.
"""

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from util import dist
from util.cli import entry_point, flags, options
from util.cli.advice import advised
from util.data.archives import Archive
from util.data.decode import BadImage, Picture, fit_channels, is_turned, read, size_of
from util.data.folders import find_files
from util.data.huggingface_sets import HuggingFaceSet
from util.data.labels import Subset
from util.data.lists import read_list
from util.data.loader import MAX_BAD_SHARE, Batches, up_to_cores
from util.data.samples import preserve_generators
from util.data.sources import Files, Source, Strings, check_split_names
from util.data.torchvision_sets import TorchvisionSet, dataset_in
from util.data.transforms import to_tensor, to_unit_range
from util.data.webdataset_shards import Shards
from util.files.untrusted import printable

logger = logging.getLogger(__name__)


def open_source(
    split: str,
    data_path: str | None = None,
    file_list: str | None = None,
    dataset: str | None = None,
    *,
    download: bool = False,
    num_images: int | None = None,
) -> Source | Shards:
    """Opens a dataset of any kind.

    All processes call it. Rank 0 lists the images of folders, lists, archives and shards; the others receive the list.

    Args:
        split: "train" or "val".
        data_path: a folder of images, a folder that contains the folder `split`, or a tar or zip file of either. With
            `file_list`, the folder that its relative paths start from. With a dataset of torchvision, the folder with
            its files.
        file_list: a list of image files.
        dataset: a dataset of torchvision, hf:NAME_OR_FOLDER, or wds:SHARDS.
        download: download the files of a torchvision dataset.
        num_images: number of images in shards, instead of counting them.

    Raises:
        ValueError: no dataset is given, the dataset does not exist, or it has no images.
    """
    root = Path(data_path) if data_path else None
    kind, _, name = (dataset or "").partition(":")
    if file_list and dataset:
        raise ValueError(f"--{split}_list and --dataset exclude each other; give one of them")
    for flag, value, counts in (
        ("--download", download, dataset and kind not in ("hf", "wds")),
        ("--num_images", num_images, kind == "wds"),
        ("--data_path", data_path, kind not in ("hf", "wds")),
    ):
        if value and not counts:
            logger.warning(f"{flag} has no effect with this dataset")
    if dataset:
        if kind == "hf":
            return HuggingFaceSet(name, split)
        if kind == "wds":
            return dist.from_rank_0(lambda: Shards(name, num_images), Shards)
        return TorchvisionSet(dataset, split, data_path, download)
    if file_list:
        # Beside an archive, paths are relative to the folder of the list.
        below = None if root and root.is_file() else root
        return dist.from_rank_0(lambda: read_list(Path(file_list), below, f"--{split}_list"), Files, Strings)
    if root is None:
        raise ValueError(
            "--data_path is needed: a folder of images, a folder that contains train/, or a tar or zip file of either "
            "(or give --train_list or --dataset)"
        )
    if root.is_file():
        return dist.from_rank_0(lambda: Archive(root, split), Archive, Strings)
    if not root.is_dir():
        raise ValueError(f"--data_path: there is no folder or archive {root}")
    return dist.from_rank_0(lambda: _open_folder(root, split), Files, Strings)


def _open_folder(root: Path, split: str) -> Files:
    remedy = dataset_in(root)
    try:
        files = _files_of_split(root, split)
    except ValueError as error:
        raise advised(error, remedy) if remedy else error from None
    if remedy:
        name = remedy.partition("dataset ")[2]
        logger.warning(
            f"{root} has the files of torchvision's dataset {name}, and is read without its splits and labels"
        )
    return files


def _files_of_split(root: Path, split: str) -> Files:
    if (root / split).is_dir():
        return find_files(root / split)
    check_split_names(os.listdir(root), split, root)
    if split == "val" or (root / "val").is_dir():  # never the images of the other split
        error = ValueError(f"--data_path {root}: there is no folder {split}/ in it")
        raise advised(error, f"add this folder, or give --{split}_list FILE")
    return find_files(root)


# ---------------------------------------------------------------------------------------------- checking a dataset

EXAMPLES = 8  # images that `suggest_statistics` reads
MAX_LISTED = 20  # unreadable images that are listed


class ImageFacts(NamedTuple):
    """Size, channels and statistics of one image, or the reason why it can't be read."""

    label: int
    size: tuple[int, int] = (0, 0)  # height, width
    channels: int = 0  # number of channels in the file
    deep: bool = False  # more than 8 bits
    sums: np.ndarray | None = None  # (2, in_chans): sums of the values, in 0 to 1, and of their squares
    unreadable: tuple[str, str] | None = None  # name and reason
    turned: bool = False  # the EXIF data have an orientation, which training and evaluation ignore
    remedy: str | None = None  # flags with which an unreadable image can be read


class FactsDataset(Dataset):
    """The facts of each image of a source."""

    def __init__(self, source: Source, in_chans: int) -> None:
        self.source = source
        self.in_chans = in_chans

    def __getitem__(self, index: int) -> ImageFacts:
        try:
            return image_facts(*self.source[index], self.in_chans)
        except Exception as error:  # decoders raise any exception on damaged bytes
            return _unreadable(self.source.name(index), error)


def _unreadable(name: str, error: Exception) -> ImageFacts:
    reason = printable(" ".join(str(error).split()))
    return ImageFacts(-1, unreadable=(name, reason), remedy=getattr(error, "remedy", None))


def image_facts(data: bytes | Picture, label: int, in_chans: int) -> ImageFacts:
    """Decodes an image and collects its facts.

    Raises:
        Exception: any exception of the decoder.
    """
    own = read(data, in_chans) if isinstance(data, bytes) else data
    values = to_unit_range(to_tensor(fit_channels(own, in_chans))).double().flatten(1)
    sums = torch.stack([values.sum(dim=1), values.square().sum(dim=1)]).numpy()
    channels = len(own) if isinstance(own, torch.Tensor) else len(own.getbands())
    deep = isinstance(own, torch.Tensor) and own.is_floating_point()
    return ImageFacts(label, size_of(own), channels, deep, sums, turned=is_turned(own))


def all_facts(source: Source | Shards, in_chans: int, indices: list[int], num_workers: int) -> Iterator[ImageFacts]:
    """Yields the facts of the images at `indices`; of a stream, those of the first len(indices) images."""
    if isinstance(source, Shards):
        unreadable: list[ImageFacts] = []

        def report(name: str, error: Exception) -> bool:
            unreadable.append(_unreadable(name, error))
            return True

        for _, name, data, label in islice(source.stream(0, 0, 1, report, laps=1), len(indices)):
            try:
                yield image_facts(data, label, in_chans)
            except Exception as error:
                report(name, error)
        yield from unreadable
    else:
        dataset = FactsDataset(source, in_chans)
        for batch in Batches(dataset, num_workers, batch_size=16, sampler=indices, collate_fn=list):
            yield from batch


def readable(source: Source, in_chans: int, num_workers: int) -> Source:
    """Returns a dataset without the images that can't be read, and logs them. All processes call it.

    Raises:
        BadImage: more than `loader.MAX_BAD_SHARE` of the images can't be read.
    """
    own = list(range(dist.rank(), len(source), dist.world_size()))
    with preserve_generators():
        facts = all_facts(source, in_chans, own, up_to_cores(num_workers))
        bar = tqdm(facts, "reading", len(own), unit="image", leave=False, disable=None if dist.is_main() else True)
        bad = {index: fact.unreadable for index, fact in zip(own, bar, strict=True) if fact.unreadable}
    bad = {index: why for part in dist.gather(bad) for index, why in part.items()}
    for name, reason in bad.values():
        logger.warning(f"{name}: {reason}; it is excluded")
    if len(bad) > MAX_BAD_SHARE * len(source):
        raise BadImage(
            f"{len(bad):,} of {len(source):,} images can't be read, more than {MAX_BAD_SHARE:.0%}; one of them: "
            f"{': '.join(bad[min(bad)])}"
        )
    return Subset(source, np.delete(np.arange(len(source)), list(bad)))


def statistics_of(good: list[ImageFacts]) -> tuple[str, str]:
    """Returns mean and standard deviation of each channel, as arguments of --mean and --std."""
    pixels = sum(fact.size[0] * fact.size[1] for fact in good)
    mean, squares = np.sum([fact.sums for fact in good if fact.sums is not None], axis=0) / pixels
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    std = np.where(std > 0, std, 1)  # a constant channel has std 0
    # Without exponents, because argparse parses -1e-05 as a flag.
    texts = [
        " ".join(np.format_float_positional(value, 4, fractional=False, trim="-") for value in values)
        for values in (mean, std)
    ]
    return texts[0], texts[1]


def suggest_statistics(
    source: Source | Shards, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Logs a warning if images have more than 8 bits and `--mean` or `--std` is missing. It suggests values.

    Float images are not scaled, and the statistics of ImageNet may not fit their range. The suggested values are the
    statistics of EXAMPLES images.
    """
    if (mean and std) or isinstance(source, Shards) or not dist.is_main():
        return
    facts = FactsDataset(source, in_chans)
    few = [facts[int(index)] for index in np.unique(np.linspace(0, len(source) - 1, EXAMPLES, dtype=int))]
    good = [fact for fact in few if fact.sums is not None]
    if any(fact.deep for fact in good):
        suggestion = "--mean {} --std {}".format(*statistics_of(good))
        logger.warning(
            f"the images have more than 8 bits, and without --mean and --std the statistics of ImageNet normalize "
            f"them; {len(good)} images suggest {suggestion} (python -m util.datasets reads all images)"
        )


def report_on(source: Source | Shards, facts: list[ImageFacts], seconds: float) -> list[str]:
    """Returns the lines of the report.

    Args:
        facts: the facts of the images that were read.
        seconds: the duration of reading them.
    """
    good = [fact for fact in facts if fact.sums is not None]
    bad = [fact.unreadable for fact in facts if fact.unreadable]
    lines = [f"images      {len(source):,}" + (f", of which {len(facts):,} were read" * (len(facts) < len(source)))]
    counts = Counter(fact.label for fact in good if fact.label >= 0)
    if counts:
        of_each = [counts[label] for label in range(max(len(source.classes), max(counts) + 1))]
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
        mean, std = statistics_of(good)
        lines += [
            f"sizes       {size[0]} x {size[1]} (height x width): {most:,} images" + spread * bool(others),
            "channels    " + ", ".join(f"{number}: {count:,} images" for number, count in channels),
            f"depth       {sum(fact.deep for fact in good):,} images of more than 8 bits",
            f"rotated     {sum(fact.turned for fact in good):,} images by EXIF data, which is ignored in training",
            f"--mean      {mean}",
            f"--std       {std}",
        ]
    lines.append(f"speed       {len(facts) / seconds:,.0f} images/s read and decoded")
    return lines


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Checks a dataset before training. The exit code is 1 if images can't be read.")
    parser.add_argument("data_path", nargs="?", metavar="PATH", help="as --data_path of main_pretrain.py")
    options.add_source_options(parser)
    options.add_stream_options(parser)
    parser.add_argument("--val_list", metavar="FILE", help="as --train_list, for --split val")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="training or validation set")
    parser.add_argument(
        "--limit", type=flags.positive_int, metavar="N", help="check N evenly spaced images (default: all)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Prints the report.

    Raises:
        ValueError: the dataset can't be opened.
        BadImage: an image can't be read.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    file_list = args.train_list if args.split == "train" else args.val_list
    source = open_source(
        args.split, args.data_path, file_list, args.dataset, download=args.download, num_images=args.num_images
    )
    indices = np.unique(np.linspace(0, len(source) - 1, args.limit or len(source), dtype=int)).tolist()
    workers = up_to_cores(args.num_workers)
    started = time.perf_counter()
    facts = list(tqdm(all_facts(source, args.in_chans, indices, workers), total=len(indices), disable=None))
    print("\n".join(report_on(source, facts, time.perf_counter() - started)))
    bad = [fact for fact in facts if fact.unreadable]
    if bad:
        raise BadImage(f"{len(bad):,} of {len(facts):,} images can't be read: {_remedy_of(bad, len(facts))}")


def _remedy_of(bad: list[ImageFacts], count: int) -> str:
    """Returns the remedy for the unreadable among `count` images."""
    (remedy, shared), *_ = Counter(fact.remedy for fact in bad).most_common()
    if remedy and shared > count / 2:
        return remedy
    if len(bad) <= MAX_BAD_SHARE * count:
        return f"main_pretrain.py --on_bad_image skip excludes them, up to {MAX_BAD_SHARE:.0%} of an epoch"
    return (
        f"replace or remove them; main_pretrain.py --on_bad_image skip excludes up to {MAX_BAD_SHARE:.0%} of an epoch"
    )


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
