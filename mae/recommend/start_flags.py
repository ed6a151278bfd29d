"""The command line of `mae.start`. It is checked before PyTorch is imported, which may take half a minute."""

import argparse
from pathlib import Path
from typing import Any

from mae.cli import options
from mae.recommend import check_flags

# Arguments of `mae recipe` that are not those of this command, and their flags.
OF_RECIPE = {
    "recipe": "recipe", "purpose": "for", "split": "split", "limit": "limit",
    **{name: name for name in check_flags.ENCODER},
}  # fmt: skip
NOT_OF_RECIPE = ("output_dir", "against")
HELP = {
    # Those that are refused or have no effect are not in --help.
    **dict.fromkeys([*OF_RECIPE, *check_flags.MASKS, *check_flags.OTHERS], argparse.SUPPRESS),
    "minutes": "time of the pre-training, without the check, the comparison and the page (default: that of 800,000 "
    "images or 80 epochs, whichever is more, with which measured runs had most of their gain, at most 8 hours; with "
    "--init_from 30)",
}


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = check_flags.get_args_parser()
    parser.prog = "mae start"
    parser.description = "Pre-trains on a folder of images, compares the encoder, and writes a page about it."
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="directory of the run (default: runs/NAME of the images)"
    )
    options.add_against_option(parser)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    return parser


def given_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that are given, but those in NOT_OF_RECIPE.

    Raises:
        ValueError: an argument is not one of this command, or no images are named.
    """
    defaults = vars(get_args_parser().parse_args([]))
    given = {name: value for name, value in vars(args).items() if name not in NOT_OF_RECIPE and value != defaults[name]}
    if unused := [name for name in OF_RECIPE if name in given]:
        raise ValueError(f"`{OF_RECIPE[unused[0]]}` is an argument of `mae recipe`, which writes a recipe only")
    if not images_of(args):
        raise ValueError("name a folder of images, such as: mae start IMAGES")
    return given


def images_of(args: argparse.Namespace) -> str | None:
    """Returns what names the images."""
    images: str | None = args.path or args.data_path or args.train_list or args.dataset
    return images


def output_dir(args: argparse.Namespace) -> Path:
    """Returns the directory of the run: by default, that of the name of the images in runs/."""
    if args.output_dir:
        return Path(args.output_dir).expanduser()
    path = Path(str(images_of(args)))
    name = path.resolve().name if path.is_dir() else path.stem  # "." has no name
    return Path("runs", name.replace(":", "_"))


def checked(args: argparse.Namespace, explicit: frozenset[str]) -> argparse.Namespace:
    """Returns the arguments of the command line, as `entry_point.run` needs it.

    Raises:
        ValueError: as in `given_of`; or a first call names images that do not exist, or an `output_dir` within them.
    """
    given_of(args)
    out = output_dir(args)
    path = args.path or args.data_path
    if out.with_name(f"{out.name}.yaml").exists() or not path or args.dataset or args.train_list:
        return args
    check_flags.require_images(path)
    folder = Path(path).resolve()
    if folder in out.resolve().parents:
        elsewhere = folder.parent / "runs" / out.name
        raise ValueError(f"output_dir={out} is in the folder of the images: give output_dir={elsewhere}")
    return args
