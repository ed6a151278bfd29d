"""Damage to files: to any bytes, and to the structure of a format. All functions use the given random generator."""

import json
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any

ODD = [0, 1, 2, 3, 5, 7, 8, 127, 128, 255, 256, 1000, 20_000, 32_767, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1,
       2**32, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip
VALUES: list[Any] = [None, True, -1, 0, 3, 1e308, float("nan"), 10**30, "", "x" * 200, "\x1b[2J", "\udc80", "../../x",
                     [], {}, [[]], [1, 2, 3], {"a": 1}, "1", "0.5"]  # fmt: skip
WORDS = [
    "&a ", "*a ", "<<: *a\n", "!!python/object/apply:os.getcwd []", "!!binary x", "!!float x", "!!set {a}", "? ", "[",
    "]", "{", "}", ": ", "- ", "'", '"', "|\n", ">\n", "%YAML 9\n", "---\n", "...\n", "\t", "\n", "#", "@", "`", "null",
    "~", ".inf", "-1", "1e999", "0x", "1:1:1", "9" * 5000, "\\", '"\\e[2J"', "\u202e", "\x85", "\ufeff", "\x00", ",",
    ";", "wds:pipe:true", "--help", "true", "2024-01-01", "é",
]  # fmt: skip


def mutate(data: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    """Applies one to three kinds of damage to any bytes."""
    for _ in range(generator.choice((1, 1, 2, 3))):
        data = generator.choice((flip, flip, cut, splice, number, number))(data, others, generator)
    return data


def flip(data: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 8)) if changed else 0):
        changed[place(len(changed), generator)] ^= 1 << generator.randrange(8)
    return bytes(changed)


def place(size: int, generator: random.Random) -> int:
    """A random position: in the headers and directories at both ends as often as elsewhere."""
    near = generator.randrange(min(size, 400))
    return generator.choice((near, size - 1 - near, generator.randrange(size)))


def cut(data: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data) + 1)]


def splice(data: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    other = generator.choice(others)
    return data[: generator.randrange(len(data) + 1)] + other[generator.randrange(len(other) + 1) :]


def number(data: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    """Writes an unusual number of 1 to 8 bytes to a random position, in either byte order."""
    written = odd_number(generator.choice((1, 2, 4, 8)), generator)
    start = place(len(data), generator) if data else 0
    return data[:start] + written + data[start + len(written) :]


def odd_number(size: int, generator: random.Random) -> bytes:
    return (generator.choice(ODD) % 256**size).to_bytes(size, generator.choice(("little", "big")))


def tiff(data: bytes, generator: random.Random) -> bytes:
    """Changes the type, the number of values or the value of an entry of the first directory."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, start)[0]
    entry = start + 2 + 12 * generator.randrange(count)
    at, size = generator.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2)))
    value = generator.choice(ODD) % 256**size
    if at == 0:
        value = generator.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339))
    written = value.to_bytes(size, "little" if order == "<" else "big")
    return data[: entry + at] + written + data[entry + at + size :]


def png(data: bytes, generator: random.Random) -> bytes:
    """Damages a chunk, with a valid checksum."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack_from(">I", data, at)[0]
        chunks.append(data[at + 4 : at + 8 + size])
        at += 12 + size
    which = generator.randrange(len(chunks))
    if generator.random() < 0.3:
        name = generator.choice((b"iTXt", b"zTXt", b"iCCP", b"eXIf"))
        chunks.insert(which, name + b"a\0\0" + zlib.compress(bytes(10**6)))
    else:
        chunks[which] = chunks[which][:4] + mutate(chunks[which][4:], [data], generator)
    made = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return data[:8] + b"".join(made)


def jpeg(data: bytes, generator: random.Random) -> bytes:
    """Repeats a segment or scan of a JPEG file up to thousands of times, with bytes before each copy."""
    markers = [at for at in range(2, len(data) - 3) if data[at] == 0xFF and data[at + 1] in (*range(0xC0, 0xD0), 0xDA)]
    if not markers:
        return data
    start = generator.choice((markers[-1], generator.choice(markers)))
    end = generator.choice([at for at in [*markers, len(data) - 2] if at > start][:2] or [len(data)])
    between = generator.choice((b"", b"", b"\0", b"\xff\xff", b"\xff\xd0", b"\xff\xfe\0\2", b"\xff\xd9"))
    number = generator.choice((1, 2, 30, 100, 3000))
    return data[:end] + (between + data[start:end]) * number + data[end:]


def zip_directory(data: bytes, generator: random.Random) -> bytes:
    """Changes a field of an entry, or of the end, of the directory of a zip file."""
    signature, fields = generator.choice((
        (b"PK\1\2", ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (38, 4), (42, 4))),
        (b"PK\5\6", ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        (b"PK\3\4", ((8, 2), (18, 4), (26, 2), (28, 2))),
    ))  # fmt: skip
    starts = [at for at in range(len(data)) if data.startswith(signature, at)]
    if not starts:
        return data
    at, size = generator.choice(fields)
    at += generator.choice(starts)
    return data[:at] + odd_number(size, generator) + data[at + size :]


def tar_header(data: bytes, generator: random.Random) -> bytes:
    """Changes a field of a header, with a valid checksum."""
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data
    start = generator.choice(starts)
    header = bytearray(data[start : start + 512])
    at, size = generator.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (345, 155)))
    if at == 156:
        header[156] = generator.choice(b"01234567xgLKSVM\0")
    elif at == 124:
        sizes = (b"77777777777\0", b"\xff" * 12, b"\x80" + bytes(7) + b"\x7f\0\0\0", b"-1\0" + bytes(9))
        header[124:136] = generator.choice(sizes)
    else:
        header[at : at + size] = bytes(generator.choice((0, 27, 46, 47, 255)) for _ in range(size))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def text(data: str, generator: random.Random) -> str:
    """Inserts, repeats and removes words and lines."""
    for _ in range(generator.choice((1, 1, 2, 4))):
        lines = data.split("\n")
        how, which = generator.randrange(5), generator.randrange(len(lines))
        at = generator.randrange(len(data) + 1)
        if how < 2:
            data = data[:at] + generator.choice(WORDS) + data[at:]
        elif how == 2:
            data = "\n".join([*lines[:which], *lines[which:][: generator.randrange(3)] * 2, *lines[which:]])
        elif how == 3:
            data = "\n".join(lines[:which] + lines[which + 1 :])
        else:
            data = data[:at] + data[at + generator.randrange(8) :]
    return data


def nested(value: Any, generator: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """Returns a copy with one part replaced, removed or renamed."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        how = generator.randrange(6)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {(f"{k}\x1b" if k == key else k): v for k, v in value.items()}
        return value | {key: nested(value[key], generator, values)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        at = generator.randrange(len(value))
        return [*value[:at], nested(value[at], generator, values), *value[at + 1 :]]
    return generator.choice(values)


def document(data: bytes, generator: random.Random) -> bytes:
    """Damages the structure of a JSON document, or else its text."""
    try:
        return json.dumps(nested(json.loads(data), generator)).encode()
    except ValueError:
        return text(data.decode(errors="replace"), generator).encode(errors="replace")
