"""The comparison of encoders: protocols x numbers of labels x random subsets."""

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae import parallel
from mae.compare import costs, store, summary
from mae.compare.encoders import PIXELS, UPDATES, Encoder, open_encoders
from mae.compare.images import Size
from mae.compare.predictors import BASELINES
from mae.compare.protocols import LORA, TUNED, reason_against, row_of
from mae.compare.summary import Result
from mae.compare.trials import Trial, Trials
from mae.data import equal_images
from mae.data.labels import open_pair
from mae.data.run_data import RunData
from mae.data.source import Source
from mae.files import locks
from mae.plurals import counted
from mae.settings import Run
from mae.settings.choices import CLASSIFICATION
from mae.settings.training import ComparisonSpec
from mae.settings.values import as_yaml
from mae.training import log

logger = logging.getLogger(__name__)

# The standard error of an accuracy of n images is up to 50 / root of n points: a point with ENOUGH.
ENOUGH = 2500
MOST_DRAWS = 10


def compare(run: Run, scripts: Mapping[str, store.Script]) -> str:
    """Runs the trials that have no result yet, one after another. Prints, writes and returns table and conclusion.

    It also prints and writes what the encoders cost, `costs.write`.

    The same comparison may run several times at once, also on several machines: each trial runs in one of them.

    Args:
        scripts: the script of each protocol.

    Raises:
        ValueError: the settings exclude each other, an encoder can't be opened, or a script has failed.
    """
    log.start_logging()
    if parallel.launched_processes() > 1:
        raise ValueError("main_compare.py is one process: start it without torchrun; a second one shares the trials")
    spec = run.comparison
    settings = run.record()
    _require_comparable(spec, run.images.task)
    _warn_of_unused(spec.protocols, settings)
    out = Path(run.machine.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    encoders = open_encoders(spec, settings, run.explicit)
    images = replace(run.images, in_chans=encoders[0].architecture["in_chans"])  # a file records them
    data = RunData(images, run.data, torch.device("cpu"))
    open_split, held_out = data.splits()
    train, val = open_pair(open_split, run.images.task)
    equal_images.warn(train, val)
    if held_out:
        val = data.readable(val, held_out)
    sizes = _sizes_of(spec, train)
    trials = Trials(run, sizes, scripts, out / "runs", data, train, val, bool(held_out))
    left_out = _left_out(encoders, spec.protocols)
    planned = _plan(encoders, spec.protocols, sizes, left_out, run.images.task)
    for trial in planned:
        trials.settings(trial)  # the script's error about a setting comes now, and not after hours
    costs_text = costs.write(out, encoders, run.machine.device, run.machine.amp, run.model.encoder)
    text = ""
    results = dict[str, Result]()
    slow: dict[tuple[str, int], str] = {}  # by row and number of labels, why a baseline is left out
    try:
        for trial, result in _results_of(trials, planned):
            if isinstance(result, str):
                if trial.key[:2] not in slow:
                    logger.warning(f"{trial.key[0]} is left out: {result}")
                slow[trial.key[:2]] = result
                continue
            results[trial.name] = result
            chosen = f"{result.chosen}, " if result.chosen else ""
            unit = " %" if result.metric == summary.ACCURACY else ""
            logger.info(
                f"[{len(results)}/{len(planned)}] {result.row}, {result.labels:,} labels, draw {result.draw}: "
                f"{result.metric} {result.accuracy:.4g}{unit} ({chosen}{result.seconds:.0f} s)"
            )
        trials.remove_features()
    finally:
        if results:
            with locks.locked(out, "table.md.lock", waits=True):
                found = [results[trial.name] for trial in planned if trial.name in results]
                reasons = {row: "; ".join(text for (one, _), text in slow.items() if one == row) for row, _ in slow}
                unknown = {key for key in slow if _is_strongest(*key, found)}
                keys = [trial.key for trial in planned if trial.key[:2] not in slow.keys() - unknown]
                text = summary.write(out, found, len(val), left_out | reasons, data.name_held_out(held_out), keys)
    logger.info(f"\n{text}\n{costs_text}\n\nall runs with their commands: {out / 'results.csv'}")
    return text


def _require_comparable(spec: ComparisonSpec, task: str) -> None:
    """Raises ValueError if the labels exclude a subset of labels or a baseline."""
    if task != CLASSIFICATION and spec.labels != ["all"]:
        raise ValueError(
            f"labels={as_yaml(spec.labels)}: subsets have equally many images of each class, and task={task} has no "
            f"single class; give labels=all"
        )
    if not BASELINES[task] and PIXELS in spec.encoders:
        raise ValueError(f"encoders={PIXELS}: task={task} has no baseline; omit {PIXELS}")


def _warn_of_unused(protocols: Collection[str], settings: Mapping[str, Any]) -> None:
    """Logs a warning of each setting that is given, and is of other protocols than those that are compared."""
    for name, served in {"blr": TUNED, **dict.fromkeys(UPDATES, (LORA,))}.items():
        if settings[name] and not {*served} & {*protocols}:
            logger.warning(f"`{name}` has no effect: it is for the protocols {' and '.join(served)}")


def _sizes_of(spec: ComparisonSpec, train: Source) -> list[Size]:
    """Returns the numbers of labels. All images are a single draw.

    Raises:
        ValueError: a number is not one, a class has fewer images, or two numbers are the same images of each class.
    """
    texts = spec.labels
    budgets = _for_each(texts, "budget", spec.budget)
    numbers = [_number_of(text, train) for text in texts]
    draws = _for_each(texts, "draws", spec.draws or [_draws_of(labels) for labels, _ in numbers])
    if len({labels for labels, _ in numbers}) < len(numbers):  # `all` may be as many as a number
        raise ValueError(
            f"labels={as_yaml(texts)}: these are {', '.join(f'{labels:,}' for labels, _ in numbers)} images, equally "
            f"many of each class; give each once"
        )
    sizes = [
        Size(labels, per_class, count if per_class else 1, epochs)
        for (labels, per_class), count, epochs in zip(numbers, draws, budgets, strict=True)
    ]
    if not spec.draws:
        texts = [f"{size.draws} of {counted(size.labels, 'label')}" for size in sizes]
        logger.info(
            f"draws: {', '.join(texts)} (1 of all labels; of fewer, as many as have {ENOUGH:,} labels together, at "
            f"most {MOST_DRAWS}; `draws` sets another number)"
        )
    return sizes


def _draws_of(labels: int) -> int:
    """Returns the number of random subsets by default: several if labels are few."""
    return min(MOST_DRAWS, math.ceil(ENOUGH / labels))


def _number_of(text: str, train: Source) -> tuple[int, int | None]:
    """Returns a number of labels, and the number of images of each class; None: all images."""
    if text == "all":
        return len(train), None
    per_class = int(text) // len(train.classes) if text.isdecimal() else 0
    fewest = int(np.bincount(train.labels, minlength=len(train.classes)).min())
    if not 0 < per_class <= fewest:
        raise ValueError(
            f"labels={text}: give {len(train.classes)} (one image of each class) to {len(train.classes) * fewest} "
            f"(the smallest class has {fewest}), or all"
        )
    if int(text) != (labels := per_class * len(train.classes)):
        logger.info(f"labels={text}: {labels} images are used, {per_class} of each class")
    return labels, per_class


def _for_each(labels: Sequence[str], setting: str, values: list[int]) -> list[int]:
    """Returns the value of a setting for each number of labels.

    Raises:
        ValueError: the setting has another number of values.
    """
    if len(values) not in (1, len(labels)):
        raise ValueError(f"`{setting}` has {len(values)} values: give one, or one for each of {len(labels)} `labels`")
    return values * len(labels) if len(values) == 1 else values


def _plan(
    encoders: Sequence[Encoder], protocols: Sequence[str], sizes: Sequence[Size], left_out: Mapping[str, str], task: str
) -> list[Trial]:
    """Returns the trials in the order of the table, without rows that are left out."""
    return [
        Trial(encoder, protocol, size, draw)
        for encoder in encoders
        for protocol in (
            [each.title for each in BASELINES[task]] if encoder.name == PIXELS else dict.fromkeys(protocols)
        )
        if row_of(encoder.name, protocol) not in left_out
        for size in sizes
        for draw in range(size.draws)
    ]


def _left_out(encoders: Sequence[Encoder], protocols: Sequence[str]) -> dict[str, str]:
    """Returns the rows of the table that can't be computed, and the reasons. A warning names them.

    Raises:
        ValueError: no protocol of an encoder is left.
    """
    reasons: dict[str, str] = {}
    for encoder in encoders:
        if encoder.name == PIXELS:
            continue
        found = {protocol: text for protocol in protocols if (text := reason_against(encoder, protocol))}
        if found.keys() == {*protocols}:
            names = [*found] if len(found) > 1 else next(iter(found))
            raise ValueError(f"protocols={as_yaml(names)}: {encoder.name}: {next(iter(found.values()))}")
        reasons |= {row_of(encoder.name, protocol): text for protocol, text in found.items()}
    for row, text in reasons.items():
        logger.warning(f"{row} is left out: {text}")
    return reasons


def _is_strongest(row: str, labels: int, results: Sequence[Result]) -> bool:
    """Whether a baseline is the best one with the largest number of labels, below `labels`, of which it has results."""
    entries = summary.entries_of(results)
    if not (smaller := [one for one in entries.get(row, {}) if one < labels]):
        return False
    columns = [by_labels[max(smaller)] for by_labels in entries.values() if max(smaller) in by_labels]
    return entries[row][max(smaller)].rank == max(entry.rank for entry in columns if entry.encoder == PIXELS)


def _results_of(trials: Trials, planned: Sequence[Trial]) -> Iterator[tuple[Trial, Result | str]]:
    """Yields what `Trials.result` returns of all trials; the first draw of each comes first.

    It waits for those in other processes.
    """
    pending = sorted(planned, key=lambda trial: trial.draw)
    while pending:
        busy: list[Trial] = []
        for trial in pending:
            try:
                yield trial, trials.result(trial)
            except locks.Busy:
                busy.append(trial)
        if len(busy) == len(pending):
            time.sleep(locks.WAIT_SECONDS)
        pending = busy
