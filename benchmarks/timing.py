"""Throughput of implementations that take turns, so that all of them see the same machine."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from mae.evaluate.tables import markdown


def seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The mean time of `repeats` calls."""
    return times(call, repeats, device)[0]


def times(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float]:
    """The mean seconds of `repeats` calls: until the device is ready, and until the host is.

    A host that needs as long as the device limits the speed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    host = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats, host / repeats


def implementations(names: Iterable[str], only: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a name and "eager" or "compiled".

    Args:
        only: names, and names with "eager" or "compiled"; if it is empty, all.
    """
    pairs = [(name, how) for how in ("eager", "compiled") for name in names]
    chosen = [(name, how) for name, how in pairs if not only or {name, f"{name} {how}"} & set(only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(only)}: the implementations are {', '.join(map(' '.join, pairs))}")
    return chosen


def take_turns(measures: Mapping[str, Callable[[], float]], rounds: int, warm_ups: int = 1) -> dict[str, list[float]]:
    """Calls every function in each round; first, `warm_ups` times without a result, because the first call compiles.

    Returns:
        The results by name, one for each round.
    """
    for name, measure in measures.items():
        for number in range(warm_ups):
            print(f"warming up: {name}, {number + 1} of {warm_ups}", flush=True)
            measure()
    results: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def report(title: str, runs: Mapping[str, list[float]]) -> dict[str, Any]:
    """Prints and returns the median throughput of implementations.

    Args:
        runs: images/s in each round, by name. The table compares with the first of them, round by round.
    """
    rates = {name: statistics.median(values) for name, values in runs.items()}
    first = next(iter(rates))
    ratios = {name: statistics.median(a / b for a, b in zip(runs[name], runs[first], strict=True)) for name in rates}
    rows = [(name, f"{rate:,.2f}", f"{ratios[name]:.2f}") for name, rate in rates.items()]
    print(f"\n{markdown([title, 'images/s', f'relative to {first}'], rows)}\n", flush=True)
    return {"images_per_second": rates, "all_images_per_second": runs}
