"""Errors that this project raises on purpose, about a setting, a file or a dataset: commands print them in one line.

Any other error, also one in this project, is a mistake in code. It keeps Python's traceback.
"""

import dis
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, TracebackType

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = ("mae", "examples", "demo", "benchmarks")  # beside each other, with the modules
MODULES = ("main_", "engine_", "models_", "submitit_", "hubconf")
LIBRARY = os.path.dirname(os.__file__) + os.sep  # of Python
# A worker process sends the text of an error, without its frames. This is its last line.
OF_WORKER = "(raised on purpose, in a worker process)"
IN_TEXT = "Original Traceback"  # in the text of an error from a worker process


def is_on_purpose(error: BaseException, named: Iterable[object] = ()) -> bool:
    """Whether an error is about a setting, a file or a dataset, so that its message is enough.

    It is, if a `raise` of this project has raised it, and its cause is not in the user's code; or if this project was
    reading or writing a file that a setting names.

    Args:
        named: the values of the settings.
    """
    if IN_TEXT in str(error):
        return str(error).rstrip().endswith(OF_WORKER)
    frames = _frames(error)
    if _is_of_user(error.__cause__):
        return False
    if _is_class_of_project(error):
        return True
    code, instruction = frames[-1] if frames else (None, 0)
    if code and _is_of_project(code) and code.co_code[instruction] == dis.opmap["RAISE_VARARGS"]:
        return True
    return isinstance(error, OSError) and not _is_of_user(error) and _is_named(error.filename, named)


def message(error: BaseException) -> str:
    """Returns the message of an error on purpose, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without the error number
    text = str(error).strip()
    if IN_TEXT in text:  # the traceback, the message and a note
        text = text.removesuffix(OF_WORKER).rstrip().splitlines()[-1].partition(": ")[2]
    return text


@contextmanager
def marked() -> Iterator[None]:
    """Marks errors on purpose that leave a worker process. It is a decorator, too."""
    try:
        yield
    except Exception as error:
        from torch.utils.data import get_worker_info  # a wrong argument is refused before PyTorch is imported

        if get_worker_info() and is_on_purpose(error):
            error.add_note(OF_WORKER)
        raise


def _frames(error: BaseException) -> list[tuple[CodeType, int]]:
    """Returns the code and the instruction of each frame, the innermost last."""
    found: list[tuple[CodeType, int]] = []
    traceback: TracebackType | None = error.__traceback__
    while traceback:
        found.append((traceback.tb_frame.f_code, traceback.tb_lasti))
        traceback = traceback.tb_next
    return found


def _is_of_project(code: CodeType) -> bool:
    folder, _, rest = os.path.relpath(os.path.abspath(code.co_filename), ROOT).partition(os.sep)
    return folder in FOLDERS if rest else folder.startswith(MODULES)


def _is_of_library(file: str) -> bool:
    """Whether a file is of Python or of an installed package. Compiled and frozen code has no path."""
    return file.startswith(LIBRARY) or "-packages" in file or not os.path.isabs(file)


def _is_of_user(error: BaseException | None) -> bool:
    """Whether the user's code raised an error or its cause, or called the library that did.

    An error of a class of this project is on purpose there, too.
    """
    if error is None:
        return False
    for code, _ in reversed(_frames(error)):
        if _is_of_project(code):
            break
        if not _is_of_library(code.co_filename):
            return not _is_class_of_project(error)
    return _is_of_user(error.__cause__)


def _is_class_of_project(error: BaseException) -> bool:
    """Whether an error has a class of this project, such as `BadImage`, which a dataset of the user's may raise."""
    return type(error).__module__.startswith("mae.")


def _is_named(file: object, named: Iterable[object]) -> bool:
    """Whether a value names a file, or a folder that contains it."""
    if not isinstance(file, str | os.PathLike):
        return False
    values = [one for value in named for one in (value if isinstance(value, list | tuple) else [value])]
    paths = {os.path.abspath(value) for value in values if value and isinstance(value, str | os.PathLike)}
    file = os.path.abspath(file)
    while file not in paths and file != os.path.dirname(file):
        file = os.path.dirname(file)
    return file in paths
