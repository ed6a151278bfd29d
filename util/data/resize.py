"""python -m util.resize FOLDER COPY: a copy of a folder of images, scaled so that their short sides have 256 pixels.

Where processors can't decode as fast as a GPU trains, smaller files are the remedy: of the pixels of a photograph most
are thrown away when a crop of it is scaled to 224. Crops of the copy are a little softer than the folder's.
"""

import argparse
import io
import logging
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from util.cli import entry_point, flags
from util.cli.choices import DEFAULT_WORKERS
from util.data.decode import BadImage, read
from util.data.folders import image_files
from util.data.loader import up_to_cores
from util.files import atomic
from util.files.untrusted import printable, read_file

logger = logging.getLogger(__name__)

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG"
SCALED = ("L", "LA", "RGB", "RGBA", "CMYK")
MAX_LISTED = 5  # files that can't be read are named, up to so many


def resize(name: str, folder: Path, copy: Path, short_side: int, quality: int) -> tuple[str, str]:
    """Writes the copy of one image, unless that is there already: what became of it, and why if it can't be read.

    Format, colours and EXIF data stay. A picture that is small already is copied as it is, and so is what a scaled
    picture would lose something of: all but JPEG and plain PNG files of 8 bits.

    Raises:
        OSError: the copy can't be written.
    """
    target = copy / name
    if target.exists():
        return "there before", ""
    try:
        data = read_file(folder / name)
        scaled = scale(data, short_side, quality)
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        return "can't be read", printable(f"{name}: {' '.join(str(error).split())}")
    with atomic.replacing(target, sync=False) as written:  # to wait for the disk after each would take longer than all
        written.write_bytes(scaled or data)
    return "scaled" if scaled else "copied as they are", ""


def scale(data: bytes, short_side: int, quality: int) -> bytes | None:
    """An image file's bytes, scaled so that its short side has so many pixels; None where it must stay as it is."""
    if not data.startswith((JPEG, PNG)):
        return None
    picture = read(data, 3)
    if not isinstance(picture, Image.Image) or picture.mode not in SCALED or "transparency" in picture.info:
        return None
    if min(picture.size) <= short_side or getattr(picture, "n_frames", 1) > 1:
        picture.load()  # it must be readable all the same
        return None
    factor, stream = short_side / min(picture.size), io.BytesIO()
    size = (max(short_side, round(picture.width * factor)), max(short_side, round(picture.height * factor)))
    own = {"quality": quality} if picture.format == "JPEG" else {}
    exif = picture.info.get("exif", b"")
    picture.resize(size, Image.Resampling.BICUBIC).save(stream, picture.format, exif=exif, **own)
    return stream.getvalue()


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser(
        "Copies a folder of images and scales them down. The same command resumes an interrupted copy."
    )
    parser.add_argument("data_path", type=Path, metavar="FOLDER", help="images, flat or nested")
    parser.add_argument(
        "copy", type=Path, metavar="COPY", help="folder to write, with the same subfolders and file names"
    )
    parser.add_argument(
        "--short_side", default=256, type=flags.positive_int, metavar="S", help="largest short side, in pixels"
    )
    parser.add_argument("--quality", default=90, type=flags.jpeg_quality, metavar="Q", help="quality of JPEG files")
    parser.add_argument(
        "--num_workers", default=DEFAULT_WORKERS, type=flags.positive_int, metavar="N",
        help="processes, at most one per CPU core",
    )  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes the copy and prints the number of files, and those that can't be read."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not args.data_path.is_dir():
        raise ValueError(f"there is no folder {args.data_path}")
    if args.copy.resolve().is_relative_to(args.data_path.resolve()):
        raise ValueError(f"{args.copy} lies in {args.data_path}: the copy must be a folder of its own")
    names = sorted(os.path.relpath(path, args.data_path) for path in image_files(str(args.data_path)))
    if not names:
        raise ValueError(f"there are no images in {args.data_path}")
    for parent in {(args.copy / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    one = partial(resize, folder=args.data_path, copy=args.copy, short_side=args.short_side, quality=args.quality)
    counts, unread = Counter[str](), []
    with ProcessPoolExecutor(up_to_cores(args.num_workers)) as pool:
        for outcome, why in tqdm(pool.map(one, names, chunksize=16), total=len(names), unit="image", disable=None):
            counts[outcome] += 1
            unread += [why] if why else []
    logger.info(f"{len(names):,} images: " + ", ".join(f"{count:,} {what}" for what, count in counts.most_common()))
    if counts["there before"]:
        logger.info("existing files are kept, even if made with another --short_side or --quality")
    logger.info("\n".join(unread[:MAX_LISTED]) or f"in {args.copy}")
    if unread:
        raise BadImage(f"{len(unread):,} files can't be read; the copy is without them")
