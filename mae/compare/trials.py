"""The trials of a comparison: an encoder is evaluated with a protocol on a random subset of the labels."""

import logging
import math
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from mae.compare import choices, store
from mae.compare.encoders import ARCHITECTURE, PIXELS, UPDATES, Encoder, directory_of
from mae.compare.images import Images, Size
from mae.compare.predictors import BASELINES, SVM, SVR, USES, Predictor
from mae.compare.protocols import (
    ATTENTIVE,
    DEFAULTS,
    FITTED,
    KNN,
    LINEAR,
    LORA,
    RANK,
    RATE_OF_LORA,
    TITLES,
    TUNED,
    row_of,
)
from mae.compare.store import Scores, Settings
from mae.compare.summary import ACCURACY, Result, ResultKey
from mae.data import raw_pixels
from mae.data.fingerprint import fingerprint
from mae.data.run_data import RunData
from mae.data.source import Source
from mae.evaluate.metrics import DEFAULT_METRICS, lower_is_better
from mae.evaluate.tasks import best_of
from mae.files import locks, recipes
from mae.pooling import TITLES as POOLING_TITLES
from mae.settings import DATASETS, DataSpec, ImageSpec, ModelSpec, Run, names_of
from mae.settings.arguments import arguments
from mae.settings.choices import POOL_CHOICES
from mae.settings.training import ComparisonSpec
from mae.settings.values import as_yaml
from mae.training import log
from mae.training.nonfinite import NonFiniteLoss

logger = logging.getLogger(__name__)

# Settings of which a comparison has one value, or one for each encoder and draw. It ignores those of a recipe.
OF_COMPARISON = {
    *DATASETS, "finetune", "task", "label_columns", "metric", "nb_classes", "train_per_class", "val_fraction",
}  # fmt: skip
# Settings that all scripts share; the comparison passes those that are given.
SHARED = [*names_of(ModelSpec, ImageSpec, DataSpec), "device", "amp", "metric"]
FEATURES = "features"  # the folder of stored features
VAL_FRACTION = 0.2  # of the training images of a draw, held out to choose hyperparameters
LEAST_UPDATES = 3  # of an epoch: batches of few images are smaller
FEW = 5_000  # labels. The products of their fits are small: waiting for other threads takes longer
# Baselines on more labels are left out if a fit would take longer than MOST_SECONDS.
MANY = 10_000
MOST_SECONDS = 600


class Trial(NamedTuple):
    """An encoder, a protocol, a number of labels and a draw."""

    encoder: Encoder
    protocol: str  # for raw pixels the title of the baseline
    size: Size
    draw: int

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return f"{directory_of(self.encoder.name)}/{directory_of(self.protocol)}/{self.size.labels}/{self.draw}"

    @property
    def key(self) -> ResultKey:
        """The key of its result."""
        return row_of(self.encoder.name, self.protocol), self.size.labels, self.draw


class Trials:
    """Runs the scripts of a comparison in this process, and fits predictors on features and on pixels.

    Args:
        run: the settings of the comparison.
        sizes: the numbers of labels.
        scripts: the script of each protocol.
        folder: the run directories. Results in them are kept.
        data, train, val: the data.
        spares_stand_in: training images take the place of a missing validation set. They choose nothing.
    """

    def __init__(
        self, run: Run, sizes: Sequence[Size], scripts: Mapping[str, store.Script], folder: Path, data: RunData,
        train: Source, val: Source, spares_stand_in: bool,
    ) -> None:  # fmt: skip
        self.run = run
        self.spec = run.comparison
        self.given = given = run.record()
        explicit = run.explicit
        self.sizes = sizes
        self.scripts = scripts
        self.folder = folder
        self.data = data
        self.train = train
        self.val = val
        self.features: dict[str, dict[str, list[np.ndarray]]] = {}  # by encoder and pooling: of training, of validation
        # All scores depend on these. Digests of names and labels are the same on all machines, and for a moved dataset.
        self.validation: Settings = {"spares_stand_in": True} if spares_stand_in else {}
        self.digests = [fingerprint(source, with_labels=True) for source in (train, val)]
        self.shared = {name: given[name] for name in SHARED if name in explicit and name not in ARCHITECTURE}
        self.updates = {name: given[name] for name in UPDATES if name in explicit}
        self.recipes = _recipes_of(self.spec)
        for protocol, recipe in self.recipes.items():
            if ignored := sorted(OF_COMPARISON & scripts[protocol].settings({"config": recipe}).explicit):
                names = " ".join(f"`{name}`" for name in ignored)
                logger.info(f"{recipe}: the comparison has its own {names}")
        self.metric = next(iter(given.get("metric") or DEFAULT_METRICS[given["task"]]), ACCURACY)

    @cached_property
    def images(self) -> Images:
        """The images of all draws."""
        return Images(self.run, self.data, self.train, self.val, self.sizes)

    def settings(self, trial: Trial) -> Settings:
        """Returns the settings of a trial, without the hyperparameters that are chosen on held-out images.

        Raises:
            SystemExit: the script refuses them; its message is printed.
            ValueError: a recipe has the learning rate of a probe.
        """
        if trial.encoder.name == PIXELS:
            return self._settings_of_pixels(trial)
        script = self.scripts[trial.protocol]
        recipe = self.recipes.get(trial.protocol)
        first: Settings = {"config": recipe} if recipe else DEFAULTS.get(trial.protocol, {})
        # The images of a recipe are explicit. A recipe serves encoders of several architectures.
        run = script.settings(first)
        if ignored := run.explicit & {*OF_COMPARISON, *trial.encoder.without}:  # a recipe may name another model
            first = {name: run[name] for name in run.explicit - {"config", *ignored}}
        of_encoder = run.names - run.explicit.intersection(names_of(ImageSpec))
        if trial.protocol in TUNED:
            of_encoder -= {*UPDATES}
        settings = first | {name: value for name, value in trial.encoder.settings.items() if name in of_encoder}
        shared = {name: value for name, value in self.shared.items() if name not in trial.encoder.without}
        settings |= shared | {"seed": trial.draw}
        if trial.size.per_class:
            settings["train_per_class"] = trial.size.per_class
        if trial.protocol in TUNED:
            settings |= self._updates(trial, run)
            epochs = trial.size.epochs
            settings |= {"epochs": epochs, "warmup_epochs": epochs // 10, "eval_every": epochs, "save_every": epochs}
        run = script.settings(settings)
        if trial.protocol == ATTENTIVE and run.optim.lr is not None:
            text = f"{trial.protocol}={recipe}"
            raise ValueError(f"recipes={as_yaml(text)}: it has lr={run.optim.lr:g}; give `blr`, one rate or several")
        largest = 2 ** max(1, (trial.size.labels // LEAST_UPDATES).bit_length() - 1)
        if trial.protocol not in FITTED and run.optim.batch_size > largest:
            settings["batch_size"] = largest
        return settings

    def _updates(self, trial: Trial, first: Run) -> Settings:
        """Returns the low-rank updates of a training. Those of the file are merged into its weights.

        Args:
            first: the settings of the protocol.
        """
        if trial.protocol == LORA:
            return ({} if first.model.lora else {"lora": RANK}) | self.updates
        has_updates = trial.encoder.settings.get("lora")
        return {"lora": 0} if has_updates and "lora" not in first.explicit else {}

    def _settings_of_pixels(self, trial: Trial) -> Settings:
        """Returns the data and the images of a baseline."""
        given = {**self.given, **trial.encoder.settings, **self.shared}
        names = [name for name in (*DATASETS, *names_of(ImageSpec)) if name in given]
        return {**{name: given[name] for name in names}, "seed": trial.draw}

    def result(self, trial: Trial) -> Result | str:
        """Returns the result of a trial, whose labels choose its hyperparameters; or why a baseline is left out.

        Raises:
            locks.Busy: another process computes it, or the features of the encoder.
        """
        is_pixels = trial.encoder.name == PIXELS
        if is_pixels and trial.size.labels > MANY and (seconds := self._estimate(trial)) > MOST_SECONDS:
            return f"with {trial.size.labels:,} labels, a fit would take about {seconds / 60:,.0f} minutes"
        if is_pixels or trial.protocol in FITTED:
            scores, command = self._fit(trial)
            chosen = scores["chosen"]
        else:
            rate = self._choose_rate(trial)
            scores, command = self._run(trial.name, trial, {} if rate is None else {"blr": rate})
            chosen = "" if rate is None else f"blr {rate:g}"
        title = TITLES.get(trial.protocol, trial.protocol)
        return Result(
            trial.encoder.name, title, trial.size.labels, trial.draw, scores[f"test_{self.metric}"], chosen,
            scores["seconds"], command, self.metric, scores.get("trained_parameters"), scores.get("peak_memory_gb"),
        )  # fmt: skip

    def _choose_rate(self, trial: Trial) -> float | None:
        """Chooses the base learning rate on a held-out fifth of the images of the draw; None if there is none.

        A grid of several rates that ends at its best is extended, as in `choices.choose`.
        """
        blr = self.scripts[trial.protocol].settings(self.settings(trial)).optim.blr
        rates: Any = self.given["blr"] if trial.protocol in TUNED else blr  # the flag is for fine-tuning
        if trial.protocol == LORA and rates:
            rates = [float(f"{RATE_OF_LORA * rate:g}") for rate in rates]
        if not isinstance(rates, list) or len(rates) == 1:
            return rates[0] if isinstance(rates, list) else rates
        tokens = self.folder / f"choices/{trial.name}/features"
        grid = sorted(rates)
        found: dict[float, float] = {}
        for _ in range(choices.MOST_EXTENSIONS + 1):
            found |= {rate: self._held_out_score(trial, rate, tokens) for rate in grid if rate not in found}
            ordered = sorted(found, key=lambda rate: choices.inner([grid], (rate,)), reverse=True)
            best = ordered[best_of([found[rate] for rate in ordered], lower_is_better(self.metric))]
            if not choices.extend([grid], (best,)):
                break
        shutil.rmtree(tokens, ignore_errors=True)
        return best

    def _held_out_score(self, trial: Trial, rate: float, tokens: Path) -> float:
        """Returns the score of a rate: NaN, the worst, if the training diverges, as an extended grid may show."""
        name = f"choices/{trial.name}/{rate}"
        try:
            scores, _ = self._run(name, trial, {"val_fraction": VAL_FRACTION, "blr": rate}, tokens)
        except ValueError as error:
            if not _has_diverged(error):
                raise
            shutil.rmtree(self.folder / name)  # the next comparison does not resume from the state before
            return math.nan
        return scores[f"test_{self.metric}"]

    def _run(self, name: str, trial: Trial, hyperparameters: Settings, kept: Path | None = None) -> tuple[Scores, str]:
        """Runs the script of a protocol; returns its scores and its command.

        Args:
            kept: folder of the tokens of a frozen encoder, which several runs read.
        """
        script = self.scripts[trial.protocol]
        out = self.folder / name
        settings = self.settings(trial) | hyperparameters | {"output_dir": out, "resume": "auto"}
        options = dict(self.validation)
        if kept and trial.protocol == ATTENTIVE:
            options["features"] = kept
            settings["cache_features"] = True
        try:
            scores = store.run_once(out, script, settings, self._scores, options, {"images": self.digests})
        except locks.Busy:
            raise
        except ValueError as error:  # it may name a flag that the comparison does not have
            recipe = f"{trial.protocol}=YAML"
            raise ValueError(f"{error}; recipes={as_yaml(recipe)} passes other flags to {script.name}.py") from error
        if not self.spec.keep_checkpoints:
            for path in (*out.glob("*.pth"), *out.glob("tokens")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return scores, shlex.join(["python", f"{script.name}.py", *arguments(settings)])

    def _scores(self, out: Path, _returned: Any) -> Scores:
        """Returns the scores in the last line of log.txt."""
        epochs = log.read(out)
        last = epochs[-1]
        scores = {name: value for name, value in last.items() if name.startswith(("test_", "chosen"))}
        memory = [epoch["peak_memory_gb"] for epoch in epochs if "peak_memory_gb" in epoch]  # with CUDA
        scores |= {"peak_memory_gb": max(memory)} if memory else {}
        return scores | {"trained_parameters": last["n_parameters"]}

    def _predictor_of(self, trial: Trial) -> Predictor:
        task = self.given["task"]
        if trial.protocol in FITTED:
            return USES[task][TITLES[trial.protocol]]
        return next(each for each in BASELINES[task] if each.title == trial.protocol)

    def _features_of(self, trial: Trial) -> dict[str, list[np.ndarray]]:
        """Returns features of the images of all draws and of the validation images, by pooling; or their pixels.

        Raises:
            locks.Busy: another process computes them.
        """
        encoder = trial.encoder
        if encoder.name not in self.features:
            self.features[encoder.name] = self._read_pixels(trial) if encoder.name == PIXELS else self._encode(trial)
        return self.features[encoder.name]

    def _read_pixels(self, trial: Trial) -> dict[str, list[np.ndarray]]:
        spec = ImageSpec.of(self.settings(trial))
        sets = (self.images.train, self.images.val)
        return {"": [raw_pixels.read(source, spec, self.given["num_workers"]) for source in sets]}

    def _encode(self, trial: Trial) -> dict[str, list[np.ndarray]]:
        settings = self.settings(trial) | {"seed": 0}  # random weights are those of all draws
        settings.pop("train_per_class", None)
        name = directory_of(trial.encoder.name)
        with locks.locked(self.folder / FEATURES, f"{name}.lock"):
            return self.scripts[trial.protocol].call_main(
                settings, self.folder / FEATURES / f"{name}.txt", train=self.images.train, val=self.images.val,
                kept=self.folder / FEATURES / name,
            )  # fmt: skip

    def remove_features(self) -> None:
        """Removes the stored features, once all trials have a result."""
        shutil.rmtree(self.folder / FEATURES, ignore_errors=True)

    def _fit(self, trial: Trial) -> tuple[Scores, str]:
        """Fits a predictor on the images of the draw; returns its scores, and its command or a description."""
        predictor = self._predictor_of(trial)

        def compute(_: Path) -> Scores:
            features = self._features_of(trial)
            rows = self.images.rows_of(trial.size, trial.draw)
            targets = self.images.targets[rows]
            banks = {name: bank[rows] for name, (bank, _) in features.items()}
            with threadpool_limits(1 if len(targets) < FEW else None):
                choice = choices.choose(predictor, banks, targets, trial.draw, self.given["task"], self.metric)
                bank = banks[choice.option]
                queries = features[choice.option][1]
                (outputs,) = predictor.predict(bank, targets, queries, [choice.values])
            score = self.images.score_of(outputs, "k" in predictor.names)
            texts = [predictor.in_words(choice.values), POOLING_TITLES.get(choice.option, ""), choice.note]
            return {
                f"test_{self.metric}": score, "chosen": ", ".join(filter(None, texts)), "pooling": choice.option,
                "values": choice.values, "images": len(targets), "width": bank.shape[1],
            }  # fmt: skip

        settings = self.settings(trial)
        scores = store.kept(self.folder / trial.name, self._inputs_of(trial), compute)
        classes = len(self.val.classes)
        if trial.protocol == KNN and trial.encoder.settings.get("finetune"):  # its features do not depend on the seed
            settings["k"] = min(int(scores["values"][0]), scores["images"])
            if scores["pooling"] in POOL_CHOICES:
                settings["pool"] = scores["pooling"]
            command = shlex.join(["python", f"{self.scripts[KNN].name}.py", *arguments(settings)])
        else:
            command = f"{predictor.title} on {scores['images']} images: {shlex.join(arguments(settings))}"
        trained = {KNN: 0, LINEAR: (scores["width"] + 1) * classes}
        return scores | {"trained_parameters": trained.get(trial.protocol)}, command

    def _inputs_of(self, trial: Trial) -> Settings:
        """Returns what the scores of a fit depend on."""
        of_pixels = {"pixels": raw_pixels.VERSION} if trial.encoder.name == PIXELS else {}
        predictor = {"predictor": self._predictor_of(trial).title}
        return self.settings(trial) | self.validation | predictor | {"images": self.digests} | of_pixels

    def _estimate(self, trial: Trial) -> float:
        """Returns about how many seconds a fit of a baseline takes, by that of a part of the first draw's images."""
        first = trial._replace(draw=0)
        predictor = self._predictor_of(trial)

        def measure(_: Path) -> Scores:
            rows = np.arange(len(self.images.targets))[self.images.rows_of(trial.size, 0)]
            part = rows[choices.stratified(self.images.targets[rows], choices.MOST, 0)]
            bank = self._features_of(first)[""][0]
            begin = time.perf_counter()
            predictor.predict(bank[part], self.images.targets[part], bank[part][:1], [predictor.default])
            growth = (len(rows) / len(part)) ** (2 if predictor in (SVM, SVR) else 1)
            return {"fit_seconds": growth * (time.perf_counter() - begin)}

        folder = self.folder / "choices" / first.name
        return store.kept(folder, self._inputs_of(first), measure)["fit_seconds"]


def _has_diverged(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is that of a loss that is not finite."""
    return error is not None and (isinstance(error, NonFiniteLoss) or _has_diverged(error.__cause__))


def _recipes_of(spec: ComparisonSpec) -> dict[str, str]:
    """Returns the recipe of each protocol that has one.

    Raises:
        ValueError: --recipes names a protocol that trains nothing or is not compared, or one twice.
    """
    paths: dict[str, str] = {}
    for text in spec.recipes:
        protocol, _, name = text.partition("=")
        recipe = recipes.find(name)
        trained = [name for name in spec.protocols if name not in FITTED]
        if protocol not in trained or protocol in paths or not recipe:
            some = f"give PROTOCOL=YAML once for each of {', '.join(trained)}" if trained else "omit it"
            raise ValueError(f"recipes={as_yaml(text)}: {' and '.join(FITTED)} are no trainings; {some}")
        paths[protocol] = recipe
    return paths
