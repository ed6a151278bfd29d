"""Checks names in the code against the table of terms in CONTRIBUTING.md: `python tests/identifiers.py`.

It checks the names of functions, classes, arguments, variables and attributes that this project defines outside of its
tests. Names are split at underscores and capitals. The last column of the table lists words that no name may contain,
and full names.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"tests", ".venv", "runs"}
# Terms that contain an excluded word: found_inf and hidden_dim are names of PyTorch and of the field.
TERMS = ("held_out", "found_inf", "hidden_dim")


def excluded_words(document: str) -> set[str]:
    """The words in the last column of the table of terms, in lower case."""
    table = document.partition("\n## Terms\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    assert rows and rows[0][-1].strip() == "not in names", "CONTRIBUTING.md has no table of terms"
    return {word.strip().lower() for row in rows[2:] for word in row[-1].split(",") if word.strip()}


def definitions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a module defines, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.alias(asname=str(name)) | ast.MatchAs(name=str(name)):
                yield name, node.lineno


def words_of(name: str) -> set[str]:
    """A name and its words, in lower case: VisibleTokens -> {"visibletokens", "visible", "tokens"}."""
    for term in TERMS:
        name = re.sub(term, "", name, flags=re.IGNORECASE)
    return {name.lower()} | {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def problems(root: Path = ROOT) -> list[str]:
    """A line for each name with an excluded word."""
    excluded = excluded_words((root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    lines = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIPPED.isdisjoint(path.parts):
            for name, line in definitions(ast.parse(file.read_text(encoding="utf-8"))):
                lines += [f"{path}:{line}: {name}: not {word!r}" for word in sorted(words_of(name) & excluded)]
    return lines


if __name__ == "__main__":
    lines = problems()
    print("\n".join([*lines, "see the table of terms in CONTRIBUTING.md"] if lines else ["all names follow the terms"]))
    sys.exit(bool(lines))
