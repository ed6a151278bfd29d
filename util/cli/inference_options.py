"""The flags of commands that use a trained model."""

import argparse
from typing import Any

from util.cli.options import add, add_exif
from util.cli.user_code import import_object


def add_inference_options(
    parser: argparse.ArgumentParser, images: bool = True, example: str = "mae_finetuned_vit_base", also: str = ""
) -> None:
    """Adds the flags of a command that uses a trained model.

    Args:
        images: add the image files as arguments.
        example: a published name that the command accepts; "" if it accepts checkpoint files only.
        also: end of the help text of --model: other values that the command accepts.
    """
    published = f", folder in the format of transformers, or published name such as {example}" * bool(example)
    if images:
        parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
        add_exif(parser, "applied to single photographs")
        add(parser, "nodata", "value_range")
    parser.add_argument("--model", required=True, metavar="FILE", help=f"checkpoint file{published}{also}")
    add(parser, "encoder", "encoder_args", "device", "debug")


def add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of batches and precision of a command that uses a trained model."""
    add(parser, "batch_size", default=128)
    add(parser, "num_workers")
    add_exif(parser, "not applied to datasets")
    add(parser, "fast_jpeg", "amp", "compile")


def chosen_settings(args: argparse.Namespace, reads: bool = True) -> dict[str, Any]:
    """Returns the arguments of `get_model` that the command line has: about the encoder, and about reading images.

    Args:
        reads: include those about reading images.

    Raises:
        ValueError: the class of --encoder can't be imported.
    """
    names = ("encoder_args", *(("exif", "nodata", "value_range") if reads else ()))
    settings = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return settings | ({"encoder": import_object("--encoder ", args.encoder)} if args.encoder else {})
