"""Adds flags to parsers. A script calls the functions that it needs and sets the defaults of its task.

A function may add flags to several groups of --help. GROUPS is their order.
"""

import argparse
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mae.cli.flags import not_in_recipes
from mae.data.kinds.registry import KINDS
from mae.encoders import class_named
from mae.registry import default_name, described
from mae.settings.arguments import OFF
from mae.settings.choices import HEAD_CHOICES, TF32
from mae.settings.fields import default_of
from mae.settings.run import FIELDS
from mae.settings.types import InvalidValue, count_or_all, positive
from mae.suggestions import did_you_mean
from mae.user_code import NAMED, runs_code

GROUPS = {name: name for name in ("data", "augmentation", "model", "optimization", "evaluation", "run")}  # of --help
GROUPS |= {"distributed": "distributed (start with torchrun, srun or submitit_*.py)"}
# The flags that name code, a command or an address, and the values that a recipe must not set.
REFUSED = {
    "dataset": runs_code,
    **dict.fromkeys(
        ("download", "model_class", "dist_backend", "dist_url"),
        lambda value: True,
    ),
    **dict.fromkeys(NAMED, lambda value: ":" in value),
}
# A setting -> the module and the name of the registry that has its values. A flag imports the module where it is added.
REGISTRIES = {
    "encoder": ("mae.encoders", "ENCODERS"),
    "optimizer": ("mae.training.optimizers", "OPTIMIZERS"),
    "lr_schedule": ("mae.training.lr_sched", "SCHEDULES"),
    "masking": ("mae.masking", "MASKING"),
    "metric": ("mae.evaluate.metrics", "METRICS"),
    "probe": ("mae.probes", "PROBES"),
}
EXCLUDES = (  # help of `on_bad_image`, where no other image takes the place
    "if an image can't be read: abort, or leave it out, up to 10 %% of the images; it first reads all images"
)
CROP_FLAGS = ("crop_scale", "crop_ratio", "hflip", "vflip", "rotate90")
EVALUATION_FLAGS = ("eval", "eval_every", "report", "dist_eval")
COMPUTE_FLAGS = ("seed", "device", "debug", "amp")
RUN_FLAGS = (
    "config", "output_dir", "log_dir", "resume", "start_epoch", "save_every", "keep_last", "save_minutes",
    *COMPUTE_FLAGS, "compile",
)  # fmt: skip


def group_of(parser: argparse.ArgumentParser, name: str) -> argparse._ArgumentGroup:
    """Returns a group of --help. The first call adds all groups; --help omits groups without flags."""
    title = GROUPS[name]
    if not any(group.title == title for group in parser._action_groups):
        for each in GROUPS.values():
            parser.add_argument_group(each)
    return next(group for group in parser._action_groups if group.title == title)


def add(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Adds the flags of settings to their groups, as `add_to` does."""
    for name in names:
        kind, one = FIELDS[name]
        add_to(group_of(parser, one.metadata["flag"]["group"] or kind.group), name, **changes)


def add_to(group: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Adds the flags of settings to a group, or to a parser without groups.

    Args:
        changes: a default, a type, a help text or another argument of `add_argument` that differs in this script.
    """
    for name in names:
        one = FIELDS[name][1]
        argument = {"default": default_of(one), **one.metadata["flag"], **changes}
        if name in REGISTRIES:
            argument = _of_registry(name, registry_of(name), argument)
        flags = [f"--{name}", *argument.pop("aliases")]
        off = argument.pop("off")
        argument = {key: value for key, value in argument.items() if key != "group" and (key, value) != ("type", None)}
        if argument.get("action") == "switch":
            _add_switch(group, name, argument["default"], argument["help"], off or f"disable --{name}")
            continue
        flag = group.add_argument(*flags, **argument)
        if name in REFUSED:
            not_in_recipes(flag, REFUSED[name])


def registry_of(setting: str) -> Mapping[str, Any]:
    """Returns the registry that has the values of a setting."""
    module, name = REGISTRIES[setting]
    registry: Mapping[str, Any] = getattr(importlib.import_module(module), name)
    return registry


def _of_registry(name: str, registry: Mapping[str, Any], argument: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a flag with the names and the help of a registry."""
    text = argument["help"].replace("{choices}", described(registry))
    if name in NAMED:
        default = default_name(registry) if "{default}" in text else ""
        text = text.replace("{default}", default)
        return {**argument, "help": text, "type": _name_or_code(registry, default)}
    return {**argument, "help": text, "choices": [*registry]}


def _name_or_code(registry: Collection[str], default: str) -> Callable[[str], str | None]:
    """Returns the type of a key of a registry or a name of the user's code; None for the default."""

    def name(text: str) -> str | None:
        if ":" not in text and text not in registry:
            near = did_you_mean(text, registry)
            raise InvalidValue(f"must be {', '.join(registry)} or MODULE:NAME, got {text}{near}")
        return None if text == default else text

    return name


def _add_switch(group: argparse._ActionsContainer, name: str, default: bool | None, on: str, off: str) -> None:
    """Adds two flags, so that the command line can override a recipe in both directions."""
    for flag, value, text in ((f"--{name}", True, on), (OFF.get(name, f"--no_{name}"), False, off)):
        if default is value:
            text += " (default)"
        group.add_argument(flag, action=f"store_{str(value).lower()}", dest=name, default=default, help=text)


def add_data_options(parser: argparse.ArgumentParser, labels: bool = False, rereads: bool = False) -> None:
    """Adds the flags of the dataset and the image size.

    Args:
        labels: the images need labels, whose meaning is a flag.
        rereads: the script reads each image several times.
    """
    layout = "folder of images, flat or nested; if it contains train/, only train/ is read"
    if labels:
        layout = "folder with train/CLASS/IMAGE and val/CLASS/IMAGE; without val/, a fifth is held out"
    add(parser, "data_path", help=f"{layout}; or a tar or zip file of such a folder")
    add_source_options(group_of(parser, "data"), labels)
    add_input_options(parser, "image size")
    add(parser, "crop", "fast_jpeg")
    if rereads:
        add(parser, "cache_images")
    if labels:
        add(parser, "task", "label_columns")


def add_input_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the flags of the input of the model; `what` is the meaning of its size."""
    add(parser, "input_size", help=f"{what} in pixels: one number for squares, or height and width")
    add(parser, "mean", "std")
    add_exif(group_of(parser, "data"), "not applied")
    add(parser, "nodata", "value_range", "channels_last", "pin_mem")


def add_source_options(group: argparse._ActionsContainer, labels: bool = False, **in_chans: Any) -> None:
    """Adds the flags of data sources other than --data_path, of channels, and of worker processes.

    Args:
        in_chans: a default or a help text of --in_chans that differs.
    """
    entry = "a path and a label for each image" if labels else "a path for each image, optionally with a label"
    add_to(group, "train_list", help=f"text, CSV or JSON file with {entry}; or a JSON file of iNaturalist")
    add_dataset_option(group, labels)
    add_to(group, "extras")
    add_to(group, "download", help="download a --dataset of torchvision to --data_path")
    add_to(group, "in_chans", **in_chans)
    add_to(group, "num_workers")


def add_dataset_option(group: argparse._ActionsContainer, labels: bool = True, folder: str = "--data_path") -> None:
    """Adds the flag of datasets that are no folders.

    Args:
        labels: the images need labels.
        folder: the argument with the folder of torchvision's files.
    """
    kinds = [(prefix, kind.help) for prefix, kind in KINDS.items() if kind.has_labels or not labels]
    texts = [f"{prefix}:{text}" if prefix else text for prefix, text in kinds]
    add_to(group, "dataset", help=f"dataset of a library: {'; '.join(texts)}".replace("{folder}", folder))


def add_exif(group: argparse._ActionsContainer, default: str) -> None:
    """Adds the flags of the orientation of photographs; `default` describes the default."""
    add_to(
        group, "exif",
        help="apply the orientation that cameras record in the EXIF data of photographs; the checkpoint records it "
        f"(default: the choice of the model's run, else {default})",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, models: Collection[str], default: str, **lora: Any) -> None:
    """Adds the flags of the architecture.

    Args:
        lora: a type or a help text of --lora that differs.
    """
    add(parser, "model", default=default, choices=models, help=f"one of {', '.join(models)}")
    add(parser, "patch_size", "qk_norm", "num_cls_tokens", "encoder", "encoder_args")
    add(parser, "lora", **lora)
    add(parser, "lora_alpha")


def add_supervised_options(parser: argparse.ArgumentParser, global_pool: bool) -> None:
    """Adds the flags of the pre-trained encoder, the classes, and the validation set."""
    add(parser, "val_list", "crop_pct", "val_fraction", "nb_classes", "train_per_class", "finetune", "adapt_input")
    add(parser, "global_pool", default=global_pool)


def add_optimizer_options(parser: argparse.ArgumentParser, several_blr: bool = False, lr: float | None = None) -> None:
    """Adds the flags of batch size, epochs, learning rate, regularization, non-finite gradients and bad images.

    Args:
        several_blr: --blr takes several values.
        lr: default of --lr for a script without --blr, whose learning rate does not depend on the batch size and has a
            polynomial decay.
    """
    add(parser, "batch_size", "accum_iter", "epochs", "warmup_epochs")
    decay = ", then a cosine (default: computed from --blr)" if lr is None else ""
    add(parser, "lr", default=lr, help=f"learning rate after the warm-up{decay}")
    if lr is not None:
        add(parser, "poly_power", default=0.9)
    elif several_blr:
        text = f"{FIELDS['blr'][1].metadata['flag']['help']}. Several values train one head each"
        add(parser, "blr", default=[0.1], type=positive, nargs="+", help=text)
    else:
        add(parser, "blr")
    if not several_blr:
        add(parser, "optimizer")
    add(parser, "min_lr", "weight_decay", "clip_grad", "on_nonfinite")
    text = "if an image can't be read: abort, or use another image instead, for up to 10 %% of an epoch"
    add(parser, "on_bad_image", default="error", help=text)


def add_metric_options(parser: argparse.ArgumentParser, selects: str) -> None:
    """Adds the flag of the metrics.

    Args:
        selects: what the first metric selects.
    """
    from mae.evaluate.metrics import DEFAULT_METRICS

    defaults = "".join(f"; {task}: {' and '.join(names)}" for task, names in DEFAULT_METRICS.items() if names)
    add(
        parser, "metric",
        help=f"metrics to print and log: {{choices}}. The first selects {selects}. They are fractions, unless they "
        f"are in the units of the labels. Or your own, MODULE:NAME: function(predictions) or a Metric of "
        f"mae.evaluate.metrics. Files record its name, and do not import it (default: the top-1 accuracy{defaults})",
    )  # fmt: skip


def add_comparison_options(parser: argparse.ArgumentParser, protocols: Collection[str]) -> None:
    """Adds the flags of main_compare.py."""
    add(parser, "encoders", "timm_weights")
    add(parser, "protocols", choices=protocols, help=f"evaluations of each encoder: any of {', '.join(protocols)}")
    add(parser, "labels", "draws", "budget")
    add_to(
        group_of(parser, "evaluation"), "blr", nargs="+", type=positive, default=None,
        help="base learning rates of fine-tuning; those of lora are ten times as large. Of several, each draw "
        "uses the best on a held-out fifth of its images (default: that of the recipe, else 1e-3)",
    )  # fmt: skip
    add(parser, "recipes")
    add(
        parser, "output_dir", default="runs/compare",
        help="folder of table and runs. Results in it are reused if flags and files are the same",
    )  # fmt: skip
    add(parser, "on_bad_image", default="error", help=EXCLUDES)
    add(parser, "keep_checkpoints", "device", "debug", "amp")


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of images with segmentation masks, of the crop and of channels."""
    add(
        parser, "data_path",
        help="folder, or tar or zip file, with images and masks: images/training and annotations/training (ADE20K), "
        "train/images and train/masks; the same for validation",
    )  # fmt: skip
    add(parser, "train_folders", "val_folders")
    for name, what in (("train_list", "training"), ("val_list", "validation")):
        add(parser, name, help=f"CSV file with the header `image,mask` and a row for each {what} image")
    add(parser, "extras")
    add(
        parser, "dataset",
        help="VOCSegmentation: the dataset of torchvision, with its files in --data_path; or py:MODULE:FUNCTION, your "
        "function(split, data_path) that returns a dataset of images and masks (docs/data.md)",
    )  # fmt: skip
    add(parser, "download", help="download --dataset to --data_path")
    add(
        parser, "nb_classes",
        help="number of classes. The values in masks are 0 to N - 1; 255 is ignored (default: number in --palette)",
    )  # fmt: skip
    add(parser, "reduce_zero_label", "palette")
    add_input_options(parser, "crop and window size")
    add(parser, "short_side", "in_chans", "num_workers")


def add_segmentation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the head, the encoder and the augmentation of segmentation."""
    add(parser, "head", default=HEAD_CHOICES[0])
    add(parser, "finetune", "adapt_input", "drop_path", "grad_checkpointing", "layer_decay", "scale", "hflip")
    add(
        parser, "unfreeze_blocks", default=0, type=count_or_all, metavar="K|all",
        help="train the head and the last K blocks; 0: a frozen encoder; all: all parameters",
    )  # fmt: skip


def add_inference_options(
    parser: argparse.ArgumentParser, images: bool = True, example: str = "mae_finetuned_vit_base", also: str = "",
    amp: str = "off",
) -> None:  # fmt: skip
    """Adds the flags of a command that uses a trained model.

    Args:
        images: add the image files as arguments.
        example: a published name that the command accepts; "" if it accepts checkpoint files only.
        also: end of the help text of --model: other values that the command accepts.
        amp: default of --amp, of a command with image files.
    """
    published = f", folder in the format of transformers, or published name such as {example}" if example else ""
    if images:
        parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
        add_exif(parser, "applied to single photographs")
        add_to(parser, "nodata", "value_range", "channels_last")
        text = f"precision; auto: bf16 on CUDA (fp16 on older GPUs), else off. {TF32}. off: fp32"
        add_to(parser, "amp", default=amp, help=text)
    text = f"checkpoint file{published}{also}"
    add_to(parser, "model", default=None, choices=None, required=True, metavar="FILE", help=text)
    add_to(parser, "encoder", "encoder_args", "device", "debug")


def add_against_option(parser: argparse.ArgumentParser) -> None:
    """Adds --against, of an answer."""
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="ENCODER",
        help="other encoders that the encoder of the run is compared with: names or files, as main_knn.py takes them, "
        "such as facebook/dinov2-small",
    )  # fmt: skip


def add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of batches and precision of a command that uses a trained model."""
    add_to(parser, "batch_size", default=128)
    add_to(parser, "num_workers")
    add_exif(parser, "not applied to datasets")
    add_to(parser, "fast_jpeg", "amp", "compile")


def chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `get_model` that the command line has: about the encoder, and about reading images.

    Raises:
        ValueError: the class of --encoder can't be imported.
    """
    names = ("encoder_args", "exif", "nodata", "value_range", "channels_last")
    settings = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return settings | ({"encoder": class_named(args.encoder)} if args.encoder else {})


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of launchers. Ranks and the number of processes come from the environment that torchrun sets."""
    add(parser, "dist_backend", "dist_timeout", "dist_url", "world_size", "local_rank", "dist_on_itp")
