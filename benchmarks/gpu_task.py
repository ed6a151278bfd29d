"""A step of gpu_check.py or gpu_lab.py in its process: its results, its checks and its turns.

    python -m benchmarks.gpu_task NAME MODULE:FUNCTION FOLDER

The folder is shared by all steps of a run (`gpu_steps.py`), which starts this command. NAME.json has the results.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.scripts import ROOT
from mae.files import atomic

TINY = "mini_patch4"  # the size of the models of a rehearsal


class Task:
    """A step, as its function sees it.

    Attributes:
        name: of the step.
        folder: for the files of all steps.
        device: the GPU, or the CPU in a rehearsal.
        found: the results so far. "holds" says which checks hold; "skipped" is what needs a GPU and there is none.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.found: dict[str, Any] = {}

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def write(self, **results: Any) -> None:
        """Adds results, and writes all, so that they remain if the step is ended."""
        self.found |= results
        atomic.write_text(self.folder / f"{self.name}.json", json.dumps(self.found, default=str))

    def check(self, title: str, holds: bool) -> None:
        """Records whether a check holds. A step with a check that does not hold has failed."""
        print(f"{title}: {'holds' if holds else 'DOES NOT HOLD'}", flush=True)
        self.write(holds=self.found.get("holds", {}) | {title: bool(holds)})

    def skip(self, *titles: str) -> None:
        """Records what needs a GPU."""
        self.write(skipped=self.found.get("skipped", []) + list(titles))

    def wait_for_turn(self) -> None:
        """Says that the step is prepared, or that its turn is over, and waits until it has the machine for itself."""
        parent = os.getppid()
        turn = self.folder / f"{self.name}.go"
        (self.folder / f"{self.name}.ready").touch()
        while not turn.exists():
            if os.getppid() != parent:  # the command was killed
                sys.exit("the command that started this step has ended")
            time.sleep(0.02)
        turn.unlink()


def run_python(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs Python in the repository, and prints the output, which goes to logs.txt."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    print("$ python", *command, f"\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}", flush=True)
    return done


def last_line(text: str) -> str:
    """The last line that is not empty: of a failed command, its error message."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def main(name: str, function: str, folder: str) -> None:
    """Runs a step."""
    module, _, attribute = function.partition(":")
    task = Task(name, Path(folder))
    task.write()
    getattr(import_module(f"benchmarks.{module}"), attribute)(task)


if __name__ == "__main__":
    main(*sys.argv[1:])
