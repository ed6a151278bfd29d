"""Runs of scripts in this process. Each is computed once: its scores are in its folder, and another run reads them."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from mae.files import locks
from mae.files.results import Results
from mae.settings import Run
from mae.weights import model_zoo

Settings = dict[str, Any]
Scores = dict[str, Any]

RECORD = "run.json"  # what the scores of a folder depend on, and the scores once they are computed
WITHOUT_EFFECT = {"download", "num_workers", "output_dir", "log_dir", "features"}  # on a result


class Script(Protocol):
    """A script that takes settings by name, such as `mae.cli.script.Script`."""

    name: str

    def settings(self, given: Mapping[str, Any]) -> Run:
        """Returns the settings of a run."""

    def call_main(self, given: Mapping[str, Any], output: Path, **options: Any) -> Any:
        """Runs the script, and returns its result. It appends what it prints to a file. `options`: of its `main`."""


def kept(folder: Path, settings: Mapping[str, Any], compute: Callable[[Path], Scores]) -> Scores:
    """Returns the scores of a folder, and the `seconds` that they took. They are computed unless they are kept.

    The seconds of a computation that was interrupted include those until it last wrote a file.

    A result is computed again if a setting has changed, or the contents of a file that a setting names. After an
    interruption, `compute` is called with the same folder, unless the settings or files differ: then it is emptied.

    Args:
        settings: by name. The images that they name and modules are not compared.
        compute: computes the scores in the folder.

    Raises:
        locks.Busy: another process computes them.
        FileExistsError: the folder has files, and no record of what they depend on.
    """
    inputs = _inputs_of(settings)
    with locks.locked(folder.parent, f"{folder.name}.lock"):
        file = Results(folder / RECORD)
        record = file.read()
        if not record and any(folder.glob("[!.]*")):
            raise FileExistsError(f"{folder} has files and no {RECORD}: move it away")
        if record.get("inputs") != inputs:
            if record:
                shutil.rmtree(folder)
            file.add({"inputs": inputs})
            record = {}
        elif "scores" in record:
            return record["scores"]
        earlier = _seconds_of(folder, record)
        file.add({"attempt": {"earlier_seconds": earlier, "begin": time.time()}})
        begin = time.perf_counter()
        scores = compute(folder)
        file.add({"scores": {**scores, "seconds": earlier + time.perf_counter() - begin}})
        return file.read()["scores"]


def _seconds_of(folder: Path, record: Mapping[str, Any]) -> float:
    """Returns the seconds of the interrupted attempts at the scores of a folder, until each last wrote to it."""
    attempt = record.get("attempt")
    if not attempt:
        return 0.0
    last = max(path.stat().st_mtime for path in folder.iterdir())
    return attempt["earlier_seconds"] + max(0.0, last - attempt["begin"])


def run_once(
    folder: Path, script: Script, settings: Mapping[str, Any], read: Callable[[Path, Any], Scores],
    options: Mapping[str, Any] = MappingProxyType({}), inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Scores:  # fmt: skip
    """Runs a script in this process, unless its scores are kept. Its output is in output.txt.

    Args:
        settings: by name.
        read: returns the scores of the folder, and of what `main` has returned.
        options: further arguments of its `main`, which `kept` compares as it compares settings.
        inputs: what the scores depend on besides, such as digests of labels.

    Raises:
        locks.Busy, FileExistsError: as in `kept`.
        ValueError: the script has failed.
    """

    def compute(out: Path) -> Scores:
        return read(out, script.call_main(settings, out / "output.txt", **options))

    return kept(folder, {"script": script.name, **settings, **options, **inputs}, compute)


def _inputs_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that change a result, with a digest in place of each file or folder that they name."""
    inputs = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    for name in inputs.keys() - {"data_path"}:
        digest = _digest_of(inputs[name]) if isinstance(inputs[name], str | Path) else None
        if name == "finetune" and not digest and model_zoo.is_of_hub(inputs[name]):
            digest = _commit_of(inputs[name])
        if digest and name.endswith("_list") and not settings.get("data_path"):  # its paths start at its folder
            digest += f" in {Path(inputs[name]).resolve().parent}"
        inputs[name] = digest or inputs[name]
    return json.loads(json.dumps(inputs, default=str))


def _digest_of(path: str | Path) -> str | None:
    """Returns a digest of a file, or of the names, sizes and times of the files in a folder; None if there is none."""
    if os.path.isdir(path):  # sharded checkpoints of many gigabytes
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    file, _, model = (str(path), "", "") if os.path.exists(path) else str(path).rpartition("#")
    if not os.path.isfile(file):  # FILE#MODEL is one of several models in a file of weights
        return None
    status = os.stat(file)
    return f"{model} {_digest(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)}".strip()


@cache  # requests
def _commit_of(name: str) -> str:
    """Returns the commit of a model of the Hugging Face Hub, which its folder is named after."""
    return model_zoo.fetch_from_hub(name).name


@cache  # checkpoints of gigabytes
def _digest(path: str, _size: int, _modified: int, _changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
