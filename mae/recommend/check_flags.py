"""The command line of `mae.recommend.check`. It is checked before PyTorch is imported, which may take half a minute."""

import argparse
from pathlib import Path
from typing import Any

from mae.cli import entry_point, flags, options
from mae.settings import types
from mae.settings.arguments import in_words

CHANNELS = "input channels: 3 RGB, 1 gray (default: those of the images)"
INIT_FROM = (
    "with --recipe: continue this encoder: a file or folder of DINOv2, DINOv3, MAE or a run of your own, a published "
    "name, or OWNER/NAME of the Hugging Face Hub"
)
BAD = "if an image can't be read: error, or skip: accept up to 10 %% of them (default: error; skip with --recipe)"
# Help of flags whose defaults differ from those of the scripts.
HELP = {
    "mean": "mean of each channel, for pixel values in [0, 1] (default: that of the images)",
    "std": "standard deviation of each channel (default: that of the images)",
    "num_workers": "processes that read the images for the check, at most one per CPU core; 0: none",
}
CACHE = "for small datasets: decode all images once, into a file (default: the recipe decides by the size of that file)"
# The settings of the data of the scripts: those that determine which images the command reads and how, those that it
# writes to a recipe, and the others.
READ = ("dataset", "train_list", "num_images", "nodata", "value_range", "channels_last")
PRETRAIN = (
    "input_size", "mean", "std", "exif", "pin_mem", "crop", "fast_jpeg", "cache_images", "repeated_sampling",
    "min_valid",
)  # fmt: skip
ON_BAD_IMAGE = "on_bad_image"
LABELS = ("task", "label_columns", "val_list")
MASKS = ("train_folders", "val_folders", "reduce_zero_label", "palette")
NAMES_LABELS = ("dataset", "train_list", "label_columns", *MASKS)  # with one of them, no file is searched for labels
OTHERS = ("crop_pct", "val_fraction", "nb_classes", "train_per_class", "cache_features", "short_side")
# The values of --for; what a recipe of fine-tuning has besides, and what it has not.
PRETRAINING = "pretrain"
FINETUNING = "finetune"
OF_FINETUNING = ("val_fraction", "nb_classes", "train_per_class")
ENCODER = ("finetune", "encoder", "encoder_args")
NOT_OF_FINETUNING = ("num_images", "repeated_sampling", "min_valid")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Checks a dataset before training. The exit code is 1 if images can't be read.")
    parser.add_argument("path", nargs="?", metavar="PATH", help="the same as --data_path")
    options.add(parser, "data_path", help="folder of images, flat or nested; or a tar or zip file of such a folder")
    options.add_source_options(options.group_of(parser, "data"), default=None, help=CHANNELS)
    options.add_input_options(parser, "image size")
    options.add(parser, "crop", "fast_jpeg")
    options.add(parser, "cache_images", default=None, help=CACHE)
    options.add(parser, "num_images", "repeated_sampling", "min_valid", *LABELS, *MASKS, *OTHERS)
    options.add(parser, ON_BAD_IMAGE, help=BAD)
    options.add(parser, *ENCODER)
    # None: not given.
    parser.set_defaults(**dict.fromkeys((*READ, *PRETRAIN, *LABELS, *MASKS, *OTHERS, *ENCODER, ON_BAD_IMAGE)))
    parser.add_argument("--split", default="train", choices=("train", "val"), help="training or validation set")
    parser.add_argument(
        "--limit", type=types.positive_int, metavar="N", help="check N evenly spaced images (default: all)"
    )
    parser.add_argument(
        "--recipe", type=flags.new_file(".yaml"), metavar="FILE", help="write a recipe for --config of a script"
    )
    parser.add_argument(
        "--for", dest="purpose", default=PRETRAINING, choices=(PRETRAINING, FINETUNING),
        help="the script of --recipe: main_pretrain.py, or main_finetune.py for the labels and the encoder of "
        "--finetune",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=types.positive, metavar="M",
        help="time of the training of --recipe (default: that of 800,000 images or 80 epochs, whichever is more, with "
        "which measured runs had most of their gain, at most 8 hours; with --init_from 30; of fine-tuning, what the "
        "labels need)",
    )  # fmt: skip
    options.add(parser, "init_from", default=None, help=INIT_FROM)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    return parser


def given_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that are given.

    Raises:
        ValueError: they exclude each other.
    """
    given = {name: value for name, value in vars(args).items() if value is not None and name not in ("path", "purpose")}
    finetunes = bool(args.recipe and args.purpose == FINETUNING)
    if getattr(args, "path", None):
        if "data_path" in given:
            raise ValueError(f"data_path={args.data_path} and the argument {args.path} are the same: give one of them")
        given["data_path"] = args.path
    if args.minutes and not args.recipe:
        raise ValueError(f"minutes={args.minutes:g} is the time of a recipe: give recipe=FILE")
    if args.init_from and not args.recipe:
        raise ValueError(f"init_from={args.init_from} is the start of a recipe: give recipe=FILE")
    if args.init_from and finetunes:
        raise ValueError(f"init_from={args.init_from}: the encoder of for={FINETUNING} is that of `finetune`")
    if args.recipe and args.split != "train":
        raise ValueError(f"split={args.split}: a recipe is for the training set")
    if args.recipe and args.extras:
        raise ValueError("`extras`: a recipe has no `encoder` for them; give both to main_pretrain.py beside `config`")
    if args.purpose != PRETRAINING and not args.recipe:
        raise ValueError(f"for={args.purpose} is for a recipe: give recipe=FILE")
    if not finetunes and (unused := [name for name in ENCODER if name in given]):
        raise ValueError(f"{in_words({name: given[name] for name in unused})}: give for={FINETUNING} too")
    return given


def checked(args: argparse.Namespace, explicit: frozenset[str]) -> argparse.Namespace:
    """Returns the arguments of the command line, as `entry_point.run` needs it.

    Raises:
        ValueError: as in `given_of`, or the images do not exist.
    """
    given = given_of(args)
    if given.keys().isdisjoint(("dataset", "train_list")):
        require_images(given.get("data_path"))
    return args


def require_images(data_path: str | None) -> None:
    """Raises ValueError if a path of images does not exist."""
    if data_path and not Path(data_path).exists():
        raise ValueError(f"data_path={data_path}: there is no such folder or archive")
