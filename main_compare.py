"""Comparison of encoders: which one is worth most on this data, and how many labels does it need?

Under ten minutes on two CPU cores:

    python demo/unpack_data.py
    python main_compare.py --data_path demo/data/fashion_mnist --input_size 28 --in_chans 1 \\
        --encoders scratch pixels mine=demo/output/pretrain/checkpoint-119.pth --labels 100 1000 --draws 2 \\
        --recipes finetune=recipes/finetune_fashion_mnist.yaml --budget 30 --jobs 2 --output_dir runs/compare

Released weights on your own images, on one GPU:

    python main_compare.py --data_path IMAGES --encoders scratch mae_pretrain_vit_base timm:vit_base_patch16_224 \\
        --labels 500 5000 all --draws 3 --budget 50 --output_dir runs/compare

Each cell of the table is a run of main_knn.py, main_linprobe.py or main_finetune.py. The same command resumes an
interrupted comparison and skips the runs that are complete.
"""

import logging
import re
import shlex
import shutil
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import mae.build
import main_finetune
import main_knn
import main_linprobe
import models_vit
from mae import user_code
from mae.checkpoints import run_directory
from mae.cli import entry_point, options
from mae.compare import baselines, summary
from mae.compare.store import Commands
from mae.compare.summary import ACCURACY, PIXELS, Result
from mae.data.labels import open_pair, some_of_each_class
from mae.data.open import open_source
from mae.data.sources import Source
from mae.data.user_sets import OpenDataset, with_source
from mae.evaluate.metrics import LOWER_IS_BETTER
from mae.evaluate.tasks import best_of
from mae.files import recipes
from mae.files.results import from_line
from mae.settings import REBUILDS, DataSpec, ImageSpec, ModelSpec, Run, names_of, names_with
from mae.settings.arguments import arguments
from mae.settings.choices import CLASSIFICATION, DEFAULT_METRICS
from mae.settings.fields import HEAD, LABELS
from mae.settings.names import FLIPS
from mae.suggestions import did_you_mean
from mae.training import log
from mae.user_code import DATASET
from mae.weights import preprocessing, reading

logger = logging.getLogger(__name__)

SCRATCH, TIMM = "scratch", "timm:"
RESERVED = (SCRATCH, PIXELS, "choices")  # names of encoders and folders in runs/
KNN, LINEAR, ATTENTIVE, FINETUNE = "knn", "linear", "attentive", "finetune"
TITLES = {KNN: "k-NN", LINEAR: "linear probe", ATTENTIVE: "attentive probe", FINETUNE: "fine-tuned"}
PROBE = {"cache_features": True, "epochs": 60, "warmup_epochs": 5, "batch_size": 256,
         "eval_every": 60, "save_every": 60}  # fmt: skip
# Protocol -> script, and its flags without a recipe.
PROTOCOLS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    KNN: (main_knn, {"global_pool": True, "k": [5, 20, 100]}),
    LINEAR: (main_linprobe, {**PROBE, "blr": [0.3, 1, 3, 10, 30, 100], "global_pool": True}),
    ATTENTIVE: (main_linprobe, {**PROBE, "blr": [0.3, 1, 3, 10, 30], "probe": "attentive"}),
    FINETUNE: (main_finetune, {"batch_size": 128}),
}  # fmt: skip
# Flags that all scripts share; the comparison passes those that are given.
SHARED = [*names_of(ModelSpec, ImageSpec, DataSpec), "device", "amp", "metric"]
OF_ENCODER = {"model", "encoder", "encoder_args"}  # those of SHARED that a file of --encoders replaces
VAL_FRACTION = 0.2  # of the training images of the first draw, held out to choose hyperparameters
LEAST_UPDATES = 3  # of an epoch; batches of few images are smaller

Flags = dict[str, Any]


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script."""
    parser = entry_point.parser("Compares encoders on a dataset: protocols x numbers of labels x random subsets.")
    options.add_data_options(parser, labels=True)
    options.add(parser, "val_list", "crop_pct")
    options.add_model_options(parser, models_vit.MODELS, default="vit_base_patch16")
    options.add_comparison_options(parser, list(PROTOCOLS))
    options.add_metric_options(parser, selects="hyperparameters, and is compared")
    parser.set_defaults(protocols=[KNN, LINEAR, FINETUNE])
    return parser


class Encoder(NamedTuple):
    """An encoder of the comparison."""

    name: str
    flags: Flags  # of its architecture and weights


class Task(NamedTuple):
    """A cell of the table for one draw."""

    encoder: Encoder
    protocol: str  # for raw pixels the name of the baseline
    labels: int  # number of training images
    per_class: int | None  # of each class; None: all images
    draw: int

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return f"{_directory(self.encoder.name)}/{_directory(self.protocol)}/{self.labels}/{self.draw}"


def main(args: Namespace | Run, source: OpenDataset | None = None) -> str:
    """Runs the scripts that have no result yet. Prints, writes and returns the table and the conclusion.

    Args:
        source: function(split, data_path) that returns a dataset. The scripts import it by its name.

    Raises:
        ValueError: the function has no name by which the scripts can import it.
    """
    log.start_logging()
    run = with_source(entry_point.settings_of(args, get_args_parser()), source)
    run, _ = user_code.with_objects(run, encoder=None)  # results depend on its module
    if source and ("<" in run.data.dataset or run.data.dataset.startswith(f"{DATASET}__main__:")):
        raise ValueError(f"source= ({run.data.dataset}): the scripts of a comparison import it: define it in a module")
    out = Path(run.machine.output_dir)
    run_directory.prepare(out, "auto")
    with run_directory.locked(out):
        return _compare(run, out)


def _compare(run: Run, out: Path) -> str:
    encoders = _encoders(run, out / "encoders")
    lists = {"train": run.data.train_list, "val": run.data.val_list}

    def open_split(split: str) -> Any:
        return open_source(
            split, run.data.data_path, lists[split], run.data.dataset, download=run.data.download, task=run.images.task,
            label_columns=run.images.label_columns, extras=run.data.extras, whole=not run.data.val_list,
        )  # fmt: skip

    train, val = open_pair(open_split, run.images.task)
    _require_comparable(run, encoders)
    sizes = [_size(text, train) for text in run.comparison.labels]
    if len({labels for labels, _ in sizes}) < len(sizes):
        numbers = ", ".join(f"{labels:,}" for labels, _ in sizes)
        raise ValueError(
            f"--labels {' '.join(run.comparison.labels)}: these are {numbers} images, equally many of each class; give "
            f"each once"
        )
    counts = [
        count if per_class else 1
        for count, (_, per_class) in zip(_each("--draws", run.comparison.draws, len(sizes)), sizes, strict=True)
    ]
    draws = [
        (*size, draw) for draw in range(max(counts)) for size, count in zip(sizes, counts, strict=True) if draw < count
    ]
    tasks = [
        Task(encoder, protocol, *draw)
        for draw in draws
        for encoder in encoders
        for protocol in (baselines.STRENGTHS if encoder.name == PIXELS else dict.fromkeys(run.comparison.protocols))
    ]
    runs = Runs(
        run,
        Commands(out / "runs", out / "results.json", run.comparison.jobs),
        [labels for labels, _ in sizes],
        train,
        val,
    )
    order = {(task.encoder.name, task.protocol): place for place, task in enumerate(tasks)}
    trained = [task for task in tasks if task.encoder.name != PIXELS]
    for task in trained:
        runs.flags(task)  # the script's error about a flag comes now, and not after hours
    begin, results = time.perf_counter(), list[tuple[int, Result]]()
    chosen = [partial(runs.choose, task) for task in trained if not task.draw]
    for number, _ in enumerate(runs.commands.each(chosen), start=1):
        left = log.duration((time.perf_counter() - begin) / number * (len(chosen) - number))
        logger.info(f"hyperparameters of {number} of {len(chosen)} cells are chosen (about {left} left for these)")
    seconds: dict[str, float] = {}
    try:
        for task, result in runs.commands.each([partial(runs.result, task) for task in tasks]):
            results.append((order[task.encoder.name, task.protocol], result))
            seconds[task.name] = result.seconds  # reused results keep the seconds that they took
            logger.info(
                f"[{len(results)}/{len(tasks)}] {result.row}, {result.labels:,} labels, draw {result.draw}: "
                f"{result.text} ({result.seconds:.0f} s; about "
                f"{log.duration(seconds_left(tasks, seconds) / run.comparison.jobs)} left)"
            )
    finally:
        if results:
            text = summary.write(out, [result for _, result in sorted(results)])
    logger.info(f"\n{text}\nall runs with their commands: {out / 'results.csv'}; plot: {out / 'plot.png'}")
    return text


def _require_comparable(run: Run, encoders: Sequence[Encoder]) -> None:
    """Raises ValueError if the labels or the metric exclude a subset of labels or a baseline."""
    if run.images.task != CLASSIFICATION and run.comparison.labels != ["all"]:
        raise ValueError(
            f"--labels {' '.join(run.comparison.labels)}: subsets have equally many images of each class, and --task "
            f"{run.images.task} has no single class; give --labels all"
        )
    if (run.evaluation.metric or run.images.task != CLASSIFICATION) and any(
        encoder.name == PIXELS for encoder in encoders
    ):
        raise ValueError(f"--encoders {PIXELS}: these baselines have a top-1 accuracy only; omit {PIXELS}")


def _each(flag: str, values: list[Any], count: int) -> list[Any]:
    """Returns the value of a flag for each of the `count` numbers of --labels.

    Raises:
        ValueError: the flag has another number of values.
    """
    if len(values) not in (1, count):
        raise ValueError(f"{flag} has {len(values)} values: give one, or one for each of {count} --labels")
    return values * count if len(values) == 1 else values


def seconds_left(tasks: Sequence[Task], seconds: Mapping[str, float]) -> float:
    """Returns the computing time of the open tasks; `seconds` has the time of the complete ones, by name."""

    def mean(similar: Callable[[Task], bool]) -> float | None:
        values = [seconds[task.name] for task in tasks if task.name in seconds and similar(task)]
        return statistics.fmean(values) if values else None

    def expected(task: Task) -> float:
        same = mean(lambda other: (other.protocol, other.labels) == (task.protocol, task.labels))
        return same or mean(lambda other: other.protocol == task.protocol) or mean(lambda other: True) or 0.0

    return sum(expected(task) for task in tasks if task.name not in seconds)


def _directory(name: str) -> str:
    return re.sub(r"[^\w.-]|^\.+", "_", name)


def _size(text: str, train: Source) -> tuple[int, int | None]:
    """Returns a number of labels, and the number of images of each class; None for all.

    Raises:
        ValueError: the number is not one, or a class has fewer images.
    """
    if text == "all":
        return len(train), None
    per_class = int(text) // len(train.classes) if text.isdecimal() else 0
    fewest = int(np.bincount(train.labels, minlength=len(train.classes)).min())
    if not 0 < per_class <= fewest:
        raise ValueError(
            f"--labels {text}: give {len(train.classes)} (one image of each class) to {len(train.classes) * fewest} "
            f"(the smallest class has {fewest}), or all"
        )
    if int(text) != (labels := per_class * len(train.classes)):
        logger.info(f"--labels {text}: {labels} images are used, {per_class} of each class")
    return labels, per_class


def _encoders(run: Run, folder: Path) -> list[Encoder]:
    """Opens the encoders, with the settings that their files record.

    Raises:
        ValueError: two encoders have one name, or an encoder can't be opened.
    """
    own_model = {name: run[name] for name in OF_ENCODER if run[name] is not None}
    encoders, of_first = [], dict[str, Any]()
    for text in run.comparison.encoders:
        if text in (SCRATCH, PIXELS):
            encoders.append(Encoder(text, {}))
            continue
        name, file = name_and_file(text)
        path = timm_folder(file.removeprefix(TIMM), folder) if file.startswith(TIMM) else file
        weights = reading.read(path)
        recorded = mae.build.classifier_settings(weights)
        if not recorded:
            raise ValueError(f"--encoders {text}: no model of this library has its shapes")
        if recorded.get("encoder") not in (None, run.model.encoder):  # a file can't make a program import code
            raise ValueError(f"--encoders {text}: it has an encoder of its own: give --encoder {recorded['encoder']}")
        if recorded.get("crop_pct") is None and run.images.crop_pct is None:
            is_explicit = "input_size" in run.explicit
            size = run.images.input_size if is_explicit else recorded.get("input_size", run.images.input_size)
            recorded["crop_pct"] = preprocessing.crop_pct_of_earlier_version(weights, size)
        also = ("mean", "std", "num_cls_tokens")  # with --finetune, the scripts read them from the file
        of_encoder = [name for name in names_of(ModelSpec, ImageSpec) if name not in names_with(HEAD, LABELS)]
        known = {name: recorded[name] for name in of_encoder if name in run and recorded.get(name) is not None}
        own = {key: value for key, value in known.items() if key not in also}
        encoders.append(Encoder(name, {**own, "finetune": path}))
        if not of_first:  # what the scripts read from the file of an encoder
            trained = {name: weights.settings.get(name) for name in FLIPS}
            of_first = known | trained
            if of_first.get("num_cls_tokens") == 1:  # the default
                del of_first["num_cls_tokens"]
    names = Counter(_directory(encoder.name) for encoder in encoders)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"--encoders: two have the name {repeated[0]}; give names, such as long=runs/b/checkpoint-99.pth"
        )
    architecture = of_first or own_model
    if "model" in run.explicit:  # the images are those of the first file
        of_images = names_of(ImageSpec)
        architecture = own_model | {key: value for key, value in of_first.items() if key in of_images}
    return [encoder if encoder.flags else encoder._replace(flags=architecture) for encoder in encoders]


def name_and_file(text: str) -> tuple[str, str]:
    """Splits [NAME=]ENCODER. A path may contain an equals sign.

    Raises:
        ValueError: the name has another meaning.
    """
    name, file = text.split("=", 1) if "=" in text and not Path(text).exists() else ("", text)
    if not name:  # a dot of a model of timm or of a folder begins no suffix
        name = (
            file.removeprefix(TIMM)
            if file.startswith(TIMM)
            else Path(file).name
            if Path(file).is_dir()
            else Path(file).stem
        )
    if not file:
        raise ValueError(f"--encoders {text}: give a file or a published name after the equals sign")
    if _directory(name) in RESERVED:
        raise ValueError(f"--encoders {text}: the name {name} is reserved; give another, such as mine={file}")
    return name, file


def timm_folder(name: str, folder: Path) -> str:
    """Saves a model of timm with its weights as a folder; returns the folder, which `reading.read` reads.

    Raises:
        ValueError: timm does not have the model, or its weights can't be downloaded.
    """
    import timm  # takes more than a second
    from timm.models import save_for_hf

    if not (folder / name / "config.json").exists():
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # of timm, of the Hugging Face Hub and of the network
            near = "" if timm.is_model(name) else did_you_mean(name, timm.list_models("*vit*"))
            raise ValueError(f"--encoders {TIMM}{name}: {str(error).splitlines()[0]}{near}") from error
        save_for_hf(model, str(folder / name))
    return str(folder / name)


class Runs:
    """Runs the scripts of a comparison.

    Args:
        args: the flags of the comparison.
        commands: runs the scripts and keeps their results.
        sizes: the number of training images of each of --labels.
        train, val: the data, for the baselines on raw pixels.
    """

    def __init__(self, run: Run, commands: Commands, sizes: Sequence[int], train: Source, val: Source) -> None:
        self.run, self.commands, self.train, self.val = run, commands, train, val
        self.shared = {name: run[name] for name in SHARED if name in run.explicit - OF_ENCODER}
        self.recipes: dict[str, str] = {}
        for text in run.comparison.recipes:
            protocol, _, name = text.partition("=")
            recipe = recipes.find(name)
            if protocol not in run.comparison.protocols or protocol in self.recipes or not recipe:
                raise ValueError(
                    f"--recipes {text}: give PROTOCOL=YAML once for each of {', '.join(run.comparison.protocols)}"
                )
            if not Path(recipe).is_file():
                raise ValueError(f"--recipes {text}: there is no file {recipe}")
            self.recipes[protocol] = recipe
        self.budgets = dict(zip(sizes, _each("--budget", run.comparison.budget, len(sizes)), strict=True))
        self.chosen: dict[tuple[str, str, int], Flags] = {}
        self.notes: set[str] = set()
        self.metric = next(iter(run.evaluation.metric or DEFAULT_METRICS[run.images.task]), ACCURACY)

    def flags(self, task: Task) -> Flags:
        """Returns the flags of a task, without those that `choose` returns.

        Raises:
            SystemExit: the script refuses them; its message is printed.
            ValueError: there are too few labels for a probe that selects its rate.
        """
        own = {"config": recipe} if (recipe := self.recipes.get(task.protocol)) else PROTOCOLS[task.protocol][1]
        # The images of a recipe are explicit. A recipe serves encoders of several architectures.
        settings = self._settings(task, own)
        of_recipe = settings.explicit & {*names_of(ImageSpec)}
        encoder = {
            name: value for name, value in task.encoder.flags.items() if name in settings and name not in of_recipe
        }
        flags = {**own, **encoder, **self.shared, "seed": task.draw}
        if task.per_class:
            flags["train_per_class"] = task.per_class
        if task.protocol == FINETUNE and "finetune" not in flags:
            flags["layer_decay"] = 1  # no layer has pre-trained weights
        # A probe that selects its rate needs two images for its batch norm, and one that selects.
        if (
            task.protocol in (LINEAR, ATTENTIVE)
            and len(main_linprobe.rates_of(self._settings(task, flags))) > 1
            and task.labels < 3
        ):
            least = len(self.train.classes) * -(-3 // len(self.train.classes))
            raise ValueError(
                f"--labels {task.labels}: --protocols {task.protocol} trains on at least two images, and selects its "
                f"learning rate on another; give --labels {least} or more"
            )
        if task.protocol == KNN and len(temperatures := self._settings(task, flags).evaluation.temperature) > 1:
            values = " ".join(map(str, temperatures))
            raise ValueError(f"--recipes {KNN}={self.recipes[KNN]}: it has the temperatures {values}; give one")
        return {**flags, **self._smaller_batch(task, flags)}

    def choose(self, task: Task) -> None:
        """Chooses the hyperparameters of a cell on held-out training images of this draw; `result` uses them."""
        flags = self.flags(task)
        held_out = {**flags, "val_fraction": VAL_FRACTION}
        chosen: Flags = {}
        if task.protocol == KNN:
            most = min(round(task.labels * (1 - VAL_FRACTION)), task.labels - 1)
            ks = [k for k in self._settings(task, flags).evaluation.k if k <= most] or [1]
            scores = self._run(f"choices/{task.name}", task, {**held_out, "k": ks}) if len(ks) > 1 else {}
            chosen["k"] = self._best(ks, [scores[f"knn_{self.metric}_k{k}"] for k in ks if scores])
        elif task.protocol == FINETUNE:
            epochs = self.budgets[task.labels]
            chosen = {"epochs": epochs, "warmup_epochs": epochs // 10, "eval_every": epochs, "save_every": epochs}
            rates = self.run.optim.blr or []
            assert isinstance(rates, list), "the flag takes several"
            runs = [
                self._run(f"choices/{task.name}/{rate}", task, {**held_out, **chosen, "blr": rate})
                for rate in (rates if len(rates) > 1 else [])
            ]
            if rates:
                chosen["blr"] = self._best(rates, [scores[f"test_{self.metric}"] for scores in runs])
        self.chosen[task.encoder.name, task.protocol, task.labels] = chosen

    def _best(self, values: Sequence[Any], scores: Sequence[float]) -> Any:
        """Returns the value with the best score; without scores, the first."""
        return values[best_of(scores, self.metric in LOWER_IS_BETTER) if scores else 0]

    def result(self, task: Task) -> tuple[Task, Result]:
        """Returns the result of a task, after `choose` for its first draw."""
        if task.encoder.name == PIXELS:
            scores = self._pixels(task)
        else:
            own = self.chosen[task.encoder.name, task.protocol, task.labels]
            scores = self._run(task.name, task, {**self.flags(task), **own})
            names = {"k": own.get("k"), "blr": own.get("blr") or scores.get("chosen_blr")}
            scores["chosen"] = ", ".join(f"{name} {value:g}" for name, value in names.items() if value)
        title = TITLES.get(task.protocol, task.protocol)
        names_of = (f"test_{self.metric}", f"knn_{self.metric}_k")
        score = next(value for name, value in scores.items() if name.startswith(names_of))
        scored = (score, scores["chosen"], scores["seconds"], scores["command"], self.metric)
        return task, Result(task.encoder.name, title, task.labels, task.draw, *scored)

    def _settings(self, task: Task, flags: Flags) -> Run:
        return entry_point.parse(PROTOCOLS[task.protocol][0].get_args_parser(), arguments(flags))

    def _smaller_batch(self, task: Task, flags: Flags) -> Flags:
        """Returns a smaller batch size if the flags give fewer than LEAST_UPDATES updates per epoch."""
        batch_size = self._settings(task, flags).optim.batch_size
        largest = 2 ** max(1, (task.labels // LEAST_UPDATES).bit_length() - 1)
        if task.protocol == KNN or batch_size <= largest:
            return {}
        note = f"{TITLES[task.protocol]} with {task.labels} labels: batches of {largest} images, not {batch_size}"
        if note not in self.notes:
            logger.info(note)
        self.notes.add(note)
        return {"batch_size": largest}

    def _run(self, name: str, task: Task, flags: Flags) -> dict[str, Any]:
        if task.protocol == KNN:
            return self._start(name, task, flags, lambda _, output: from_line(output.strip().splitlines()[-1]))
        out = self.commands.folder / name
        scores = self._start(name, task, {**flags, "output_dir": out, "resume": "auto"}, last_line)
        if not self.run.comparison.keep_checkpoints:
            remove_checkpoints(out)
        return scores

    def _start(
        self, name: str, task: Task, flags: Flags, read: Callable[[Path, str], dict[str, Any]]
    ) -> dict[str, Any]:
        """Runs the script of a protocol. An error names the recipe as the place of the script's own flags."""
        script = Path(str(PROTOCOLS[task.protocol][0].__file__))
        try:
            return self.commands.run(name, script, flags, read)
        except ValueError as error:
            place = f"main_compare.py passes other flags of {script.name} in a recipe: --recipes {task.protocol}=YAML"
            raise ValueError(f"{error}; {place}") from error

    def _pixels(self, task: Task) -> dict[str, Any]:
        """Fits a baseline of scikit-learn on the images of the same draw."""
        flags = {**self.run.record(), **task.encoder.flags, **self.shared}
        images = ImageSpec.of(flags)
        settings = {name: value for name, value in images.record().items() if name in REBUILDS and name in flags}

        def compute(_: Path) -> dict[str, Any]:
            few = some_of_each_class(self.train, task.per_class, task.draw) if task.per_class else self.train
            train, val = (
                (baselines.read(source, images, self.run.data.num_workers), source.labels) for source in (few, self.val)
            )
            accuracy, chosen = baselines.evaluate(task.protocol, *train, *val, seed=task.draw)
            return {"test_acc1": accuracy, "chosen": chosen}

        data = {name: self.run[name] for name in ("data_path", "dataset", "train_list", "val_list")}
        words = shlex.join(arguments({**data, **settings, "seed": task.draw}))
        return self.commands.keep(
            task.name, f"{task.protocol} of scikit-learn on {task.labels} images: {words}", data, compute
        )


def last_line(out: Path, _: str) -> dict[str, Any]:
    """Returns the scores of a run directory."""
    lines = log.read(out)
    scores = {name: value for name, value in lines[-1].items() if name.startswith(("test_", "chosen"))}
    return {**scores, "epochs": len(lines)}


def remove_checkpoints(out: Path) -> None:
    """Removes the checkpoints and stored tokens of a run directory."""
    for path in (*out.glob("*.pth"), *out.glob("tokens")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
