"""Results of a comparison of encoders: a table, a CSV file and a conclusion."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

from mae.evaluate import knn
from mae.evaluate.metrics import lower_is_better
from mae.evaluate.tables import markdown
from mae.files import atomic, spreadsheet
from mae.plurals import counted

ACCURACY = "acc1"  # the metric that is a percentage
KNN = "k-NN"  # title of the protocol

ResultKey = tuple[str, int, int]  # of a result: title of its row, number of labels, draw


class Result(NamedTuple):
    """The score of an encoder with a protocol."""

    encoder: str
    protocol: str  # title, such as "linear probe"
    labels: int  # number of training images
    draw: int  # number of the random subset of the labels
    accuracy: float  # top-1, in percent; or the score `metric`
    chosen: str  # hyperparameters that were chosen with the labels of the draw
    seconds: float
    command: str  # or what was fitted
    metric: str = ACCURACY  # or a name of --metric
    trained_parameters: int | None = None  # None: of a baseline, or of an earlier version
    peak_memory_gb: float | None = None  # of a training with CUDA, in 10^9 bytes

    @property
    def row(self) -> str:
        """The title of its row."""
        return row_of(self.encoder, self.protocol)


def row_of(encoder: str, protocol: str) -> str:
    """Returns the title of the row of an encoder and the title of a protocol."""
    return f"{encoder} ({protocol})"


class Entry(NamedTuple):
    """The scores of the draws of an encoder, a protocol and a number of labels."""

    encoder: str
    protocol: str
    by_draw: dict[int, float]
    metric: str = ACCURACY
    chosen: Mapping[int, str] = MappingProxyType({})  # by draw, as in `Result`
    seconds: Mapping[int, float] = MappingProxyType({})  # by draw
    trained_parameters: int | None = None
    peak_memory_gb: float | None = None  # the largest

    @property
    def choice(self) -> str:
        """What was chosen, in parentheses after a space; each draw chooses. "" if nothing was."""
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
    """Collects the draws of each entry: of an interrupted comparison, those that all entries have, if there are any."""
    shared: dict[int, set[int]] = {}  # draws by the number of labels
    for title, labels in dict.fromkeys((result.row, result.labels) for result in results):
        draws = {result.draw for result in results if (result.row, result.labels) == (title, labels)}
        shared[labels] = shared.get(labels, draws) & draws
    entries: Entries = {}
    for result in results:
        if shared[result.labels] and result.draw not in shared[result.labels]:
            continue
        row = entries.setdefault(result.row, {})
        before = row.get(result.labels) or Entry(result.encoder, result.protocol, {}, result.metric)
        row[result.labels] = before._replace(
            by_draw={**before.by_draw, result.draw: result.accuracy},
            chosen={**before.chosen, result.draw: result.chosen},
            seconds={**before.seconds, result.draw: result.seconds},
            trained_parameters=result.trained_parameters,
            peak_memory_gb=max(filter(None, (before.peak_memory_gb, result.peak_memory_gb)), default=None),
        )
    return entries


def columns_of(entries: Entries) -> list[int]:
    """Returns the numbers of labels in ascending order."""
    return sorted({labels for row in entries.values() for labels in row})


def _ranked(entries: Entries, labels: int) -> list[tuple[str, Entry]]:
    """Returns the entries of a column with the titles of their rows, the best first."""
    column = [(title, row[labels]) for title, row in entries.items() if labels in row]
    return sorted(column, key=lambda entry: -entry[1].rank)


def table(
    entries: Entries, left_out: Mapping[str, str] = MappingProxyType({}), unfinished: Collection[int] = ()
) -> str:  # fmt: skip
    """Returns the table in Markdown, with what was chosen, and costs. The best mean of each column is bold.

    Args:
        left_out: rows, or some of their entries, that were not computed, and the reasons, which stand below the table.
        unfinished: numbers of labels with which a row is missing. Nothing is bold there.
    """
    columns = columns_of(entries)
    best = {labels: _ranked(entries, labels)[0][1] for labels in columns}
    metric = next(iter(best.values())).metric
    costs = _costs_of(entries)
    titles = [f"test {'accuracy, %' if metric == ACCURACY else metric}", *(f"{labels:,} labels" for labels in columns)]
    lines = []
    for title, row in entries.items():
        is_best = {n: entry.rank == best[n].rank and n not in unfinished for n, entry in row.items()}
        texts = {n: f"**{entry}**" if is_best[n] else str(entry) for n, entry in row.items()}
        scores = [f"{texts[n]}{row[n].choice}" if n in row else "" for n in columns]
        lines.append([title, *scores, *(cost[title] for cost in costs.values())])
    lines += [[title, *("–" for _ in (*columns, *costs))] for title in left_out if title not in entries]
    notes = [f"{title} is left out: {reason}." for title, reason in left_out.items()]
    return "\n".join([markdown([*titles, *costs], lines), *(f"\n{note}" for note in notes)])


def _costs_of(entries: Entries) -> dict[str, dict[str, str]]:
    """Returns the columns of costs: by their titles, the cells by the titles of the rows. Unknown costs have none."""
    columns = columns_of(entries)
    of_labels = f" ({' / '.join(f'{labels:,}' for labels in columns)} labels)" if len(columns) > 1 else ""
    trained: dict[str, str] = {}
    seconds: dict[str, str] = {}
    memory: dict[str, str] = {}
    for title, row in entries.items():
        counts = {f"{entry.trained_parameters:,}" for entry in row.values() if entry.trained_parameters is not None}
        trained[title] = " or ".join(sorted(counts))
        medians = {labels: statistics.median(entry.seconds.values()) for labels, entry in row.items() if entry.seconds}
        seconds[title] = " / ".join(_time(medians[labels]) if labels in medians else "–" for labels in columns)
        of_row = [entry.peak_memory_gb for entry in row.values() if entry.peak_memory_gb is not None]
        memory[title] = f"{max(of_row):.1f}" if of_row else ""
    found = {"trained parameters": trained, f"seconds{of_labels}": seconds, "GPU memory, GB": memory}
    return {title: texts for title, texts in found.items() if any(text.strip("– /") for text in texts.values())}


def _time(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"


def conclusion(entries: Entries, test_images: int | None = None) -> str:
    """Returns one sentence: the best encoder for each number of labels, and its distance to the best other encoder.

    Encoders with the same mean tie. The distance is the mean over the draws, with its standard deviation: the encoders
    share the subset of each draw. Encoders that `_doubt` can't tell from the best are named.

    Args:
        test_images: their number. None: unknown.
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
        others = [(name, one, _doubt(best, one, test_images)) for name, one in _best_of_others(rest, best.encoder)]
        unclear = [other for other in others if other[2]]
        clear = [other for other in others if not other[2]]
        part = f"with {labels:,} labels, {title} has the {'highest' if unclear else 'best'} {noun}, {best}{unit}"
        texts = [
            f", not distinguishable from {name} ({_distance(best, one)} it, {doubt})" for name, one, doubt in unclear
        ]
        texts += [f", {_distance(best, one)} {name}" for name, one, _ in clear[:1]]
        parts.append("".join([part, best.choice, *texts]))
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _absent_rows(entries: Entries, planned: Sequence[ResultKey]) -> dict[int, list[str]]:
    """Returns the planned rows that have no result, by the number of labels."""
    absent: dict[int, list[str]] = {}
    for title, labels in dict.fromkeys((title, labels) for title, labels, _ in planned):
        if labels not in entries.get(title, {}):
            absent.setdefault(labels, []).append(title)
    return absent


def _incomplete(shown: int, others: int, planned: int, absent: Mapping[int, Sequence[str]]) -> str:
    """Returns a paragraph on missing results.

    Args:
        shown: number of results in the table.
        others: number of further results.
        planned: number of results of the whole comparison.
        absent: as `_absent_rows` returns it.
    """
    further = f", without {others:,} of draws that not all rows have" if others else ""
    unknown = [
        f" With {labels:,} labels, there is none of {', '.join(rows)}: the best encoder is unknown."
        for labels, rows in absent.items()
    ]
    return "".join([f"It is incomplete: it has {shown:,} of {planned:,} results{further}.", *unknown])


def _images_of(entries: Entries, test_images: int, held_out: str) -> str:
    """Returns a paragraph on the images that the scores are of."""
    text = f"The scores are of {counted(test_images, 'held-out image')}{held_out and f' of {held_out}'}."
    found = {(entry.protocol, entry.metric) for row in entries.values() for entry in row.values()}
    if (KNN, ACCURACY) not in found:
        return text
    labels = " or ".join(f"{labels:,}" for labels in columns_of(entries))
    return f"{text} {KNN}: {knn.in_words('k', labels, test_images)}."


def _best_of_others(ranked: Sequence[tuple[str, Entry]], encoder: str) -> list[tuple[str, Entry]]:
    """Returns the best entry of each other encoder, the best first."""
    found: dict[str, tuple[str, Entry]] = {}
    for title, entry in ranked:
        if entry.encoder != encoder:
            found.setdefault(entry.encoder, (title, entry))
    return [*found.values()]


def _differences(best: Entry, other: Entry) -> list[float]:
    return [best.by_draw[draw] - other.by_draw[draw] for draw in best.by_draw.keys() & other.by_draw.keys()]


def _doubt(best: Entry, other: Entry, test_images: int | None) -> str:
    """Returns why two entries can't be told apart; "" if they can, or if that is unknown.

    The difference is within the 95 % interval of the mean of the draws (Student's t), or within that of two accuracies
    of so many test images (Agresti and Caffo 2000, with Student's t). The latter is that of independent images: a
    paired one, usually narrower, needs the predictions.
    """
    from scipy import stats  # takes half a second

    difference = abs(best.mean - other.mean)
    differences = _differences(best, other)
    count = len(differences)
    if count > 1:
        quantile = float(stats.t.ppf(0.975, count - 1))
        if difference <= quantile * statistics.stdev(differences) / math.sqrt(count):
            return f"within the error of {count} draws"
    if best.metric == ACCURACY and test_images:
        # One image more is right, and one is wrong: an accuracy of 100 % of few images has an error, too.
        shares = [(test_images * entry.mean / 100 + 1) / (test_images + 2) for entry in (best, other)]
        variance = sum(share * (1 - share) for share in shares) / (test_images + 2)
        quantile = float(stats.t.ppf(0.975, max(1, test_images - 1)))
        if abs(shares[0] - shares[1]) <= quantile * math.sqrt(variance):
            return f"within the error of {test_images:,} test images"
    return ""


def _distance(best: Entry, other: Entry) -> str:
    differences = _differences(best, other)
    side = "below" if lower_is_better(best.metric) else "above"
    unit = " points" if best.metric == ACCURACY else ""
    if len(differences) < 2:
        return f"{best.format(abs(best.mean - other.mean))}{unit} (one draw: the spread is unknown) {side}"
    spread = statistics.stdev(differences)
    return f"{best.format(abs(statistics.fmean(differences)))} ± {best.format(spread)}{unit} {side}"


def write(
    folder: Path, results: Sequence[Result], test_images: int | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}), held_out: str = "",
    planned: Sequence[ResultKey] = (),
) -> str:  # fmt: skip
    """Writes table.md and results.csv to a folder.

    The best encoder is named for the numbers of labels with which all planned rows have a result.

    Args:
        test_images, left_out: as in `conclusion` and `table`.
        held_out: what the test images are, in words.
        planned: the keys of all results of the comparison. By default, none is missing.

    Returns:
        The table, the conclusion, what is missing, and the images that the scores are of.
    """
    entries = entries_of(results)
    images = [_images_of(entries, test_images, held_out)] if test_images else []
    absent = _absent_rows(entries, planned)
    finished = {title: {n: one for n, one in row.items() if n not in absent} for title, row in entries.items()}
    sentences = [conclusion(finished, test_images)] if columns_of(finished) else []
    if len(results) < len(planned):
        shown = sum(len(entry.by_draw) for row in entries.values() for entry in row.values())
        sentences.append(_incomplete(shown, len(results) - shown, len(planned), absent))
    text = "\n\n".join([table(entries, left_out, absent), *sentences, *images]) + "\n"
    rows = [["" if value is None else value for value in result] for result in results]
    spreadsheet.write(folder / "results.csv", [Result._fields, *rows])
    atomic.write_text(folder / "table.md", text)
    return text


def read(folder: Path) -> list[Result]:
    """Reads the results that `write` has written to a folder.

    Raises:
        FileNotFoundError: the folder has no results.
    """
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        titles, *rows = spreadsheet.read(file.read())
    kinds = get_type_hints(Result) | {"trained_parameters": _or_none(int), "peak_memory_gb": _or_none(float)}
    return [Result(**{name: kinds[name](value) for name, value in zip(titles, row, strict=True)}) for row in rows]


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: kind(text) if text else None
