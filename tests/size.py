"""The size of this repository, of the files that git tracks: `python tests/size.py`."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lines(file: Path) -> int:
    """The number of lines of a text file."""
    return len(file.read_text(encoding="utf-8").splitlines())


def report(root: Path = ROOT) -> list[str]:
    """The numbers, a line for each. Functions and files are those outside of tests/."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    files = [file for file in map(root.joinpath, listed.splitlines()) if file.is_file()]
    tests = [file for file in files if file.suffix == ".py" and root / "tests" in file.parents]
    sources = {file: ast.parse(file.read_bytes()) for file in files if file.suffix == ".py" and file not in tests}
    nodes = [(file.relative_to(root), node) for file, tree in sources.items() for node in ast.walk(tree)]
    functions = [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long_files = sorted(((lines(file), file.relative_to(root)) for file in sources if lines(file) > 300), reverse=True)
    sizes = [(node.end_lineno - node.lineno + 1, path, node.name) for path, node in functions]
    long_functions = sorted((size for size in sizes if size[0] > 70), reverse=True)
    return [
        f"statements outside of tests: {sum(isinstance(node, ast.stmt) for _, node in nodes):,}",
        f"lines of tests: {sum(map(lines, tests)):,}",
        f"lines of documents: {sum(lines(file) for file in files if file.suffix == '.md'):,}",
        f"files above 300 lines: {len(long_files)}",
        *(f"  {count} {path}" for count, path in long_files),
        f"functions above 70 lines: {len(long_functions)}",
        *(f"  {count} {path} {name}" for count, path, name in long_functions),
    ]


if __name__ == "__main__":
    print("\n".join(report()))
