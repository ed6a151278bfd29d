"""Data sets that other libraries open: torchvision's by name, Hugging Face's, and the shards of WebDataset."""

import inspect
import logging
import random
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from util import dist
from util.cli.advice import advised, did_you_mean
from util.data.archives import BoundedTarInfo, check_size, find_members
from util.data.decode import SUFFIXES, BadImage, Picture
from util.files.untrusted import printable, read_file

logger = logging.getLogger(__name__)

# How torchvision and Hugging Face call the images for validation; the first that a data set has is taken.
VALIDATION = ("val", "valid", "validation", "2021_valid", "test")
SHUFFLED = 1000  # samples of a stream that are mixed; shards themselves are shuffled anew in every epoch


class TorchvisionSet:
    """A data set of torchvision by the name of its class, such as CIFAR10, with the files under `root`.

    Args:
        name: the class, or CLASS:SPLIT for one of its own splits or versions (STL10:unlabeled, INaturalist:2018).
        split: "train", its default part, or "val".
        download: fetch the files that are not there.

    Raises:
        ValueError: no such class or split, or the files are not there.
    """

    def __init__(self, name: str, split: str, root: str | None, download: bool) -> None:
        self.title = name
        name, _, part = name.partition(":")
        make = getattr(torchvision.datasets, name, None)
        if not inspect.isclass(make):
            near = did_you_mean(name, torchvision.datasets.__all__) or " (CIFAR10, Flowers102, ...)"
            raise ValueError(f"--dataset {name}: torchvision has no data set of this name{near}")
        takes = _parameters(make)
        arguments: dict[str, Any] = {}
        if "root" in takes:
            if not root:
                raise ValueError(f"--dataset {name} needs --data_path: the folder that has its files, or gets them")
            arguments["root"] = root
        if "small" in takes and any(Path(arguments["root"]).glob("*_256*")):  # Places365 of 256 pixels
            arguments["small"] = True
        if "loader" in takes:
            arguments["loader"] = read_file  # our own decoder does the rest
        parts = self._parts(make, takes, split, part)
        if dist.is_main() and download and "download" in takes:
            self._open(make, arguments | {"download": True}, parts)
        dist.barrier()
        self.images = self._open(make, arguments, parts)
        listed = _listed_labels(self.images)
        self.classes = _class_names(self.images, listed)
        self._labels = listed if self.classes else np.full(len(self), -1)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all samples; of data sets that don't list them, found by reading all, once."""
        if self._labels is None:
            logger.info(f"{self.title} does not list its labels: reading all {len(self):,} samples for them")
            self._labels = np.array([self[index][1] for index in range(len(self))])
        return self._labels

    def _parts(self, make: type, takes: Any, split: str, part: str) -> list[dict[str, Any]]:
        """The settings that choose a part of the data set, of which the first that the class knows is the one."""
        chooser = next((name for name in ("split", "version", "image_set") if name in takes), None)
        if part and not chooser:
            raise ValueError(f"--dataset {self.title}: {make.__name__} has no splits of its own")
        own = {chooser: part} if chooser and part else {}
        if "train" in takes:
            return [own | {"train": split == "train"}]
        if split == "train":  # without the images of "val", where the default has them too
            return [own] if own or not chooser else [{chooser: "train"}, {}]
        if not chooser or (own and chooser == "version"):
            error = ValueError(f"--dataset {self.title}: torchvision's has no images for validation")
            raise advised(error, "give --val_list")
        return [{chooser: name} for name in VALIDATION]

    def _open(self, make: type, arguments: dict[str, Any], parts: list[dict[str, Any]]) -> Any:
        for part in parts:
            try:
                return make(**arguments, **part)
            except Exception as error:  # whatever missing files lead a class to
                if isinstance(error, ValueError) and part is not parts[-1]:
                    continue  # it does not know this name
                raise ValueError(
                    f"--dataset {self.title}: torchvision says: {' '.join(str(error).split())} (--data_path is where "
                    f"the files are looked for, and --download fetches them there)"
                ) from error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes | Picture, int]:
        try:
            image, label = self.images[index][:2]
        except OSError:
            raise
        except Exception as error:
            raise BadImage(f"torchvision can't read it ({type(error).__name__}: {error})") from error
        return image, int(label) if isinstance(label, (int, np.integer)) and self.classes else -1

    def name(self, index: int) -> str:
        """The data set's name and the number of the sample."""
        return f"{self.title}[{index}]"


def _parameters(make: type) -> set[str]:
    """What a class takes, and what it hands on to those that it is made of."""
    names: set[str] = set()
    for base in make.__mro__:
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _listed_labels(images: Any) -> np.ndarray | None:
    """The labels that a data set of torchvision lists, if they are numbers, one a sample."""
    for attribute in ("targets", "labels", "_labels"):
        listed = getattr(images, attribute, None)
        if listed is not None and len(listed) == len(images) and np.asarray(listed).dtype.kind in "iu":
            return np.asarray(listed).reshape(len(images), -1)[:, 0].astype(np.int64)
    return None


def _class_names(images: Any, listed: np.ndarray | None) -> list[str]:
    for attribute in ("classes", "categories", "all_categories"):
        names = getattr(images, attribute, None)
        if isinstance(names, (list, tuple)) and names:
            return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    return [] if listed is None else [str(number) for number in range(int(listed.max()) + 1)]


class HuggingFaceSet:
    """A map-style data set of Hugging Face, by its name on the hub or a folder (of parquet, images, or as saved).

    Raises:
        ValueError: the package `datasets` is missing, or it can't open the set, or there is no column of images.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError('--dataset hf: needs the package datasets: pip install ".[hf]"') from error
        self.title = f"hf:{name}"
        if not name:
            raise ValueError("--dataset hf: give a name or a folder behind it")
        if dist.is_main():
            self._load(datasets, name)  # the others find what it has prepared
        dist.barrier()
        parts = self._load(datasets, name)
        available = [part for part in (("train",) if split == "train" else VALIDATION) if part in parts]
        if not available:
            raise ValueError(f"--dataset {self.title}: it has no part for {split}, only {', '.join(parts)}")
        table = parts[available[0]]
        features = table.features
        image = next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"--dataset {self.title}: no column holds images: {', '.join(map(str, features))}")
        label = next((c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        self.classes = list(features[label].names) if label else []
        self.labels = np.array([-1 if n is None else n for n in table[label]] if label else [-1] * len(table))
        self.table = table.select_columns([image, *([label] if label else [])])
        self.table = self.table.cast_column(image, datasets.Image(decode=False))
        self.image, self.label = image, label

    def _load(self, datasets: Any, name: str) -> Any:
        try:
            if (Path(name) / "dataset_dict.json").exists():
                return datasets.load_from_disk(name)
            if (Path(name) / "dataset_info.json").exists() and (Path(name) / "state.json").exists():
                return {"train": datasets.load_from_disk(name)}
            return datasets.load_dataset(name)
        except Exception as error:  # whatever files that it can't read lead the library to
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ValueError(f"--dataset {self.title}: {reason}") from error

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self.table[index]
        image, label = row[self.image], row[self.label] if self.label else -1
        if image is None:
            raise BadImage("there is no image in this row")
        data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
        return data, -1 if label is None else label

    def name(self, index: int) -> str:
        """The data set's name and the number of the row."""
        return f"{self.title}[{index}]"


class Shards:
    """Tar files that are read from the first byte to the last (WebDataset): on slow disks, or from a URL.

    Which samples an epoch takes, and in which order, depends on the number of processes and workers, and a run that
    goes on in the middle of an epoch takes others than it would have taken: this is approximate, where all other
    sources are exact. Labels are read from members `.cls`.

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
            report: told of a shard that can't be read to its end; True goes on with the next.
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
        handle: told of what can't be read; True goes on with the next shard.
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
        logger.warning(f"{file}: of samples with several images ({len(members)} in {count}), the first one is taken")
    return count


def _matching(pattern: str) -> list[str]:
    folder = Path(pattern).parent
    return sorted(str(path.absolute()) for path in folder.glob(Path(pattern).name))
