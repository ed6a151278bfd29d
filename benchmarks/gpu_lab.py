"""One command for a machine with a GPU: where the time of pre-training goes, and what each variant of the model saves.

    python3 benchmarks/gpu_lab.py --out runs/gpu_lab --seconds 520     # with a GPU
    python3 benchmarks/gpu_lab.py --out runs/gpu_lab --seconds 120     # on a CPU: a rehearsal, the smallest model

It installs nothing and needs no network. gpu_lab.json is written after each step (`gpu_steps.py`), and the tables are
printed last (table.txt). logs.txt has the output of the steps.

First, all steps compile together. Then the steps of a group take turns, round by round, each with the machine for
itself, so that a change of its speed concerns all. lab/README.md says what follows from the figures.
"""

import argparse
import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_steps, machine
from benchmarks.gpu_steps import ROUNDS, Step
from benchmarks.lab import tables
from mae.cli import entry_point
from mae.files import atomic

# Size and batch size -> variants of lab/variants.py. Below 256 images, the host limits.
UPDATES: Mapping[str, tuple[str, ...]] = {
    "base_patch16.512": ("main", "packed", "carry", "gelu", "fused", "exact", "bf16-encoder", "all"),
    "base_patch16.64": ("main", "exact", "all"),
    "large_patch16.256": ("main", "packed", "fused", "exact", "bf16-encoder", "all"),
    "huge_patch14.128": ("main", "packed", "fused", "exact", "bf16-encoder", "all"),
}
BLOCKS = ("B_encoder", "B_decoder", "L_encoder", "H_encoder", "H_decoder")
GROUPS: dict[str, dict[str, Step]] = {  # in this order: what comes first decides most
    "attention": {"attention": Step("lab.parts:attention", 70)},
    **{
        f"update.{of_what}": {f"update.{of_what}.{name}": Step("lab.updates:update", 30) for name in names}
        for of_what, names in UPDATES.items()
    },
    "ceilings": {"ceilings": Step("lab.parts:ceilings", 40)},
    **{f"blocks.{shape}": {f"blocks.{shape}": Step("lab.parts:blocks", 40)} for shape in BLOCKS},
    "curves": {"curves": Step("lab.updates:curves", 120)},
}
# Without a GPU: one step of each kind, and two that take turns.
REHEARSED = (
    "ceilings", "attention", "update.base_patch16.512.main", "update.base_patch16.512.all", "blocks.B_encoder",
    "curves",
)  # fmt: skip
PREPARATION = 0.35  # of all seconds, after which the turns begin
FEWEST_SECONDS = 10  # a group that has less is left out


class Lab(gpu_steps.Steps):
    """A run of this command."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        super().__init__(args, work)
        self.environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a core for each process

    def write(self) -> None:
        machine.write("gpu_lab", self.device, vars(self.args), self.results, self.args.out)
        table = tables.table(machine.describe(self.device), self.results)
        atomic.write_text(self.args.out / "table.txt", table)

    def run(self, names: Collection[str]) -> None:
        """Runs groups of steps."""
        groups = {name: steps for name, steps in GROUPS.items() if name in names}
        if self.device.type == "cpu":
            groups = {
                group: {name: step for name, step in steps.items() if name in REHEARSED}
                for group, steps in groups.items()
            }
        self.prepare({name: step for steps in groups.values() for name, step in steps.items()})
        for steps in groups.values():
            self.measure({name: step for name, step in steps.items() if name in self.running})

    def prepare(self, steps: Mapping[str, Step]) -> None:
        """Starts steps, as many at once as there are cores, and waits until all are prepared, or the turns begin."""
        ends = time.monotonic() + PREPARATION * self.args.seconds
        cores = max(2, (os.cpu_count() or 1) - 2)
        waiting = [*steps]
        while time.monotonic() < ends and (waiting or not all(map(self.is_ready, self.running))):
            while waiting and sum(not self.is_ready(name) for name in self.running) < cores:
                name = waiting.pop(0)
                self.start(name, steps[name].function)
            time.sleep(0.05)
        for name in waiting:
            self.tell(name, "left out: it was not prepared in time, give more --seconds")

    def measure(self, steps: Mapping[str, Step]) -> None:
        """Gives turns to the steps of a group; several steps take turns in each round."""
        if self.left < FEWEST_SECONDS:
            for name in steps:
                self.leave_out(name)
            return
        for _ in range(ROUNDS - 1 if len(steps) > 1 else 0):
            for name, step in steps.items():
                self.take_turn(name, step.seconds)
        for name, step in steps.items():
            self.give_turn(name)
            self.finish(name, time.monotonic(), step.seconds)


def main(args: argparse.Namespace) -> None:
    """Runs the steps, prints the tables, and exits with an error that names the steps that failed."""
    gpu_steps.run_steps(Lab, args)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    description = "Measures where the time of pre-training goes on a GPU, and variants; on a CPU, a rehearsal."
    return gpu_steps.parser(description, "runs/gpu_lab", 520, [*GROUPS])


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
