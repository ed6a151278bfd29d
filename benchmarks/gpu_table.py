"""The table of gpu_check.py in Markdown, from its results.

python benchmarks/gpu_table.py benchmarks/results/nvidia_h100/gpu_check.json
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.training.costs import PEAK_TFLOPS

Results = Mapping[str, Any]


def tera(value: float | None, form: str = ",.0f") -> str:
    """A number of FLOP/s or bytes/s in units of 10^12."""
    return f"{value / 1e12:{form}}" if value else ""


def share(value: float, whole: float | None) -> str:
    return f"{value / whole:.0%}" if whole else ""


def of_steps(results: Results) -> str:
    """What holds, what failed, and what was skipped."""
    rows = []
    for name, found in results["steps"].items():
        state = results["failed"].get(name, "ok")
        rows.append((name, f"{results['seconds'].get(name, 0):.0f}", state, "; ".join(found.get("skipped", []))))
    rows += [(name, "", state, "") for name, state in results["failed"].items() if name not in results["steps"]]
    return markdown(["step", "seconds", "result", "skipped here"], rows)


def of_checks(steps: Results) -> Iterable[str]:
    for name, found in steps.items():
        for title, holds in found.get("holds", {}).items():
            yield f"- {name}: {title}{'' if holds else ' DOES NOT HOLD'}"


def of_ceilings(found: Results) -> Iterable[str]:
    yield f"copy {tera(found.get('copy_bytes_per_second'), '.2f')} TB/s, product of large matrices "
    yield f"{tera(found.get('product_flops'), '.3g')} TFLOP/s"
    products = found.get("products_flops", {})
    titles = ["forward", "input gradient", "weight gradient"]
    rows = [(shape, *(tera(rates[name], ".3g") for name in titles)) for shape, rates in products.items()]
    yield "\n\n" + markdown(["product: rows x outputs x inputs, TFLOP/s", *titles], rows)
    times = found.get("attention_microseconds_per_image", {})
    kernels = list(dict.fromkeys(name for own in times.values() for name in own))
    rows = [(shape, *(_number(own.get(name, "")) for name in kernels)) for shape, own in times.items()]
    yield "\n\n" + markdown(["attention, forward and backward, µs per image and block", *kernels], rows)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def of_training(steps: Results, machine: Results) -> str:
    """A row for each task, size, batch size and way."""
    data_sheet, measured = 1e12 * PEAK_TFLOPS.get(machine["gpu"], 0), steps.get("ceilings", {}).get("product_flops")
    rows = []
    for found in steps.values():
        for cell in found.get("cells", []):
            own = [found["task"], found["size"], str(cell["batch_size"]), cell["way"]]
            if "flops" not in cell:
                rows.append([*own, "does not fit", *[""] * 5])
                continue
            memory = f"{cell['peak_bytes'] / 1e9:.1f}" if cell["peak_bytes"] else ""
            rows.append([
                *own, f"{cell['images_per_second']:,.0f}", f"{cell['milliseconds']:.1f}", tera(cell["flops"], ",.3g"),
                share(cell["flops"], data_sheet), share(cell["flops"], measured), memory,
            ])  # fmt: skip
    peak = f"share of {tera(data_sheet)}" if data_sheet else "share of the data sheet"
    titles = ["task", "size", "batch size", "way", "images/s", "ms", "TFLOP/s", peak, "share of the product", "GB"]
    return markdown(titles, rows)


def of_variants(name: str, found: Results) -> str:
    """The throughput of each way, relative to the first."""
    rates = found["images_per_second"]
    first = next(iter(rates.values()))
    rows = [(way, f"{rate:,.0f}", f"{rate / first:.3f}") for way, rate in rates.items()]
    title = f"{name}: pre-training of {found['size']}" if "size" in found else name
    return markdown([title, "images/s", "relative"], rows)


def table(machine: Results, results: Results) -> str:
    """All tables.

    Args:
        machine: as `machine.describe` returns it.
        results: "steps", "seconds" and "failed", by the names of steps.
    """
    steps = results["steps"]
    parts = [", ".join(f"{name} {value}" for name, value in machine.items() if value), of_steps(results)]
    parts += ["\n".join(of_checks(steps))]
    if "ceilings" in steps:
        parts.append("".join(of_ceilings(steps["ceilings"])))
    if any("cells" in found for found in steps.values()):
        parts.append(of_training(steps, machine))
    for name in ("variants", "autotune", "loader"):
        if "images_per_second" in steps.get(name, {}):
            parts.append(of_variants(name, steps[name]))
    seconds = {name: f"{found['compile_seconds']:.0f}" for name, found in steps.items() if "compile_seconds" in found}
    parts.append(f"seconds of compilation, while others ran: {seconds}" if seconds else "")
    whole = steps.get("whole", {}).get("second_epoch")
    parts.append(f"main_pretrain.py with data, second epoch: {json.dumps(whole)}" if whole else "")
    parts.append(f"failed: {', '.join(results['failed'])}" if results["failed"] else "all steps hold")
    return "\n\n".join(filter(None, parts)) + "\n"


def main(args: argparse.Namespace) -> None:
    """Prints the tables of a file."""
    results = json.loads(args.file.read_text())
    print(table(results["machine"], results))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("The tables of a gpu_check.json, in Markdown.")
    parser.add_argument("file", type=Path, metavar="FILE", help="gpu_check.json")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
