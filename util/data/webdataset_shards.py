"""Shards of WebDataset: tar files, read as a stream."""

import logging
import random
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.cli.advice import advised
from util.data.archives import BoundedTarInfo, check_size, find_members
from util.data.decode import SUFFIXES, BadImage
from util.files.untrusted import printable

logger = logging.getLogger(__name__)

SHUFFLED = 1000  # samples of a stream that are mixed; shards themselves are shuffled anew in every epoch


class Shards:
    """Tar files that are read from the first byte to the last (WebDataset): on slow disks, or from a URL.

    The samples of an epoch and their order depend on the number of processes and workers. A run that is resumed within
    an epoch reads other samples than the interrupted run would have read: resuming is approximate here, and exact for
    all other sources. Labels are read from members `.cls`.

    Args:
        pattern: paths or URLs with braces {000..127}, or with * for files.
        num_images: in all shards; None counts those of files.

    Raises:
        ValueError: the package `webdataset` is missing, no such files, no image in them, or a URL and no `num_images`.
    """

    def __init__(self, pattern: str, num_images: int | None) -> None:
        try:
            import webdataset
        except ImportError as error:
            raise ValueError('--dataset wds: needs the package webdataset: pip install ".[wds]"') from error
        self.title = f"wds:{pattern}"
        self.classes: list[str] = []  # labels are numbers without names
        expanded = webdataset.shardlists.expand_urls(pattern)
        urls = [url for one in expanded for url in (_matching(one) if "*" in one else [one])]
        files = [Path(url).absolute() for url in urls if not _is_scheme(url)]
        # The path from the root, because webdataset would take a file named `pipe:...` for a command.
        self.urls = [url if _is_scheme(url) else str(Path(url).absolute()) for url in urls]
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not self.urls:
            raise ValueError(f"--dataset {self.title}: there is no file {(missing or [pattern])[0]}")
        if num_images is None and len(files) < len(self.urls):
            raise ValueError(f"--dataset {self.title}: shards at URLs can't be counted; give --num_images")
        self.num_images = num_images or sum(_count_samples(file) for file in files)
        if not self.num_images:
            raise ValueError(f"--dataset {self.title}: no images in its {len(files)} shards")
        logger.info(f"{self.num_images:,} images in {len(self.urls)} shards, streamed: resuming is approximate")

    def __len__(self) -> int:
        return self.num_images

    def stream(
        self,
        seed: Sequence[int],
        part: int,
        parts: int,
        report: Callable[[str, Exception], bool],
        laps: int = sys.maxsize,
    ) -> Iterator[tuple[str, bytes, int]]:
        """Goes through the shards lap after lap, each time in another order: (name, bytes, label).

        Args:
            seed: of the order of shards, the same in all processes.
            part: of so many `parts`, this one gets every `parts`-th shard, counted on through the laps.
            report: called for a shard that can't be read to its end; True continues with the next.
        """
        import webdataset

        def handle(error: Exception) -> bool:
            where = next((part for part in error.args[::-1] if part in self.urls), self.title)
            return report(where, BadImage(f"the shard can't be read to its end: {error.args[0] if error.args else ''}"))

        generator = np.random.default_rng(seed)
        mixed = webdataset.shuffle(SHUFFLED, rng=random.Random(zlib.crc32(repr((*seed, part)).encode())))
        had_some = 0
        for lap in range(laps):
            order = enumerate(generator.permutation(len(self.urls)), start=lap * len(self.urls))
            mine = [{"url": self.urls[number]} for position, number in order if position % parts == part]
            members = read_shards(webdataset.tariterators.url_opener(mine, handler=handle), handle)
            for sample in mixed(webdataset.tariterators.group_by_keys(members, handler=handle)):
                data = next((sample[key] for key in sample if f".{key}".lower().endswith(SUFFIXES)), None)
                if data is not None:
                    had_some = lap
                    label = sample.get("cls", b"").decode("utf-8", "replace")
                    name = printable(f"{sample['__url__']}: {sample['__key__']}")
                    yield name, data, int(label) if label.strip().isdecimal() else -1
            if lap - had_some > parts:
                raise ValueError(f"--dataset {self.title}: no images in these shards")


def _is_scheme(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def read_shards(opened: Iterable[dict[str, Any]], handle: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The images and labels of open shards, as webdataset's own reader has them, but of a bounded size.

    Args:
        opened: {"url", "stream"} of each.
        handle: called for each error; True continues with the next shard.
    """
    for shard in opened:
        try:
            with tarfile.open(fileobj=shard["stream"], mode="r|*", tarinfo=BoundedTarInfo) as archive:
                for member in archive:
                    if member.isreg() and member.name.lower().endswith((*SUFFIXES, ".cls")):
                        check_size(member.size)
                        file = archive.extractfile(member)
                        assert file is not None
                        yield {"fname": member.name, "data": file.read(), "__url__": shard["url"]}
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps all that it has passed
            yield {}  # so that no sample is of two shards
        except Exception as error:
            error.args = (*error.args, shard["url"])
            if not handle(error):
                return


def _count_samples(file: Path) -> int:
    """The samples of a shard: what has the same name up to its first dot is one."""
    from webdataset.tariterators import base_plus_ext

    try:
        _, members = find_members(file)
    except ValueError as error:
        raise advised(ValueError(str(error)), "give --num_images to stream it without counting its images") from error
    count = len({base_plus_ext(name)[0] for name in members})
    if count < len(members):
        logger.warning(f"{file}: of samples with several images ({len(members)} in {count}), the first one is used")
    return count


def _matching(pattern: str) -> list[str]:
    folder = Path(pattern).parent
    return sorted(str(path.absolute()) for path in folder.glob(Path(pattern).name))
