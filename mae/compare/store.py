"""Runs scripts in processes of their own, several at a time; each result is computed once and kept in a folder."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from mae.files import atomic
from mae.files.results import Results
from mae.interrupts import end_with_parent
from mae.settings.arguments import arguments
from mae.user_code import DATASET

Scores = dict[str, Any]
T = TypeVar("T")

# Flags that do not change a result. A moved folder of results is complete.
WITHOUT_EFFECT = {"download", "num_workers", "output_dir", "log_dir", "precision"}
# Flags whose files are not compared: images may have hundreds of gigabytes, and runs write the others.
NOT_COMPARED = WITHOUT_EFFECT | {"data_path"}
LISTS = {"train_list", "val_list"}


class Commands:
    """Runs commands and keeps their scores in a file.

    A result is computed again if a flag has changed, or the contents of a file, folder or module that a flag names.

    Args:
        folder: the run directories.
        stored: JSON file with the scores of all commands, by name.
        jobs: commands at a time. Each gets an equal share of the CPU cores.
    """

    def __init__(self, folder: Path, stored: Path, jobs: int) -> None:
        self.folder, self.results, self.jobs = folder, Results(stored), jobs
        self.lock = threading.Lock()  # of the processes
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def keep(self, name: str, command: str, flags: Mapping[str, Any], compute: Callable[[Path], Scores]) -> Scores:
        """Returns the scores of a name, with `seconds`, `command` and `files`. They are computed unless they are kept.

        Args:
            flags: by name. The contents of the files among their values belong to the result, and the names, sizes and
                times of the files in folders, except for NOT_COMPARED.
            compute: computes the scores in a run directory. After an interruption it is called again with the same
                directory.
        """
        out = self.folder / name
        compared = {key: value for key, value in flags.items() if key not in NOT_COMPARED}
        files = {key: digest for key, value in compared.items() if (digest := _digest_of(value))}
        if flags.get("data_path") is None:  # then the paths in a list are relative to its folder
            files |= {key: f"{files[key]} in {Path(flags[key]).resolve().parent}" for key in files.keys() & LISTS}
        words = _compared_words(command, files)
        scores = self.results.read().get(name, {})
        if scores.get("files") == files and _compared_words(scores["command"], files) == words:
            return {**scores, "command": command}
        started = out / "command.txt"
        if started.exists():
            before, _, digests = started.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
            if digests != json.dumps(files) or _compared_words(before, files) != words:
                shutil.rmtree(out)  # of other flags or files; it can't be resumed
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(started, f"{command}\n{json.dumps(files)}\n")
        begin = time.perf_counter()
        scores = {**compute(out), "seconds": time.perf_counter() - begin, "command": command, "files": files}
        self.results.add({name: scores})
        return scores

    def run(self, name: str, script: Path, flags: Mapping[str, Any], read: Callable[[Path, str], Scores]) -> Scores:
        """Runs a script.

        Args:
            flags: by name, as `advice.arguments` takes them.
            read: returns the scores of a run directory and an output.

        Raises:
            ValueError: the script failed; the message is the last line of its output, or says that it was killed.
        """
        command = shlex.join(["python", script.name, *arguments(flags)])

        def compute(out: Path) -> Scores:
            output = out / "output.txt"
            with output.open("wb") as file:
                with self.lock:
                    if self.stopping:
                        raise ValueError(f"{name} was not started: another command has failed")
                    process = subprocess.Popen(
                        [sys.executable, str(script), *arguments(flags)], stdout=file, stderr=subprocess.STDOUT,
                        preexec_fn=end_with_parent,  # else it would train on while a resumed comparison runs
                        env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))},
                    )  # fmt: skip
                    self.processes.add(process)
                code = process.wait()
                self.processes.discard(process)
            text = output.read_text(encoding="utf-8", errors="replace")
            if code == -signal.SIGKILL:  # the end of the output is unrelated; a script handles all other signals
                raise ValueError(
                    f"{name} was killed by SIGKILL, usually for lack of memory; the same command resumes "
                    f"(the output is in {output})"
                )
            if code:
                last = next((line for line in reversed(text.splitlines()) if line.strip()), f"exit code {code}")
                raise ValueError(f"{last} (the output is in {output})")
            return read(out, text)

        return self.keep(name, command, flags, compute)

    def each(self, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Calls functions, `jobs` at a time, and yields their results as they are complete.

        An error or an interruption ends the running commands; they save their state.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                yield from (future.result() for future in as_completed([pool.submit(call) for call in calls]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self.lock:
                    self.stopping = True
                    for process in list(self.processes):
                        process.terminate()
                raise


def _compared_words(command: str, files: Collection[str]) -> list[str]:
    """Returns a command without the flags that do not change its result and those whose files are compared."""
    words, compared = [], True
    for word in shlex.split(command):
        if word.startswith("--"):
            compared = word[2:] not in WITHOUT_EFFECT | set(files)
        if compared:
            words.append(word)
    return words


def _digest_of(value: Any) -> str | None:
    """Returns a digest of a file, or of the names, sizes and times of the files in a folder; None for other values.

    The digest of MODULE:NAME, which names the user's code, is that of the file of an imported module.
    """
    if not isinstance(value, str | Path):
        return None
    if not os.path.exists(value):
        weights, _, model = str(value).rpartition("#")  # FILE#MODEL is one of several models in a file of weights
        if os.path.exists(weights):
            return f"{model} {_digest_of(weights)}"
        module, separator, name = str(value).removeprefix(DATASET).rpartition(":")
        file = getattr(sys.modules.get(module), "__file__", None)
        return f"{name} {_digest_of(file)}" if separator and file else None
    if os.path.isdir(value):  # sharded checkpoints of many gigabytes
        files = sorted(path for path in Path(value).rglob("*") if path.is_file())
        stats = [(str(path.relative_to(value)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    status = os.stat(value)
    return _digest(str(value), status.st_size, status.st_mtime_ns)


@cache  # checkpoints of gigabytes
def _digest(path: str, _size: int, _time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
