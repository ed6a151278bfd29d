"""The command line: every flag once, `--config` recipes, and errors as sentences.

A main takes the groups that it needs, sets its task's defaults, and hands `main` to `run`.
"""

import argparse
import difflib
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from util import dist
from util.precision import AMP_CHOICES

logger = logging.getLogger(__name__)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if isinstance(action.default, bool) else super()._get_help_string(action)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser for a main, without --help, so that it can be another's parent; `run` adds that."""
    return argparse.ArgumentParser(description=description, formatter_class=_Help, add_help=False, allow_abbrev=False)


# ---------------------------------------------------------------------------------------------------- kinds of value


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def non_negative(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}")
    return value


def seed(text: str) -> int:
    """An integer that all random generators take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2^32), got {text}")
    return value


def ratio(text: str) -> float:
    """A number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


class _Size(argparse.Action):
    """One number for a square, two for height and width; one stays a plain number."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one number or two (height, width), got {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else list(values))


def _add_switch(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    """--NAME and --no_NAME, so that a flag can undo what a recipe or a default says."""
    on, off = (" (the default)", "") if default else ("", " (the default)")
    group.add_argument(f"--{name}", action="store_true", default=default, help=text + on)
    group.add_argument(f"--no_{name}", action="store_false", dest=name, default=default, help=f"not so{off}")


# ----------------------------------------------------------------------------------------------------- option groups


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where a run reads its settings, writes its files, and computes."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", metavar="YAML", help="recipe that sets defaults; flags given beside it win")
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="checkpoints and log.txt go here")
    group.add_argument(
        "--log_dir",
        default="./output_dir",
        metavar="DIR",
        help="TensorBoard's files go here; --output_dir if only that is given",
    )
    group.add_argument(
        "--resume", default="", metavar="FILE|auto",
        help="continue a run from this checkpoint; auto: from the newest in --output_dir that is whole, or start",
    )  # fmt: skip
    group.add_argument("--start_epoch", default=0, type=int, metavar="N", help="first epoch, where nothing is resumed")
    group.add_argument(
        "--save_every", default=20, type=positive_int, metavar="N", help="epochs between checkpoints kept"
    )
    group.add_argument(
        "--save_minutes", default=15.0, type=non_negative, metavar="M",
        help="minutes between states in checkpoint-last.pth, also in the middle of an epoch",
    )  # fmt: skip
    group.add_argument("--seed", default=0, type=seed, help="of the weights, the order, the crops and the masks")
    group.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--amp", default="auto", choices=AMP_CHOICES, help="mixed precision; auto: bf16 or fp16 on CUDA, else off"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What the samples are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", metavar="PATH",
        help="folder of images, flat or nested, or one with train/ in it; or a tar or zip file of such a folder",
    )  # fmt: skip
    add_source_options(group)
    group.add_argument(
        "--on_bad_image", default="error", choices=("error", "skip"),
        help="where an image can't be read: end the run, or take another in its place, up to a tenth of an epoch's",
    )  # fmt: skip
    group.add_argument(
        "--input_size", default=224, type=positive_int, nargs="+", action=_Size, metavar=("H", "W"),
        help="pixels of a side, or height and width",
    )  # fmt: skip
    group.add_argument("--mean", type=float, nargs="+", metavar="M", help="of each channel, 0 to 1; None is ImageNet's")
    group.add_argument(
        "--std", type=positive, nargs="+", metavar="S", help="of each channel, 0 to 1; None is ImageNet's"
    )
    _add_switch(group, "pin_mem", True, "load into pinned memory, which a GPU reads faster")


def add_source_options(group: argparse._ActionsContainer) -> None:
    """Where images come from other than --data_path, and how they are read."""
    group.add_argument(
        "--train_list", metavar="FILE",
        help="text, CSV or JSON file that names the images: a path, and a label if you like",
    )  # fmt: skip
    group.add_argument(
        "--dataset", metavar="NAME",
        help="a data set of torchvision by its class, CIFAR10 or STL10:unlabeled, with its files in --data_path; "
        "hf:NAME_OR_FOLDER, of Hugging Face; wds:SHARDS, of WebDataset: s/{000..127}.tar",
    )  # fmt: skip
    group.add_argument("--download", action="store_true", help="let torchvision fetch the files of --dataset")
    group.add_argument(
        "--num_images", type=positive_int, metavar="N", help="images in shards at URLs, which can't be counted"
    )
    group.add_argument("--in_chans", default=3, type=positive_int, metavar="C", help="channels: 3 is RGB, 1 is grey")
    group.add_argument(
        "--num_workers", default=10, type=int, metavar="N", help="processes that load data, at most one a core"
    )


def add_model_options(parser: argparse.ArgumentParser, models: Sequence[str], default: str) -> None:
    """Which network."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=default, choices=models, metavar="NAME", help=f"one of {', '.join(models)}")
    group.add_argument(
        "--patch_size", type=positive_int, nargs="+", action=_Size, metavar=("P", "P"),
        help="pixels of a patch's side, or height and width; None is the model's own",
    )  # fmt: skip


def add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", default=64, type=positive_int, metavar="N", help="images a process and batch")
    group.add_argument("--epochs", default=400, type=positive_int, metavar="N", help="passes over the data")
    group.add_argument(
        "--accum_iter", default=1, type=positive_int, metavar="N",
        help="batches to an optimizer step; effective batch = batch_size x accum_iter x processes",
    )  # fmt: skip
    group.add_argument(
        "--weight_decay", default=0.05, type=non_negative, metavar="W", help="not on biases and 1-D weights"
    )
    group.add_argument("--lr", type=non_negative, help="highest learning rate; None: blr x effective batch / 256")
    group.add_argument("--blr", default=1e-3, type=non_negative, help="base learning rate, for a batch of 256")
    group.add_argument(
        "--min_lr", default=0.0, type=non_negative, metavar="LR", help="learning rate at the end of the cosine"
    )
    group.add_argument("--warmup_epochs", default=40, type=non_negative, metavar="N", help="epochs of linear warm-up")
    group.add_argument(
        "--clip_grad", type=positive, metavar="NORM", help="largest norm of the gradient; None: no clipping"
    )
    group.add_argument(
        "--on_nonfinite", default="abort", choices=("abort", "skip"),
        help="when a loss or gradient is not finite: save and end the run, or leave the step out",
    )  # fmt: skip


def add_pretrain_options(parser: argparse.ArgumentParser) -> None:
    """What only masked pre-training has."""
    group = parser.add_argument_group("masked pre-training")
    group.add_argument("--mask_ratio", default=0.75, type=ratio, metavar="R", help="share of the patches removed")
    _add_switch(group, "norm_pix_loss", False, "predict patches normalised by their own mean and variance")
    group.add_argument(
        "--crop_scale", default=[0.2, 1.0], type=float, nargs=2, metavar=("MIN", "MAX"),
        help="share of the image's area that a random crop takes",
    )  # fmt: skip
    group.add_argument(
        "--hflip", default=0.5, type=share, metavar="P", help="chance of a horizontal flip; 0 where left is not right"
    )
    group.add_argument("--init_from", default="", metavar="FILE", help="start from this file's weights (nothing else)")
    group.add_argument(
        "--vis_every",
        default=20,
        type=int,
        metavar="N",
        help="epochs between TensorBoard pictures of reconstructions; 0: none",
    )


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    """Flags of launchers. Ranks and counts come from the environment that torchrun sets."""
    group = parser.add_argument_group("several processes (start with torchrun)")
    group.add_argument("--world_size", default=1, type=int, help="taken from the launcher; accepted for old scripts")
    group.add_argument(
        "--local_rank", "--local-rank", default=-1, type=int, help="taken from the launcher; accepted for old scripts"
    )
    group.add_argument("--dist_on_itp", action="store_true", help="without effect; accepted for old scripts")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")


# ------------------------------------------------------------------------------------------------------------ running


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags over `--config` over defaults. A recipe's entries are read just as flags are, with the same checks."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this text and exit")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    argv = (_recipe_flags(parser, Path(config)) if config else []) + argv
    args = parser.parse_args(argv)
    if "log_dir" in args and not any(flag.partition("=")[0] == "--log_dir" for flag in argv):
        args.log_dir = args.output_dir  # the published default is one fixed folder, in which all runs would meet
    if "dist_on_itp" in args and (args.dist_on_itp or args.world_size != 1):
        logger.warning("--world_size and --dist_on_itp have no effect: the launcher decides (torchrun)")
    return args


def _recipe_flags(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    if not path.is_file():
        parser.error(f"--config: there is no file {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        parser.error(f"--config {path} must be a list of `flag: value` lines")
    by_flag = parser._option_string_actions
    known = sorted(action.dest for flag, action in by_flag.items() if flag == f"--{action.dest}")
    flags: list[str] = []
    for key, value in recipe.items():
        if key not in known or key == "config":
            near = difflib.get_close_matches(str(key), known, n=1)
            parser.error(
                f"--config {path}: there is no flag {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if isinstance(value, bool):
            switch = [f for f, a in by_flag.items() if a.dest == key and a.nargs == 0 and a.const is value]
            flags += switch[:1] if switch or value else []
            if value and not switch:
                parser.error(f"--config {path}: {key} takes a value, not {value}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parses the command line and runs `main`. What goes wrong ends in a sentence and an exit code above 0."""
    args = parse(parser)
    try:
        main(args)
    except torch.OutOfMemoryError as error:
        _fail(parser, args, error, f"out of memory: halve --batch_size {args.batch_size} and double --accum_iter", 1)
    except (ValueError, OSError, ArithmeticError) as error:
        _fail(parser, args, error, _sentence(error), 1)
    except KeyboardInterrupt as error:
        _fail(parser, args, error, "interrupted; the same command with --resume auto goes on from the last state", 130)
    # Not after an error: processes that still run would wait for this one, or it for them.
    dist.teardown()


def _fail(
    parser: argparse.ArgumentParser, args: argparse.Namespace, error: BaseException, said: str, code: int
) -> None:
    if "debug" in args and args.debug:
        traceback.print_exception(error)
    print(f"{parser.prog}: error: {said}", file=sys.stderr)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    """An error's message. Those from a loader's worker bring its traceback along, message last."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
