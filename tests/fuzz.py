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

from mae import errors

OF_A_PROCESS = 100
SECONDS = 20
MAX_GROWTH = 1024  # MB
ALLOWED = (ValueError, OSError)  # BadImage and CheckpointError are ValueErrors
FORK = get_context("fork")  # so that PyTorch is imported once


class Fault(NamedTuple):
    door: str
    number: int
    what: str


class Batch:
    """A process that reads the inputs from `first` to `end`, in a working folder of its own."""

    def __init__(self, name: str, seeds: list[Any], first: int, end: int, folder: Path) -> None:
        self.name, self.seeds, self.end = name, seeds, end
        self.number = FORK.Value("q", first)  # the last input that it has read
        self.answer, answer = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._read_all, args=(folder / f"{name}-{first}", answer))
        self.process.start()
        answer.close()

    def _read_all(self, folder: Path, answer: Any) -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at any point
        folder.mkdir(parents=True)
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
            what = read(self.name, DOORS[self.name], self.seeds, number, folder)
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
        """The faults of an ended process, and its memory in MB."""
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
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        if not errors.is_on_purpose(error, [folder]):
            return described(error)
        return "" if text.isprintable() else f"{type(error).__name__} of several lines: {text!r}"
    except BaseException as error:
        return described(error)
    return ""


def described(error: BaseException) -> str:
    """Returns an error that is no documented one, and where it was raised."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)!r:.150} in {Path(at.filename).name}:{at.lineno}"


def fuzz(names: list[str], inputs: int, folder: Path, processes: int = 2) -> Iterator[tuple[str, list[Fault], int]]:
    """Reads `inputs` inputs at each door; yields (door, faults, MB) of each process."""
    waiting = []
    for name in names:
        (folder / name).mkdir(parents=True)
        seeds = DOORS[name].make_seeds(folder / name)
        firsts = range(0, inputs, OF_A_PROCESS)
        waiting += [(name, seeds, first, min(first + OF_A_PROCESS, inputs)) for first in firsts]
    running: list[Batch] = []
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(Batch(*waiting.pop(0), folder))
        connection.wait([batch.process.sentinel for batch in running])
        for batch in [batch for batch in running if not batch.process.is_alive()]:
            running.remove(batch)
            faults, grown = batch.result()
            if batch.number.value + 1 < batch.end:
                waiting.insert(0, (batch.name, batch.seeds, batch.number.value + 1, batch.end))
            yield batch.name, faults, grown


def main() -> int:
    """Prints a line for each fault, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("doors", nargs="*", choices=[[], *DOORS], metavar="DOOR", help=f"{', '.join(DOORS)}, or all")
    parser.add_argument("--inputs", type=int, default=2_000, metavar="N", help="number of inputs per door")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="reads only this input of DOOR, in this process")
    args = parser.parse_args()
    names = args.doors or list(DOORS)
    counts, peaks, begun = dict.fromkeys(names, 0), dict.fromkeys(names, 0), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.only is not None:
            door, generator = DOORS[names[0]], random.Random(f"{names[0]} {args.only}")
            door.read(door.mutate(door.make_seeds(folder), generator), folder, generator)
            return 0
        for name, faults, grown in fuzz(names, args.inputs, folder):
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
    sys.exit(main())
