"""python -m util.resize FOLDER COPY: a copy of a folder of images, scaled so that their short sides have 256 pixels.

Where processors can't decode as fast as a GPU trains, smaller files are the remedy: of the pixels of a photograph most
are thrown away when a crop of it is scaled to 224. Crops of the copy are a little softer than the folder's.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from util import cli, flags
from util.decode import SUFFIXES, BadImage, read

logger = logging.getLogger(__name__)

LEFT_ALONE = (".tif", ".tiff", ".npy")
SHOWN = 5  # files that can't be read are named, up to so many
UNFINISHED = ".unfinished"  # ending of a file that is being written


def resize(name: str, folder: Path, copy: Path, short_side: int, quality: int) -> tuple[str, str]:
    """Writes the copy of one image, unless that is there already: what became of it, and why if it can't be read.

    Colours, format and EXIF data stay. A picture that is small already is copied as it is, and so is what may be no
    plain picture of 8 bits: TIFF and .npy files, palettes, several frames.
    """
    source, target = folder / name, copy / name
    if target.exists():
        return "done before", ""
    unfinished = target.with_name(target.name + UNFINISHED)
    try:
        data = source.read_bytes()
        picture = None if source.suffix.lower() in LEFT_ALONE else read(data, 3)
        if (
            not isinstance(picture, Image.Image)
            or min(picture.size) <= short_side
            or picture.mode in ("P", "1")
            or getattr(picture, "n_frames", 1) > 1
        ):
            unfinished.write_bytes(data)
            outcome = "copied as they are"
        else:
            factor = short_side / min(picture.size)
            size = (max(short_side, round(picture.width * factor)), max(short_side, round(picture.height * factor)))
            options = {"quality": quality, "exif": picture.info.get("exif", b"")} if picture.format == "JPEG" else {}
            picture.resize(size, Image.Resampling.BICUBIC).save(unfinished, picture.format, **options)
            outcome = "scaled"
    except (BadImage, OSError, ValueError, SyntaxError) as error:
        unfinished.unlink(missing_ok=True)
        return "can't be read", f"{name}: {' '.join(str(error).split())}"
    unfinished.replace(target)  # whole, or not there
    return outcome, ""


def image_names(folder: Path) -> Iterator[str]:
    """Paths of image files below a folder, relative to it."""
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (
            str(Path(path, file).relative_to(folder)) for file in sorted(files) if file.lower().endswith(SUFFIXES)
        )


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = cli.parser("Writes a copy of a folder of images, scaled down. Started again, it goes on where it was.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as --data_path of the mains")
    parser.add_argument("copy", type=Path, metavar="COPY", help="the folder to write; classes and names stay")
    parser.add_argument("--short_side", default=256, type=flags.positive_int, metavar="S", help="pixels of it")
    parser.add_argument("--quality", default=90, type=flags.positive_int, metavar="Q", help="of JPEG files, up to 100")
    parser.add_argument(
        "--num_workers", default=os.cpu_count(), type=flags.positive_int, metavar="N", help="processes; the cores"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes the copy; tells how many files there are, and which can't be read."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not args.folder.is_dir():
        raise ValueError(f"there is no folder {args.folder}")
    if args.copy.resolve().is_relative_to(args.folder.resolve()):
        raise ValueError(f"{args.copy} lies in {args.folder}: the copy must be a folder of its own")
    names = list(image_names(args.folder))
    if not names:
        raise ValueError(f"there are no images in {args.folder}")
    for parent in {(args.copy / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    one = partial(resize, folder=args.folder, copy=args.copy, short_side=args.short_side, quality=args.quality)
    counts, unread = Counter[str](), []
    with ProcessPoolExecutor(args.num_workers) as pool:
        for outcome, why in tqdm(pool.map(one, names, chunksize=16), total=len(names), unit="image", disable=None):
            counts[outcome] += 1
            unread += [why] if why else []
    logger.info(f"{len(names):,} images: " + ", ".join(f"{count:,} {what}" for what, count in counts.most_common()))
    logger.info("\n".join(unread[:SHOWN]) or f"in {args.copy}")
    if unread:
        raise BadImage(f"{len(unread):,} files can't be read; the copy is without them")


if __name__ == "__main__":
    cli.run(main, get_args_parser())
