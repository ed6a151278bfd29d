"""The flags of main_segment.py that no other script has."""

import argparse

from util.cli.flags import count_or_all
from util.cli.options import AUGMENTATION, DATA, MODEL, OPTIMIZATION, add, add_input_options, group_of


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of images with segmentation masks, of the crop and of channels."""
    group = group_of(parser, DATA)
    add(
        group, "data_path",
        help="folder, or tar or zip file, with images and masks: images/training and annotations/training (ADE20K), "
        "train/images and train/masks, or the folders of mmsegmentation or LoveDA; the same for validation",
    )  # fmt: skip
    for flag, what in (("--train_folders", "training"), ("--val_folders", "validation")):
        group.add_argument(
            flag, nargs=2, metavar=("IMAGES", "MASKS"),
            help=f"the folder of the {what} images and that of their masks. File names are equal except for suffixes",
        )  # fmt: skip
    for name, what in (("train_list", "training"), ("val_list", "validation")):
        add(group, name, help=f"CSV file with a row `image,mask` for each {what} image")
    add(
        group, "dataset",
        help="VOCSegmentation: the dataset of torchvision, with its files in --data_path; or py:MODULE:FUNCTION, your "
        "function(split, data_path) that returns a dataset of images and masks (DATA.md)",
    )  # fmt: skip
    add(group, "download", help="download --dataset to --data_path")
    add(
        group, "nb_classes",
        help="number of classes. The values in masks are 0 to N - 1; 255 is ignored (default: number in --palette)",
    )  # fmt: skip
    add(group, "reduce_zero_label", "palette")
    add_input_options(group, "crop and window size")
    add(group, "short_side", "in_chans", "num_workers")


def add_segmentation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the head, the encoder and the augmentation of segmentation."""
    add(group_of(parser, MODEL), "head", "finetune", "adapt_input", "drop_path", "grad_checkpointing")
    group = group_of(parser, OPTIMIZATION)
    add(group, "layer_decay")
    add(
        group, "unfreeze_blocks", default=0, type=count_or_all, metavar="K|all",
        help="train the head and the last K blocks; 0: a frozen encoder; all: all parameters",
    )  # fmt: skip
    add(group_of(parser, AUGMENTATION), "scale", "hflip")
