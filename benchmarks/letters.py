"""Letters and digits: gray images of 28 x 28 pixels and 62 classes, rendered from fonts of Debian's packages.

    apt-get install --no-install-recommends $(python benchmarks/letters.py)

The command prints the names of the packages. Test images are of the fonts of other packages than training images.
Nothing that is rendered is in the repository. Licences of the fonts, as the packages state them: OFL-1.1, except
fonts-adf-* (GPL-2+ with font exception), fonts-freefont-ttf (GPL-3+ with font exception), fonts-dejavu-core and
fonts-hack (Bitstream Vera, Expat), fonts-b612 (OFL-1.1, EPL-2.0), fonts-georgewilliams (OFL-1.1 or BSD-3-Clause),
fonts-go (BSD-3-Clause), fonts-opendyslexic (CC-BY-3.0), fonts-open-sans, fonts-roboto-slab, fonts-play and
fonts-jetbrains-mono (Apache-2.0), fonts-tuffy (public domain).
"""

import string
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PACKAGES = {
    "train": (
        "fonts-adf-accanthis", "fonts-adf-baskervald", "fonts-adf-berenis", "fonts-adf-gillius", "fonts-adf-ikarius",
        "fonts-adf-irianis", "fonts-adf-libris", "fonts-adf-mekanus", "fonts-adf-romande", "fonts-adf-switzera",
        "fonts-adf-tribun", "fonts-adf-universalis", "fonts-averia-gwf", "fonts-b612", "fonts-cabin",
        "fonts-cantarell", "fonts-comic-neue", "fonts-courier-prime", "fonts-crosextra-caladea",
        "fonts-crosextra-carlito", "fonts-dejavu-core", "fonts-dosis", "fonts-ebgaramond", "fonts-fantasque-sans",
        "fonts-firacode", "fonts-freefont-ttf", "fonts-georgewilliams", "fonts-go", "fonts-hack", "fonts-inter",
        "fonts-jetbrains-mono", "fonts-junicode", "fonts-karla", "fonts-manrope", "fonts-opendyslexic",
        "fonts-quicksand", "fonts-sora",
    ),
    "val": (
        "fonts-bwht", "fonts-lato", "fonts-mononoki", "fonts-open-sans", "fonts-play", "fonts-quattrocento",
        "fonts-roboto-slab", "fonts-sil-gentium-basic", "fonts-tuffy", "fonts-vollkorn", "fonts-yanone-kaffeesatz",
    ),
}  # fmt: skip
STYLES = 5  # of a package: bold, italic and so on, evenly spaced
CHARACTERS = string.digits + string.ascii_letters
# pixels of an image, of the font, and from the top
SIDE = 28
SIZE = 22
BASELINE = 21


def fonts(package: str) -> list[Path]:
    """Returns font files of an installed package.

    Raises:
        ValueError: it is not installed.
    """
    listed = subprocess.run(["dpkg-query", "--listfiles", package], capture_output=True, text=True, check=False)
    files = sorted(Path(line) for line in listed.stdout.splitlines() if line.endswith((".ttf", ".otf")))
    if not files:
        raise ValueError(f"{package} is not installed: see benchmarks/letters.py")
    return [files[number] for number in np.unique(np.linspace(0, len(files) - 1, STYLES, dtype=int))]


def glyphs(file: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yields the characters of a font and their images. Characters that it lacks are left out."""
    font = ImageFont.truetype(file, SIZE)
    missing = bytes(font.getmask("\uffff"))
    for character in CHARACTERS:
        image = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(image).text((SIDE / 2, BASELINE), character, 255, font, anchor="ms")
        if image.getbbox() and bytes(font.getmask(character)) != missing:
            yield character, image


def name_of(character: str) -> str:
    """Returns the class of a character. Names that differ in case only are one folder on some systems."""
    return f"{character}_upper" if character.isupper() else character


def write(folder: Path) -> None:
    """Writes the images to folder/train and folder/val, with a folder for each class."""
    for split, packages in PACKAGES.items():
        for package in packages:
            for file in fonts(package):
                for character, image in glyphs(file):
                    out = folder / split / name_of(character)
                    out.mkdir(parents=True, exist_ok=True)
                    image.save(out / f"{package}-{file.stem}.png")


if __name__ == "__main__":
    print(*(package for packages in PACKAGES.values() for package in packages))
