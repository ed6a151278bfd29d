"""A few updates of a recipe: the throughput of this machine, with all processes, the loading and the precision."""

import logging
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
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
# of torchrun: what follows is of no rank
REPORT = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic", re.MULTILINE)


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
        output = Path(folder, "output.txt")
        with output.open("w") as file, interrupts.command(command, env=environment, stdout=file, stderr=file) as trial:
            pass
        seconds = time.perf_counter() - started
        if trial.returncode:
            kept = Path(tempfile.mkdtemp(prefix="mae-trial-"), output.name)
            shutil.move(output, kept)
            text = kept.read_text(errors="replace")
            raise ValueError(f"a trial run of the recipe failed: {reason_of(text)} (the output is in {kept})")
        lines = log.read(Path(folder))
    rate = statistics.median(line["images_per_s"] for line in lines[1:])
    return Trial(rate, seconds - sum(line["seconds"] for line in lines))


def reason_of(output: str) -> str:
    """Returns the line of an output of torchrun that says why a rank failed.

    That is a message of this project, the last line of the first traceback, or the signal that has ended the rank.
    """
    of_ranks = REPORT.split(output, maxsplit=1)[0]
    if messages := re.findall(": error: (.*)", of_ranks):
        return str(messages[0])
    if first := re.search(r"^(\[rank\d+\]: )?Traceback", of_ranks, re.MULTILINE):
        prefix = first[1] or ""
        of_first = [line for line in of_ranks[first.start() :].splitlines() if line.startswith(prefix)]
        lines = [line.removeprefix(prefix) for line in of_first]
        if ends := [line for before, line in pairwise(lines) if before.startswith(" ") and line[:1].strip()]:
            return ends[-1]  # earlier ones are of its causes
    signals = re.findall(r"traceback : (Signal .*)", output)
    return str(signals[-1] if signals else output.strip().rpartition("\n")[2])
