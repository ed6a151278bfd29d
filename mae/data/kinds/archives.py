"""The images of one tar or zip file, read in place with random access.

The standard library lists the members. `Members` reads their bytes itself: `zipfile` would parse the list again in each
worker process, and needs twice the time for a small file.
"""

import logging
import os
import posixpath
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae.data.kinds.folders import (
    KINDS,
    check_split_names,
    classes_of,
    is_hidden,
    is_image,
    log_listing,
    no_split,
    warn_of_inner_splits,
)
from mae.data.kinds.listing import Files, Listing
from mae.data.pixels import BadImage
from mae.files.untrusted import MAX_BYTES, printable
from mae.plurals import counted

logger = logging.getLogger(__name__)

STORED = zipfile.ZIP_STORED
DEFLATED = zipfile.ZIP_DEFLATED
UNREADABLE = -1
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MAX_HEADER = 1 << 20  # bytes of long names and attributes in a tar file


class Position(NamedTuple):
    """The position of a member: of its data in a tar file, of its header in a zip file."""

    start: int
    size: int  # bytes in the archive
    method: int = STORED
    unpacked: int = 0  # uncompressed bytes (zip)
    checksum: int = 0  # CRC-32 (zip)


class Members(Files):
    """Files of an archive.

    Args:
        root: the archive.
        is_zip: it is a zip file, and not a tar file.
        positions: (n, 5), a `Position` for each name.
    """

    def __init__(self, root: str | Path, names: Sequence[str], is_zip: bool, positions: Any) -> None:
        super().__init__(root, names)
        self.is_zip = is_zip
        self.positions = np.array(positions, dtype=np.int64)
        self.file: FileIO | None = None  # forked processes share it: a read at a position does not move its offset

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None}

    def path(self, index: int) -> str:
        """Returns the path of the archive."""
        return self.root

    def name(self, index: int) -> str:
        """Returns the paths of the archive and of the member."""
        return printable(f"{self.root}: {self.names[index]}")

    def chosen(self, indices: Sequence[int]) -> "Members":
        """Returns some of the files."""
        names = [self.names[index] for index in indices]
        return Members(self.root, names, self.is_zip, self.positions[np.asarray(indices)])

    def size(self, index: int) -> int:
        """Returns the number of unpacked bytes of a file."""
        position = Position(*self.positions[index].tolist())
        return position.unpacked if self.is_zip else position.size

    def read(self, index: int) -> bytes:
        """As `Files.read`."""
        position = Position(*self.positions[index].tolist())
        if position.method not in (STORED, DEFLATED):
            raise BadImage(
                "it is encrypted, compressed by another method than deflate, or a link to a file that is not in the "
                "archive; pack the files again"
            )
        check_size(max(position.size, position.unpacked))
        self.file = self.file or FileIO(self.root)
        if not self.is_zip:
            return _read_at(self.file, position.start, position.size)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", _read_at(self.file, position.start, 30))
        data = _read_at(self.file, position.start + 30 + name_length + extra_length, position.size)
        try:
            if position.method == DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, position.unpacked + 1)
        except zlib.error:
            signature = b""
        if signature != b"PK\3\4" or zlib.crc32(data) != position.checksum:
            raise BadImage("the archive is damaged here: the checksum does not match")
        return data


def open_archive(
    path: Path, split: str | None, *, enclosing: bool = False, kind: str = "image", whole: bool = True
) -> Listing:
    """Lists the images of a tar or zip file.

    The layout equals the layout of an unpacked dataset: enclosing folders are skipped, and the folders below `split`
    are the classes. An archive without splits contributes all of its images.

    Args:
        path: the archive.
        split: "train" or "val"; None: all images.
        enclosing: keep enclosing folders in the names, if `split` is None.
        kind: what a file is, for the log.
        whole: an archive without splits contributes all of its images for training. False: it is an error.

    Raises:
        ValueError: the archive can't be read in place, is damaged, or contains no image.
    """
    started = time.perf_counter()
    is_zip, members = find_members(path)
    found = sorted(_below(filter(is_read, members), split, path, enclosing, whole).items())
    if not found:
        raise ValueError(f"data_path={path}: there are no images in it (looked for {KINDS})")
    names = [name for name, _ in found]
    files = Members(path, names, is_zip, [members[member] for _, member in found])
    folder = _normal(found[0][1]).removesuffix(found[0][0])
    others = [name for name in members if not is_image(name) and not is_ignored(name)]
    beside = [name for name in others if _normal(name).startswith(folder)]
    text = f"{counted(len(names), kind)} in {path}, found in {time.perf_counter() - started:.1f} s"
    log_listing(text, len(names), beside)
    return Listing(files, *classes_of(names))


def members_named(path: Path, names: Sequence[str]) -> Members:
    """Finds files by name in an archive. A name starts at the top, or below folders that contain all members.

    Raises:
        ValueError: a file is not in the archive, or the archive can't be read in place or is damaged.
    """
    is_zip, positions = find_members(path)
    members = {_normal(name): position for name, position in positions.items()}
    wanted = [_normal(name) for name in names]
    while members and wanted[0] not in members:
        tops = {name.partition("/")[0] for name in members if not is_ignored(name)}
        top = f"{tops.pop()}/" if len(tops) == 1 else ""
        members = {name.removeprefix(top): members[name] for name in members if top and name.startswith(top)}
    if missing := next((name for name, key in zip(names, wanted, strict=True) if key not in members), None):
        raise ValueError(f"there is no file {printable(missing)} in {path}")
    return Members(path, names, is_zip, [members[name] for name in wanted])


class StrictTarInfo(tarfile.TarInfo):
    """A header of a tar file. A damaged one is an error: tarfile takes it for the end of the archive.

    Sizes are not negative, and limited for long names and attributes, which tarfile reads at once.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        """Like the method of tarfile; raises ReadError for a damaged header, and for a missing end of the archive."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):  # the end of the archive
                raise
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0 or (header.type in HEADERS and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header states {header.size:,} bytes")
        return header


def check_size(size: int) -> None:
    """Raises BadImage if an unpacked file is too large. Without a limit, a small archive could fill the memory."""
    if size > MAX_BYTES:
        raise BadImage(f"it has {size:,} bytes when unpacked, more than the limit of {MAX_BYTES:,}")


def _read_at(file: FileIO, start: int, size: int) -> bytes:
    if start < 0 or start + size > os.fstat(file.fileno()).st_size:  # checked before memory is allocated
        raise BadImage("the archive ends within this member")
    data = os.pread(file.fileno(), size, start)
    while len(data) < size and (more := os.pread(file.fileno(), size - len(data), start + len(data))):
        data += more
    return data


def find_members(path: Path) -> tuple[bool, dict[str, Position]]:
    """Lists the files of an archive.

    Returns:
        True for a zip file, False for a tar file; and the position of every file by its name.

    Raises:
        ValueError: the file is neither a tar nor a zip file, is damaged, or can't be read in place.
    """
    try:
        archive = tarfile.open(path, "r:", tarinfo=StrictTarInfo)  # noqa: SIM115  # first: a tar file may end in a zip file
    except tarfile.TarError:
        positions = _zip_members(path)
        is_zip = True
    else:
        with archive:
            positions = _tar_members(archive, path)
        is_zip = False
    return is_zip, positions


def _tar_members(archive: tarfile.TarFile, path: Path) -> dict[str, Position]:
    """Returns the positions of the files, and of the targets of links. A link without a target can't be read."""
    positions: dict[str, Position] = {}
    links: dict[str, str] = {}
    last = "the beginning"
    try:
        for member in archive:
            last = printable(member.name)
            if member.size < 0:
                raise tarfile.ReadError(f"its size is {member.size}")
            if member.issparse() and is_image(member.name):
                raise ValueError(f"{path}: {last} is a sparse file (tar -S); pack the files again without -S")
            if member.isreg():
                positions[member.name] = Position(member.offset_data, member.size)
            elif member.islnk():
                links[member.name] = member.linkname
            elif member.issym():
                links[member.name] = posixpath.join(posixpath.dirname(member.name), member.linkname)
    except (tarfile.TarError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged or truncated after {last}: {error}") from error
    targets = {posixpath.normpath(name): position for name, position in positions.items()}
    missing = Position(0, 0, UNREADABLE)
    return positions | {name: targets.get(posixpath.normpath(target), missing) for name, target in links.items()}


def _zip_members(path: Path) -> dict[str, Position]:
    """Returns the positions of the files. Links can't be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, IndexError, UnicodeError) as error:
        raise ValueError(f"{path} can't be read as an uncompressed tar file or a zip file: {error}") from error
    positions: dict[str, Position] = {}
    for member in members:
        is_readable = not member.flag_bits & 1 and not stat.S_ISLNK(member.external_attr >> 16)  # nor encrypted
        method = member.compress_type if is_readable else UNREADABLE
        # A damaged header may state any size, also one of more than 64 bits.
        stored, unpacked = (min(size, 2 * MAX_BYTES) for size in (member.compress_size, member.file_size))
        name = member.filename.replace("\\", "/")  # old programs on Windows write backslashes
        positions[name] = Position(member.header_offset, stored, method, unpacked, member.CRC)
    return positions


def is_read(name: str) -> bool:
    """Whether a member is an image that is not hidden."""
    return is_image(name) and not is_ignored(name)


def is_ignored(name: str) -> bool:
    """Whether a member or one of its folders is hidden."""
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")  # tar -P stores absolute names


def _below(members: Iterable[str], split: str | None, path: Path, enclosing: bool, whole: bool) -> dict[str, str]:
    """Maps names relative to the folder of a split to members. A `whole` archive without splits contributes all."""
    names = {_normal(member): member for member in members}
    while names and not enclosing:
        tops = {name.partition("/")[0] if "/" in name else "" for name in names}
        if split in tops:
            return {name.removeprefix(f"{split}/"): m for name, m in names.items() if name.startswith(f"{split}/")}
        check_split_names(tops, split, path)
        if split and ((split != "train" and "train" in tops) or "val" in tops):  # never the images of the other split
            raise no_split(path, split, "train" in tops)
        if len(tops) != 1 or "" in tops:
            break
        names = {name.partition("/")[2]: member for name, member in names.items()}
    if names and split and (split != "train" or not whole):
        raise no_split(path, split, False)
    warn_of_inner_splits(names if split else (), path)
    return names
