"""Hyperparameters chosen with a draw of labels, beside the defaults and the best in hindsight: the table of choices.md.

    python demo/unpack_data.py
    apt-get install $(python benchmarks/letters.py)
    OMP_NUM_THREADS=1 python benchmarks/choices.py              # 4 kinds of images, half an hour each on an idle core

Started once per core, the command shares the kinds. For each of 40 draws of 300 labels, a predictor of the frozen
features of an encoder (pooling.py's, with its default pooling, the class token or the mean of the patches) or of pixels
is chosen by the rule of `mae.compare.choices`, fitted on the draw, and evaluated on the images of val/. The best in
hindsight is the pooling and the values of the grid with the highest mean on these images over all draws.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import leaderboard, machine, pooling
from mae.cli import entry_point
from mae.compare import choices
from mae.compare.predictors import BASELINES, USES, Predictor
from mae.data import raw_pixels
from mae.data.labels import some_of_each_class
from mae.data.open import open_source
from mae.data.source import Source
from mae.evaluate.tables import markdown
from mae.files import locks, results
from mae.inference import extraction
from mae.inference.model import get_model
from mae.settings import DataSpec, ImageSpec
from mae.settings.choices import CLASS_TOKEN, CLASSIFICATION, PATCHES
from mae.training.environment import commit
from mae.training.precision import Precision

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("choices.jsonl", "choices.md"))
KINDS = ("garments", "photographs", "cells", "letters")
LABELS = 300
DRAWS = 40

Options = dict[str, tuple[np.ndarray, np.ndarray]]  # features of the training and of the test images, by name


def options_of(kind: str) -> tuple[Options, Options, Source, Source]:
    """Returns features of an encoder by pooling, pixels, and the sources."""
    data = DataSpec(data_path=str(pooling.folder_of(kind)))
    train, val = (cast(Source, open_source(data, split)) for split in ("train", "val"))
    model = get_model(str(pooling.encoder_of(kind, 0)))
    precision = Precision("off", model.normalize.mean.device)
    encoded = {
        pool: tuple(
            extraction.extract(extraction.Extractor(model, pool), source, None, {}, 256, 0, precision)
            for source in (train, val)
        )
        for pool in dict.fromkeys([model.pooling.name, CLASS_TOKEN, PATCHES])
    }
    images = ImageSpec.of(model.settings)
    pixels = {"pixels": tuple(raw_pixels.read(source, images, 0) for source in (train, val))}
    return cast(Options, encoded), cast(Options, pixels), train, val


def measure(predictor: Predictor, options: Options, train: Source, val: Source) -> dict[str, Any]:
    """Returns the accuracies of the draws in percent: of the choice, of the default, and of the best in hindsight."""
    per_class = max(1, LABELS // len(train.classes))
    grid = [*itertools.product(*predictor.grid)]
    truth = np.asarray(val.labels)
    chosen = list[float]()
    of_grid = list[list[float]]()
    texts = list[str]()
    for draw in range(DRAWS):
        few = some_of_each_class(train, per_class, draw)
        labels = np.asarray(few.labels)
        found = choices.choose(predictor, {name: one[few.indices] for name, (one, _) in options.items()}, labels, draw)
        accuracies = []
        for name, (bank, queries) in options.items():
            values = [*grid, *([found.values] if name == found.option else [])]
            classes = predictor.predict(bank[few.indices], labels, queries, values).argmax(axis=2)
            accuracies += (100 * (classes[: len(grid)] == truth).mean(axis=1)).tolist()
            if name == found.option:
                chosen.append(100 * float((classes[-1] == truth).mean()))
        of_grid.append(accuracies)
        texts.append(f"{found.option}, {predictor.in_words(found.values)}")
    every: np.ndarray = np.array(of_grid)
    default = every[:, grid.index(predictor.default)]
    return {
        "labels": per_class * len(train.classes), "chosen": chosen, "default": default.tolist(),
        "hindsight": every[:, every.mean(axis=0).argmax()].tolist(), "texts": texts,
    }  # fmt: skip


def read() -> list[dict[str, Any]]:
    """Returns the rows of all kinds and predictors."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Returns the table, with the mean and the standard deviation over the draws."""
    lines = []
    for row in read() if rows is None else rows:
        default, chosen, hindsight = (np.array(row[name]) for name in ("default", "chosen", "hindsight"))
        shown = [f"{each.mean():.1f} ± {each.std(ddof=1):.1f}" for each in (default, chosen, hindsight)]
        gains = [f"{(chosen - hindsight).mean():+.1f}", f"{(chosen - default).min():+.1f}"]
        lines.append([row["kind"], row["of"], row["predictor"], f"{row['labels']:,}", *shown, *gains])
    titles = [
        "images", "of", "predictor", "labels", "default, %", "chosen, %", "best in hindsight, %",
        "chosen − hindsight, mean", "chosen − default, worst draw",
    ]  # fmt: skip
    return markdown(titles, lines)


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, and prints the table."""
    version = commit()
    for kind in args.kinds:
        with suppress(locks.Busy), locks.locked(pooling.WORK / kind / "choices"), threadpool_limits(1):
            cases = [("encoder", each) for each in USES[CLASSIFICATION].values()]
            cases += [("pixels", each) for each in BASELINES[CLASSIFICATION]]
            done = {(row["of"], row["predictor"]) for row in read() if row["kind"] == kind}
            if not (missing := [(of, each) for of, each in cases if (of, each.title) not in done]):
                continue
            encoded, pixels, train, val = options_of(kind)
            for of, predictor in missing:
                found = measure(predictor, encoded if of == "encoder" else pixels, train, val)
                row = {"kind": kind, "of": of, "predictor": predictor.title, **found}
                row |= {"machine": machine.processor(), "commit": version}
                results.add_line(ROWS, json.dumps(row))
                leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(), PAGE)
                print(table([row]), flush=True)
    print(table())


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Compares chosen hyperparameters with the defaults and the best in hindsight.")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
