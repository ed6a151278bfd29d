"""Results of a comparison of encoders: a table, a CSV file, a plot over the number of labels, and a conclusion."""

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from mae.evaluate.metrics import LOWER_IS_BETTER
from mae.evaluate.tables import markdown, new_figure, save, write_csv
from mae.files import atomic
from mae.files.untrusted import escape_dollars

PIXELS = "pixels"  # the encoder of baselines on raw pixels
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

    @property
    def text(self) -> str:
        """The score for the log."""
        return f"{self.accuracy:.2f} %" if self.metric == ACCURACY else f"{self.metric} {self.accuracy:.4g}"


class Cell(NamedTuple):
    """The scores of the draws of an encoder, a protocol and a number of labels."""

    encoder: str
    protocol: str
    by_draw: dict[int, float]
    metric: str = ACCURACY

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
        rank = -self.mean if self.metric in LOWER_IS_BETTER else self.mean
        return -math.inf if math.isnan(rank) else rank

    def format(self, value: float) -> str:
        """Formats a value of the metric."""
        return f"{value:.1f}" if self.metric == ACCURACY else f"{value:.4g}"


Cells = dict[str, dict[int, Cell]]  # by title of the row and number of labels


def cells_of(results: Sequence[Result]) -> Cells:
    """Collects the draws of each cell."""
    cells: Cells = {}
    for result in results:
        empty = Cell(result.encoder, result.protocol, {}, result.metric)
        cell = cells.setdefault(result.row, {}).setdefault(result.labels, empty)
        cell.by_draw[result.draw] = result.accuracy
    return cells


def columns_of(cells: Cells) -> list[int]:
    """Returns the numbers of labels in ascending order."""
    return sorted({labels for row in cells.values() for labels in row})


def table(cells: Cells) -> str:
    """Returns the table in Markdown. The best mean of each column is bold."""
    columns = columns_of(cells)
    best = {labels: max(row[labels].rank for row in cells.values() if labels in row) for labels in columns}

    def text(row: dict[int, Cell], labels: int) -> str:
        if labels not in row:
            return ""
        return f"**{row[labels]}**" if row[labels].rank == best[labels] else str(row[labels])

    titles = [f"test {title(cells)}", *(f"{labels:,} labels" for labels in columns)]
    return markdown(titles, [[name, *(text(row, labels) for labels in columns)] for name, row in cells.items()])


def title(cells: Cells) -> str:
    """Returns the name of the metric with its unit."""
    metric = next(cell.metric for row in cells.values() for cell in row.values())
    return "accuracy, %" if metric == ACCURACY else metric


def conclusion(cells: Cells) -> str:
    """Returns one sentence: the best encoder for each number of labels, and its distance to the best other encoder.

    The distance is the mean over the draws, with its standard deviation: the encoders share the subset of each draw.
    """
    parts: list[str] = []
    for labels in columns_of(cells):
        column = sorted(((row[labels], name) for name, row in cells.items() if labels in row), key=lambda c: -c[0].rank)
        (best, name), *rest = column
        noun, unit = ("accuracy", " %") if best.metric == ACCURACY else (best.metric, "")
        part = f"{'; with' if parts else 'With'} {labels:,} labels, {name} has the best {noun}, {best}{unit}"
        other, other_name = next(((cell, title) for cell, title in rest if cell.encoder != best.encoder), (None, ""))
        parts.append(part + (f", {_distance(best, other)} {other_name}" if other else ""))
    return "".join(parts) + "."


def _distance(best: Cell, other: Cell) -> str:
    differences = [best.by_draw[draw] - other.by_draw[draw] for draw in best.by_draw.keys() & other.by_draw.keys()]
    side = "below" if best.metric in LOWER_IS_BETTER else "above"
    unit = " points" if best.metric == ACCURACY else ""
    if len(differences) < 2:
        return f"{best.format(abs(best.mean - other.mean))}{unit} (one draw: the spread is unknown) {side}"
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    verdict = "" if abs(mean) > spread else " (within the spread of the draws)"
    return f"{best.format(abs(mean))} ± {best.format(spread)}{unit}{verdict} {side}"


def write(folder: Path, results: Sequence[Result]) -> str:
    """Writes table.md, results.csv and plot.png to a folder.

    Returns:
        The table and the conclusion.
    """
    cells = cells_of(results)
    text = f"{table(cells)}\n\n{conclusion(cells)}\n"
    write_csv(folder / "results.csv", [Result._fields, *results])
    draw(cells, folder / "plot.png")
    atomic.write_text(folder / "table.md", text)
    return text


def read(folder: Path) -> list[Result]:
    """Reads the results that `write` has written to a folder.

    Raises:
        FileNotFoundError: the folder has no results.
    """
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = get_type_hints(Result)
    return [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in rows]


def draw(cells: Cells, path: Path) -> None:
    """Draws the accuracies: lines over the numbers of labels, or bars for one number of labels."""
    save(_draw_lines(cells) if len(columns_of(cells)) > 1 else _draw_bars(cells), path)


def _draw_bars(cells: Cells) -> Any:
    """Draws a bar for each row, with its standard deviation. Baselines on raw pixels are gray."""
    (labels,) = columns_of(cells)
    column = {escape_dollars(name): row[labels] for name, row in cells.items()}
    encoders = list(dict.fromkeys(cell.encoder for cell in column.values()))
    means, spreads = zip(*((cell.mean, cell.spread or 0.0) for cell in column.values()), strict=True)
    drawn = [pair for pair in zip(means, spreads, strict=True) if math.isfinite(pair[0])] or [(0.0, 1.0)]
    least, most = min(mean - spread for mean, spread in drawn), max(mean + spread for mean, spread in drawn)
    start, xlabel = max(0, 5 * math.floor((least - max(1.0, most - least) / 2) / 5)), "top-1 accuracy (%)"
    if title(cells) != "accuracy, %":
        start, xlabel = min(0, least), title(cells)
    colors = ["0.7" if cell.encoder == PIXELS else f"C{encoders.index(cell.encoder)}" for cell in column.values()]
    figure = new_figure(5.5 + 0.07 * max(map(len, column)), 1 + 0.35 * len(column))
    axes = figure.subplots()
    bars = axes.barh(list(column), means, xerr=spreads if any(spreads) else None, color=colors, capsize=2)
    axes.bar_label(bars, list(map(str, column.values())), padding=4)
    axes.set(
        title=f"{labels:,} labels", xlim=(start, most + 0.02 * (most - start)),
        xlabel=xlabel + (f"; the axis starts at {start:g} %" if start > 0 else ""),
    )  # fmt: skip
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_lines(cells: Cells) -> Any:
    """Draws one panel for each protocol, and one line for each encoder.

    Baselines on raw pixels are dashed, in every panel.
    """
    titles = {name: next(iter(row.values())) for name, row in cells.items()}  # any cell of the row
    encoders = list(dict.fromkeys(cell.encoder for cell in titles.values()))
    protocols = list(dict.fromkeys(cell.protocol for cell in titles.values() if cell.encoder != PIXELS)) or [""]
    figure = new_figure(max(4.5, 3.2 * len(protocols)), 3.6)
    panels = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    for axes, protocol in zip(panels, protocols, strict=True):
        for name, row in cells.items():
            encoder, own = titles[name][:2]
            if encoder == PIXELS:
                style = {"label": name, "color": "0.6", "linestyle": ("--", ":")["SVM" in own]}
            elif own == protocol:
                style = {"label": escape_dollars(encoder), "color": f"C{encoders.index(encoder)}", "marker": "."}
            else:
                continue
            columns = sorted(row)
            means, spreads = zip(*((row[labels].mean, row[labels].spread or 0.0) for labels in columns), strict=True)
            axes.errorbar(columns, means, spreads, capsize=2, **style)
        axes.set(xscale="log", title=protocol, xlabel="labels", xticks=columns_of(cells))
        axes.set_xticks(columns_of(cells), [f"{labels:,}" for labels in columns_of(cells)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"test {title(cells)}")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure
