"""python -m mae.data.resize FOLDER COPY: copies a folder of images and scales their short sides to 256 pixels.

Smaller files help if the CPU cores decode images more slowly than the GPU trains. Training scales crops to 224 pixels
and discards most pixels of a photograph. Crops of the copy are slightly less sharp than crops of the original.
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

from mae.cli import entry_point
from mae.data.batches import up_to_cores
from mae.data.decode import BadImage, is_rescaled, read
from mae.data.segmentation_masks import JPEG, MASK_FOLDERS, PNG
from mae.data.sources import files_below, log_listing
from mae.files import atomic, locks
from mae.files.untrusted import printable, read_file
from mae.interrupts import end_with_parent
from mae.settings import types
from mae.settings.choices import DEFAULT_WORKERS, SHORT_SIDE

logger = logging.getLogger(__name__)

SCALED = ("L", "LA", "RGB", "RGBA", "CMYK")
FEW_COLORS = 64  # pictures with at most so many may be masks, whose values are classes
MAX_LISTED = 5  # unreadable files that are listed


def resize(name: str, folder: Path, copy: Path, short_side: int, quality: int) -> tuple[str, str]:
    """Writes the copy of one image. An existing copy is kept.

    Format, colors and EXIF data are preserved. Small pictures are copied unchanged. So are pictures with few colors and
    all files except JPEG and plain PNG files with 8 bits, because scaling would lose information.

    Args:
        name: path of the image, relative to `folder`.
        short_side: largest short side, in pixels.
        quality: quality of JPEG files.

    Returns:
        The outcome, and the reason if the image can't be read.

    Raises:
        OSError: the copy can't be written.
    """
    target = copy / name
    if target.exists():
        return "there before", ""
    try:
        data = read_file(folder / name)
        scaled = scale(data, short_side, quality)
    except Exception as error:  # decoders raise any exception on damaged bytes
        return "can't be read", printable(f"{name}: {' '.join(str(error).split())}")
    with atomic.replacing(target, sync=False) as written:  # syncing every file would take longer than all the rest
        written.write_bytes(scaled or data)
    return "scaled" if scaled else "copied as they are", ""


def scale(data: bytes, short_side: int, quality: int) -> bytes | None:
    """Scales an image file so that its short side has `short_side` pixels; None if it must be copied unchanged."""
    if not data.startswith((JPEG, PNG)):
        return None
    picture = read(data, 3)
    if not isinstance(picture, Image.Image) or picture.mode not in SCALED or "transparency" in picture.info:
        return None
    if is_rescaled(picture):
        return None
    if min(picture.size) <= short_side or getattr(picture, "n_frames", 1) > 1:
        picture.load()  # raises if the file can't be read
        return None
    if picture.getcolors(FEW_COLORS):
        return None
    factor, stream = short_side / min(picture.size), io.BytesIO()
    size = (max(short_side, round(picture.width * factor)), max(short_side, round(picture.height * factor)))
    own = {"quality": quality} if picture.format == "JPEG" else {}
    exif = picture.info.get("exif", b"")
    picture.resize(size, Image.Resampling.BICUBIC).save(stream, picture.format, exif=exif, **own)
    return stream.getvalue()


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser(
        "Copies a folder of images and scales them down. The same command resumes an interrupted copy."
    )
    parser.add_argument("data_path", type=Path, metavar="FOLDER", help="images, flat or nested")
    parser.add_argument(
        "copy", type=Path, metavar="COPY", help="output folder, with the same subfolders and file names"
    )
    parser.add_argument(
        "--short_side", default=SHORT_SIDE, type=types.positive_int, metavar="S", help="largest short side, in pixels"
    )
    parser.add_argument("--quality", default=90, type=types.jpeg_quality, metavar="Q", help="quality of JPEG files")
    parser.add_argument(
        "--num_workers", default=DEFAULT_WORKERS, type=types.positive_int, metavar="N",
        help="worker processes, at most one per CPU core",
    )  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes the copy. Prints the number of files, and the files that can't be read.

    Raises:
        ValueError: the folder contains no images, a folder of masks or the copy, or another process writes the copy.
        OSError: the folder can't be read.
        BadImage: a file can't be read.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if args.copy.resolve().is_relative_to(args.data_path.resolve()):
        raise ValueError(f"{args.copy} is inside {args.data_path}; give a folder outside of it")
    images, others = files_below(str(args.data_path))
    names = sorted(os.path.relpath(path, args.data_path) for path in images)
    if not names:
        raise ValueError(f"there are no images in {args.data_path}")
    for name in names:  # interpolation would create values of other classes
        folders = [args.data_path.resolve().name, *name.split(os.sep)[:-1]]
        if any(folder.lower() in MASK_FOLDERS for folder in folders):
            raise ValueError(
                f"masks can't be scaled like photographs: {printable(str(args.data_path / name))} is in a folder of "
                f"masks ({', '.join(MASK_FOLDERS)}); give the folder of the images alone"
            )
    log_listing(f"{len(names):,} images in {args.data_path}", len(names), others)
    num_workers = up_to_cores(args.num_workers)
    one = partial(resize, folder=args.data_path, copy=args.copy, short_side=args.short_side, quality=args.quality)
    counts, unread = Counter[str](), []
    with locks.locked(args.copy), ProcessPoolExecutor(num_workers, initializer=end_with_parent) as pool:
        for parent in {(args.copy / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        for outcome, why in tqdm(pool.map(one, names, chunksize=16), total=len(names), unit="image", disable=None):
            counts[outcome] += 1
            unread += [why] if why else []
    logger.info(f"{len(names):,} images: " + ", ".join(f"{count:,} {what}" for what, count in counts.most_common()))
    if counts["there before"]:
        logger.info("existing files are kept, even if made with another --short_side or --quality")
    logger.info("\n".join(unread[:MAX_LISTED]) or f"in {args.copy}")
    if unread:
        raise BadImage(f"{len(unread):,} files can't be read; the copy does not contain them")


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
