"""The rules of fine-tuning, compared with flags set by hand and the published flags: the table of finetune_rule.md.

    python demo/unpack_data.py
    OMP_NUM_THREADS=1 python benchmarks/finetune_rule.py              # 36 runs of two minutes of a core
    OMP_NUM_THREADS=1 python benchmarks/finetune_rule.py --rehearse   # one run of each, of a second

Started once per core, the command shares the runs. The same command resumes an interrupted study: each run is stored
when it ends, and appends its row to finetune_rule.jsonl. It writes the table to finetune_rule.md.

Images: the garments of the repository, and cells (cells.py). An encoder of each is pre-trained on 200,000 images, by
the settings that `python -m mae.data --recipe` gives for one core. It is fine-tuned with 200 labels and with all, three
random subsets or seeds of each, for equal times: the number of epochs follows from the speed of each way, which is
measured first. `mae.recommend.finetuning` gives the rule, which may stop earlier. The accuracy is of the test images
after the last epoch, so that no evaluation chooses.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import main_finetune
import main_pretrain
from benchmarks import cells, leaderboard, machine, noise, scripts
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store
from mae.data.image_facts import all_facts
from mae.data.open import open_source
from mae.data.source import Source
from mae.evaluate.tables import markdown
from mae.files import atomic, locks, results
from mae.recommend import finetuning, trial
from mae.recommend.facts import Images
from mae.recommend.finetuning import Labels, Start
from mae.settings import DataSpec
from mae.settings.types import positive
from mae.training import log
from mae.training.environment import commit

ROWS, PAGE = (Path(__file__).with_name(name) for name in ("finetune_rule.jsonl", "finetune_rule.md"))
WORK = scripts.ROOT / "runs/finetune_rule"
RULE = "rule"
BY_HAND = {"aa": "none", "reprob": 0, "smoothing": 0, "drop_path": 0, "layer_decay": 0.9, "lr": 1e-3, "batch_size": 32}
WAYS: dict[str, dict[str, Any]] = {RULE: {}, "by hand": BY_HAND, "published": {}}
WARM_UP = 10  # a tenth of the epochs
MINUTES = 2.0
ALL = "all"


class Study(NamedTuple):
    """What is measured."""

    images: Mapping[str, tuple[Path, int]]  # of a kind: its folder, and the epochs of the pre-training
    labels: Sequence[int | str]
    draws: Sequence[int]
    minutes: float  # of a fine-tuning
    work: Path


class Case(NamedTuple):
    """A run of the study."""

    kind: str
    labels: int | str
    draw: int
    way: str


def images_of(kind: str) -> tuple[Path, int]:
    """Returns the folder of a kind of images, and the epochs that process 200,000 of them."""
    return noise.images_of(kind, 0), noise.EPOCHS[kind]


def rehearsal(folder: Path) -> Study:
    """Returns a study of a few generated images and short runs."""
    images = {}
    for kind, count in (("cells", 24), ("more cells", 30)):
        out = folder / kind / "images"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            with atomic.replacing(out) as written:
                cells.write(written, {"train": count, "val": 4})
        images[kind] = (out, 1)
    return Study(images, (120, ALL), (0,), 1 / 60, folder)


def pretrained(study: Study, kind: str) -> Path:
    """Pre-trains an encoder of a kind of images; returns its file."""
    folder, epochs = study.images[kind]
    flags = {"epochs": epochs, "warmup_epochs": epochs / 20, "save_every": epochs, "vis_every": 0, "resume": "auto"}
    out = study.work / kind / "encoder"
    settings = {**noise.recipe(folder), **flags, "output_dir": out}
    store.run_once(out, Script(main_pretrain), settings, lambda run, _: {"loss": log.read(run)[-1]["train_loss"]})
    return out / f"checkpoint-{epochs - 1}.pth"


def facts_of(folder: Path, labels: int | str) -> tuple[Images, Labels]:
    """Returns what the rules know about images and labels."""
    train, val = (cast(Source, open_source(DataSpec(data_path=str(folder)), split)) for split in ("train", "val"))
    facts = list(all_facts(train, 1, list(range(0, len(train), max(1, len(train) // 500))), 0))
    found = Labels.of(train, val, "classification")
    if labels != ALL:
        per_class = int(labels) // found.classes
        found = found._replace(images=per_class * found.classes, fewest=per_class)
    return Images.of(facts, len(train), 1, has_range=False), found


def settings_of(study: Study, case: Case, file: Path) -> tuple[dict[str, Any], Labels]:
    """Returns the settings of a run, without its length, and its labels."""
    folder, _ = study.images[case.kind]
    images, labels = facts_of(folder, case.labels)
    settings = {
        "data_path": folder, "finetune": file, "cache_images": True, "num_workers": 0, **WAYS[case.way],
        "seed": case.draw,
    }  # fmt: skip
    if case.labels != ALL:
        settings["train_per_class"] = labels.fewest
    if case.way == RULE:
        start = Start.of(str(file))
        lines = [
            *finetuning.input_lines(images, start), *finetuning.augmentation_lines(images, labels),
            *finetuning.optimization_lines(labels, start, noise.ONE_CORE),
        ]  # fmt: skip
        settings |= {line.name: line.value for line in lines}
    return settings, labels


def speed_of(study: Study, case: Case, settings: Mapping[str, Any], labels: Labels, batch: int) -> trial.Trial:
    """Measures the throughput of a way, once for all draws."""
    out = study.work / case.kind / f"{case.labels}-{case.way}-speed"
    short = finetuning.of_trial(labels, batch) or {}
    flags = {**settings, **short, "seed": 0, "epochs": trial.EPOCHS, "warmup_epochs": 1, "save_every": trial.EPOCHS,
             "output_dir": out}  # fmt: skip

    def rate(run: Path, _: object) -> dict[str, Any]:
        return {"images_per_s": statistics.median(line["images_per_s"] for line in log.read(run)[1:])}

    return trial.Trial(store.run_once(out, Script(main_finetune), flags, rate)["images_per_s"], 0)


def measure(study: Study, case: Case) -> dict[str, Any]:
    """Fine-tunes; returns the accuracy in percent, the epochs and the throughput.

    Raises:
        locks.Busy: another process computes it, or what it needs.
    """
    settings, labels = settings_of(study, case, pretrained(study, case.kind))
    batch = Script(main_finetune).settings(settings).optim.batch_size
    measured = speed_of(study, case, settings, labels, batch)
    in_epoch = labels.images // batch * batch
    epochs = max(1, int(60 * study.minutes * measured.images_per_s / in_epoch))
    if case.way == RULE:
        images, _ = facts_of(study.images[case.kind][0], case.labels)
        epochs = min(epochs, finetuning.most_epochs(images, labels, Start.of(str(settings["finetune"]))))
    out = study.work / case.kind / f"{case.labels}-{case.way}-{case.draw}"
    length = {"epochs": epochs, "warmup_epochs": epochs / WARM_UP, "eval_every": epochs, "save_every": epochs,
              "resume": "auto", "output_dir": out}  # fmt: skip

    def read(run: Path, _: object) -> dict[str, Any]:
        return {"accuracy": log.read(run)[-1]["test_acc1"]}

    scores = store.run_once(out, Script(main_finetune), {**settings, **length}, read)
    return {"accuracy": scores["accuracy"], "epochs": epochs, "images/s": round(measured.images_per_s)}


def rows_of(study: Study, done: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the row of each run that is not done, also of those that another process runs meanwhile."""
    every = itertools.product(study.draws, study.images, study.labels, WAYS)
    cases = [Case(kind, labels, draw, way) for draw, kind, labels, way in every]
    pending = [case for case in cases if not any(case._asdict().items() <= row.items() for row in done)]
    while pending:
        busy = []
        for case in pending:
            try:
                yield {**case._asdict(), "minutes": study.minutes, **measure(study, case)}
            except locks.Busy:
                busy.append(case)
        if len(busy) == len(pending):
            time.sleep(locks.WAIT_SECONDS)
        pending = busy


def read() -> list[dict[str, Any]]:
    """Returns the rows of all runs."""
    return results.read_lines(ROWS) if ROWS.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table: means and standard deviations over the draws, and the rule's distance to the best other way.

    Only the draws that all ways have count.
    """
    found: dict[tuple[str, str], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        ways = found.setdefault((row["kind"], str(row["labels"])), {way: {} for way in WAYS})
        ways[row["way"]][row["draw"]] = row
    lines = []
    for (kind, labels), ways in sorted(found.items()):
        draws = sorted(set.intersection(*({*runs} for runs in ways.values())))
        if draws:
            accuracies = {way: [runs[draw]["accuracy"] for draw in draws] for way, runs in ways.items()}
            means = {way: statistics.fmean(values) for way, values in accuracies.items()}
            best = max((way for way in WAYS if way != RULE), key=lambda way: means[way])
            epochs = [str(ways[way][draws[0]]["epochs"]) for way in WAYS]
            texts = [_with_spread(values) for values in accuracies.values()]
            difference = f"{means[RULE] - means[best]:+.2f} ({best})"
            lines.append([kind, labels, str(len(draws)), *texts, difference, " ".join(epochs)])
    titles = ["images", "labels", "draws", *(f"{way}, %" for way in WAYS), "rule − best other", "epochs"]
    return markdown(titles, lines)


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def main(args: argparse.Namespace) -> None:
    """Runs what is missing, and prints the table."""
    os.chdir(scripts.ROOT)
    if args.rehearse:
        print(table(list(rows_of(rehearsal(WORK.with_name("finetune_rule_rehearsal")), []))))
        return
    kinds = {kind: images_of(kind) for kind in noise.EPOCHS}
    version = commit()
    for row in rows_of(Study(kinds, (200, ALL), (0, 1, 2), args.minutes, WORK), read()):
        complete = {**row, "machine": machine.processor(), "commit": version}
        results.add_line(ROWS, json.dumps(complete))
        leaderboard.write_table(f"python benchmarks/{Path(__file__).name}", table(read()), PAGE)
        print(json.dumps(complete), flush=True)
    print(table(read()))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Compares the rules of fine-tuning with flags set by hand and the published flags.")
    parser.add_argument("--minutes", default=MINUTES, type=positive, metavar="M", help="time of a fine-tuning")
    parser.add_argument("--rehearse", action="store_true", help="a few generated images, and runs of a second")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
