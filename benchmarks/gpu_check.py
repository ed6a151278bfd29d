"""One command for a machine with a GPU: are the results right there, and how fast is it?

    python3 benchmarks/gpu_check.py --out runs/gpu_check --seconds 440     # with a GPU
    python3 benchmarks/gpu_check.py --out runs/gpu_check --seconds 400     # on a CPU: a rehearsal, the smallest model

It installs nothing and needs no network. Every step is a process of its own with a limit of seconds, so that a crash or
a full memory ends one step. gpu_check.json is written after each step, and the table is printed last (table.txt).
logs.txt has the output of the steps, profile.txt the time of each kernel.

First, steps that check results run together, while others compile. Then each measurement has the machine for itself.
Compiled kernels choose their launch settings at their first call, when they still share the GPU, by medians of timings.
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
    is_alone: bool = True  # it has the machine for itself
    is_prepared: bool = False  # it starts, and compiles, together with others, and waits for its turn


STEPS = {
    "tests": Step("gpu_correct:tests", 150, is_alone=False),
    "equality": Step("gpu_correct:equality", 200, is_alone=False),
    "numerics": Step("gpu_correct:numerics", 120, is_alone=False),
    "ceilings": Step("gpu_speed:ceilings", 40, is_prepared=True),
    # Before the largest batches: its models leave the memory first.
    "variants": Step("gpu_training:variants", 50, is_prepared=True),
    "base": Step("gpu_training:training", 70, is_prepared=True),
    "huge": Step("gpu_training:training", 80, is_prepared=True),
    "large": Step("gpu_training:training", 70, is_prepared=True),
    "finetune": Step("gpu_training:training", 60, is_prepared=True),
    "loader": Step("gpu_speed:loader", 40, is_prepared=True),
    "whole": Step("gpu_speed:whole", 70),
    "memory": Step("gpu_correct:memory", 50),
    "autotune": Step("gpu_training:autotune", 200),
}
OPTIONAL = {"autotune"}  # may lack time
PREPARATION = 0.4  # of all seconds, after which the measurements begin
FEWEST_SECONDS = 15  # a step that has less is left out


class Check:
    """A run of this command: its processes and what they found."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args = args
        self.work = work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ends = time.monotonic() + args.seconds
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.began: dict[str, float] = {}  # for a step that waits, when its turn came
        self.results: dict[str, Any] = {"steps": {}, "seconds": {}, "failed": {}}

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.ends - time.monotonic()

    def start(self, name: str) -> None:
        """Starts the process of a step in a process group of its own."""
        path = [str(self.work), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),  # nothing compiled earlier
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.device.type == "cpu":  # code without vector instructions compiles in half the time
            environment["ATEN_CPU_CAPABILITY"] = "default"
        command = [sys.executable, "-m", "benchmarks.gpu_task", name, STEPS[name].function, str(self.work)]
        with (self.work / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.began[name] = time.monotonic()

    def rest(self, name: str) -> float:
        """Seconds that a step may still take."""
        rest = self.began[name] + STEPS[name].seconds - time.monotonic()
        return min(rest, self.left) if self.device.type == "cuda" else self.left

    def next_of(self, names: Collection[str]) -> str:
        """Waits until one of several steps has ended, or has no seconds left; returns its name."""
        while True:
            for name in names:
                if self.running[name].poll() is not None or self.rest(name) <= 0:
                    return name
            time.sleep(0.1)

    def finish(self, name: str) -> None:
        """Waits for a step, at most for its seconds, and writes all results."""
        try:
            code = self.running[name].wait(max(0.1, self.rest(name)))
            reason = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"ended after {time.monotonic() - self.began[name]:.0f} seconds"
        self.end(name)
        file = self.work / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if broken := [title for title, holds in found.get("holds", {}).items() if not holds]:
            reason = "; ".join(broken)
        elif code == 1:
            reason = last_line((self.work / f"{name}.log").read_text(errors="replace"))
        if code is None and name in OPTIONAL:
            found.setdefault("skipped", []).append(reason)
        elif code != 0 or broken:
            self.results["failed"][name] = reason
        self.results["steps"][name] = found
        self.results["seconds"][name] = round(time.monotonic() - self.began[name], 1)
        self.tell(name, self.results["failed"].get(name, "ok"))

    def tell(self, name: str, state: str) -> None:
        """Prints the state of a step, and writes all results."""
        print(f"{self.args.seconds - self.left:4.0f} s  {name}: {state}", flush=True)
        self.save()

    def end(self, name: str) -> None:
        """Ends the process group of a step: also the commands that it has started."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def leave_out(self, name: str) -> None:
        """Records a step for which no time is left."""
        reason = "left out: no time is left, give more --seconds"
        if name in OPTIONAL:
            self.results["steps"][name] = {"skipped": [reason]}
        else:
            self.results["failed"][name] = reason
        self.tell(name, reason)

    def save(self) -> None:
        """Writes the results, the table, the logs and the profiles."""
        out = self.args.out
        machine.write(machine.GPU_CHECK, self.device, vars(self.args), self.results, out)
        atomic.write_text(out / "table.txt", gpu_table.table(machine.describe(self.device), self.results))
        for name, pattern, end in (("logs", "*.log", -20_000), ("profile", "*.profile.txt", 0)):
            files = sorted(self.work.glob(pattern))
            texts = [f"==== {file.stem}\n{file.read_text(errors='replace')[end:]}\n" for file in files]
            if texts:
                atomic.write_text(out / f"{name}.txt", "".join(texts))

    def run(self) -> None:
        """Runs the steps."""
        chosen = {name: step for name, step in STEPS.items() if name in self.args.only}
        for name, step in chosen.items():
            if not step.is_alone or step.is_prepared:
                self.start(name)
        while together := self.running.keys() & {name for name, step in chosen.items() if not step.is_alone}:
            self.finish(self.next_of(together))
        prepared = [name for name, step in chosen.items() if step.is_prepared]
        deadline = self.ends - (1 - PREPARATION) * self.args.seconds
        while time.monotonic() < deadline and not all(map(self.is_ready, prepared)):
            time.sleep(0.1)
        for name in [name for name, step in chosen.items() if step.is_alone]:
            if self.left < FEWEST_SECONDS:
                self.leave_out(name)
                continue
            if name not in self.running:
                self.start(name)
            self.began[name] = time.monotonic()
            (self.work / f"{name}.go").touch()
            self.finish(name)

    def is_ready(self, name: str) -> bool:
        """Whether a step is prepared, or has ended."""
        return (self.work / f"{name}.ready").exists() or self.running[name].poll() is not None


def main(args: argparse.Namespace) -> None:
    """Runs the steps, prints the table, and exits with an error that names the steps that failed."""
    if unknown := set(args.only) - STEPS.keys():
        raise ValueError(f"--only {' '.join(sorted(unknown))}: the steps are {', '.join(STEPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(args, Path(folder))
        if args.listed_packages:
            listed_packages.write_hook(Path(folder))
        try:
            check.run()
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
    parser.add_argument("--only", nargs="+", default=[*STEPS], metavar="STEP", help="steps (default: all)")
    parser.add_argument(
        "--listed_packages", action="store_true",
        help="hide all packages but those of benchmarks/listed_packages.py, as on a machine without them",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
