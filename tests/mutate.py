"""Mutation tests: changes the code in one place at a time, and reports the changes that the tests detect.

    python tests/mutate.py                        # every change in tests/mutants/ (under an hour on 2 cores)
    python tests/mutate.py models_mae.py          # the changes of one file
    python tests/mutate.py models_mae.py:MaskedAutoencoderViT.patchify   # the changes of one function

Each file in tests/mutants/ is TOML. A table is named after a source file. It gives the tests that should notice a
change, and a list of changes: function, snippet, replacement, and tests that differ from those of the table. The
snippet must occur exactly once in the function (an empty name means the whole file). A change that no longer applies
is an error, so the list is maintained together with the code. The exit code is 1 if fewer than 90 % are detected.
"""

import argparse
import ast
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = Path(__file__).with_name("mutants")
AIM = 0.9  # share of the changes that the tests must notice
TIMEOUT = 300.0  # seconds for the tests of one change; a hang is noticed
# Tests run in forks of a process that has imported the libraries, which takes longer than most of the tests.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torchvision", "timm", "timm.optim",
     "transformers", "datasets", "sklearn.metrics", "matplotlib.pyplot", "submitit"]
)  # fmt: skip


class Mutant(NamedTuple):
    """One change of the code."""

    file: str
    function: str  # "function", "Class.method", or "" for the whole file
    snippet: str
    replacement: str
    tests: tuple[str, ...]  # pytest's arguments

    def __str__(self) -> str:
        def line(text: str) -> str:
            return " ".join(text.split())

        return f"{self.file}:{self.function}: {line(self.snippet)} -> {line(self.replacement)}"

    def apply(self, source: str) -> str:
        """Returns the source with the change.

        Raises:
            ValueError: the function does not exist, the snippet does not occur exactly once in it, or the result is
                not valid Python.
        """
        first, last = _lines(source, self.function) if self.function else (0, source.count("\n") + 1)
        lines = source.splitlines(keepends=True)
        body = "".join(lines[first:last])
        if body.count(self.snippet) != 1:
            raise ValueError(f"the snippet stands {body.count(self.snippet)} times in the function, not once: {self}")
        changed = body.replace(self.snippet, self.replacement)
        try:
            same = _tree(changed) == _tree(body)
        except SyntaxError as error:
            raise ValueError(f"the change is no Python ({error}): {self}") from error
        if same:
            raise ValueError(f"nothing is changed: {self}")
        return "".join([*lines[:first], changed, *lines[last:]])


_parse = cache(ast.parse)


def _tree(code: str) -> str:
    """The code of a file or function without its layout."""
    return ast.dump(ast.parse(f"if True:\n{code}" if code[:1].isspace() else code))


def _lines(source: str, function: str) -> tuple[int, int]:
    """First line (from 0) and end of a function, method or class."""
    node: ast.AST = _parse(source)
    for name in function.split("."):
        inside = (
            child
            for child in ast.walk(node)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == name
        )
        found = next(inside, None)
        if found is None:
            raise ValueError(f"there is no function {function}")
        node = found
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.end_lineno
    decorators = [decorator.lineno for decorator in node.decorator_list]
    return min([node.lineno, *decorators]) - 1, node.end_lineno


def read_mutants(folder: Path = MUTANTS) -> list[Mutant]:
    """The changes of all files in the folder."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        for file, table in tomllib.loads(path.read_text()).items():
            for function, snippet, replacement, *tests in table["changes"]:
                mutants.append(Mutant(file, function, snippet, replacement, tuple(tests or table["tests"])))
    return mutants


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[bool, str]:
    """Runs tests in a copy of the repository; returns whether they pass, and the first failure."""
    output = folder.with_suffix(".txt")
    process = SERVER.Process(target=_run_pytest, args=(folder, tests, output))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return False, f"no end after {TIMEOUT:.0f} s"
    if process.exitcode == 0:
        return True, ""
    if process.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ValueError(f"no such tests: {' '.join(tests)}")
    text = output.read_text(errors="replace")
    if name_error := re.search(r"while loading conftest[\s\S]*NameError: .*", text):
        raise ValueError(f"the change does not run: {name_error[0].splitlines()[-1]}")
    failures = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return False, failures[0] if failures else text[-2000:]


def _run_pytest(folder: Path, tests: Sequence[str], output: Path) -> None:
    os.setsid()  # the processes of the tests end with it at the deadline
    multiprocessing.set_start_method(None, force=True)  # data loader workers start as in pytest
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]))


def copy_repository(folder: Path) -> Path:
    """Copies the files of the working tree that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(lambda name: name and (ROOT / name).is_file(), names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def main(selected: Sequence[str]) -> int:
    """Runs the selected changes, all by default."""

    def names_of(mutant: Mutant) -> set[str]:
        return {mutant.file, f"{mutant.file}:{mutant.function}"}

    mutants = read_mutants()
    if unknown := set(selected) - {name for mutant in mutants for name in names_of(mutant)}:
        raise SystemExit(
            f"tests/mutants/ has no change of {' or '.join(sorted(unknown))} (FILE or FILE:CLASS.FUNCTION)"
        )
    mutants = [mutant for mutant in mutants if not selected or names_of(mutant) & set(selected)]
    for mutant in mutants:
        mutant.apply((ROOT / mutant.file).read_text())
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    num_workers, start = os.cpu_count() or 1, time.monotonic()
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(num_workers) as pool:
        folders: queue.Queue[Path] = queue.Queue()
        for number in range(num_workers):
            folders.put(copy_repository(Path(temporary) / str(number)))

        def passes(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[bool, str, float]:
            folder, began = folders.get(), time.monotonic()
            try:
                if mutant:
                    (folder / mutant.file).write_text(mutant.apply((ROOT / mutant.file).read_text()))
                passed, failure = run_tests(folder, tests)
            finally:
                if mutant:
                    shutil.copy2(ROOT / mutant.file, folder / mutant.file)
                folders.put(folder)
            return passed, failure, time.monotonic() - began

        tests = sorted({mutant.tests for mutant in mutants})
        print(f"{len(mutants)} changes, {len(tests)} selections of tests; without a change they must pass", flush=True)
        failing = set()
        for names, (passed, failure, seconds) in zip(tests, pool.map(passes, tests), strict=True):
            print(f"{seconds:5.1f} s  {'passed' if passed else 'FAILED'}  {' '.join(names)}", flush=True)
            if not passed:
                print(f"its changes are left out, because it fails without a change: {failure}", flush=True)
                failing.add(names)
        mutants = [mutant for mutant in mutants if mutant.tests not in failing]
        results = pool.map(passes, [mutant.tests for mutant in mutants], mutants)
        for number, (mutant, (passed, failure, seconds)) in enumerate(zip(mutants, results, strict=True), 1):
            verdict = "SURVIVED" if passed else "noticed "
            by = " ".join(mutant.tests) if passed else failure.split(" - ")[0]
            print(f"{number:4}/{len(mutants)} {seconds:5.1f} s  {verdict}  {mutant}  [{by}]", flush=True)
            if passed:
                survivors.append(mutant)
    noticed = len(mutants) - len(survivors)
    minutes = (time.monotonic() - start) / 60
    share = noticed / max(1, len(mutants))
    print(f"\n{noticed} of {len(mutants)} changes noticed ({share:.1%}) in {minutes:.0f} minutes")
    for mutant in survivors:
        print(f"survived: {mutant}")
    for names in sorted(failing):
        print(f"fails without a change: {' '.join(names)}")
    return int(bool(failing) or noticed < AIM * len(mutants))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("selected", nargs="*", metavar="FILE[:FUNCTION]", help="default: all changes")
    sys.exit(main(parser.parse_args().selected))
