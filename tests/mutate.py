"""Mutation tests: random changes of the code, one at a time, and the changes that the tests do not notice.

    python tests/mutate.py                                    # 150 changes of all source files
    python tests/mutate.py models_mae.py mae/data            # changes of a file, and of the files of a directory
    python tests/mutate.py main_compare.py --number 20 --seed 1

The first use runs all tests to record which test executes which line, also in child processes. A change is a node of
the syntax tree: a comparison, an operator, a constant, an argument, a returned value, a removed statement. The tests of
its line run, the fastest first, for up to a minute. The sample of a file depends on the seed and the file only.
"""

import argparse
import ast
import json
import math
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "runs/mutate/coverage"
TEST = "MUTATE_TEST"  # environment variable: the test that runs, for the coverage of child processes
SECONDS = 60.0  # of tests for a change
HANG = 240.0  # seconds after which tests are stopped, and the change counts as noticed
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
               ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}  # fmt: skip
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
             ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip


class Mutant(NamedTuple):
    """A change of the code between two positions of a file: (line from 1, byte of the line)."""

    file: str
    line: int  # of the statement
    start: tuple[int, int]
    end: tuple[int, int]
    before: str
    after: str
    is_imported: bool  # outside of functions: whichever test imports the file first executes it

    def __str__(self) -> str:
        return f"{self.file}:{self.start[0]}: {' '.join(self.before.split())} -> {' '.join(self.after.split())}"

    def apply(self, source: str) -> str:
        """Returns the source with the change."""
        lines = source.encode().splitlines(keepends=True)
        (first, left), (last, right) = self.start, self.end
        text = lines[first - 1][:left] + self.after.encode() + lines[last - 1][right:]
        return b"".join([*lines[: first - 1], text, *lines[last:]]).decode()


def changes(node: ast.AST) -> Iterator[str]:
    """Yields replacements of a node as source."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            yield f"({ast.unparse(left)} {COMPARISONS[type(op)]} {ast.unparse(right)})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            yield f"({ast.unparse(ast.BinOp(left, OPERATORS[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values):
            yield f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"(bool({ast.unparse(operand)}))"
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() | float() as value):
            yield f"({value * 2 + 1})"
        case ast.Constant(value=str() as value) if value and not set(value) & set(" \n"):  # not a sentence
            yield repr(value + "_")
        case ast.Call(func=func, args=[first, second, *rest], keywords=keywords):
            yield ast.unparse(ast.Call(func, [second, first, *rest], keywords))
        case ast.Call(func=func, args=args, keywords=[_, *rest]):
            yield ast.unparse(ast.Call(func, args, rest))
        case ast.Return(value=ast.expr()):
            yield "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Assign(targets=[ast.Attribute()]):
            yield "pass"


def mutants_of(file: str) -> list[Mutant]:
    """All changes of a file, without annotations, texts of f-strings and docstrings."""
    found: list[Mutant] = []

    def visit(node: ast.AST, line: int, is_imported: bool) -> None:
        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.stmt):
            line = node.lineno
        if isinstance(node, ast.expr | ast.stmt):
            start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
            before = ast.unparse(node)
            for after in changes(node):
                if after != before:
                    found.append(Mutant(file, line, start, end, before, after, is_imported))
        is_imported &= not isinstance(node, ast.FunctionDef | ast.Lambda)
        skipped = (getattr(node, "annotation", None), getattr(node, "returns", None))
        for child in ast.iter_child_nodes(node):
            if child not in skipped:
                visit(child, line, is_imported)

    visit(ast.parse((ROOT / file).read_text()), 1, True)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Names the test in the coverage of this process and of its children (pytest -p mutate)."""
    os.environ[TEST] = item.nodeid
    if current := coverage.Coverage.current():
        current.switch_context(item.nodeid)
    return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes the seconds of each test that passed."""
    seconds = {report.nodeid: report.duration for report in terminalreporter.stats.get("passed", ())}
    RECORD.with_name("seconds.json").write_text(json.dumps(seconds))


def record_tests() -> None:
    """Runs all tests, and records which test executes which line. A current record is kept."""
    if RECORD.exists() and RECORD.stat().st_mtime > max(file.stat().st_mtime for file in python_files()):
        return
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    coverage_of_children = {"COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml"), "COVERAGE_FILE": str(RECORD)}
    environment = os.environ | coverage_of_children | {"PYTHONPATH": str(ROOT / "tests")}
    print("recording which test executes which line", flush=True)
    pytest_run = ["pytest", "-p", "mutate", "-q", "-n", str(os.cpu_count()), "--dist", "loadfile", "tests"]
    subprocess.run([sys.executable, "-m", *pytest_run], cwd=ROOT, env=environment)
    subprocess.run([sys.executable, "-m", "coverage", "combine", "-q"], cwd=ROOT, env=environment, check=True)


def tests_of(mutant: Mutant, data: coverage.CoverageData, seconds: dict[str, float]) -> list[str]:
    """The tests that execute the lines of a change, the fastest first, up to SECONDS of tests."""
    lines = data.contexts_by_lineno(str(ROOT / mutant.file))
    names = {name for line in range(mutant.line, mutant.end[0] + 1) for name in lines.get(line, ())}
    if mutant.is_imported:
        names = set().union(*lines.values())
    total, chosen = 0.0, []
    for name in sorted(names & seconds.keys(), key=seconds.__getitem__):
        if chosen and total + seconds[name] > SECONDS:
            break
        total, chosen = total + seconds[name], [*chosen, name]
    return chosen


def passes(folder: Path, tests: Sequence[str]) -> bool:
    """Runs tests in a copy of the repository, until the first failure."""
    command = ["timeout", "--signal=KILL", str(HANG), sys.executable, "-m", "pytest", "-x", "-q", *tests]
    # Not to a pipe: processes that a test leaves behind would keep it open.
    hidden = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.run([*command, "-p", "no:cacheprovider"], cwd=folder, **hidden).returncode == 0


def python_files() -> list[Path]:
    """The files of this repository, without virtual environments, runs and the links of an editable install."""
    return sorted(
        file for file in ROOT.rglob("*.py") if not {".venv", "runs", "build"} & set(file.relative_to(ROOT).parts)
    )


def sample(paths: Sequence[str], number: int, seed: int) -> list[Mutant]:
    """A random sample of the changes of files and directories, in proportion to the changes of each file."""
    sources = [file.relative_to(ROOT) for file in python_files() if ROOT / "tests" not in file.parents]
    if unknown := [path for path in paths if not any(source.is_relative_to(path) for source in sources)]:
        raise SystemExit(f"{unknown[0]} has no source file of this repository")
    selected = [str(source) for source in sources if any(map(source.is_relative_to, paths or ["."]))]
    candidates = {name: mutants_of(name) for name in selected}
    share = number / max(1, sum(map(len, candidates.values())))
    mutants = []
    for name, found in candidates.items():
        generator = random.Random(f"{seed} {name}")
        count = math.floor(share * len(found) + generator.random())
        mutants += sorted(generator.sample(found, min(count, len(found))))
    return mutants


def main(paths: Sequence[str], number: int, seed: int) -> None:
    """Prints each change with its verdict, then the score and the changes that no test noticed."""
    mutants = sample(paths, number, seed)
    record_tests()
    data = coverage.CoverageData(str(RECORD))
    data.read()
    seconds = json.loads(RECORD.with_name("seconds.json").read_text())
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folders: queue.Queue[Path] = queue.Queue()
        for process in range(os.cpu_count() or 1):
            ignored = shutil.ignore_patterns(".venv", ".git", "runs", "output", "__pycache__")
            folders.put(shutil.copytree(ROOT, Path(temporary, str(process)), ignore=ignored))

        def survives(mutant: Mutant) -> bool:
            tests, folder = tests_of(mutant, data, seconds), folders.get()
            try:
                (folder / mutant.file).write_text(mutant.apply((ROOT / mutant.file).read_text()))
                return not tests or passes(folder, tests)
            finally:
                shutil.copy2(ROOT / mutant.file, folder / mutant.file)
                folders.put(folder)

        survivors = []
        for count, (mutant, survived) in enumerate(zip(mutants, pool.map(survives, mutants), strict=True), 1):
            print(f"{count:4}/{len(mutants)} {'SURVIVED' if survived else 'noticed '} {mutant}", flush=True)
            if survived:
                survivors.append(mutant)
    noticed = len(mutants) - len(survivors)
    print(f"\n{noticed} of {len(mutants)} changes noticed ({noticed / max(1, len(mutants)):.0%}). Not noticed:")
    print(*survivors, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files and directories (default: all sources)")
    parser.add_argument("--number", default=150, type=int, metavar="N", help="number of changes")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="of the sample")
    arguments = parser.parse_args()
    main(arguments.paths, arguments.number, arguments.seed)
