"""The images of one tar or zip file, read in place: nothing is unpacked, and any member can be had at once."""

import logging
import os
import posixpath
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.cli.advice import advised
from util.data.decode import SUFFIXES, BadImage
from util.data.sources import KINDS, Strings, classes_of
from util.files.untrusted import MAX_BYTES, printable

logger = logging.getLogger(__name__)

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
MAX_LINK = 4096  # characters of a link's target, Linux's own limit
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAX_HEADER = 1 << 20  # bytes of a tar's long names and attributes
# In place of a member's method: why it can't be read.
ENCRYPTED, LOST = -1, -2
PROBLEMS = {ENCRYPTED: "it is encrypted", LOST: "it is a link that leads out of the archive or nowhere"}


class Place(NamedTuple):
    """Where a member is: in a tar its data, in a zip its header, which the data follow."""

    start: int
    size: int  # as stored
    method: int = STORED
    unpacked: int = 0  # bytes, of a zip's member
    checksum: int = 0  # CRC-32, of a zip's member


class Archive:
    """The images of one tar or zip file; its members are looked up once.

    They count as if the archive were unpacked: folders that contain everything are skipped, `split` is taken if it is
    there, and the folders below are the classes. Without a split, all images are taken.

    Raises:
        ValueError: not an archive that can be read in place, damaged, or no image in it.
    """

    def __init__(self, path: Path, split: str | None) -> None:
        started = time.perf_counter()
        self.is_zip, members = find_members(path)
        names = sorted(_below(members, split, path).items())
        if not names:
            raise ValueError(f"--data_path: no images in {path} (looked for {KINDS})")
        self.path = str(path)
        self.names = Strings([name for name, _ in names])
        self.places = np.array([members[member] for _, member in names], dtype=np.int64)
        self.classes, self.labels = classes_of([name for name, _ in names])
        self.file: tuple[int, int] | None = None  # process and descriptor
        logger.info(f"{len(self):,} images in {path}, found in {time.perf_counter() - started:.1f} s")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._member(Place(*self.places[index].tolist())), int(self.labels[index])

    def __del__(self) -> None:
        process, file = getattr(self, "file", None) or (0, 0)
        if process == os.getpid():
            os.close(file)

    def name(self, index: int) -> str:
        """The archive's path and the member's."""
        return printable(f"{self.path}: {self.names[index]}")

    def _member(self, place: Place) -> bytes:
        """Reads at a place of the file that no other process moves."""
        if self.file is None or self.file[0] != os.getpid():
            self.file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        file = self.file[1]
        if place.method not in (STORED, DEFLATED):
            other = f"it is compressed by method {place.method}, and deflate is the one that is read"
            raise BadImage(f"{PROBLEMS.get(place.method, other)}; pack the files again")
        check_size(max(place.size, place.unpacked))
        if not self.is_zip:
            return _read_at(file, place.start, place.size)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", _read_at(file, place.start, 30))
        data = _read_at(file, place.start + 30 + name_length + extra_length, place.size)
        try:
            if place.method == DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.unpacked + 1)
        except zlib.error as error:
            raise BadImage(f"the archive is damaged here: {error}") from error
        if signature != b"PK\3\4" or zlib.crc32(data) != place.checksum:
            raise BadImage("the archive is damaged here: the checksum does not fit")
        return data


class BoundedTarInfo(tarfile.TarInfo):
    """A header that does not lead backwards, nor tarfile to read a name or attributes without bound."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "BoundedTarInfo":
        """As tarfile's; raises ReadError where the sizes can't be."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in HEADERS and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header states {header.size:,} bytes")
        return header


def check_size(size: int) -> None:
    """Raises BadImage of an image's file that is too large to read: small archives could fill the memory."""
    if size > MAX_BYTES:
        raise BadImage(f"it has {size:,} bytes when unpacked, more than the {MAX_BYTES:,} that are read")


def _read_at(file: int, start: int, size: int) -> bytes:
    if start + size > os.fstat(file).st_size:  # before memory is taken for what isn't there
        raise BadImage("the archive ends before its member does")
    data = os.pread(file, size, start)
    while len(data) < size and (more := os.pread(file, size - len(data), start + len(data))):
        data += more
    if len(data) < size:
        raise BadImage("the archive ends before its member does")
    return data


def find_members(path: Path) -> tuple[bool, dict[str, Place]]:
    """Whether a file is a zip (or else a tar) file, and name and place of every image in it.

    Raises:
        ValueError: it is neither, damaged, or its members can't be read where they are.
    """
    try:
        archive = tarfile.open(path, "r:", tarinfo=BoundedTarInfo)  # noqa: SIM115  # first: a tar file may end in a zip file
    except tarfile.TarError:
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is neither a zip file nor an uncompressed tar file, which can be read in place; unpack it, or "
                f"pack its files again in one of these formats"
            ) from None
        return True, _zip_members(path)
    with archive:
        return False, _tar_members(archive, path)


def _tar_members(archive: tarfile.TarFile, path: Path) -> dict[str, Place]:
    places: dict[str, Place] = {}
    links: dict[str, str] = {}
    last = "its beginning"
    try:
        for member in archive:
            last = printable(member.name)
            if member.size < 0:
                raise tarfile.ReadError(f"its size is {member.size}")
            if member.issparse() and _is_image(member.name):
                raise ValueError(f"{path}: {last} is stored with holes, as tar -S does; pack the files again without")
            if member.isreg():
                places[member.name] = Place(member.offset_data, member.size)
            elif member.islnk():
                links[member.name] = member.linkname
            elif member.issym():
                links[member.name] = posixpath.join(posixpath.dirname(member.name), member.linkname)
        ended = _ends_with_zeros(path, archive.offset)
    except (tarfile.TarError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged or cut off after {last}: {error}") from error
    if not ended:  # tarfile takes a header that makes no sense for the end
        raise ValueError(f"{path} is damaged or cut off after {last}")
    return _images_of(places, links)


def _ends_with_zeros(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _zip_members(path: Path) -> dict[str, Place]:
    places: dict[str, Place] = {}
    links: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.replace("\\", "/")  # old packers on Windows
                if member.is_dir() or not _is_image(name):
                    continue
                if stat.S_ISLNK(member.external_attr >> 16):
                    links[name] = posixpath.join(posixpath.dirname(name), _target(archive, member))
                    continue
                method = ENCRYPTED if member.flag_bits & 1 else member.compress_type
                # They may lie, in more than 64 bits.
                stored, unpacked = (min(size, 2 * MAX_BYTES) for size in (member.compress_size, member.file_size))
                places[name] = Place(member.header_offset, stored, method, unpacked, member.CRC)
    except (zipfile.BadZipFile, NotImplementedError, IndexError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged, or a zip file of a kind that can't be read: {error}") from error
    if places and not any(place.method in (STORED, DEFLATED) for place in places.values()):
        raise ValueError(
            f"{path}: {printable(next(iter(places)))} is encrypted, or compressed by another method than deflate, as "
            f"are all others; pack the files again without"
        )
    return _images_of(places, links)


def _target(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    """Where a link leads; one that can't be read leads nowhere."""
    try:
        return archive.read(member).decode() if member.file_size <= MAX_LINK else ""
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, zlib.error):
        return ""


def _images_of(places: dict[str, Place], links: dict[str, str]) -> dict[str, Place]:
    """Images, and links to files; those that lead nowhere can't be read, as in a folder."""
    normal = {posixpath.normpath(name): place for name, place in places.items()}
    images = {name: place for name, place in places.items() if _is_image(name)}
    lost = Place(0, 0, LOST)
    return images | {n: normal.get(posixpath.normpath(links[n]), lost) for n in links if _is_image(n)}


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)
    return name.lower().endswith(SUFFIXES) and not hidden


def _below(members: Iterable[str], split: str | None, path: Path) -> dict[str, str]:
    """The members of a split by their names below it; all of them where there are no splits."""
    names = {posixpath.normpath(member): member for member in members}
    while names:
        tops = {name.partition("/")[0] if "/" in name else "" for name in names}
        if split in tops:
            return {name.removeprefix(f"{split}/"): m for name, m in names.items() if name.startswith(f"{split}/")}
        if split and ((split == "val" and "train" in tops) or "val" in tops):  # never the images of the other part
            error = ValueError(f"--data_path {path}: there is no folder {split}/ in it")
            raise advised(error, f"give that, or --{split}_list")
        if len(tops) != 1 or "" in tops:
            break
        names = {name.partition("/")[2]: member for name, member in names.items()}
    if names and split == "val":
        raise advised(ValueError(f"--data_path {path}: there is no folder val/ in it"), "give that, or --val_list")
    return names
