"""Reads damaged inputs: ./run fuzz (at most ten minutes on two cores).

    python tests/fuzz.py                             # every door, 2,000 inputs each
    python tests/fuzz.py images --only 1234          # repeats one input, with its traceback

A door is a function that reads untrusted files: images, archives, lists, recipes, weights, sharded checkpoints. Its
inputs are valid files with flipped bits, truncation, splices, unusual numbers in headers, and changes of the structure
of their format (`mutations.py`): very many scans of JPEG files, links in place of files, large headers. Each input must
be read, or rejected with a documented exception in one line of printable text, within 20 seconds. 100 inputs share a
process and may use 1 GiB of memory together.
"""

import argparse
import contextlib
import gc
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz_doors import DOORS, Door

INPUTS = 2_000
OF_A_PROCESS = 100
SECONDS = 20
MAX_GROWTH = 1024  # MB
ALLOWED = (ValueError, OSError)  # BadImage and CheckpointError are ValueErrors
FORK = get_context("fork")  # so that PyTorch is imported once


class Fault(NamedTuple):
    """The fault of one input."""

    door: str
    number: int
    what: str


class Batch:
    """A process that reads the inputs from `first` to `end`.

    Args:
        folder: working folder of this process.
    """

    def __init__(self, name: str, door: Door, seeds: list[Any], first: int, end: int, folder: Path) -> None:
        self.name, self.end = name, end
        self.number = FORK.Value("q", first)
        self.answer, answer = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._read_all, args=(door, seeds, folder, answer))
        self.process.start()
        answer.close()

    def _read_all(self, door: Door, seeds: list[Any], folder: Path, answer: Any) -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at any point
        folder.mkdir(parents=True, exist_ok=True)
        said = (folder / "said.txt").open("w+")
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        gc.freeze()  # garbage of the parent that is freed here would hide as much growth
        start = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
        faults, first = [], self.number.value
        for number in range(first, self.end):
            self.number.value = number
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            what = read(self.name, door, seeds, number, folder)
            signal.setitimer(signal.ITIMER_REAL, 0)
            faults += [Fault(self.name, number, what)] if what else []
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - start
        if grown > MAX_GROWTH:
            faults.append(Fault(self.name, first, f"inputs {first} to {self.end - 1} took {grown} MB"))
        sys.stdout.flush()
        sys.stderr.flush()
        odd = [line for line in (folder / "said.txt").read_text(errors="replace").splitlines() if "\x1b" in line]
        faults += [Fault(self.name, first, f"a message with an escape sequence: {odd[0]!r}")] if odd else []
        answer.send((faults, grown))

    def result(self) -> tuple[list[Fault], int]:
        """The faults of an ended process, and its memory in MB. `number` is the last input that it read."""
        self.process.join()
        with contextlib.suppress(EOFError):
            answer = self.answer.recv()
            self.number.value = self.end - 1
            return answer
        how = "hangs" if self.process.exitcode == -signal.SIGALRM else f"ends the process ({self.process.exitcode})"
        return [Fault(self.name, self.number.value, how)], 0


def read(name: str, door: Door, seeds: list[Any], number: int, folder: Path) -> str:
    """Reads one input; returns the fault in one line, or an empty string."""
    generator = random.Random(f"{name} {number}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door.read(door.mutate(seeds, generator), folder, generator)
    except ALLOWED as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror
        return "" if text.isprintable() else f"{type(error).__name__} of several lines: {text!r}"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)!r:.150} in {Path(at.filename).name}:{at.lineno}"
    return ""


def fuzz(names: list[str], inputs: int, folder: Path, processes: int = 2) -> Iterator[tuple[str, list[Fault], int]]:
    """Reads `inputs` inputs at each door; yields (door, faults, MB) of each process."""
    waiting = []
    for name in names:
        (folder / name).mkdir(parents=True)
        seeds = DOORS[name].make_seeds(folder / name)
        ends = [*range(OF_A_PROCESS, inputs, OF_A_PROCESS), inputs]
        waiting += [(name, seeds, end - min(OF_A_PROCESS, end), end) for end in ends]
        waiting[-1] = (name, seeds, ends[-2] if len(ends) > 1 else 0, inputs)
    running: list[tuple[Batch, list[Any]]] = []
    while waiting or running:
        while waiting and len(running) < processes:
            name, seeds, first, end = waiting.pop(0)
            own = folder / f"{name}-{first}"
            running.append((Batch(name, DOORS[name], seeds, first, end, own), seeds))
        connection.wait([batch.process.sentinel for batch, _ in running])
        for batch, seeds in [one for one in running if not one[0].process.is_alive()]:
            running.remove((batch, seeds))
            faults, grown = batch.result()
            if batch.number.value + 1 < batch.end:
                waiting.insert(0, (batch.name, seeds, batch.number.value + 1, batch.end))
            yield batch.name, faults, grown


def main(args: argparse.Namespace) -> int:
    """Prints a line for each fault, and a table."""
    names = args.doors or list(DOORS)
    with tempfile.TemporaryDirectory() as folder:
        if args.only is not None:
            seeds = DOORS[names[0]].make_seeds(Path(folder))
            generator = random.Random(f"{names[0]} {args.only}")
            DOORS[names[0]].read(DOORS[names[0]].mutate(seeds, generator), Path(folder), generator)
            return 0
        counts, peaks, begun = dict.fromkeys(names, 0), dict.fromkeys(names, 0), time.perf_counter()
        for name, faults, grown in fuzz(names, args.inputs, Path(folder)):
            counts[name] += len(faults)
            peaks[name] = max(peaks[name], grown)
            for fault in faults:
                print(f"{fault.door} {fault.number}: {fault.what}", flush=True)
    print("| door | inputs | faults | peak memory of 100 inputs (MB) |\n|---|---|---|---|")
    for name in names:
        print(f"| {name} | {args.inputs:,} | {counts[name]} | {peaks[name]} |")
    print(f"{time.perf_counter() - begun:.0f} s")
    return int(any(counts.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "doors", nargs="*", choices=[[], *DOORS], metavar="DOOR", help=f"{', '.join(DOORS)} (default: all)"
    )
    parser.add_argument(
        "--inputs", type=int, default=INPUTS, metavar="N", help=f"number of inputs per door (default: {INPUTS:,})"
    )
    parser.add_argument(
        "--only", type=int, metavar="NUMBER", help="read only this input of the first door, in this process"
    )
    sys.exit(main(parser.parse_args()))
