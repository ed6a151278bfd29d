"""One command for a machine with a GPU: are the results right there, and how fast is it?

    python3 benchmarks/gpu_check.py --out runs/gpu_check --seconds 440     # with a GPU
    python3 benchmarks/gpu_check.py --out runs/gpu_check --seconds 400     # on a CPU: a rehearsal, the smallest model

It installs nothing and needs no network. Every step is a process of its own with a limit of seconds, so that a crash or
a full memory ends one step. gpu_check.json is written after each step, and the table is printed last (table.txt).
logs.txt has the output of the steps.

First, steps that check results run together, while measurements compile and write images. Then each measurement has the
machine for itself. Compiled kernels choose their launch settings at their first call, when they still share the GPU, by
medians of timings.
The exit status is 0 only if all steps hold; otherwise, the last line names those that failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import gpu_table, listed_packages, machine
from benchmarks.gpu_task import last_line
from benchmarks.scripts import ROOT
from mae.cli import entry_point
from mae.files import atomic
from mae.settings import types


class Step(NamedTuple):
    """A process."""

    function: str  # in a module of benchmarks
    seconds: float  # at most, with a GPU; on a CPU, the rest of all seconds


CHECKS = {  # the shortest first: they are waited for in this order
    "numerics": Step("gpu_correct:numerics", 120),
    "tests": Step("gpu_correct:tests", 150),
    "equality": Step("gpu_correct:equality", 200),
}
IN_TURNS = {
    "base": Step("gpu_speed:training", 70),
    "huge": Step("gpu_speed:training", 80),
    "large": Step("gpu_speed:training", 70),
    "finetune": Step("gpu_speed:training", 60),
    "loader": Step("gpu_speed:loader", 40),
    "whole": Step("gpu_speed:whole", 70),
    "memory": Step("gpu_correct:memory", 50),
}
PREPARATION = 0.4  # of all seconds, after which the turns begin
FEWEST_SECONDS = 15  # a step that has less is left out


class Check:
    """A run of this command: its processes and what they found."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args = args
        self.work = work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ends = time.monotonic() + args.seconds
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.results: dict[str, Any] = {"steps": {}, "seconds": {}, "failed": {}}

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.ends - time.monotonic()

    def start(self, name: str, function: str) -> None:
        """Starts the process of a step in a process group of its own."""
        path = [str(self.work), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),  # nothing compiled earlier
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device.type == "cpu":  # code without vector instructions compiles in half the time
            environment["ATEN_CPU_CAPABILITY"] = "default"
            environment["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # with AMX, PyTorch's attention would need vector instructions
        command = [sys.executable, "-m", "benchmarks.gpu_task", name, function, str(self.work)]
        with (self.work / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def finish(self, name: str, began: float, seconds: float) -> None:
        """Waits for a step, at most for its seconds, and writes all results."""
        limit = min(began + seconds, self.ends) if self.device.type == "cuda" else self.ends
        try:
            code = self.running[name].wait(max(0.1, limit - time.monotonic()))
            reason = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"ended after {time.monotonic() - began:.0f} seconds"
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

    def tell(self, name: str, failure: str | None) -> None:
        """Prints whether a step has failed, and writes all results, the table and the logs."""
        if failure:
            self.results["failed"][name] = failure
        print(f"{self.args.seconds - self.left:4.0f} s  {name}: {failure or 'ok'}", flush=True)
        out = self.args.out
        machine.write(machine.GPU_CHECK, self.device, vars(self.args), self.results, out)
        atomic.write_text(out / "table.txt", gpu_table.table(machine.describe(self.device), self.results))
        logs = sorted(self.work.glob("*.log"))
        texts = [f"==== {log.stem}\n{log.read_text(errors='replace')[-20_000:]}\n" for log in logs]
        atomic.write_text(out / "logs.txt", "".join(texts))

    def end(self, name: str) -> None:
        """Ends the process group of a step: also the commands that it has started."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, names: Collection[str]) -> None:
        """Runs steps."""
        checks, turns = ({n: step for n, step in steps.items() if n in names} for steps in (CHECKS, IN_TURNS))
        began = time.monotonic()
        for name, step in {**checks, **turns}.items():
            self.start(name, step.function)
        for name, step in checks.items():
            self.finish(name, began, step.seconds)
        while time.monotonic() < began + PREPARATION * self.args.seconds and not all(map(self.is_ready, turns)):
            time.sleep(0.1)
        for name, step in turns.items():
            if self.left < FEWEST_SECONDS:
                self.end(name)
                self.tell(name, "left out: no time is left, give more --seconds")
            else:
                (self.work / f"{name}.go").touch()
                self.finish(name, time.monotonic(), step.seconds)

    def is_ready(self, name: str) -> bool:
        """Whether a step is prepared, or has ended."""
        return (self.work / f"{name}.ready").exists() or self.running[name].poll() is not None


def main(args: argparse.Namespace) -> None:
    """Runs the steps, prints the table, and exits with an error that names the steps that failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(args, Path(folder))
        if args.listed_packages:
            listed_packages.write_hook(Path(folder))
        try:
            check.run(args.only)
        finally:
            for name in [*check.running]:
                check.end(name)
    print((args.out / "table.txt").read_text())
    if failed := check.results["failed"]:
        sys.exit(f"failed: {', '.join(failed)}")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Checks and measurements on a machine with a GPU; on a CPU, a rehearsal of them.")
    parser.add_argument("--out", default=Path("runs/gpu_check"), type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--seconds", default=440, type=types.positive, metavar="S", help="seconds of all steps together"
    )
    steps = [*CHECKS, *IN_TURNS]
    parser.add_argument("--only", nargs="+", default=steps, choices=steps, metavar="STEP", help="steps (default: all)")
    parser.add_argument(
        "--listed_packages", action="store_true",
        help="hide all packages but those of benchmarks/listed_packages.py, as on a machine without them",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
