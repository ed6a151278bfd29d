"""The records of the leaderboard, the recipes of `python -m mae.data`, and what predicts a score without labels.

    python benchmarks/records.py                                             # writes three tables of LEADERBOARD.md
    python benchmarks/records.py "demo with normalized pixels" baseline      # prints the test of two entries
    python benchmarks/records.py "demo with normalized pixels" baseline --epochs 50      # of rows at equal updates

An entry is a record if its mean score is above that of the last record on the same machine, with p < .01 in a one-sided
Welch test. Both have rows of at least three seeds, which were run alternately: at the same commit. Rows at equal
updates are no records. Those of several machines are tested together.
"""

import argparse
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scipy import stats

from benchmarks import leaderboard, scoring
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.settings.types import positive_int

RECORDS = ("baseline", "demo with normalized pixels")  # each above the one before it
FEWEST = 3  # rows of an entry in a test
LEVEL = 0.01  # of the test
MEASURES = ("score", *scoring.SCORED, "linear")
TRACK = {"budget": 5.0, "kind": leaderboard.KINDS[leaderboard.FASHION_MNIST][0]}
SETS = ("held-out", scoring.OTHERS, scoring.TEST)  # the first is that of the records so far

Row = dict[str, Any]
Rows = dict[tuple[str, str], list[Row]]  # by entry and machine


def read(evaluated: str = SETS[0], epochs: int | None = None) -> Rows:
    """Returns the rows of five minutes, or of a number of epochs, that are evaluated on a set of images."""
    wanted = TRACK | {"evaluated on": evaluated} | ({"budget": f"{epochs} epochs"} if epochs else {})
    rows: Rows = defaultdict(list)
    for row in leaderboard.read():
        if all(row[name] == value for name, value in wanted.items()):
            machine = "all machines" if epochs else row["machine"]  # the speed does not matter
            rows[row["entry"], machine].append(row)
    return rows


def compare(better: list[float], worse: list[float]) -> tuple[float, float, float, float]:
    """Compares scores: the difference of the means, its 95 % interval, and p of the one-sided Welch test."""
    p = stats.ttest_ind(better, worse, equal_var=False, alternative="greater").pvalue
    low, high = stats.ttest_ind(better, worse, equal_var=False).confidence_interval(0.95)
    return statistics.fmean(better) - statistics.fmean(worse), low, high, p


def pairs(better: str, worse: str, rows: Rows) -> dict[str, tuple[list[Row], list[Row]]]:
    """Returns the rows of two entries by machine: those that have a row of the other entry of the same seed and commit.

    leaderboard.py runs such rows one after the other.
    """
    found = {}
    for machine in [machine for entry, machine in rows if entry == better and (worse, machine) in rows]:
        runs = [{(row["seed"], row["commit"]): row for row in rows[entry, machine]} for entry in (better, worse)]
        shared = sorted(runs[0].keys() & runs[1].keys())
        if shared:
            found[machine] = ([runs[0][key] for key in shared], [runs[1][key] for key in shared])
    return found


def tests(better: str, worse: str, rows: Rows) -> dict[str, tuple[float, float, float, float]]:
    """Compares two entries on each machine that has enough pairs of rows."""
    return {
        machine: compare([row["score"] for row in ours], [row["score"] for row in others])
        for machine, (ours, others) in pairs(better, worse, rows).items()
        if len(ours) >= FEWEST
    }


def gains(ours: list[Row], others: list[Row]) -> str:
    """Returns the differences between the means of the accuracies that all rows have."""
    means = [
        {name: statistics.fmean(row[name] for row in rows) for name in MEASURES if all(name in row for row in rows)}
        for rows in (ours, others)
    ]
    shared = [name for name in MEASURES if all(name in mean for mean in means)]
    return ", ".join(f"{name} {means[0][name]:.2f} - {means[1][name]:.2f}" for name in shared)


def records(rows: Rows) -> str:
    """Returns the table of the records. The first has no test."""
    lines = []
    for number, entry in enumerate(RECORDS):
        found = tests(entry, RECORDS[number - 1], rows) if number else {}
        machine = min(found, key=lambda name: found[name][3]) if found else _most_rows(entry, rows)
        chosen = pairs(entry, RECORDS[number - 1], rows)[machine][0] if found else rows[entry, machine]
        gain = ""
        p = ""
        if found:
            difference, low, high, chance = found[machine]
            gain = f"{difference:+.2f} ({low:.2f} to {high:.2f})"
            p = f"{chance:.1g}"
        mean = statistics.fmean(row["score"] for row in chosen)
        last = chosen[-1]
        command = f"`{' '.join(leaderboard.command({**leaderboard.BASE, **leaderboard.ENTRIES[entry]}))}`"
        lines.append([last["date"], entry, f"{mean:.2f}", str(len(chosen)), gain, p, machine, last["commit"], command])
    return markdown(["date", "entry", "score", "seeds", "gain (95 %)", "p", "machine", "commit", "command"], lines)


def _most_rows(entry: str, rows: Rows) -> str:
    """Returns the machine with the most rows of an entry."""
    return max((machine for name, machine in rows if name == entry), key=lambda name: len(rows[entry, name]))


def correlations(rows: Rows) -> str:
    """Returns Spearman's correlations of the score with measures that need no labels.

    Entries are compared on the machine with most of them, and their losses only if the pixels are normalized.
    """
    loss = leaderboard.UNLABELLED[0]
    measured = {key: [row for row in found if loss in row] for key, found in rows.items()}
    machines = Counter(machine for (_, machine), found in measured.items() if found)
    if not machines:
        return "no rows have these measures"
    chosen = machines.most_common(1)[0][0]
    lines = []
    for measure in leaderboard.UNLABELLED:
        compared = {
            key: [row for row in found if measure != loss or "--norm_pix_loss" in row["command"].split()]
            for key, found in measured.items()
        }
        within = [
            _spearman([(row[measure], row["score"]) for row in found])
            for found in compared.values() if len(found) >= FEWEST + 1
        ]  # fmt: skip
        means = [
            (statistics.fmean(row[measure] for row in found), statistics.fmean(row["score"] for row in found))
            for (_, machine), found in compared.items() if found and machine == chosen
        ]  # fmt: skip
        lines.append([
            measure, f"{_spearman(means):.2f}" if len(means) > FEWEST else "", str(len(means)),
            f"{statistics.median(within):.2f}" if within else "", str(len(within)),
        ])  # fmt: skip
    titles = ["measure", "between entries", "entries", "within an entry, median", "entries with four seeds"]
    return markdown(titles, lines)


def _spearman(pairs: list[tuple[float, float]]) -> float:
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def recipes(rows: list[Row]) -> str:
    """Returns the score of the automatic recipe and of the best other entry, on the same machine, for each kind."""
    scores: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        track = f"{leaderboard.budget_of(row)}, {row['images']:,} {leaderboard.described(row['kind'])}"
        scores[track, row["evaluated on"], row["machine"]][row["entry"]].append(row["score"])
    lines = []
    for key, entries in scores.items():
        means = {entry: statistics.fmean(found) for entry, found in entries.items()}
        ours = means.pop(leaderboard.RECIPE, None)
        pixels = means.pop(leaderboard.PIXELS, None)
        if ours is None or not means:
            continue
        best = max(means, key=lambda entry: means[entry])
        lines.append([
            *key, f"{ours:.2f}", f"{ours - means[best]:+.2f}", best, f"{means[best]:.2f}",
            "" if pixels is None else f"{pixels:.2f}",
        ])  # fmt: skip
    return markdown(
        ["track", "evaluated on", "machine", "recipe", "difference", "best other entry", "its score", "raw pixels"],
        lines,
    )


def table() -> str:
    """Returns the tables."""
    rows = read()
    return (
        f'{records(rows)}\n\n`python -m mae.data --recipe` gives the settings of "{leaderboard.RECIPE}":\n\n'
        f"{recipes(leaderboard.read())}\n\nSpearman's correlation with the score:\n\n{correlations(rows)}"
    )


def main(args: argparse.Namespace) -> None:
    """Prints the test of two entries, or writes the tables to the page."""
    if not args.entries:
        leaderboard.write_table("python benchmarks/records.py", table(), leaderboard.PAGE)
        print(table())
        return
    better, worse = args.entries
    is_tested = [print_test(better, worse, evaluated, args.epochs) for evaluated in SETS]
    if not any(is_tested):
        raise ValueError(
            f"no machine has rows of {better} and of {worse} of the same seed and commit: run leaderboard.py with both "
            f"entries and --seeds 0 1 2"
        )


def print_test(better: str, worse: str, evaluated: str, epochs: int | None) -> bool:
    """Prints the test of two entries on a set of images, by machine. Returns whether there are rows of both."""
    rows = read(evaluated, epochs)
    tested = tests(better, worse, rows)
    found = pairs(better, worse, rows)
    for machine, (ours, others) in found.items():
        print(f"{evaluated} images, {machine}, {len(ours)} seed(s): {gains(ours, others)}")
        if machine in tested:
            difference, low, high, p = tested[machine]
            is_better = p < LEVEL and difference > 0
            verdict = ("a record" if worse == RECORDS[-1] and not epochs else "better") if is_better else "no record"
            print(f"score {difference:+.2f} ({low:.2f} to {high:.2f}), p = {p:.2g}: {verdict}")
        else:
            print(f"no test: it needs {FEWEST} seeds of each, of one command of leaderboard.py")
    return bool(found)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Writes the records of the leaderboard, or compares two entries.")
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help="two entries: the better one first")
    parser.add_argument("--epochs", type=positive_int, metavar="N", help="compare rows of N epochs: equal updates")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
