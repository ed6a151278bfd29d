"""Copies a folder of images, with short sides of 256 pixels: python examples/resize_folder.py IMAGES COPY.

Smaller files help if the CPU cores decode images more slowly than the GPU trains. Crops of the copy are slightly less
sharp than crops of the original. The same command resumes an interrupted copy. JPEG and PNG files of 8 bits are scaled;
all other files, and pictures of few colors, which may be masks, are copied unchanged.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm


def copy_file(file: Path, folder: Path, copy: Path, short_side: int) -> str:
    """Copies a file, scaled if it is a larger image; returns the reason if it can't be read. A copy is kept."""
    target = copy / file.relative_to(folder)
    if target.exists():
        return ""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as picture:
            picture.load()
            is_deep = picture.format == "PNG" and file.read_bytes()[24] > 8  # Pillow reduces 16 bits to 8
            is_photograph = picture.mode in ("L", "RGB") and not picture.getcolors(64) and not is_deep
            if is_photograph and "transparency" not in picture.info and min(picture.size) > short_side:
                scaled = ImageOps.scale(picture, short_side / min(picture.size), Image.Resampling.BICUBIC)
                scaled.save(part, picture.format, quality=90, exif=picture.info.get("exif", b""))
    except Image.UnidentifiedImageError:
        pass  # another format
    except OSError as error:
        return f"{file}: {error}"
    if not part.exists():
        shutil.copyfile(file, part)
    part.replace(target)
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--short_side", type=int, default=256, help="pixels (default: 256)")
    args = parser.parse_args()
    files = sorted(path for path in args.folder.rglob("*") if path.is_file())
    if not files:
        parser.error(f"there are no files in the folder {args.folder}")
    with ProcessPoolExecutor() as pool:
        copied = pool.map(partial(copy_file, **vars(args)), files, chunksize=16)
        unread = [reason for reason in tqdm(copied, total=len(files), unit="file") if reason]
    if unread:
        raise SystemExit("\n".join([f"{len(unread)} files can't be read, and have no copy:", *unread[:5]]))
