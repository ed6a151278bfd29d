"""The processes of gpu_check.py and gpu_lab.py: steps that prepare together, and measure one at a time.

Every step is a process of its own with a limit of seconds, so that a crash or a full memory ends one step. All results
are written after each step.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import listed_packages
from benchmarks.gpu_task import last_line
from benchmarks.scripts import ROOT
from mae.cli import entry_point
from mae.files import atomic
from mae.settings import types

ROUNDS = 5  # of ways that take turns


class Step(NamedTuple):
    """A process."""

    function: str  # in a module of benchmarks
    seconds: float  # at most, with a GPU; on a CPU, the rest of all seconds


class Steps:
    """A run of a command: its processes and what they found.

    Attributes:
        environment: variables of the processes.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args = args
        self.work = work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ends = time.monotonic() + args.seconds
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.results: dict[str, Any] = {"steps": {}, "seconds": {}, "failed": {}}
        path = [str(work), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),  # nothing compiled earlier
            "TOKENIZERS_PARALLELISM": "false",
        }

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.ends - time.monotonic()

    def start(self, name: str, function: str) -> None:
        """Starts the process of a step in a process group of its own."""
        command = [sys.executable, "-m", "benchmarks.gpu_task", name, function, str(self.work)]
        with (self.work / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def give_turn(self, name: str) -> None:
        """Gives the machine to a step that waits for it."""
        (self.work / f"{name}.ready").unlink(missing_ok=True)
        (self.work / f"{name}.go").touch()

    def take_turn(self, name: str, seconds: float) -> None:
        """Gives the machine to a step, and waits until its turn is over, at most for `seconds`."""
        self.give_turn(name)
        limit = min(time.monotonic() + seconds, self.ends)
        while not self.is_ready(name) and time.monotonic() < limit:
            time.sleep(0.02)

    def finish(self, name: str, began: float, seconds: float) -> None:
        """Waits until a step ends, at most for its seconds, and writes all results."""
        limit = min(began + seconds, self.ends) if self.device.type == "cuda" else self.ends
        try:
            code = self.running[name].wait(max(0.1, limit - time.monotonic()))
            reason = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code = None
            reason = f"ended after {time.monotonic() - began:.0f} seconds"
        self.end(name)
        file = self.work / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if broken := [title for title, holds in found.get("holds", {}).items() if not holds]:
            reason = "; ".join(broken)
        elif code == 1:
            reason = last_line((self.work / f"{name}.log").read_text(errors="replace"))
        self.results["steps"][name] = found
        self.results["seconds"][name] = round(time.monotonic() - began, 1)
        self.tell(name, reason if code != 0 or broken else None)

    def leave_out(self, name: str) -> None:
        """Ends a step for which no time is left."""
        self.end(name)
        self.tell(name, "left out: no time is left, give more --seconds")

    def tell(self, name: str, failure: str | None) -> None:
        """Prints whether a step has failed, and writes all results and the logs."""
        if failure:
            self.results["failed"][name] = failure
        print(f"{self.args.seconds - self.left:4.0f} s  {name}: {failure or 'ok'}", flush=True)
        self.write()
        logs = sorted(self.work.glob("*.log"))
        texts = [f"==== {log.stem}\n{log.read_text(errors='replace')[-20_000:]}\n" for log in logs]
        atomic.write_text(self.args.out / "logs.txt", "".join(texts))

    def write(self) -> None:
        """Writes all results."""
        raise NotImplementedError

    def end(self, name: str) -> None:
        """Ends the process group of a step: also the commands that it has started."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def is_ready(self, name: str) -> bool:
        """Whether a step is prepared, or has ended."""
        return (self.work / f"{name}.ready").exists() or self.running[name].poll() is not None


def run_steps(kind: Callable[[argparse.Namespace, Path], Any], args: argparse.Namespace) -> None:
    """Runs the steps of a command, prints table.txt, and exits with an error that names the steps that failed.

    Args:
        kind: a subclass of `Steps` with a method `run`, which takes the names of the steps.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-steps-") as folder:
        steps = kind(args, Path(folder))
        if args.listed_packages:
            listed_packages.write_hook(Path(folder))
        try:
            steps.run(args.only)
        finally:
            for name in [*steps.running]:
                steps.end(name)
    print((args.out / "table.txt").read_text())
    if failed := steps.results["failed"]:
        sys.exit(f"failed: {', '.join(failed)}")


def parser(description: str, out: str, seconds: float, steps: Collection[str]) -> argparse.ArgumentParser:
    """Returns the parser of a command.

    Args:
        out: folder of the results.
        seconds: of all steps together.
        steps: their names.
    """
    result = entry_point.parser(description)
    result.add_argument("--out", default=Path(out), type=Path, metavar="DIR", help="folder of the results")
    result.add_argument(
        "--seconds", default=seconds, type=types.positive, metavar="S", help="seconds of all steps together"
    )
    result.add_argument("--only", nargs="+", default=steps, choices=steps, metavar="STEP", help="steps (default: all)")
    result.add_argument(
        "--listed_packages", action="store_true",
        help="hide all packages but those of benchmarks/listed_packages.py, as on a machine without them",
    )  # fmt: skip
    return result
