"""All flags. Each is defined once. A script calls the functions that it needs and sets the defaults of its task.

A function may add flags to several groups of --help. GROUPS is their order.
"""

import argparse
from collections.abc import Collection
from typing import Any

from util.cli.choices import (
    ADAPT_CHOICES,
    AMP_CHOICES,
    CLASSIFICATION,
    CROP_CHOICES,
    DEFAULT_WORKERS,
    HEAD_CHOICES,
    LINEAR,
    METRIC_CHOICES,
    NUM_QUERIES,
    PROBE_CHOICES,
    REGRESSION_LOSSES,
    TASK_CHOICES,
)
from util.cli.flags import (
    Range,
    Size,
    add_switch,
    count,
    count_or_all,
    nodata,
    non_negative,
    not_in_recipes,
    positive,
    positive_int,
    positive_share,
    ratio,
    runs_code,
    seed,
    share,
)
from util.dist import BACKENDS
from util.masking import MASKING_CHOICES

DATA, AUGMENTATION, MODEL, OPTIMIZATION, EVALUATION, RUN = (
    "data", "augmentation", "model", "optimization", "evaluation", "run"
)  # fmt: skip
DISTRIBUTED = "distributed (start with torchrun, srun or submitit_*.py)"
GROUPS = (DATA, AUGMENTATION, MODEL, OPTIMIZATION, EVALUATION, RUN, DISTRIBUTED)


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Returns the group with this title. The first call adds all groups; --help omits groups without flags."""
    if not any(group.title == title for group in parser._action_groups):
        for name in GROUPS:
            parser.add_argument_group(name)
    return next(group for group in parser._action_groups if group.title == title)


# ---------------------------------------------------------------------------------------------------------------- data


def add_data_options(parser: argparse.ArgumentParser, labels: bool = False) -> None:
    """Adds the flags of the dataset and the image size.

    Args:
        labels: the images need labels.
    """
    group = _group(parser, DATA)
    layout = "folder of images, flat or nested; if it contains train/, only train/ is read"
    if labels:
        layout = "folder with train/CLASS/IMAGE and val/CLASS/IMAGE"
    group.add_argument("--data_path", metavar="PATH", help=f"{layout}; or a tar or zip file of such a folder")
    add_source_options(group, labels)
    _add_input_options(group, "image size")
    group.add_argument(
        "--crop", default=CROP_CHOICES[0], choices=CROP_CHOICES,
        help="random: random crops in training, and the center in evaluation, with the aspect ratio of --input_size; "
        "none: the whole image, scaled to --input_size, for spectrograms and signals",
    )  # fmt: skip
    _add_fast_jpeg(group)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of images in memory, for scripts that read each image several times."""
    group = _group(parser, DATA)
    add_switch(
        group, "cache_images", False,
        "for small datasets: decode all images at the start and keep them in up to half of the memory of the machine, "
        "which its processes share. An image takes height x width x channels bytes. The batches are the same",
    )  # fmt: skip


def _add_input_options(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--input_size", default=224, type=positive_int, nargs="+", action=Size, metavar=("H", "W"),
        help=f"{what} in pixels: one number for squares, or height and width",
    )  # fmt: skip
    group.add_argument(
        "--mean", type=float, nargs="+", metavar="M",
        help="mean of each channel, for pixel values in [0, 1] (default: ImageNet's, or that of the loaded weights)",
    )  # fmt: skip
    group.add_argument(
        "--std", type=positive, nargs="+", metavar="S",
        help="standard deviation of each channel (default: as for --mean)",
    )  # fmt: skip
    _add_exif(group, "not applied")
    add_value_options(group)
    add_switch(group, "pin_mem", True, "load batches into pinned memory, for faster copies to the GPU")


def add_source_options(group: argparse._ActionsContainer, labels: bool = False) -> None:
    """Adds the flags of data sources other than --data_path, of channels, and of worker processes."""
    entry = "a path and a label for each image" if labels else "a path for each image, optionally with a label"
    group.add_argument(
        "--train_list", metavar="FILE",
        help=f"text, CSV or JSON file with {entry}; or a JSON file of COCO or iNaturalist",
    )  # fmt: skip
    add_dataset_option(group, "; or wds:SHARDS (WebDataset), such as wds:s/{000..127}.tar" * (not labels))
    group.add_argument(
        "--extras", nargs="+", metavar="NAME",
        help="columns of --train_list (CSV with a header, or keys of JSON) with numbers that are inputs of the model "
        "besides the image, by name (DATASETS.md)",
    )  # fmt: skip
    _add_download(group, "download a --dataset of torchvision to --data_path")
    _add_reading_options(group)


def add_dataset_option(group: argparse._ActionsContainer, also: str = "", place: str = "--data_path") -> None:
    """Adds the flag of datasets that are no folders.

    Args:
        also: end of the help text: other values.
        place: the argument with the folder of torchvision's files.
    """
    dataset = group.add_argument(
        "--dataset", metavar="NAME",
        help="dataset of a library: a class of torchvision, such as CIFAR10 or STL10:unlabeled, with its files in "
        f"{place}; hf:NAME_OR_FOLDER (Hugging Face); or py:MODULE:FUNCTION, your function(split, data_path) that "
        f"returns a dataset (DATASETS.md){also}",
    )  # fmt: skip
    not_in_recipes(dataset, runs_code)


def add_stream_options(group: argparse._ActionsContainer) -> None:
    """Adds the flags of streamed shards, which are for pre-training only."""
    group.add_argument(
        "--num_images", type=positive_int, metavar="N",
        help="number of images in the shards of wds: (default: counted, which needs local files)",
    )  # fmt: skip


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of images with segmentation masks, of the crop and of channels."""
    group = _group(parser, DATA)
    group.add_argument(
        "--data_path", metavar="PATH",
        help="folder, or tar or zip file, with images and masks: images/training and annotations/training (ADE20K), "
        "train/images and train/masks, or the folders of mmsegmentation or LoveDA; the same for validation",
    )  # fmt: skip
    for flag, what in (("--train_folders", "training"), ("--val_folders", "validation")):
        group.add_argument(
            flag, nargs=2, metavar=("IMAGES", "MASKS"),
            help=f"the folder of the {what} images and that of their masks. File names are equal except for suffixes",
        )  # fmt: skip
    for flag, what in (("--train_list", "training"), ("--val_list", "validation")):
        group.add_argument(flag, metavar="FILE", help=f"CSV file with a row `image,mask` for each {what} image")
    dataset = group.add_argument(
        "--dataset", metavar="NAME",
        help="VOCSegmentation: the dataset of torchvision, with its files in --data_path; or py:MODULE:FUNCTION, your "
        "function(split, data_path) that returns a dataset of images and masks (DATASETS.md)",
    )  # fmt: skip
    not_in_recipes(dataset, runs_code)
    _add_download(group, "download --dataset to --data_path")
    group.add_argument(
        "--nb_classes", type=positive_int, metavar="N",
        help="number of classes. The values in masks are 0 to N - 1; 255 is ignored (default: number in --palette)",
    )  # fmt: skip
    add_switch(
        group,
        "reduce_zero_label",
        False,
        "ignore the value 0 in masks; the classes have the values 1 to N (ADE20K, LoveDA)",
    )
    group.add_argument(
        "--palette", metavar="FILE",
        help="text file with a line `R G B NAME` for each class: its name, and its color in color masks and in "
        "pictures (default: numbers, and the colors of VOC)",
    )  # fmt: skip
    _add_input_options(group, "crop and window size")
    group.add_argument(
        "--short_side", type=count, metavar="N",
        help="scale images so that their shorter side has N pixels, before the random scale in training and the "
        "windows in evaluation; 0: the size of the file (default: the shorter side of --input_size)",
    )  # fmt: skip
    _add_reading_options(group)


def _add_fast_jpeg(group: argparse._ActionsContainer) -> None:
    add_switch(
        group, "fast_jpeg", False,
        "decode color JPEG files with torchcodec and scale them with compiled code: the same pixels at up to twice the "
        "throughput. Pillow decodes other files, and computes augmentation policies, as without the flag",
    )  # fmt: skip


def add_segmentation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the head, the encoder and the augmentation of segmentation."""
    group = _group(parser, MODEL)
    group.add_argument(
        "--head", default=HEAD_CHOICES[0], choices=HEAD_CHOICES,
        help="linear: batch norm and a 1 x 1 convolution on the tokens of the last block; dpt: a dense prediction "
        "transformer on four evenly spaced blocks (Ranftl et al. 2021)",
    )  # fmt: skip
    _add_weights_options(group)
    _add_layer_options(parser, drop_path=0.0)
    _group(parser, OPTIMIZATION).add_argument(
        "--unfreeze_blocks", default=0, type=count_or_all, metavar="K|all",
        help="train the head and the last K blocks; 0: a frozen encoder; all: all parameters",
    )  # fmt: skip
    _add_recompute_option(parser)
    group = _group(parser, AUGMENTATION)
    group.add_argument(
        "--scale", default=[0.5, 2.0], type=positive, nargs=2, metavar=("MIN", "MAX"),
        help="range of the random scale of an image, before the random crop of --input_size",
    )  # fmt: skip
    _add_hflip(group)


def _add_download(group: argparse._ActionsContainer, text: str) -> None:
    not_in_recipes(group.add_argument("--download", action="store_true", help=text))


def _add_reading_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--in_chans", default=3, type=positive_int, metavar="C", help="input channels: 3 RGB, 1 gray")
    _add_num_workers(group)


def _add_exif(group: argparse._ActionsContainer, default: str) -> None:
    group.add_argument(
        "--exif", action="store_true", default=None,
        help="apply the orientation that cameras record in the EXIF data of photographs; the checkpoint records it "
        f"(default: the choice of the model's run, else {default})",
    )  # fmt: skip
    group.add_argument("--no_exif", action="store_false", dest="exif", default=None, help="disable --exif")


def add_value_options(group: argparse._ActionsContainer) -> None:
    """Adds the flags of the meaning of pixel values."""
    group.add_argument(
        "--nodata", type=nodata, metavar="nan|VALUE",
        help="pixels with this value in any channel of the input are invalid: they enter the model as the mean, "
        "and pre-training never scores them (default: the choice of the model's run, else all pixels are valid)",
    )  # fmt: skip
    group.add_argument(
        "--value_range", type=float, nargs=2, action=Range, metavar=("MIN", "MAX"),
        help="values in the files that become 0 and 1, for pixels of any type (default: the choice of the model's run, "
        "else 8 and 16 bits are scaled to 0 to 1, and float values are unchanged)",
    )  # fmt: skip


def chosen_reading(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of `get_model` about reading images whose flags the command line has."""
    return {name: getattr(args, name) for name in ("exif", "nodata", "value_range") if getattr(args, name) is not None}


def _add_num_workers(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--num_workers", default=DEFAULT_WORKERS, type=count, metavar="N",
        help="data loader worker processes, at most one per CPU core; 0: load in the training process",
    )  # fmt: skip


def _add_crop_options(parser: argparse.ArgumentParser, crop_scale: list[float]) -> None:
    group = _group(parser, AUGMENTATION)
    group.add_argument(
        "--crop_scale", default=crop_scale, type=float, nargs=2, metavar=("MIN", "MAX"),
        help="range of the area of a random crop, as a fraction of the image",
    )  # fmt: skip
    group.add_argument(
        "--crop_ratio", default=[3 / 4, 4 / 3], type=positive, nargs=2, metavar=("MIN", "MAX"),
        help="range of the aspect ratio (width / height) of a random crop, relative to that of --input_size (default: "
        "3/4 to 4/3)",
    )  # fmt: skip
    _add_hflip(group)
    group.add_argument(
        "--vflip", default=0.0, type=share, metavar="P",
        help="probability of a vertical flip, for images without an upper side, such as microscope images",
    )  # fmt: skip
    add_switch(group, "rotate90", False, "rotate images by random multiples of 90 degrees; needs a square --input_size")


def _add_hflip(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hflip", default=0.5, type=share, metavar="P", help="probability of a horizontal flip")


# --------------------------------------------------------------------------------------------------------------- model


def add_model_options(parser: argparse.ArgumentParser, models: Collection[str], default: str) -> None:
    """Adds the flags of the architecture."""
    group = _group(parser, MODEL)
    group.add_argument("--model", default=default, choices=models, metavar="NAME", help=f"one of {', '.join(models)}")
    group.add_argument(
        "--patch_size", type=positive_int, nargs="+", action=Size, metavar=("P", "P"),
        help="patch size in pixels: one number for squares, or height and width (default: the patch size in the name "
        "of the model)",
    )  # fmt: skip
    group.add_argument(
        "--qk_norm", choices=("layer", "rms"),
        help="normalize queries and keys of each head, as ViT-22B does, against diverging attention: layer: LayerNorm; "
        "rms: RMSNorm (default: the choice of the loaded weights, else no norm)",
    )  # fmt: skip
    group.add_argument(
        "--num_cls_tokens", type=positive_int, metavar="T",
        help="number of class tokens; heads and k-NN use their mean (default: those of the loaded weights, else 1)",
    )  # fmt: skip
    add_encoder_options(group)


def add_encoder_options(group: argparse._ActionsContainer) -> None:
    """Adds the flags of an encoder of the user's code."""
    encoder = group.add_argument(
        "--encoder", metavar="MODULE:CLASS",
        help="your own encoder: a class derived from models_vit.Encoder, from a module on Python's path or in the "
        "working directory. Files record its name, and do not import it",
    )  # fmt: skip
    not_in_recipes(encoder)
    group.add_argument(
        "--encoder_args", nargs="+", metavar="NAME=VALUE",
        help="arguments of the class of --encoder, such as groups=3 (default: those of the loaded weights)",
    )  # fmt: skip


def _add_model_class(group: argparse._ArgumentGroup) -> None:
    model_class = group.add_argument(
        "--model_class", metavar="MODULE:CLASS",
        help="your own method: a class derived from models_mae.MaskedAutoencoderViT (METHOD.md). Files record its "
        "name, and do not import it",
    )  # fmt: skip
    not_in_recipes(model_class)
    group.add_argument(
        "--model_args", nargs="+", metavar="NAME=VALUE", help="arguments of the class of --model_class, such as bins=9"
    )


def add_pretrain_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of masked pre-training."""
    group = _group(parser, DATA)
    add_stream_options(group)
    group.add_argument(
        "--repeated_sampling", default=1, type=positive_int, metavar="R",
        help="crops per decoded image, all in one batch. An epoch has R times as many samples: divide --epochs and "
        "--warmup_epochs by R",
    )  # fmt: skip
    group.add_argument(
        "--min_valid", default=0.5, type=positive_share, metavar="S",
        help="a patch with a smaller share of valid pixels is never visible and has no loss (--nodata, or masks of a "
        "--dataset)",
    )  # fmt: skip
    _add_crop_options(parser, [0.2, 1.0])

    group = _group(parser, MODEL)
    _add_mask_options(group)
    group.add_argument(
        "--learned_pos_embed", action="store_true",
        help="learn the positions of encoder and decoder (default: the fixed sine-cosine tables)",
    )  # fmt: skip
    _add_drop_path(group, 0.0)
    group.add_argument(
        "--decoder_depth", type=positive_int, metavar="N", help="number of decoder blocks (default: the model's)"
    )
    add_switch(group, "norm_pix_loss", False, "normalize each target patch by its own mean and variance")
    _add_model_class(group)
    group.add_argument(
        "--init_from", default="", metavar="FILE", help="start from the weights in this file, at epoch 0 (default: "
        "random weights)",
    )  # fmt: skip

    group = _group(parser, OPTIMIZATION)
    schedule = group.add_argument(
        "--lr_schedule", metavar="MODULE:FUNCTION",
        help="your own decay: function(progress) returns the factor of the learning rate for the progress after the "
        "warm-up, 0 to 1. Files record its name, and do not import it (default: a cosine)",
    )  # fmt: skip
    not_in_recipes(schedule)
    group.add_argument(
        "--updates_per_epoch", type=positive_int, metavar="N",
        help="number of updates per epoch; the next epoch continues where this one ended, and the data are reshuffled "
        "after each pass (default: one pass)",
    )  # fmt: skip
    _add_monitor_options(_group(parser, EVALUATION))
    _add_recompute_option(parser)
    _group(parser, DISTRIBUTED).add_argument(
        "--fsdp", action="store_true", help="shard weights, gradients and optimizer states over the processes (FSDP2)"
    )


def _add_mask_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--mask_ratio", default=0.75, type=ratio, metavar="R", help="fraction of masked patches")
    group.add_argument(
        "--masking", default="random", choices=MASKING_CHOICES,
        help="masked patches: random; block, large rectangles as in BEiT; or grid, three of every 2x2 patches",
    )  # fmt: skip
    group.add_argument(
        "--mask_block", default=1, type=positive_int, metavar="N",
        help="--masking random masks blocks of NxN patches instead of single patches; Pixio has 4",
    )  # fmt: skip


def _add_monitor_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--vis_every", default=20, type=count, metavar="N",
        help="log reconstructions to TensorBoard every N epochs; 0: never",
    )  # fmt: skip
    group.add_argument(
        "--probe_every", default=0, type=count, metavar="N",
        help="every N epochs, log the k-NN accuracy and the effective rank (RankMe) of the class token of unmasked "
        "images; the training stays the same (default: 0, never)",
    )  # fmt: skip
    group.add_argument(
        "--probe_path", metavar="PATH",
        help="labelled dataset of --probe_every, with class folders in train/ and val/ (default: the training images, "
        "of which a tenth is classified by the others)",
    )  # fmt: skip


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the validation set."""
    group = _group(parser, DATA)
    group.add_argument("--val_list", metavar="FILE", help="as --train_list, for the validation set")
    group.add_argument(
        "--crop_pct", type=positive_share, metavar="S",
        help="side of the center crop in evaluation, as a fraction of the resized image (default: .875; 1 for squares "
        "above 224 pixels, and if the shorter side of --input_size is below 112)",
    )  # fmt: skip


def add_supervised_options(parser: argparse.ArgumentParser, global_pool: bool) -> None:
    """Adds the flags of the pre-trained encoder, the classes, and the validation set."""
    add_validation_options(parser)
    group = _group(parser, DATA)
    group.add_argument(
        "--val_fraction", type=ratio, metavar="R",
        help="to choose hyperparameters: hold out this fraction of the training images and evaluate on it (default: "
        "evaluate on the validation set)",
    )  # fmt: skip
    group.add_argument(
        "--nb_classes", type=positive_int, metavar="N",
        help="number of classes, as a check (default: the number in the training set)",
    )  # fmt: skip
    group.add_argument(
        "--train_per_class", type=positive_int, metavar="N",
        help="train on N images of each class, chosen by --seed (default: all images)",
    )  # fmt: skip
    group = _group(parser, MODEL)
    _add_weights_options(group)
    on, off = (" (default)", "") if global_pool else ("", " (default)")
    group.add_argument(
        "--global_pool", action="store_true", default=global_pool, help="classify the mean of the patch tokens" + on
    )
    group.add_argument(
        "--cls_token", action="store_false", dest="global_pool", default=global_pool,
        help="classify the class token" + off,
    )  # fmt: skip


def _add_weights_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--finetune", default="", metavar="FILE|NAME",
        help="weights to start from: a checkpoint file, or a published name such as mae_pretrain_vit_base "
        "(default: random weights)",
    )  # fmt: skip
    group.add_argument(
        "--adapt_input", default="error", choices=ADAPT_CHOICES,
        help="if the weights of --finetune have another number of input channels: error: abort; mean: each channel "
        "starts from the mean of their channels; repeat: from their channels in turn; skip: the patch projection is "
        "initialized at random",
    )  # fmt: skip


def _add_drop_path(group: argparse._ActionsContainer, default: float) -> None:
    group.add_argument(
        "--drop_path", default=default, type=ratio, metavar="R",
        help="stochastic depth: drop rate of the last block of the encoder; it grows linearly from 0 at the first",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- optimization


def add_optimizer_options(parser: argparse.ArgumentParser, several_blr: bool = False, lr: float | None = None) -> None:
    """Adds the flags of batch size, epochs, learning rate, regularization, non-finite gradients and bad images.

    Args:
        several_blr: --blr takes several values.
        lr: default of --lr for a script without --blr, whose learning rate does not depend on the batch size and has a
            polynomial decay.
    """
    group = _group(parser, OPTIMIZATION)
    _add_batch_size(group, 64)
    group.add_argument(
        "--accum_iter", default=1, type=positive_int, metavar="N",
        help="iterations per update (optimizer step). Effective batch size = batch_size x accum_iter x processes",
    )  # fmt: skip
    group.add_argument("--epochs", default=400, type=positive_int, metavar="N", help="number of epochs")
    group.add_argument(
        "--warmup_epochs", default=40, type=non_negative, metavar="N", help="epochs of linear warm-up, then the decay"
    )
    decay = ", then a cosine (default: computed from --blr)" * (lr is None)
    group.add_argument(
        "--lr", default=lr, type=non_negative, metavar="LR", help=f"learning rate after the warm-up{decay}"
    )
    if lr is not None:
        group.add_argument(
            "--poly_power", default=0.9, type=positive, metavar="P",
            help="power of the polynomial decay: the rate is proportional to (1 - progress)^P",
        )  # fmt: skip
    elif several_blr:
        group.add_argument(
            "--blr", default=[0.1], type=positive, nargs="+", metavar="LR",
            help="base learning rate: lr = blr x effective batch size / 256. Several values train one head each",
        )  # fmt: skip
    else:
        group.add_argument(
            "--blr", default=1e-3, type=non_negative, metavar="LR",
            help="base learning rate: lr = blr x effective batch size / 256",
        )  # fmt: skip
    if not several_blr:
        optimizer = group.add_argument(
            "--optimizer", metavar="MODULE:FUNCTION",
            help="your own optimizer: function(model, groups) returns it for groups of parameters. Files record "
            "its name, and do not import it (default: AdamW)",
        )  # fmt: skip
        not_in_recipes(optimizer)
    group.add_argument(
        "--min_lr", default=0.0, type=non_negative, metavar="LR", help="learning rate at the end of the decay"
    )
    group.add_argument(
        "--weight_decay", default=0.05, type=non_negative, metavar="W",
        help="weight decay; biases and other one-dimensional parameters have none",
    )  # fmt: skip
    group.add_argument(
        "--clip_grad", type=positive, metavar="NORM", help="clip the gradient to this norm (default: no clipping)"
    )
    group.add_argument(
        "--on_nonfinite", default="abort", choices=("abort", "skip"),
        help="if a loss or gradient is not finite: abort after saving a checkpoint, or skip the update",
    )  # fmt: skip
    add_bad_image_option(_group(parser, DATA), "use another image instead, for up to 10 %% of an epoch")


def add_bad_image_option(parser: argparse._ActionsContainer, skip: str) -> None:
    """Adds the flag of images that can't be read; `skip` describes its second value."""
    parser.add_argument(
        "--on_bad_image", default="error", choices=("error", "skip"),
        help=f"if an image can't be read: abort, or {skip}",
    )  # fmt: skip


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of fine-tuning: regularization, augmentation, trained layers."""
    _add_layer_options(parser, drop_path=0.1)
    group = _group(parser, OPTIMIZATION)
    group.add_argument(
        "--unfreeze_blocks", type=count, metavar="K",
        help="train the head and the last K blocks only (default: all parameters)",
    )  # fmt: skip
    group.add_argument("--smoothing", default=0.1, type=ratio, metavar="S", help="label smoothing")
    _add_recompute_option(parser)

    _add_crop_options(parser, [0.08, 1.0])
    group = _group(parser, AUGMENTATION)
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="augmentation policy, as timm names it, or none"
    )
    group.add_argument(
        "--color_jitter", type=non_negative, metavar="S", help="strength of color jitter, with --aa none (default: 0)"
    )
    group.add_argument("--reprob", default=0.25, type=share, metavar="P", help="probability of random erasing")
    group.add_argument(
        "--remode", default="pixel", choices=("const", "rand", "pixel"),
        help="values of erased pixels: const: 0; rand: one random color; pixel: random for each pixel",
    )  # fmt: skip
    group.add_argument("--recount", default=1, type=positive_int, metavar="N", help="largest number of erased areas")
    group.add_argument("--resplit", action="store_true", help="accepted but ignored")
    group.add_argument("--mixup", default=0.0, type=non_negative, metavar="A", help="alpha of mixup; 0: no mixup")
    group.add_argument("--cutmix", default=0.0, type=non_negative, metavar="A", help="alpha of cutmix; 0: no cutmix")
    group.add_argument(
        "--cutmix_minmax", type=share, nargs=2, metavar=("MIN", "MAX"),
        help="range of the side of the cutmix box, as a fraction of the image (default: sampled with --cutmix)",
    )  # fmt: skip
    group.add_argument("--mixup_prob", default=1.0, type=share, metavar="P", help="probability of mixup or cutmix")
    group.add_argument(
        "--mixup_switch_prob", default=0.5, type=share, metavar="P", help="probability of cutmix if both are enabled"
    )
    group.add_argument(
        "--mixup_mode", default="batch", choices=("batch", "pair", "elem"),
        help="sample the mixing parameters once per batch, pair or element",
    )  # fmt: skip


def _add_layer_options(parser: argparse.ArgumentParser, drop_path: float) -> None:
    _add_drop_path(_group(parser, MODEL), drop_path)
    _group(parser, OPTIMIZATION).add_argument(
        "--layer_decay", default=0.75, type=positive, metavar="D",
        help="layer-wise learning rate decay: the factor from each layer to the layer below",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- evaluation


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of evaluating a classifier."""
    group = _group(parser, EVALUATION)
    group.add_argument(
        "--eval", action="store_true", help="evaluate the weights of --resume or --finetune on the validation set, "
        "and exit",
    )  # fmt: skip
    group.add_argument(
        "--eval_every", default=1, type=positive_int, metavar="N",
        help="evaluate every N epochs, and after the last one",
    )  # fmt: skip
    group.add_argument(
        "--report", metavar="DIR", help="folder for the scores per class and the confusion matrix (CSV and picture)"
    )
    group.add_argument(
        "--dist_eval", action="store_true", help="accepted but ignored: the evaluation is always distributed, and exact"
    )


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the meaning of labels."""
    group = _group(parser, DATA)
    group.add_argument(
        "--task", default=CLASSIFICATION, choices=TASK_CHOICES,
        help="classification: one class for each image; multilabel: any number of classes, in a list as a;b or in one "
        "column of 0 and 1 for each class; regression: one or more numbers, which are standardized on the training "
        "set. The labels are those of --train_list, or vectors of a --dataset py:MODULE:FUNCTION",
    )  # fmt: skip
    group.add_argument(
        "--label_columns", nargs="+", metavar="NAME",
        help="columns of --train_list and --val_list (CSV with a header, or keys of JSON) with the labels (default: "
        "label, class or groundtruth)",
    )  # fmt: skip


def add_regression_loss_option(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of the loss of --task regression."""
    _group(parser, OPTIMIZATION).add_argument(
        "--regression_loss", choices=REGRESSION_LOSSES,
        help="loss of --task regression, on standardized targets; huber: l2 below one standard deviation, and l1 above "
        "(default: l1)",
    )  # fmt: skip


def add_metric_options(parser: argparse.ArgumentParser, selects: str) -> None:
    """Adds the flag of the metrics.

    Args:
        selects: what the first metric selects.
    """
    _group(parser, EVALUATION).add_argument(
        "--metric", nargs="+", choices=METRIC_CHOICES, metavar="NAME",
        help=f"metrics to print and log, any of {', '.join(METRIC_CHOICES)}. The first selects {selects} (default: the "
        "top-1 accuracy; multilabel: average_precision; regression: r2 and mae). They are fractions, and mae has the "
        "units of the labels; kappa has quadratic weights; auroc and average_precision are means over the classes, one "
        "against the others",
    )  # fmt: skip


def add_class_weight_option(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of the weights of classes in the loss."""
    _group(parser, OPTIMIZATION).add_argument(
        "--class_weight", choices=["balanced"],
        help="balanced: the loss of an image is divided by the share of its class in the training set, so that small "
        "and large classes count equally (default: all images count equally)",
    )  # fmt: skip


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of linear and attentive probing."""
    group = _group(parser, MODEL)
    group.add_argument(
        "--probe", default=LINEAR, choices=PROBE_CHOICES,
        help="linear: a linear layer on the pooled features; attentive: learned queries pool the patch tokens for the "
        "linear layer (efficient probing, Psomas et al. 2025)",
    )  # fmt: skip
    group.add_argument(
        "--num_queries", default=NUM_QUERIES, type=positive_int, metavar="Q",
        help="queries of --probe attentive; a divisor of the width of the encoder",
    )  # fmt: skip
    _group(parser, DATA).add_argument(
        "--cache_features", action="store_true",
        help="compute the features of all images once, without augmentation, and train on them. --probe attentive "
        "stores patch tokens in fp16 in the folder tokens of --output_dir, and a resumed run reuses those of unchanged "
        "images",
    )  # fmt: skip
    _group(parser, EVALUATION).add_argument(
        "--held_out", default=0.1, type=ratio, metavar="R",
        help="fraction of the training set that is held out to choose among several --blr",
    )  # fmt: skip


def add_knn_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of k-nearest-neighbor classification."""
    group = _group(parser, EVALUATION)
    group.add_argument(
        "--k", default=[10, 20, 100], type=positive_int, nargs="+", metavar="K", help="numbers of neighbors"
    )
    group.add_argument(
        "--temperature", default=[0.07], type=positive, nargs="+", metavar="T",
        help="temperature T of the weight of a neighbor, exp(cosine similarity / T). Several values print a table of "
        "all combinations with --k; the best of them is optimistic, because the validation set selects it",
    )  # fmt: skip


def add_comparison_options(parser: argparse.ArgumentParser, protocols: Collection[str]) -> None:
    """Adds the flags of main_compare.py."""
    group = _group(parser, EVALUATION)
    group.add_argument(
        "--encoders", required=True, nargs="+", metavar="[NAME=]ENCODER",
        help="checkpoint files, published names, timm:MODEL (a Vision Transformer of timm with its weights), scratch "
        "(random weights in the architecture of the first file, or of --model), pixels (logistic regression and an "
        "RBF-SVM on raw pixels). NAME is the title in the table (default: the name of the file)",
    )  # fmt: skip
    group.add_argument(
        "--protocols", nargs="+", choices=protocols, metavar="P",
        help=f"evaluations of each encoder: any of {', '.join(protocols)}",
    )  # fmt: skip
    group.add_argument(
        "--labels", nargs="+", default=["all"], metavar="N",
        help="numbers of labeled training images, equally many of each class; all: the whole training set",
    )  # fmt: skip
    group.add_argument(
        "--draws", nargs="+", type=positive_int, default=[3], metavar="N",
        help="number of random subsets of each number of labels; all labels are a single one. One value, or one for "
        "each of --labels",
    )  # fmt: skip
    group.add_argument(
        "--budget", nargs="+", type=positive_int, default=[50], metavar="N",
        help="epochs of each fine-tuning run; one value, or one for each of --labels. It sets main_finetune.py "
        "--epochs, and main_finetune.py --warmup_epochs to a tenth of them, also with --recipes",
    )  # fmt: skip
    group.add_argument(
        "--blr", nargs="+", type=positive, metavar="LR",
        help="base learning rates of fine-tuning. Of several, the best on held-out training images of the first draw "
        "is used (default: the rate of the recipe)",
    )  # fmt: skip
    group.add_argument(
        "--recipes", nargs="+", default=[], metavar="P=YAML",
        help="a recipe for the script of a protocol, such as finetune=recipes/finetune_fashion_mnist.yaml, instead of "
        "the settings of this script. Its flags for images (crop, input_size, ...) replace those that encoders record",
    )  # fmt: skip
    group = _group(parser, RUN)
    group.add_argument(
        "--output_dir", default="runs/compare", metavar="DIR", help="folder of table, plot and runs. Results in it are "
        "reused if the command and the files that it names are the same",
    )  # fmt: skip
    group.add_argument(
        "--jobs", type=positive_int, default=1, metavar="N",
        help="number of runs at a time, which share the CPU cores or the GPU",
    )  # fmt: skip
    add_switch(group, "keep_checkpoints", False, "keep the checkpoints of completed runs")
    _add_device(group)
    _add_amp(group)


# ----------------------------------------------------------------------------------------------------------------- run


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the recipe, the run directory, checkpoints, and computation."""
    group = _group(parser, RUN)
    _add_config(group)
    group.add_argument(
        "--output_dir", default="./output_dir", metavar="DIR", help="run directory: checkpoints, log.txt"
    )
    group.add_argument(
        "--log_dir", default="./output_dir", metavar="DIR",
        help="folder of TensorBoard events; --output_dir if only that is set",
    )  # fmt: skip
    group.add_argument(
        "--resume", default="", metavar="FILE|auto",
        help="resume from this checkpoint, which must be the newest one if it is in --output_dir; auto: from the "
        "newest valid one in --output_dir, if any (default: start a new run)",
    )  # fmt: skip
    group.add_argument(
        "--start_epoch", default=0, type=count, metavar="N", help="first epoch of a run that is not resumed"
    )
    group.add_argument(
        "--save_every", default=20, type=positive_int, metavar="N", help="save a checkpoint every N epochs"
    )
    group.add_argument(
        "--keep_last", type=positive_int, metavar="K", help="keep only the newest K of these checkpoints (default: all)"
    )
    group.add_argument(
        "--save_minutes", default=15.0, type=non_negative, metavar="M",
        help="minutes between writes of checkpoint-last.pth, also within an epoch",
    )  # fmt: skip
    _add_compute_options(group)
    _add_compile(group)


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the recipe and of computation, for a command without a run directory."""
    group = _group(parser, RUN)
    _add_config(group)
    _add_compute_options(group)
    _add_batch_size(_group(parser, DATA), 256)


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
        _add_exif(parser, "applied to single photographs")
        add_value_options(parser)
    parser.add_argument("--model", required=True, metavar="FILE", help=f"checkpoint file{published}{also}")
    add_encoder_options(parser)
    _add_device(parser)


def add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of batches and precision of a command that uses a trained model."""
    _add_batch_size(parser, 128)
    _add_num_workers(parser)
    _add_exif(parser, "not applied to datasets")
    _add_fast_jpeg(parser)
    _add_amp(parser)
    _add_compile(parser)


def _add_batch_size(group: argparse._ActionsContainer, default: int) -> None:
    group.add_argument(
        "--batch_size", default=default, type=positive_int, metavar="N", help="batch size per process (GPU)"
    )


def _add_config(group: argparse._ActionsContainer) -> None:
    group.add_argument("--config", metavar="YAML", help="recipe: a file of `flag: value` lines; flags override it")


def _add_compute_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed", default=0, type=seed, metavar="N", help="random seed of weights, sample order, augmentation and masks"
    )
    _add_device(group)
    _add_amp(group)


def _add_compile(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--compile", action="store_true",
        help="compile the model with torch.compile: higher throughput, after a minute or more of compilation",
    )  # fmt: skip


def _add_device(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:N, mps, or auto: cuda, else mps, else cpu"
    )
    group.add_argument("--debug", action="store_true", help="print the traceback of an error")


def _add_amp(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--amp", default="auto", choices=AMP_CHOICES,
        help="mixed precision; auto: bf16 on CUDA (fp16 on older GPUs), and for training on CPUs with AVX512-BF16 or "
        "AMX; else off. A resumed run has the precision of its checkpoint",
    )  # fmt: skip


def _add_recompute_option(parser: argparse.ArgumentParser) -> None:
    _group(parser, MODEL).add_argument(
        "--grad_checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, a third more computation",
    )  # fmt: skip


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of launchers. Ranks and the number of processes come from the environment that torchrun sets."""
    group = _group(parser, DISTRIBUTED)
    backend = group.add_argument(
        "--dist_backend", default="auto", choices=BACKENDS, help="communication backend; auto: nccl for GPUs, else gloo"
    )
    not_in_recipes(backend)
    group.add_argument(
        "--dist_timeout", default=600, type=positive, metavar="S",
        help="seconds to wait for another process before the run fails",
    )  # fmt: skip
    url = group.add_argument(
        "--dist_url", default="env://", metavar="URL", help="address at which the processes connect"
    )
    not_in_recipes(url)
    group.add_argument(
        "--world_size", default=1, type=int, metavar="N", help="accepted but ignored: the launcher sets it"
    )
    group.add_argument(
        "--local_rank",
        "--local-rank",
        default=-1,
        type=int,
        metavar="N",
        help="accepted but ignored: the launcher sets it",
    )
    group.add_argument("--dist_on_itp", action="store_true", help="accepted but ignored")
