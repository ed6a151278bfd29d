"""The command line: `--config` recipes, and errors as sentences. The flags stand in `util/options.py`."""

import argparse
import copy
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
from util.interrupts import Interrupted

logger = logging.getLogger(__name__)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if isinstance(action.default, bool) or action.required else super()._get_help_string(action)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser for a main, without --help, so that it can be another's parent; `run` adds that."""
    return argparse.ArgumentParser(description=description, formatter_class=_Help, add_help=False, allow_abbrev=False)


class _Args(argparse.Namespace):
    """Settings, and beside them, so that `vars` is free of it, the names of those that were given."""

    __slots__ = ("given", "typed")
    given: frozenset[str]  # on the command line or in a recipe
    typed: frozenset[str]  # on the command line


def given(args: argparse.Namespace, in_recipe: bool = True) -> frozenset[str]:
    """The names of the settings that were given, on the command line or in the recipe of `--config`.

    A plain Namespace, which a program made without `parse`, has only given settings: the program chose all of them.

    Args:
        in_recipe: whether those of a recipe count.
    """
    if not isinstance(args, _Args):
        return frozenset(vars(args))
    return args.given if in_recipe else args.typed


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags over `--config` over defaults. A recipe's entries are read just as flags are, with the same checks.

    `given` knows which of the settings are no defaults.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this text and exit")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    recipe = _recipe_flags(parser, Path(config)) if config else []
    args = parser.parse_args(recipe + argv, _Args())
    args.given, args.typed = _settings_in(parser, recipe + argv), _settings_in(parser, argv)
    if "log_dir" in args and "log_dir" not in args.given:
        args.log_dir = args.output_dir  # the published default is one fixed folder, in which all runs would meet
    if "dist_on_itp" in args and (args.dist_on_itp or args.world_size != 1):
        logger.warning("--world_size and --dist_on_itp have no effect: the launcher decides (torchrun)")
    return args


def _settings_in(parser: argparse.ArgumentParser, argv: list[str]) -> frozenset[str]:
    """The names that a command line sets: what parsing it without defaults finds."""
    bare = copy.deepcopy(parser)
    bare._defaults.clear()
    for action in bare._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return frozenset(vars(bare.parse_args(argv)))


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


def run(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser) -> None:
    """Parses the command line and runs `main`. What goes wrong ends in a sentence and an exit code above 0."""
    args = parse(parser)
    try:
        main(args)
    except (torch.OutOfMemoryError, MemoryError) as error:
        _fail(parser, args, error, _out_of_memory(args), 1)
    except RuntimeError as error:
        # PyTorch has no classes for these: its CPU's allocator, and the signal that a loader's process was killed,
        # which comes wherever the main thread is.
        if "allocate memory" in str(error):
            _fail(parser, args, error, _out_of_memory(args), 1)
        elif "DataLoader worker" in str(error):
            said = str(error).partition(". ")[0].strip()
            remedy = "--resume auto goes on" if "resume" in args else "try again"
            _fail(parser, args, error, f"{said}, for want of memory as a rule: lower --num_workers; {remedy}", 1)
        raise
    except (ValueError, OSError, ArithmeticError) as error:
        _fail(parser, args, error, _sentence(error), 1)
    except Interrupted as error:  # 143 after SIGTERM, 130 after SIGINT
        said = f"{error}, the state is saved; the same command with --resume auto goes on"
        _fail(parser, args, error, said, 128 + error.signum)
    except KeyboardInterrupt as error:
        remedy = "; the same command with --resume auto goes on from the last state" if "resume" in args else ""
        _fail(parser, args, error, f"interrupted{remedy}", 130)
    # Not after an error: processes that still run would wait for this one, or it for them.
    dist.teardown()


def _fail(
    parser: argparse.ArgumentParser, args: argparse.Namespace, error: BaseException, said: str, code: int
) -> None:
    if "debug" in args and args.debug:
        traceback.print_exception(error)
    print(f"{parser.prog}: error: {said}", file=sys.stderr)
    sys.exit(code)


def _out_of_memory(args: argparse.Namespace) -> str:
    if "batch_size" not in args:
        return "out of memory: give fewer or smaller images, or a smaller model"
    remedy = " and double --accum_iter" if "accum_iter" in args else ""
    return f"out of memory: halve --batch_size {args.batch_size}{remedy}"


def _sentence(error: Exception) -> str:
    """An error's message. Those from a loader's worker bring its traceback along, message last."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without the number of the error
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
