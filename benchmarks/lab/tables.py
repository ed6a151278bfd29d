"""The tables of gpu_lab.py in Markdown, from its results, and the rules of adoption.

python benchmarks/lab/tables.py benchmarks/results/nvidia_h100/gpu_lab.json
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from scipy import stats

from benchmarks import gpu_table
from benchmarks.lab import curves, variants
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.training.costs import PEAK_TFLOPS

Results = Mapping[str, Any]
COMPARED = {"base_patch16": 512, "large_patch16": 256, "huge_patch14": 128}  # batch sizes, of the rules
FASTER = 0.03  # than main, on one size at least: a variant becomes the default
SLOWER = 0.01  # than main, on any size: it does not


class Gain(NamedTuple):
    """How much faster than main a variant is, as a fraction, with the 95 % interval of the mean over the rounds."""

    mean: float
    low: float
    high: float


def gain(ours: Sequence[float], main: Sequence[float]) -> Gain:
    """Compares the times of two ways in the same rounds."""
    ratios = [reference / time - 1 for time, reference in zip(ours, main, strict=True)]
    if len(ratios) < 2:
        return Gain(ratios[0], -math.inf, math.inf)
    half = stats.t.ppf(0.975, len(ratios) - 1) * stdev(ratios) / math.sqrt(len(ratios))
    return Gain(fmean(ratios), fmean(ratios) - half, fmean(ratios) + half)


def is_adopted(gains: Sequence[Gain]) -> bool:
    """Whether an exact variant becomes the default on CUDA, from its gains on ViT-B, ViT-L and ViT-H.

    It is at least `FASTER` on one of them, where the interval is above 0, and the intervals of all exclude that it is
    more than `SLOWER`.
    """
    return any(one.mean >= FASTER and one.low > 0 for one in gains) and all(one.low > -SLOWER for one in gains)


def of_updates(steps: Results) -> dict[tuple[str, int], dict[str, Results]]:
    """The results of updates by size and batch size, and by variant; main is the first. Others are incomplete."""
    found: dict[tuple[str, int], dict[str, Results]] = defaultdict(dict)
    for step in steps.values():
        if step.get("milliseconds"):
            found[step["size"], step["batch_size"]][step["variant"]] = step
    return {key: of_variants for key, of_variants in found.items() if "main" in of_variants}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, least and greatest value."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def percent(one: Gain) -> str:
    return f"{one.mean:+.1%} ({one.low:+.1%} to {one.high:+.1%})"


def compare(one: Results, main: Results, key: str = "milliseconds") -> Gain | None:
    """The gain of a variant, if both have all rounds."""
    ours = one.get(key, [])
    reference = main.get(key, [])
    return gain(ours, reference) if len(ours) == len(reference) > 0 else None


@cache
def flops_of(size: str) -> int:
    """FLOPs of pre-training per image."""
    from benchmarks.model_table import training_flops

    return training_flops(size)


def update_table(steps: Results, gpu: str | None) -> str:
    """A row for each size, batch size and variant."""
    peak = 1e12 * PEAK_TFLOPS.get(gpu or "", 0)
    rows = []
    for (size, batch), of_variants in of_updates(steps).items():
        flops = flops_of(size) if peak else 0
        for name, one in of_variants.items():
            rate = 1e3 * batch / median(one["milliseconds"])
            gained = compare(one, of_variants["main"])
            graph = one.get("graph_milliseconds")
            rows.append([
                size, str(batch), name, spread(one["milliseconds"]), spread(one["host_milliseconds"]),
                f"{rate:,.0f}", f"{rate * flops / peak:.1%}" if peak else "",
                percent(gained) if gained else "", spread(graph) if graph else "",
                f"{1e3 * batch / median(graph):,.0f}" if graph else "",
            ])  # fmt: skip
    titles = ["size", "batch size", "variant", "ms", "ms of the host", "images/s", "share of the data sheet",
              "faster than main (95 %)", "ms as a CUDA graph", "images/s"]  # fmt: skip
    return markdown(titles, rows)


def adoption_table(steps: Results) -> str:
    """What the rules say of each variant that was measured in all rounds on several sizes."""
    gains: dict[str, dict[str, Gain]] = defaultdict(dict)
    for (size, batch), of_variants in of_updates(steps).items():
        for name, one in of_variants.items():
            gained = compare(one, of_variants["main"])
            if name != "main" and gained and batch == COMPARED.get(size):
                gains[name][size] = gained
    rows = []
    for name, of_sizes in gains.items():
        kind = variants.VARIANTS[name].kind
        verdict = "flag with its measured error" if kind == variants.ROUNDS else "default on CUDA"
        if not is_adopted([*of_sizes.values()]):
            verdict = "stays here"
        if len(of_sizes) < len(COMPARED):
            verdict = f"{verdict}, if it holds on all sizes"
        rows.append([name, kind, *(f"{size} {percent(one)}" for size, one in of_sizes.items()), verdict])
    width = max((len(row) for row in rows), default=3)
    rows = [[*row[:-1], *[""] * (width - len(row)), row[-1]] for row in rows]
    return markdown(["variant", "kind", *["faster"] * (width - 3), "by the rules"], rows)


def number_table(title: str, found: Results) -> str:
    """A row for each measurement; others, such as the errors of kernels, as they are."""
    rows = []
    for name, value in found.items():
        is_list = isinstance(value, list) and "error" not in name
        rows.append([name, spread(value, 3) if is_list else json.dumps(value)])
    return markdown([title, "median (least to greatest)"], rows)


def profile_table(steps: Results) -> str:
    """Milliseconds of the groups of kernels."""
    rows = []
    for name, step in steps.items():
        if found := step.get("profile"):
            groups = ", ".join(f"{group} {value:.1f}" for group, value in found["groups"].items())
            rows.append([
                name, f"{found['milliseconds']:.1f}", f"{found['idle_milliseconds']:.1f}", f"{found['kernels']:.0f}",
                groups,
            ])  # fmt: skip
    return markdown(["profile", "ms", "ms without a kernel", "kernels", "ms by group"], rows)


def table(machine: Results, results: Results) -> str:
    """All tables. The arguments are those of `gpu_table.page`."""
    steps = results["steps"]
    parts = [update_table(steps, machine["gpu"]), adoption_table(steps), profile_table(steps)]
    for name, step in steps.items():
        for key in ("ceilings", "attention", "microseconds_per_image"):
            if found := step.get(key):
                parts.append(number_table(name if key != "microseconds_per_image" else f"{name}, us per image", found))
        if found := step.get("curves"):
            parts.append(curves.table(found, step["updates"]))
    return gpu_table.page(machine, results, parts)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    return gpu_table.get_args_parser("gpu_lab.json")


if __name__ == "__main__":
    entry_point.run(partial(gpu_table.print_tables, table), get_args_parser())
