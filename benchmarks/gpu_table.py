"""The table of gpu_check.py in Markdown, from its results.

python benchmarks/gpu_table.py benchmarks/results/nvidia_h100/gpu_check.json
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.training.costs import PEAK_TFLOPS

Results = Mapping[str, Any]

VARIES = 0.05  # difference between the fastest and the slowest round, relative to the median, that is marked


def of_steps(results: Results) -> str:
    """What holds, what failed, and what was skipped."""
    steps = results["steps"]
    failed = results["failed"]
    rows = []
    for name in {**steps, **failed}:
        skipped = "; ".join(steps.get(name, {}).get("skipped", []))
        rows.append((name, f"{results['seconds'].get(name, 0):.0f}", failed.get(name, "ok"), skipped))
    checks = [
        f"- {name}: {title}{'' if holds else ' DOES NOT HOLD'}"
        for name, found in steps.items() for title, holds in found.get("holds", {}).items()
    ]  # fmt: skip
    return "\n\n".join([markdown(["step", "seconds", "result", "skipped here"], rows), "\n".join(checks)])


def with_range(rates: Sequence[float], digits: int = 0) -> str:
    """The median of the rates of some rounds, their range, and a mark if they differ by more than VARIES."""
    least, median, most = (f"{rate:,.{digits}f}" for rate in (min(rates), statistics.median(rates), max(rates)))
    mark = " \\*" if max(rates) - min(rates) > VARIES * statistics.median(rates) else ""
    return f"{median} ({least}–{most}){mark}"


def of_training(steps: Results, gpu: str | None) -> str:
    """A row for each task, size, batch size and way."""
    peak = 1e12 * PEAK_TFLOPS.get(gpu or "", 0)
    rows = []
    for found in steps.values():
        for entry in found.get("cells", []):
            row = [found["task"], found["size"], str(entry["batch_size"]), entry["way"]]
            if "flops" not in entry:
                rows.append([*row, "does not fit", "", "", "", "", ""])
                continue
            rows.append([
                *row, with_range(entry["all_images_per_second"]), f"{entry['milliseconds']:.1f}",
                f"{entry['host_milliseconds']:.1f}" if "host_milliseconds" in entry else "",
                f"{entry['flops'] / 1e12:,.3g}", f"{entry['flops'] / peak:.0%}" if peak else "",
                f"{entry['peak_bytes'] / 1e9:.1f}" if entry["peak_bytes"] else "",
            ])  # fmt: skip
    titles = ["task", "size", "batch size", "way", "images/s", "ms", "ms of the host", "TFLOP/s",
              "share of the data sheet", "GB"]  # fmt: skip
    note = f"images/s: the median of the rounds, and their range; \\* it is above {VARIES:.0%} of the median"
    return f"{markdown(titles, rows)}\n\n{note}"


def of_rates(name: str, found: Results) -> str:
    """The throughput of each way, relative to the first."""
    rates = found["images_per_second"]
    first = next(iter(rates.values()))
    compared = [entry for entry in found.get("cells", []) if entry["batch_size"] == found.get("compared_at")]
    rounds = found.get("all_images_per_second") or {entry["way"]: entry["all_images_per_second"] for entry in compared}
    shown = {way: with_range(rounds[way]) if way in rounds else f"{rate:,.0f}" for way, rate in rates.items()}
    rows = [(way, shown[way], f"{rate / first:.3f}") for way, rate in rates.items()]
    return markdown([name, "images/s", "relative"], rows)


def page(machine: Results, results: Results, tables: Sequence[str]) -> str:
    """The machine, its steps, the tables of a command, and whether all steps hold.

    Args:
        machine: as `machine.describe` returns it.
        results: "steps", "seconds" and "failed", by the names of steps.
    """
    title = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    end = f"failed: {', '.join(results['failed'])}" if results["failed"] else "all steps hold"
    return "\n\n".join([title, of_steps(results), *tables, end]) + "\n"


def table(machine: Results, results: Results) -> str:
    """All tables. The arguments are those of `page`."""
    steps = results["steps"]
    parts = [of_training(steps, machine["gpu"])]
    parts += [of_rates(name, found) for name, found in steps.items() if found.get("images_per_second")]
    seconds = {name: f"{found['compile_seconds']:.0f}" for name, found in steps.items() if "compile_seconds" in found}
    parts += [f"seconds of compilation, while others ran: {seconds}"]
    parts += [f"main_pretrain.py with data, second epoch: {json.dumps(steps.get('whole', {}).get('second_epoch'))}"]
    return page(machine, results, parts)


def print_tables(table: Callable[[Results, Results], str], args: argparse.Namespace) -> None:
    """Prints the tables of a file. `table` returns them."""
    results = json.loads(args.file.read_text())
    print(table(results["machine"], results))


def get_args_parser(name: str = "gpu_check.json") -> argparse.ArgumentParser:
    """Returns the parser of the command. `name`: of the file that it reads."""
    parser = entry_point.parser(f"The tables of a {name}, in Markdown.")
    parser.add_argument("file", type=Path, metavar="FILE", help=name)
    return parser


if __name__ == "__main__":
    entry_point.run(partial(print_tables, table), get_args_parser())
