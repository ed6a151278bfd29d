"""One command for a machine with a GPU: are the results right there, and how fast is it?

    python3 benchmarks/gpu_check.py --out runs/gpu_check --seconds 440     # with a GPU
    python3 benchmarks/gpu_check.py --out runs/gpu_check --seconds 400     # on a CPU: a rehearsal, the smallest model

It installs nothing and needs no network. gpu_check.json is written after each step (`gpu_steps.py`), and the table is
printed last (table.txt). logs.txt has the output of the steps.

First, steps that check results run together, while measurements compile and write images. Then each measurement has the
machine for itself. Compiled kernels choose their launch settings at their first call, when they still share the GPU, by
medians of timings.
The exit status is 0 only if all steps hold; otherwise, the last line names those that failed.
"""

import argparse
import sys
import time
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_steps, gpu_table, machine
from benchmarks.gpu_steps import Step
from mae.cli import entry_point
from mae.files import atomic

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


class Check(gpu_steps.Steps):
    """A run of this command."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        super().__init__(args, work)
        if self.device.type == "cpu":  # code without vector instructions compiles in half the time
            # With AMX, PyTorch's attention would need vector instructions.
            self.environment |= {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}

    def write(self) -> None:
        machine.write(machine.GPU_CHECK, self.device, vars(self.args), self.results, self.args.out)
        table = gpu_table.table(machine.describe(self.device), self.results)
        atomic.write_text(self.args.out / "table.txt", table)

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
                self.leave_out(name)
            else:
                self.give_turn(name)
                self.finish(name, time.monotonic(), step.seconds)


def main(args: argparse.Namespace) -> None:
    """Runs the steps, prints the table, and exits with an error that names the steps that failed."""
    gpu_steps.run_steps(Check, args)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    description = "Checks and measurements on a machine with a GPU; on a CPU, a rehearsal of them."
    return gpu_steps.parser(description, "runs/gpu_check", 440, [*CHECKS, *IN_TURNS])


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
