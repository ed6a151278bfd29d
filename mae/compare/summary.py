"""Results of a comparison of encoders: a table, a CSV file and a conclusion."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, get_type_hints

from mae.evaluate.metrics import lower_is_better
from mae.evaluate.tables import markdown
from mae.files import atomic, spreadsheet

ACCURACY = "acc1"  # the metric that is a percentage


class Result(NamedTuple):
    """The score of an encoder with a protocol."""

    encoder: str
    protocol: str  # title, such as "linear probe"
    labels: int  # number of training images
    draw: int  # number of the random subset of the labels
    accuracy: float  # top-1, in percent; or the score `metric`
    chosen: str  # hyperparameters that were chosen on held-out training images
    seconds: float
    command: str
    metric: str = ACCURACY  # or a name of --metric

    @property
    def row(self) -> str:
        """The title of its row."""
        return f"{self.encoder} ({self.protocol})"


class Entry(NamedTuple):
    """The scores of the draws of an encoder, a protocol and a number of labels."""

    encoder: str
    protocol: str
    by_draw: dict[int, float]
    metric: str = ACCURACY
    chosen: Mapping[int, str] = MappingProxyType({})  # by draw, as in `Result`

    @property
    def choice(self) -> str:
        """What was chosen, in parentheses after a space; baselines choose for each draw. "" if nothing was."""
        texts = dict.fromkeys(filter(None, self.chosen.values()))
        return f" ({' or '.join(texts)})" if texts else ""

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return statistics.fmean(self.by_draw.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the draws; None with one draw."""
        return statistics.stdev(self.by_draw.values()) if len(self.by_draw) > 1 else None

    def __str__(self) -> str:
        """Formats mean ± standard deviation."""
        return self.format(self.mean) + ("" if self.spread is None else f" ± {self.format(self.spread)}")

    @property
    def rank(self) -> float:
        """Higher values are better, and NaN is the worst."""
        rank = -self.mean if lower_is_better(self.metric) else self.mean
        return -math.inf if math.isnan(rank) else rank

    def format(self, value: float) -> str:
        """Formats a value of the metric."""
        return f"{value:.1f}" if self.metric == ACCURACY else f"{value:.4g}"


Entries = dict[str, dict[int, Entry]]  # by title of the row and number of labels


def entries_of(results: Sequence[Result]) -> Entries:
    """Collects the draws of each entry of the table."""
    entries: Entries = {}
    for result in results:
        row = entries.setdefault(result.row, {})
        before = row.get(result.labels) or Entry(result.encoder, result.protocol, {}, result.metric)
        by_draw = {**before.by_draw, result.draw: result.accuracy}
        chosen = {**before.chosen, result.draw: result.chosen}
        row[result.labels] = before._replace(by_draw=by_draw, chosen=chosen)
    return entries


def columns_of(entries: Entries) -> list[int]:
    """Returns the numbers of labels in ascending order."""
    return sorted({labels for row in entries.values() for labels in row})


def _ranked(entries: Entries, labels: int) -> list[tuple[str, Entry]]:
    """Returns the entries of a column with the titles of their rows, the best first."""
    column = [(title, row[labels]) for title, row in entries.items() if labels in row]
    return sorted(column, key=lambda entry: -entry[1].rank)


def table(entries: Entries) -> str:
    """Returns the table in Markdown, with what was chosen. The best mean of each column is bold."""
    columns = columns_of(entries)
    best = {labels: _ranked(entries, labels)[0][1] for labels in columns}
    metric = next(iter(best.values())).metric
    titles = [f"test {'accuracy, %' if metric == ACCURACY else metric}", *(f"{labels:,} labels" for labels in columns)]
    lines = []
    for title, row in entries.items():
        texts = {n: f"**{entry}**" if entry.rank == best[n].rank else str(entry) for n, entry in row.items()}
        lines.append([title, *(f"{texts[n]}{row[n].choice}" if n in row else "" for n in columns)])
    return markdown(titles, lines)


def conclusion(entries: Entries) -> str:
    """Returns one sentence: the best encoder for each number of labels, and its distance to the best other encoder.

    Encoders with the same mean tie. The distance is the mean over the draws, with its standard deviation: the encoders
    share the subset of each draw.
    """
    parts = []
    for labels in columns_of(entries):
        (title, best), *rest = _ranked(entries, labels)
        noun, unit = ("accuracy", " %") if best.metric == ACCURACY else (best.metric, "")
        tied = [(title, best), *(other for other in rest if other[1].rank == best.rank)]
        if any(other.encoder != best.encoder for _, other in tied):
            names = [f"{name}{other.choice}" for name, other in tied]
            text = f"{', '.join(names[:-1])} and {names[-1]} tie for the best {noun}"
            parts.append(f"with {labels:,} labels, {text}, {best.format(best.mean)}{unit}")
            continue
        part = f"with {labels:,} labels, {title} has the best {noun}, {best}{unit}{best.choice}"
        others = [f", {_distance(best, other)} {name}" for name, other in rest if other.encoder != best.encoder]
        parts.append(part + "".join(others[:1]))
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _distance(best: Entry, other: Entry) -> str:
    differences = [best.by_draw[draw] - other.by_draw[draw] for draw in best.by_draw.keys() & other.by_draw.keys()]
    side = "below" if lower_is_better(best.metric) else "above"
    unit = " points" if best.metric == ACCURACY else ""
    if len(differences) < 2:
        return f"{best.format(abs(best.mean - other.mean))}{unit} (one draw: the spread is unknown) {side}"
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences)
    verdict = "" if abs(mean) > spread else " (within the spread of the draws)"
    return f"{best.format(abs(mean))} ± {best.format(spread)}{unit}{verdict} {side}"


def write(folder: Path, results: Sequence[Result]) -> str:
    """Writes table.md and results.csv to a folder.

    Returns:
        The table and the conclusion.
    """
    entries = entries_of(results)
    text = f"{table(entries)}\n\n{conclusion(entries)}\n"
    spreadsheet.write(folder / "results.csv", [Result._fields, *results])
    atomic.write_text(folder / "table.md", text)
    return text


def read(folder: Path) -> list[Result]:
    """Reads the results that `write` has written to a folder.

    Raises:
        FileNotFoundError: the folder has no results.
    """
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        titles, *rows = spreadsheet.read(file.read())
    kinds = get_type_hints(Result)
    return [Result(**{name: kinds[name](value) for name, value in zip(titles, row, strict=True)}) for row in rows]
