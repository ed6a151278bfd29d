"""The command line: `--config` recipes, and error messages in one line. `mae/settings` defines the flags."""

import argparse
import contextlib
import copy
import logging
import os
import re
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from mae import errors
from mae.cli.flags import Range, Size, is_refused_in_recipes
from mae.files import recipes
from mae.files.untrusted import printable
from mae.interrupts import Interrupted
from mae.settings.arguments import arguments
from mae.settings.images import unused_crops
from mae.settings.run import Run
from mae.settings.types import InvalidValue
from mae.settings.values import BOOLEANS, PROCESSES, read_recipe
from mae.suggestions import did_you_mean

logger = logging.getLogger(__name__)

MESSAGES = (  # the end of --help
    "Messages name settings as a recipe does: NAME=VALUE is --NAME VALUE, NAME=true is --NAME, and NAME=false is the "
    "flag beside it above (--no_NAME; --cls_token for global_pool)."
)
FILES = {"FILE", "PATH", "DIR", "FOLDER", "YAML", "IMAGE"}  # metavars of flags that take a path
IMPORTS_TORCHVISION = re.compile(r"torchvision[/\\]__init__\.py\", line \d+, in <module>")  # in a traceback
OPTIONAL = {"datasets", "webdataset", "imagecodecs"}  # packages that a setting needs


class _Help(argparse.HelpFormatter):
    """Shows defaults as they are typed. The help text of a flag with the default None explains the default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default in (None, "", [], argparse.SUPPRESS) or isinstance(default, bool) or action.required:
            return str(action.help)
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(str, values))})".replace("%%", "%").replace("%", "%%")


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, followed by a line of usage."""

    recipe = ""  # prefix of error messages for flags in a recipe

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # The pattern of Python 3.11 has no exponents: -1e-4 would be a flag.
        self.register("action", "size", Size)
        self.register("action", "range", Range)
        self._negative_number_matcher = re.compile(r"-([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")

    def format_usage(self) -> str:
        """Returns the usage in one line, with the required arguments only; --help lists the flags."""
        formatter = self._get_formatter()
        formatter.add_usage(None, [action for action in self._actions if action.required], [])
        return " ".join(formatter.format_help().split()) + " [FLAGS]"

    def format_help(self) -> str:
        """Returns the help of argparse, below a usage line without the optional flags."""
        self.usage = self.format_usage().removeprefix("usage: ").replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Prints the message and the usage, and exits with code 2."""
        text = printable(self.recipe + message)
        self.exit(2, f"{self.prog}: error: {text}\n{self.format_usage()}; --help explains the flags\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the arguments of a command line, with those of the recipe of `--config`, as `parse_command`."""
        found = parse_command(self, args)[0]
        vars(namespace := namespace or argparse.Namespace()).update(vars(found))
        return namespace

    def parse_flags(self, argv: list[str]) -> argparse.Namespace:
        """Parses like argparse, but reports unknown flags first, with the most similar known flag."""
        unknown = [flag for flag in _flags_in(argv) if flag not in self._option_string_actions]
        if unknown:
            near = did_you_mean(unknown[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return super().parse_args(argv)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, InvalidValue):  # it says more than the name of the type
                error.message = str(error.__context__)
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser for a script. It has no --help, so that it can be a parent of another parser; `run` adds it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = module.name.removesuffix(".__main__") if module and module.origin == sys.argv[0] else None
    prog = name and f"python -m {name}"  # None: the file's name
    return _Parser(
        prog=prog, description=description, epilog=MESSAGES, formatter_class=_Help, add_help=False, allow_abbrev=False
    )  # fmt: skip


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> Run:
    """Parses the command line of a script. Returns its settings, and which of them are explicit.

    Programs make their settings with it, too (docs/runs.md, Settings in Python).
    Flags override the recipe of `--config`, and the recipe overrides defaults. The entries of a recipe are parsed like
    flags, with the same checks. Other settings than defaults are explicit.
    """
    args, explicit = parse_command(parser, argv)
    return Run.of(args, explicit)


def parse_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """Parses the command line as `parse` does. Returns the arguments, and the names of those that are explicit."""
    assert isinstance(parser, _Parser), "made by `entry_point.parser`"
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" not in parser._option_string_actions:
        parser.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this text and exit")
    required = [action for action in parser._actions if action.required and action.option_strings]
    for action in required if "--config" in _flags_in(argv) else ():
        action.required = False  # the recipe may set it
    args = parser.parse_flags(argv)
    _refuse_urls(parser, args)
    in_command = {parser._option_string_actions[flag].dest for flag in _flags_in(argv)}
    in_command |= {a.dest for a in parser._actions if not a.option_strings and getattr(args, a.dest) != a.default}
    recipe = _read_recipe(parser, Path(args.config)) if getattr(args, "config", None) else argparse.Namespace()
    _refuse_urls(parser, recipe)
    vars(args).update((name, value) for name, value in vars(recipe).items() if name not in in_command)
    explicit = frozenset(in_command | vars(recipe).keys())
    if missing := [a.option_strings[0] for a in required if a.dest not in explicit]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if "lr" in args and "blr" in in_command and "lr" not in in_command:
        args.lr = None  # of the recipe; it would take precedence over the --blr of the command line
    if "log_dir" in args and "log_dir" not in explicit:
        args.log_dir = args.output_dir  # all runs would write to the published default, a fixed folder
    if "dist_on_itp" in args and (args.dist_on_itp or args.world_size != 1):
        logger.warning("`world_size` and `dist_on_itp` have no effect: the launcher decides (torchrun)")
    if unused := unused_crops(getattr(args, "crop", None), explicit):
        logger.warning(f"no effect with crop=none: {' '.join(f'`{name}`' for name in unused)}")
    return args, explicit


def settings_of(args: argparse.Namespace | Run, parser: argparse.ArgumentParser) -> Run:
    """Returns the settings that `main(args)` of a script has.

    All entries of a Namespace are explicit. Those that it lacks have the defaults of the script.

    Args:
        parser: that of the script.
    """
    if isinstance(args, Run):
        return args
    defaults = {action.dest: action.default for action in parser._actions}
    given = vars(args)
    if "log_dir" not in given and "output_dir" in given:
        defaults["log_dir"] = given["output_dir"]  # as in `parse_command`
    return Run.of({**defaults, **given}, given.keys())


def _flags_in(argv: Sequence[str]) -> list[str]:
    """Returns the flags of a command line, without their values."""
    return [word.partition("=")[0] for word in takewhile(lambda word: word != "--", argv) if word.startswith("--")]


def _refuse_urls(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for action in parser._actions:
        if isinstance(action.metavar, str) and set(action.metavar.split("|")) & FILES:
            value_or_list = getattr(args, action.dest, None)
            for value in value_or_list if isinstance(value_or_list, list) else [value_or_list]:
                if re.match(r"\w{2,}:/", str(value)):  # Path("a://b") has one slash
                    flag = "/".join(action.option_strings) or action.metavar
                    parser.error(f"{flag} {value} is a URL: download the file, and give its path")


def _read_recipe(parser: _Parser, path: Path) -> argparse.Namespace:
    """Returns the settings of a recipe. Each entry is parsed alone, so that an error names the recipe."""
    if not path.is_file():
        parser.error(f"--config: there is no file {path}{did_you_mean(str(path), recipes.names())}")
    try:
        recipe = read_recipe(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        parser.error(f"--config {path} can't be read: {error.strerror}")
    except ValueError as error:
        parser.error(f"--config {path} is no recipe: {' '.join(str(error).split())}")
    by_flag = parser._option_string_actions
    known = sorted(action.dest for flag, action in by_flag.items() if flag == f"--{action.dest}")
    settings = argparse.Namespace()
    parser = copy.deepcopy(parser)
    parser.recipe = f"--config {path}: "
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    recipe.pop(PROCESSES, None)  # of `mae start`: the launcher decides here
    for key, value in recipe.items():
        if key not in known or key == "config":
            parser.error(f"there is no flag {str(key)!r}{did_you_mean(str(key), known)}")
        unknown = parser.parse_known_args(_entry_flags(parser, key, value), settings)[1]
        if unknown:
            parser.error(f"{key} takes no value {' '.join(unknown)}")
    return settings


def _entry_flags(parser: argparse.ArgumentParser, key: str, value: Any) -> list[str]:
    """Returns an entry of a recipe as flags; None means the default."""
    if value is None:
        return []
    switches = {a.const: f for f, a in parser._option_string_actions.items() if a.dest == key and a.nargs == 0}
    if switches:
        value = BOOLEANS.get(value) if isinstance(value, str) else None
        if value is None:
            parser.error(f"{key} takes true or false")
    if is_refused_in_recipes(parser._option_string_actions[f"--{key}"], value):
        text = shlex.join(arguments({key: value}))
        parser.error(f"a recipe must not set {key}, because recipes may be untrusted: give {text} on the command line")
    if switches:
        return [switches[value]] if value in switches else []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, str) and not one.isprintable():
            parser.error(f"{key} contains a control character: {one}")
    if any(not isinstance(one, str) or one.startswith("--") for one in values):
        parser.error(f"{key} takes a plain value, or a list of plain values, not {value}")
    return [f"--{key}", *values] if isinstance(value, list) else [f"--{key}={value}"]


def _open_streams() -> None:
    """Opens standard streams that are closed (2>&-): errors go to stdout then.

    Progress bars need a stream, and a file of the run would get the descriptor, to which libraries write messages.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process
    if sys.stderr is None:
        sys.stderr = sys.stdout
        try:
            os.fstat(2)
        except OSError:
            os.dup2(sys.stdout.fileno(), 2)


def run_script(main: Callable[[Run], Any], parser: argparse.ArgumentParser) -> None:
    """Parses the command line of a script and runs `main` with its settings, as `run` does."""
    run(main, parser, Run.of)


def run(
    main: Callable[[Any], Any],
    parser: argparse.ArgumentParser,
    convert: Callable[[argparse.Namespace, frozenset[str]], Any] = lambda args, explicit: args,
) -> None:
    """Parses the command line and runs `main`. An error on purpose (`errors.is_on_purpose`) prints one line.

    The exit code is 1 after an error, 2 after a wrong command line, and 128 + the number of the signal after a signal.
    It is 141, without a message, if the reader of stdout has ended, such as `head`.

    Args:
        convert: arguments, names of the explicit ones -> the argument of `main`. Default: the arguments.
    """
    _open_streams()
    logging.raiseExceptions = False  # a line that can't be written, as after `| head`, has no traceback
    args, explicit = parse_command(parser)
    trains = "resume" in args and not getattr(args, "eval", False)
    same = "the same command with --resume auto" if trains and args.resume != "auto" else "the same command"
    resume = f"; {same} resumes from the newest checkpoint" if trains else ""
    try:
        with _fitting_versions():
            main(convert(args, explicit))
        sys.stdout.flush()
        from mae import parallel  # imports PyTorch: a wrong argument is refused before

        parallel.teardown()  # not after an error, because the processes would wait for each other
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        sys.exit(128 + signal.SIGPIPE)
    except MemoryError as error:
        _fail(parser, args, error, _out_of_memory(args), 1)
    except RuntimeError as error:
        import torch

        from mae import parallel

        # PyTorch raises RuntimeError for a failed allocation on the CPU, and for a killed worker process.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            _fail(parser, args, error, _out_of_memory(args), 1)
        elif "DataLoader worker" in str(error) and "Original Traceback" not in str(error):  # no error of the dataset
            reason = str(error).partition(". ")[0].strip()
            remedy = f"{same} resumes the run" if trains else "try again"
            _fail(parser, args, error, f"{reason}, usually for lack of memory: lower `num_workers`; {remedy}", 1)
        elif lost := parallel.lost_process(error):
            _fail(parser, args, error, lost + resume, 1)
        raise
    except ImportError as error:
        if error.name not in OPTIONAL:  # of the user's code
            raise
        _fail(parser, args, error, f"{error}: pip install {error.name}", 1)
    except (ValueError, OSError, ArithmeticError) as error:
        if not errors.is_on_purpose(error, vars(args).values()):
            raise
        _fail(parser, args, error, errors.message(error), 1)
    except Interrupted as error:  # 143 after SIGTERM, 130 after SIGINT
        reason = f"{error}; {same} resumes the run"
        _fail(parser, args, error, reason, 128 + error.signum)
    except KeyboardInterrupt as error:
        _fail(parser, args, error, f"interrupted{resume}", 130)


@contextlib.contextmanager
def _fitting_versions() -> Iterator[None]:
    """Raises ValueError in place of an error in the import of torchvision, also in a worker process.

    torchvision is compiled for one version of torch. Its import fails beside another one, with many errors.
    """
    try:
        yield
    except Exception as error:
        if not IMPORTS_TORCHVISION.search("".join(traceback.format_exception(error))):
            raise
        torch, torchvision = map(metadata.version, ("torch", "torchvision"))
        build = torch.partition("+")[2]  # such as cpu
        index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
        raise ValueError(
            f"torchvision {torchvision} can't be imported with torch {torch} ({str(error).strip().splitlines()[-1]}); "
            f"install versions that fit: pip install --force-reinstall torch torchvision{index}"
        ) from error


def _is_stdout_closed() -> bool:
    """Whether stdout is a pipe without a reader."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _fail(
    parser: argparse.ArgumentParser, args: argparse.Namespace, error: BaseException, message: str, code: int
) -> None:
    if "debug" in args and args.debug:
        traceback.print_exception(error)
    print(f"{parser.prog}: error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _out_of_memory(args: argparse.Namespace) -> str:
    if "batch_size" not in args:
        return "out of memory: give fewer or smaller images, or a smaller model"
    remedy = " and double `accum_iter`" if "accum_iter" in args else ""
    return f"out of memory: halve batch_size={args.batch_size}{remedy}"
