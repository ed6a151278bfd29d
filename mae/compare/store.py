"""Runs of scripts in this process. Each is computed once: its scores are in its folder, and another run reads them."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from mae.files import locks
from mae.files.results import Results
from mae.settings import Run

Scores = dict[str, Any]

RECORD = "run.json"  # what the scores of a folder depend on, and the scores once they are computed
WITHOUT_EFFECT = {"download", "num_workers", "output_dir", "log_dir"}  # on a result
WAIT_SECONDS = 1.0  # between looks at what another process computes


class Script(Protocol):
    """A script that takes settings by name, such as `mae.cli.script.Script`."""

    name: str

    def settings(self, given: Mapping[str, Any]) -> Run:
        """Returns the settings of a run."""

    def run(self, given: Mapping[str, Any], output: Path) -> Any:
        """Runs the script, and returns its result. It appends what it prints to a file."""


class Busy(Exception):
    """Another process writes to the folder."""


def kept(folder: Path, flags: Mapping[str, Any], compute: Callable[[Path], Scores]) -> Scores:
    """Returns the scores of a folder, and the `seconds` that they took. They are computed unless they are kept.

    A result is computed again if a flag has changed, or the contents of a file that a flag names. After an
    interruption, `compute` is called with the same folder, unless the flags or files differ: then it is emptied.

    Args:
        flags: by name. Images in the folder `data_path` and modules are not compared.
        compute: computes the scores in the folder.

    Raises:
        Busy: another process computes them.
        FileExistsError: the folder has files, and no record of what they depend on.
    """
    inputs = _inputs_of(flags)
    with locked(folder):
        record = Results(folder / RECORD)
        found = record.read()
        if not found and any(folder.glob("[!.]*")):
            raise FileExistsError(f"{folder} has files and no {RECORD}: move it away")
        if found.get("inputs") != inputs:
            if found:
                shutil.rmtree(folder)
            record.add({"inputs": inputs})
        elif "scores" in found:
            return found["scores"]
        begin = time.perf_counter()
        scores = compute(folder)
        record.add({"scores": {**scores, "seconds": time.perf_counter() - begin}})
        return record.read()["scores"]


def run(folder: Path, script: Script, flags: Mapping[str, Any], read: Callable[[Path, Any], Scores]) -> Scores:
    """Runs a script in this process, unless its scores are kept. Its output is in output.txt.

    Args:
        flags: its settings by name.
        read: returns the scores of the folder, and of what `main` has returned.

    Raises:
        Busy, FileExistsError: as in `kept`.
        ValueError: the script has failed.
    """

    def compute(out: Path) -> Scores:
        return read(out, script.run(flags, out / "output.txt"))

    return kept(folder, {"script": script.name, **flags}, compute)


@contextmanager
def locked(path: Path, waits: bool = False) -> Iterator[None]:
    """Context manager that locks a file or folder by a file beside it.

    Args:
        waits: wait until no other process has locked it.

    Raises:
        Busy: another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as file:
        while not locks.acquire(file, path):
            if not waits:
                raise Busy(f"{path} is being written to by another process")
            time.sleep(WAIT_SECONDS)
        yield


def _inputs_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags that change a result, with a digest in place of each file or folder that they name."""
    inputs = {}
    for name, value in flags.items():
        if name not in WITHOUT_EFFECT:
            digest = None if name == "data_path" else _digest_of(value)
            inputs[name] = digest or value
            if digest and name.endswith("_list") and not flags.get("data_path"):  # its paths start at its folder
                inputs[name] = f"{digest} in {Path(value).resolve().parent}"
    return json.loads(json.dumps(inputs, default=str))


def _digest_of(value: Any) -> str | None:
    """Returns a digest of a file, or of the names, sizes and times of the files in a folder; None for other values."""
    if not isinstance(value, str | Path):
        return None
    if os.path.isdir(value):  # sharded checkpoints of many gigabytes
        files = sorted(path for path in Path(value).rglob("*") if path.is_file())
        stats = [(str(path.relative_to(value)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    file, _, model = (str(value), "", "") if os.path.exists(value) else str(value).rpartition("#")
    if not os.path.isfile(file):  # FILE#MODEL is one of several models in a file of weights
        return None
    status = os.stat(file)
    return f"{model} {_digest(file, status.st_size, status.st_mtime_ns)}".strip()


@cache  # checkpoints of gigabytes
def _digest(path: str, _size: int, _time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
