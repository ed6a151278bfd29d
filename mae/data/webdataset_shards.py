"""Shards of WebDataset: tar files, read as a stream."""

import itertools
import logging
import random
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.archives import BoundedTarInfo, check_size, find_members, is_ignored
from mae.data.decode import SUFFIXES, BadImage
from mae.data.sources import Source, first_few
from mae.files.untrusted import printable

logger = logging.getLogger(__name__)

READ = (*SUFFIXES, ".cls")
SHUFFLED = 1000  # size of the shuffle buffer, in samples; the order of the shards is random in every epoch


class Shards:
    """Tar files that are read sequentially (WebDataset), for slow disks and URLs.

    The samples of an epoch and their order depend on the number of processes and workers. An epoch continues at about
    the place where the epoch before it ended: the place is exact if all shards have equally many images. A run that is
    resumed within an epoch reads other samples than the interrupted run would have read: resuming is approximate here,
    and exact for all other sources. Labels are read from members `.cls`. As in WebDataset, the name of a sample ends at
    the first dot of its files; a sample with several images is refused.

    Args:
        pattern: paths or URLs with braces {000..127}; paths may also contain *.
        num_images: number of images in all shards; None: the images are counted, which requires files.

    Raises:
        ImportError: the package `webdataset` is not installed.
        ValueError: a file does not exist, a counted sample has several images, or a shard is a URL and `num_images` is
            None.
    """

    def __init__(self, pattern: str, num_images: int | None) -> None:
        import webdataset  # pip install ".[wds]"

        self.title = f"wds:{pattern}"
        self.classes: list[str] = []  # labels are numbers without names
        expanded = webdataset.shardlists.expand_urls(pattern)
        # Absolute paths, because webdataset would run a file name `pipe:...` as a command.
        urls: list[str] = []
        for one in expanded:
            urls += sorted(map(str, Path(one).absolute().parent.glob(Path(one).name))) if "*" in one else [one]
        files = [Path(url).absolute() for url in urls if not _is_scheme(url)]
        self.urls = [url if _is_scheme(url) else str(Path(url).absolute()) for url in urls]
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not self.urls:
            raise ValueError(f"dataset={self.title}: there is no file {(missing or [pattern])[0]}")
        if num_images is None and len(files) < len(self.urls):
            raise ValueError(f"dataset={self.title}: images at URLs can't be counted: give num_images=N")
        self.num_images = num_images or sum(_count_samples(file) for file in files)
        logger.info(f"{self.num_images:,} images in {len(self.urls)} shards, streamed: resuming is approximate")

    def __len__(self) -> int:
        return self.num_images

    def stream(
        self,
        seed: int,
        part: int,
        parts: int,
        report: Callable[[str, Exception], None],
        start: int = 0,
        laps: int = sys.maxsize,
    ) -> Iterator[tuple[int, str, bytes, int]]:
        """Yields (pass, name, bytes, label) of the samples of all shards, `laps` times, each time in another order.

        Args:
            seed: seed of the order of shards, the same in all processes.
            part: index of this reader. It reads every `parts`-th shard, counted over all passes.
            parts: number of readers.
            report: called with name and error if a shard can't be read to its end; then the next shard is read.
            start: number of samples that all readers together have read before, since the first pass.
            laps: number of passes over the shards.

        Raises:
            ValueError: the shards contain no images, or a sample has several.
        """
        import webdataset

        def handle(error: Exception) -> bool:
            where = next((part for part in error.args[::-1] if part in self.urls), self.title)
            report(where, BadImage(f"the shard can't be read to its end: {error.args[0] if error.args else ''}"))
            return True  # webdataset continues with the next shard

        num_shards = len(self.urls)
        # Each reader has completed this number of shards of the mean length, and has read `skip` samples of the next.
        completed, rest = divmod(start * num_shards, self.num_images * parts)
        skip = rest // (num_shards * parts)
        first = part + completed * parts
        mixed = webdataset.shuffle(SHUFFLED, rng=random.Random(zlib.crc32(repr((seed, start, part)).encode())))
        had_some = first_lap = first // num_shards
        for lap in range(first_lap, first_lap + laps):
            order = enumerate(np.random.default_rng([seed, lap]).permutation(num_shards), start=lap * num_shards)
            mine = [{"url": self.urls[number]} for place, number in order if place >= first and place % parts == part]
            members = read_shards(webdataset.tariterators.url_opener(mine, handler=handle), handle)
            samples = itertools.islice(webdataset.tariterators.group_by_keys(members, handler=handle), skip, None)
            skip = 0
            for sample in mixed(samples):
                name = printable(f"{sample['__url__']}: {sample['__key__']}")
                images = [key for key in sample if f".{key}".lower().endswith(SUFFIXES)]
                require_one_image(name, images)
                if images:
                    had_some = lap
                    label = sample.get("cls", b"").decode("utf-8", "replace")
                    yield lap, name, sample[images[0]], int(label) if label.strip().isdecimal() else -1
            if lap - had_some > parts:
                raise ValueError(f"dataset={self.title}: no images in these shards")


def require_random_access(source: Source | Shards) -> Source:
    """Returns a source. Raises ValueError if it is a stream."""
    if isinstance(source, Shards):
        raise ValueError(
            f"{source.title}: streamed shards are for pre-training only, without `cache_images`; unpack them, or pack "
            f"the images as a zip file"
        )
    return source


def _is_scheme(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def read_shards(opened: Iterable[dict[str, Any]], handle: Callable[[Exception], Any]) -> Iterator[dict[str, Any]]:
    """Yields the images and labels of open shards, in the format of webdataset's own reader, but of limited size.

    Args:
        opened: a dictionary of "url" and "stream" for each shard.
        handle: called with each error; then the next shard is read.
    """
    for shard in opened:
        try:
            with tarfile.open(fileobj=shard["stream"], mode="r|*", tarinfo=BoundedTarInfo) as archive:
                for member in archive:
                    is_file = member.isreg() or member.islnk() or member.issym()
                    if is_file and member.name.lower().endswith(READ) and not is_ignored(member.name):
                        check_size(member.size)
                        # The target of a link can't be read from a stream: the link is a bad image.
                        file = archive.extractfile(member) if member.isreg() else None
                        yield {"fname": member.name, "data": file.read() if file else b"", "__url__": shard["url"]}
                    archive.members = []  # type: ignore[attr-defined]  # else the list of members grows with the shard
            yield {}  # ends the last sample, so that no sample spans two shards
        except Exception as error:
            error.args = (*error.args, shard["url"])
            handle(error)


def require_one_image(name: str, images: Sequence[str]) -> None:
    """Raises ValueError if a sample has several images, of which one would have to be chosen.

    Args:
        images: their names after the name of the sample.
    """
    if len(images) > 1:
        raise ValueError(
            f"{name} is a sample with {len(images)} images, {printable(first_few(images))}: pack one image per sample. "
            f"In WebDataset, files of equal names up to the first dot are one sample: name a.1.jpg a_1.jpg"
        )


def _count_samples(file: Path) -> int:
    """Counts the samples of a shard. Successive members with the same name up to its first dot are one sample."""
    from webdataset.tariterators import base_plus_ext

    _, members, _ = find_members(file)
    for key, images in itertools.groupby(map(base_plus_ext, members), key=lambda parts: parts[0]):
        require_one_image(printable(f"{file}: {key}"), [image for _, image in images])
    return len(members)
