"""Tables of measurements in the documents, each between the lines `<!-- SOURCE -->` and `<!-- end -->`.

    python tests/tables.py      # rewrites the tables; the diff shows what changed

A source is a file that a command wrote, or a command that reads such files. Its tables replace the lines between.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT

from benchmarks import (
    anomalies,
    choices,
    continued,
    demo_seeds,
    finetune_rule,
    forecast,
    leaderboard,
    model_table,
    noise,
    pooling,
    records,
    speedrun,
    start_from,
    worth,
)

COMMANDS: dict[str, Callable[[], str]] = {
    "python benchmarks/model_table.py": model_table.table,
    "python benchmarks/leaderboard.py": leaderboard.table,
    "python benchmarks/records.py": records.table,
    "python benchmarks/speedrun.py": speedrun.table,
    "python benchmarks/start_from.py": start_from.table,
    "python benchmarks/choices.py": choices.table,
    "python benchmarks/continued.py": continued.table,
    "python benchmarks/demo_seeds.py": demo_seeds.table,
    "python benchmarks/finetune_rule.py": lambda: finetune_rule.table(finetune_rule.read()),
    "python benchmarks/forecast.py": forecast.table,
    "python benchmarks/anomalies.py --anomalib PYTHON": anomalies.table,
    "python benchmarks/noise.py": lambda: noise.table(noise.read()),
    "python benchmarks/pooling.py": pooling.table,
    "python benchmarks/worth.py": worth.table,
}
BLOCK = re.compile(r"(?<=^<!-- )(?!end )([^\n]+)( -->\n).*?(?=^<!-- end -->$)", flags=re.MULTILINE | re.DOTALL)


def rewritten(text: str) -> str:
    """Returns a document with the tables of its sources."""

    def block(match: re.Match) -> str:
        source = match[1]
        content = COMMANDS[source]() if source in COMMANDS else (ROOT / source).read_text(encoding="utf-8")
        return f"{source}{match[2]}{content.strip()}\n"

    return BLOCK.sub(block, text)


def pages() -> Iterator[tuple[Path, str]]:
    """Yields the documents that have tables of sources."""
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.md"))):
        text = path.read_text(encoding="utf-8")
        if BLOCK.search(text):
            yield path, text


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(rewritten(text), encoding="utf-8")
