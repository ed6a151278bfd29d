"""A few updates of a recipe: the throughput of this machine, with all processes, the loading and the precision."""

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae import interrupts
from mae.plurals import counted
from mae.settings.arguments import arguments
from mae.training import log

logger = logging.getLogger(__name__)

# of the trial; its first epoch is slower and does not count
EPOCHS = 4
UPDATES = 15


class Trial(NamedTuple):
    """The speed of a recipe on this machine."""

    images_per_s: float  # throughput of all processes
    startup: float  # seconds that a run takes besides its updates


def torchrun(processes: int, script: str, settings: Mapping[str, Any], flags: Sequence[str] = ()) -> list[str]:
    """Returns the command that runs a script in processes of this machine, with this Python.

    Args:
        script: name of the script.
        settings: by name.
        flags: further arguments.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, "-m", script, *arguments(settings), *flags]


def measure(
    recipe: Path, processes: int, threads: int, given: Sequence[str], script: str, settings: Mapping[str, Any],
    updates: int = UPDATES,
) -> Trial:  # fmt: skip
    """Trains with a recipe for EPOCHS epochs of about `updates` updates in new processes.

    Args:
        recipe: the file.
        threads: threads of each process.
        given: arguments that a recipe must not set.
        script: name of the script.
        settings: those that make it short, by name.

    Raises:
        ValueError: the run failed, for example for lack of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "config": recipe, "output_dir": folder, "epochs": EPOCHS, "warmup_epochs": 1, "save_every": EPOCHS,
            **settings,
        }  # fmt: skip
        command = torchrun(processes, script, settings, given)
        logger.info(f"measuring   {EPOCHS * updates} updates in {counted(processes, 'process')}")
        started = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with interrupts.command(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            errors = process.communicate()[1]
        seconds = time.perf_counter() - started
        if process.returncode:
            of_script = errors.partition("torch/distributed/elastic")[0]  # the rest is the report of torchrun
            reasons = [line for line in errors.splitlines() if ": error: " in line] or [of_script[-2000:]]
            raise ValueError(f"a trial run of the recipe failed: {reasons[0].partition(': error: ')[2] or reasons[0]}")
        lines = log.read(Path(folder))
    rate = statistics.median(line["images_per_s"] for line in lines[1:])
    return Trial(rate, seconds - sum(line["seconds"] for line in lines))
