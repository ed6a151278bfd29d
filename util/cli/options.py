"""Adds flags to parsers. A script calls the functions that it needs and sets the defaults of its task.

A function may add flags to several groups of --help. GROUPS is their order.
"""

import argparse
from collections.abc import Collection
from typing import Any

from util.cli.choices import METRIC_CHOICES
from util.cli.flag_table import FLAGS
from util.cli.flags import add_switch, not_in_recipes, positive, runs_code

DATA, AUGMENTATION, MODEL, OPTIMIZATION, EVALUATION, RUN = (
    "data", "augmentation", "model", "optimization", "evaluation", "run"
)  # fmt: skip
DISTRIBUTED = "distributed (start with torchrun, srun or submitit_*.py)"
GROUPS = (DATA, AUGMENTATION, MODEL, OPTIMIZATION, EVALUATION, RUN, DISTRIBUTED)
# The flags that name code, a command or an address, and the values that a recipe must not set.
REFUSED = {
    "dataset": runs_code,
    **dict.fromkeys(
        ("download", "encoder", "model_class", "optimizer", "dist_backend", "dist_url"), lambda value: True
    ),
}
FLIPS = ("crop_ratio", "hflip", "vflip", "rotate90")


def group_of(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Returns the group with this title. The first call adds all groups; --help omits groups without flags."""
    if not any(group.title == title for group in parser._action_groups):
        for name in GROUPS:
            parser.add_argument_group(name)
    return next(group for group in parser._action_groups if group.title == title)


def add(group: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Adds rows of the table of flags to a parser or a group of it.

    Args:
        changes: arguments of `add_argument` that replace those of the rows.
    """
    for name in names:
        row = {**FLAGS[name], **changes}
        if "switch" in row:
            add_switch(group, name, row["switch"], row["help"])
            continue
        flag = group.add_argument(f"--{name}", **row)
        if name in REFUSED:
            not_in_recipes(flag, REFUSED[name])


def add_data_options(parser: argparse.ArgumentParser, labels: bool = False, rereads: bool = False) -> None:
    """Adds the flags of the dataset and the image size.

    Args:
        labels: the images need labels.
        rereads: the script reads each image several times.
    """
    group = group_of(parser, DATA)
    layout = "folder of images, flat or nested; if it contains train/, only train/ is read"
    if labels:
        layout = "folder with train/CLASS/IMAGE and val/CLASS/IMAGE"
    add(group, "data_path", help=f"{layout}; or a tar or zip file of such a folder")
    add_source_options(group, labels)
    add_input_options(group, "image size")
    add(group, "crop", "fast_jpeg", *["cache_images"] * rereads)


def add_input_options(group: argparse._ArgumentGroup, what: str) -> None:
    """Adds the flags of the input of the model; `what` is the meaning of its size."""
    add(group, "input_size", help=f"{what} in pixels: one number for squares, or height and width")
    add(group, "mean", "std")
    add_exif(group, "not applied")
    add(group, "nodata", "value_range", "pin_mem")


def add_source_options(group: argparse._ActionsContainer, labels: bool = False) -> None:
    """Adds the flags of data sources other than --data_path, of channels, and of worker processes."""
    entry = "a path and a label for each image" if labels else "a path for each image, optionally with a label"
    add(group, "train_list", help=f"text, CSV or JSON file with {entry}; or a JSON file of COCO or iNaturalist")
    add_dataset_option(group, "; or wds:SHARDS (WebDataset), such as wds:s/{000..127}.tar" * (not labels))
    add(group, "extras")
    add(group, "download", help="download a --dataset of torchvision to --data_path")
    add(group, "in_chans", "num_workers")


def add_dataset_option(group: argparse._ActionsContainer, also: str = "", place: str = "--data_path") -> None:
    """Adds the flag of datasets that are no folders.

    Args:
        also: end of the help text: other values.
        place: the argument with the folder of torchvision's files.
    """
    text = (
        f"dataset of a library: a class of torchvision, such as CIFAR10 or STL10:unlabeled, with its files in {place}; "
        f"hf:NAME_OR_FOLDER (Hugging Face); or py:MODULE:FUNCTION, your function(split, data_path) that returns a "
        f"dataset (DATA.md){also}"
    )
    add(group, "dataset", help=text)


def add_exif(group: argparse._ActionsContainer, default: str) -> None:
    """Adds the flags of the orientation of photographs; `default` describes the default."""
    text = (
        "apply the orientation that cameras record in the EXIF data of photographs; the checkpoint records it "
        f"(default: the choice of the model's run, else {default})"
    )
    add(group, "exif", help=text)
    add(group, "no_exif")


def add_model_options(parser: argparse.ArgumentParser, models: Collection[str], default: str) -> None:
    """Adds the flags of the architecture."""
    group = group_of(parser, MODEL)
    group.add_argument("--model", default=default, choices=models, metavar="NAME", help=f"one of {', '.join(models)}")
    add(group, "patch_size", "qk_norm", "num_cls_tokens", "encoder", "encoder_args")


def add_pretrain_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of masked pre-training."""
    add(group_of(parser, DATA), "num_images", "repeated_sampling", "min_valid")
    add(group_of(parser, AUGMENTATION), "crop_scale", *FLIPS)
    add(
        group_of(parser, MODEL), "mask_ratio", "masking", "mask_block", "learned_pos_embed", "drop_path",
        "decoder_depth", "norm_pix_loss", "model_class", "model_args", "init_from", "grad_checkpointing",
    )  # fmt: skip
    add(group_of(parser, OPTIMIZATION), "updates_per_epoch")
    add(group_of(parser, EVALUATION), "vis_every", "probe_every", "probe_path")
    add(group_of(parser, DISTRIBUTED), "fsdp")


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the validation set."""
    add(group_of(parser, DATA), "val_list", "crop_pct")


def add_supervised_options(parser: argparse.ArgumentParser, global_pool: bool) -> None:
    """Adds the flags of the pre-trained encoder, the classes, and the validation set."""
    add_validation_options(parser)
    add(group_of(parser, DATA), "val_fraction", "nb_classes", "train_per_class")
    group = group_of(parser, MODEL)
    add(group, "finetune", "adapt_input")
    on, off = (" (default)", "") if global_pool else ("", " (default)")
    group.add_argument(
        "--global_pool", action="store_true", default=global_pool, help="classify the mean of the patch tokens" + on
    )
    group.add_argument(
        "--cls_token", action="store_false", dest="global_pool", default=global_pool,
        help="classify the class token" + off,
    )  # fmt: skip


def add_optimizer_options(parser: argparse.ArgumentParser, several_blr: bool = False, lr: float | None = None) -> None:
    """Adds the flags of batch size, epochs, learning rate, regularization, non-finite gradients and bad images.

    Args:
        several_blr: --blr takes several values.
        lr: default of --lr for a script without --blr, whose learning rate does not depend on the batch size and has a
            polynomial decay.
    """
    group = group_of(parser, OPTIMIZATION)
    add(group, "batch_size", default=64)
    add(group, "accum_iter", "epochs", "warmup_epochs")
    decay = ", then a cosine (default: computed from --blr)" * (lr is None)
    add(group, "lr", default=lr, help=f"learning rate after the warm-up{decay}")
    if lr is not None:
        add(group, "poly_power")
    elif several_blr:
        text = f"{FLAGS['blr']['help']}. Several values train one head each"
        add(group, "blr", default=[0.1], type=positive, nargs="+", help=text)
    else:
        add(group, "blr")
    if not several_blr:
        add(group, "optimizer")
    add(group, "min_lr", "weight_decay", "clip_grad", "on_nonfinite")
    text = "if an image can't be read: abort, or use another image instead, for up to 10 %% of an epoch"
    add(group_of(parser, DATA), "on_bad_image", help=text)


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of fine-tuning: regularization, augmentation, trained layers."""
    add(group_of(parser, MODEL), "drop_path", default=0.1)
    add(group_of(parser, MODEL), "grad_checkpointing")
    add(group_of(parser, OPTIMIZATION), "layer_decay", "unfreeze_blocks", "smoothing")
    group = group_of(parser, AUGMENTATION)
    add(group, "crop_scale", default=[0.08, 1.0])
    add(
        group, *FLIPS, "aa", "color_jitter", "reprob", "remode", "recount", "resplit", "mixup", "cutmix",
        "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode",
    )  # fmt: skip


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the weights of classes in the loss, and of the loss of --task regression."""
    add(group_of(parser, OPTIMIZATION), "class_weight", "regression_loss")


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of evaluating a classifier."""
    add(group_of(parser, EVALUATION), "eval", "eval_every", "report", "dist_eval")


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the meaning of labels."""
    add(group_of(parser, DATA), "task", "label_columns")


def add_metric_options(parser: argparse.ArgumentParser, selects: str) -> None:
    """Adds the flag of the metrics.

    Args:
        selects: what the first metric selects.
    """
    text = (
        f"metrics to print and log, any of {', '.join(METRIC_CHOICES)}. The first selects {selects} (default: the "
        "top-1 accuracy; multilabel: average_precision; regression: r2 and mae). They are fractions, and mae has the "
        "units of the labels; kappa has quadratic weights; auroc and average_precision are means over the classes, one "
        "against the others"
    )
    add(group_of(parser, EVALUATION), "metric", help=text)


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of linear and attentive probing."""
    add(group_of(parser, MODEL), "probe", "num_queries")
    add(group_of(parser, DATA), "cache_features")
    add(group_of(parser, EVALUATION), "held_out")


def add_knn_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of k-nearest-neighbor classification."""
    add(group_of(parser, EVALUATION), "k", "temperature")


def add_comparison_options(parser: argparse.ArgumentParser, protocols: Collection[str]) -> None:
    """Adds the flags of main_compare.py."""
    group = group_of(parser, EVALUATION)
    add(group, "encoders")
    add(group, "protocols", choices=protocols, help=f"evaluations of each encoder: any of {', '.join(protocols)}")
    add(group, "labels", "draws", "budget")
    add(
        group, "blr", nargs="+", type=positive, default=None,
        help="base learning rates of fine-tuning. Of several, the best on held-out training images of the first draw "
        "is used (default: the rate of the recipe)",
    )  # fmt: skip
    add(group, "recipes")
    group = group_of(parser, RUN)
    add(
        group, "output_dir", default="runs/compare",
        help="folder of table, plot and runs. Results in it are reused if the command and the files that it names are "
        "the same",
    )  # fmt: skip
    add(group, "jobs", "keep_checkpoints", "device", "debug", "amp")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the recipe, the run directory, checkpoints, and computation."""
    add(
        group_of(parser, RUN), "config", "output_dir", "log_dir", "resume", "start_epoch", "save_every", "keep_last",
        "save_minutes", "seed", "device", "debug", "amp", "compile",
    )  # fmt: skip


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the recipe and of computation, for a command without a run directory."""
    add(group_of(parser, RUN), "config", "seed", "device", "debug", "amp")
    add(group_of(parser, DATA), "batch_size", default=256)


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of launchers. Ranks and the number of processes come from the environment that torchrun sets."""
    group = group_of(parser, DISTRIBUTED)
    add(group, "dist_backend", "dist_timeout", "dist_url", "world_size")
    group.add_argument(
        "--local_rank", "--local-rank", default=-1, type=int, metavar="N",
        help="accepted but ignored: the launcher sets it",
    )  # fmt: skip
    add(group, "dist_on_itp")
