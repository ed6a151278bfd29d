"""The images of one tar or zip file, read in place: nothing is unpacked, and any member can be had at once."""

import logging
import os
import posixpath
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from util.decode import SUFFIXES, BadImage
from util.sources import KINDS, Strings, classes_of, printable

logger = logging.getLogger(__name__)

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class Archive:
    """The images of one tar or zip file, read in place; its members are looked up once.

    They count as if the archive were unpacked: a folder that everything is in is passed over, `split` is taken if it
    is there, and the folders below are the classes.

    Raises:
        ValueError: not an archive that can be read in place, or no image in it.
    """

    def __init__(self, path: Path, split: str) -> None:
        started = time.perf_counter()
        members = find_members(path)
        names = sorted(_below(list(members), split, path).items())
        if not names:
            raise ValueError(f"--data_path: no images in {path} (looked for {KINDS})")
        self.path = str(path)
        self.is_zip = zipfile.is_zipfile(path)
        self.names = Strings([name for name, _ in names])
        self.places = np.array([members[member] for _, member in names], dtype=np.int64)
        self.classes, self.labels = classes_of([name for name, _ in names])
        self.file: tuple[int, int] | None = None  # process and descriptor
        logger.info(f"{len(self):,} images in {path}, found in {time.perf_counter() - started:.1f} s")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._member(*map(int, self.places[index])), int(self.labels[index])

    def name(self, index: int) -> str:
        """The archive's path and the member's."""
        return printable(f"{self.path}: {self.names[index]}")

    def _member(self, start: int, size: int, method: int, checksum: int) -> bytes:
        """Reads at a place of the file that no other process moves."""
        if self.file is None or self.file[0] != os.getpid():
            self.file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        file = self.file[1]
        if not self.is_zip:
            return _read_at(file, start, size)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", _read_at(file, start, 30))
        data = _read_at(file, start + 30 + name_length + extra_length, size)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if method == DEFLATED else data
        except zlib.error as error:
            raise BadImage(f"the archive is damaged here: {error}") from error
        if signature != b"PK\3\4" or zlib.crc32(data) != checksum:
            raise BadImage("the archive is damaged here: the checksum does not fit")
        return data


def _read_at(file: int, start: int, size: int) -> bytes:
    data = os.pread(file, size, start)
    while len(data) < size and (more := os.pread(file, size - len(data), start + len(data))):
        data += more
    if len(data) < size:
        raise BadImage("the archive ends before its member does")
    return data


Place = tuple[int, int, int, int]  # start and bytes in the archive, compression and checksum (both zip's)


def find_members(path: Path) -> dict[str, Place]:
    """Name and place of every image in a tar or zip file.

    Raises:
        ValueError: it is neither, damaged, or its members can't be read where they are.
    """
    try:
        return dict(_zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path))
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is neither a zip file nor an uncompressed tar file, which can be read in place ({error}); unpack "
            f"it, or pack its files again so"
        ) from error


def _tar_members(path: Path) -> Iterator[tuple[str, Place]]:
    with tarfile.open(path, "r:") as archive:
        places: dict[str, Place] = {}
        for member in archive:
            if not _is_image(member.name):
                continue
            if member.isreg():
                places[member.name] = (member.offset_data, member.size, STORED, 0)
            elif member.islnk() and member.linkname in places:  # the same file under a second name
                places[member.name] = places[member.linkname]
            if member.name in places:
                yield member.name, places[member.name]


def _zip_members(path: Path) -> Iterator[tuple[str, Place]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir() or not _is_image(member.filename):
                continue
            if member.flag_bits & 1 or member.compress_type not in (STORED, DEFLATED):
                raise ValueError(
                    f"{path}: {printable(member.filename)} is encrypted, or compressed by another method than deflate; "
                    f"pack the files again without"
                )
            yield member.filename, (member.header_offset, member.compress_size, member.compress_type, member.CRC)


def _is_image(name: str) -> bool:
    hidden = any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _below(members: Sequence[str], split: str, path: Path) -> dict[str, str]:
    """The members of a split by their names below it; all of them where there are no splits."""
    names = {posixpath.normpath(member): member for member in members}
    for _ in range(2):
        tops = {name.partition("/")[0] if "/" in name else "" for name in names}
        if split in tops:
            return {name.removeprefix(f"{split}/"): m for name, m in names.items() if name.startswith(f"{split}/")}
        if len(tops) != 1 or tops <= {"", "train", "val"}:
            break
        names = {name.partition("/")[2]: member for name, member in names.items()}
    if names and (split == "val" or "val" in tops):  # never the images of the other part
        raise ValueError(f"--data_path {path}: there is no folder {split}/ in it; give that, or --{split}_list")
    return names
