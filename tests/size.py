"""The size of this repository, of the files that git tracks, and what a reader follows in it: `./run size`.

tests/test_size.py holds the limits.
"""

import argparse
import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOF = (  # mae/jobs has the commands submitit_*.py
    "main_", "submitit_", "mae/cli/", "mae/settings/", "mae/jobs/", "util/", "demo/", "benchmarks/", "examples/",
    "hubconf",
)  # fmt: skip
FLAG = re.compile(r"--([a-z]\w+)")


def sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Returns the syntax trees of the Python files outside of tests, by path."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [path for path in listed.splitlines() if not path.startswith("tests/") and (root / path).is_file()]
    return {path: ast.parse((root / path).read_bytes()) for path in paths}


def is_command(tree: ast.Module) -> bool:
    """Whether a module has a command line of its own."""
    parsers = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} & {"get_args_parser"}
    return bool(parsers) or any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def imports_of_the_roof(trees: dict[str, ast.Module]) -> list[str]:
    """Lists the modules below the roof that import `mae.cli` or argparse. Modules with a command may."""
    found = []
    for path, tree in trees.items():
        if path.startswith(ROOF) or is_command(tree):
            continue
        names = set[str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if any(name.startswith(("mae.cli", "argparse")) for name in names):
            found.append(path)
    return found


def flags_in_strings(trees: dict[str, ast.Module]) -> Counter[str]:
    """Counts the flags of settings in strings below the roof, by file.

    Docstrings and modules with a command do not count, nor do flags of other programs, such as git.
    """
    counts: Counter[str] = Counter()
    known = definitions(trees)
    for path, tree in trees.items():
        if path.startswith(ROOF) or is_command(tree):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                      if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                counts[path] += sum(name in known for name in FLAG.findall(node.value))
    return +counts


def definitions(trees: dict[str, ast.Module]) -> Counter[str]:
    """Counts the definitions of each setting of a run: fields, and calls of `add_argument` with its name."""
    counts: Counter[str] = Counter()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            is_field = isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)
            if path.startswith("mae/settings/") and is_field and ast.unparse(node.value.func) == "setting":
                counts[ast.unparse(node.target)] += 1
    for path, tree in trees.items():
        for node in ast.walk(tree) if path.startswith(("main_", "mae/cli/")) else ():
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                flags = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                counts.update(str(flag).removeprefix("--") for flag in flags)
    return counts


def statements(nodes: Iterable[ast.AST]) -> int:
    """Returns the number of statements."""
    return sum(isinstance(node, ast.stmt) for node in nodes)


def report(root: Path = ROOT) -> list[str]:
    """The numbers, a line for each, without those of a run (`traces.report`)."""
    trees = sources(root)
    sizes = {path: statements(ast.walk(tree)) for path, tree in trees.items()}
    raises = sum(isinstance(node, ast.Raise) for tree in trees.values() for node in ast.walk(tree))
    functions = [(node.end_lineno - node.lineno + 1, path, node.name) for path, tree in trees.items()
                 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]  # fmt: skip
    long_functions = sorted((size for size in functions if size[0] > 50), reverse=True)
    roof, flags = imports_of_the_roof(trees), flags_in_strings(trees)
    twice = [name for name, count in definitions(trees).items() if count > 1]
    return [
        f"modules below the roof that import mae.cli or argparse: {len(roof)}",
        *(f"  {path}" for path in roof),
        f"flags in strings below the roof: {flags.total()}",
        *(f"  {count} {path}" for path, count in flags.most_common()),
        f"settings with several definitions: {len(twice)}",
        *(f"  {name}" for name in twice),
        f"statements outside of tests: {sum(sizes.values()):,}",
        *(f"  {count} {path}" for path, count in sorted(sizes.items())),
        f"raise statements: {raises}",
        f"functions above 50 lines: {len(long_functions)}",
        *(f"  {count} {path} {name}" for count, path, name in long_functions),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="omit the numbers of runs, which take a minute")
    print("\n".join(report()))
    if not parser.parse_args().static:
        from traces import report as traced

        for title, entries in traced().items():
            print("\n".join([f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]))
