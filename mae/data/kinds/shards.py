"""Shards of WebDataset: tar files, read as a stream."""

import itertools
import logging
import random
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mae import parallel
from mae.data.decode import SUFFIXES
from mae.data.kinds.archives import StrictTarInfo, check_size, find_members, is_ignored, is_read
from mae.data.pixels import BadImage
from mae.data.source import OpenDataset, first_few
from mae.files.untrusted import printable
from mae.settings import DataSpec

logger = logging.getLogger(__name__)

SHUFFLED = 1000  # size of the shuffle buffer, in samples; the order of the shards is random in every epoch


class Shards:
    """Tar files that are read sequentially (WebDataset), for slow disks and URLs.

    The samples of an epoch and their order depend on the number of processes and workers. An epoch continues at about
    the place where the epoch before it ended. The place is exact if all shards have equally many images, and a reader
    has one of them or a part of one. Else it may read up to SHUFFLED images around this place twice, or not at all. A
    run that is resumed within an epoch reads other samples than the interrupted run would have read: resuming is
    approximate here, and exact for all other sources. Labels are read from members `.cls`. As in WebDataset, the name
    of a sample ends at the first dot of its files; a sample with several images is refused.

    Args:
        pattern: paths or URLs with braces {000..127}; paths may also contain *.
        num_images: number of images in all shards; None: the images are counted, which requires files.

    Raises:
        ImportError: the package `webdataset` is not installed.
        ValueError: a file does not exist or is damaged, or a shard is a URL and `num_images` is None.
    """

    is_stream = True

    def __init__(self, pattern: str, num_images: int | None) -> None:
        import webdataset  # pip install ".[wds]"

        self.title = f"wds:{pattern}"
        self.classes: list[str] = []  # labels are numbers without names
        self.urls: list[str] = []
        for url in webdataset.shardlists.expand_urls(pattern):
            path = Path(url).absolute()  # webdataset would run a file name `pipe:...` as a command
            if "://" in url or url.startswith("pipe:"):
                self.urls.append(url)
            else:
                self.urls += sorted(map(str, path.parent.glob(path.name))) if "*" in path.name else [str(path)]
        files = [Path(url) for url in self.urls if url.startswith("/")]
        missing = [str(file) for file in files if not file.is_file()] if self.urls else [pattern]
        if missing:
            raise ValueError(f"dataset={self.title}: there is no file {missing[0]}")
        if num_images is None and len(files) < len(self.urls):
            raise ValueError(f"dataset={self.title}: images at URLs can't be counted: give num_images=N")
        self.num_images = num_images or sum(is_read(name) for file in files for name in find_members(file)[1])
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
        passes: int = sys.maxsize,
    ) -> Iterator[tuple[int, str, bytes, int]]:
        """Yields (pass, name, bytes, label) of the samples of all shards in several passes, each in another order.

        Args:
            seed: seed of the order of shards, the same in all processes.
            part: index of this reader. It reads every `parts`-th shard, counted over all passes.
            parts: number of readers.
            report: called with name and error if a shard can't be read to its end; then the next shard is read.
            start: number of samples that all readers together have read before, since the first pass.
            passes: number of passes over the shards.

        Raises:
            ValueError: the shards contain no images, or a sample has several.
        """
        import webdataset

        def handle(error: Exception) -> bool:
            shard = next((argument for argument in error.args[::-1] if argument in self.urls), self.title)
            report(shard, BadImage(f"the shard can't be read to its end: {error.args[0] if error.args else ''}"))
            return True  # webdataset continues with the next shard

        num_shards = len(self.urls)
        # Each reader has completed this number of shards of the mean length, and has read `skip` samples of the next.
        completed, rest = divmod(start * num_shards, self.num_images * parts)
        skip = rest // (num_shards * parts)
        first = part + completed * parts
        last_with_images = first_pass = first // num_shards
        for number in range(first_pass, first_pass + passes):
            order = enumerate(np.random.default_rng([seed, number]).permutation(num_shards), start=number * num_shards)
            urls = [{"url": self.urls[shard]} for count, shard in order if count >= first and count % parts == part]
            members = read_members(webdataset.tariterators.url_opener(urls, handler=handle), handle)
            samples = webdataset.tariterators.group_by_keys(members, handler=handle)
            # The order depends on the pass and its shards only, so that what is skipped of a shard is what was read.
            order_of_pass = random.Random(zlib.crc32(repr((seed, number, part)).encode()))
            shuffle = webdataset.shuffle(SHUFFLED, rng=order_of_pass)
            for sample in itertools.islice(shuffle(samples), skip, None):
                name = printable(f"{sample['__url__']}: {sample['__key__']}")
                images = _images_of(sample)
                if len(images) > 1:  # one would have to be chosen
                    raise ValueError(
                        f"{name} is a sample with {len(images)} images, {printable(first_few(images))}: pack one image "
                        f"per sample. In WebDataset, files of equal names up to the first dot are one sample: name "
                        f"a.1.jpg a_1.jpg"
                    )
                if images:
                    last_with_images = number
                    label = sample.get("cls", b"").decode("utf-8", "replace")
                    yield number, name, sample[images[0]], int(label) if label.strip().isdecimal() else -1
            skip = 0
            if number - last_with_images > parts:
                raise ValueError(f"dataset={self.title}: no images in these shards")


def _images_of(sample: dict[str, Any]) -> list[str]:
    return [key for key in sample if f".{key}".lower().endswith(SUFFIXES)]


def read_members(shards: Iterable[dict[str, Any]], handle: Callable[[Exception], Any]) -> Iterator[dict[str, Any]]:
    """Yields the images and labels of open shards, as webdataset's `tar_file_expander` does.

    That function ends silently at a damaged header, omits links, and limits no size.

    Args:
        shards: a dictionary of "url" and "stream" for each shard.
        handle: called with each error; then the next shard is read.
    """
    for shard in shards:
        try:
            with tarfile.open(fileobj=shard["stream"], mode="r|*", tarinfo=StrictTarInfo) as archive:
                for member in archive:
                    is_read = member.name.lower().endswith((*SUFFIXES, ".cls")) and not is_ignored(member.name)
                    if is_read and (member.isreg() or member.islnk() or member.issym()):
                        check_size(member.size)
                        # The target of a link can't be read from a stream: the link is a bad image.
                        file = archive.extractfile(member) if member.isreg() else None
                        yield {"fname": member.name, "data": file.read() if file else b"", "__url__": shard["url"]}
                    archive.members = []  # type: ignore[attr-defined]  # else the list of members grows with the shard
        except Exception as error:
            error.args = (*error.args, shard["url"])
            handle(error)
        yield {}  # ends the last sample, so that no sample spans two shards


def open_dataset(name: str, split: str, data: DataSpec, task: str | None, function: OpenDataset | None) -> Shards:
    """Opens shards, as an entry of `mae.data.kinds.registry.KINDS`."""
    return parallel.from_rank_0(lambda: Shards(name, data.num_images))
