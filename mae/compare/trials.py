"""The trials of a comparison: an encoder is evaluated with a protocol on a random subset of the labels."""

import logging
import math
import shlex
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae.compare import baselines, grids, store
from mae.compare.encoders import ARCHITECTURE, PIXELS, UPDATES, Encoder, directory_of
from mae.compare.protocols import ATTENTIVE, DEFAULTS, GRIDS, KNN, LINEAR, LORA, RANK, RATE_OF_LORA, TITLES, TUNED
from mae.compare.store import Scores, Settings
from mae.compare.summary import ACCURACY, Result
from mae.data import raw_pixels
from mae.data.fingerprint import fingerprint
from mae.data.labels import some_of_each_class
from mae.data.source import Source
from mae.evaluate.metrics import DEFAULT_METRICS, lower_is_better
from mae.files import locks, recipes
from mae.pooling import OF_TIMM
from mae.pooling import TITLES as POOLING_TITLES
from mae.settings import DATASETS, DataSpec, ImageSpec, ModelSpec, Run, names_of
from mae.settings.arguments import arguments
from mae.settings.choices import BOTH, CLASS_TOKEN, PATCHES
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
VAL_FRACTION = 0.2  # of the training images of a draw, held out to choose hyperparameters
LEAST_UPDATES = 3  # of an epoch: batches of few images are smaller


class Size(NamedTuple):
    """A number of labels."""

    labels: int  # number of training images
    per_class: int | None  # of each class; None: all images
    draws: int  # number of random subsets
    epochs: int  # of fine-tuning
    splits: int = 1  # number of draws whose held-out images choose hyperparameters


class Trial(NamedTuple):
    """An encoder, a protocol, a number of labels and a draw."""

    encoder: Encoder
    protocol: str  # for raw pixels the name of the baseline
    size: Size
    draw: int

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return f"{directory_of(self.encoder.name)}/{directory_of(self.protocol)}/{self.size.labels}/{self.draw}"


class Trials:
    """Runs the scripts of a comparison in this process.

    Args:
        spec: what is compared.
        given: the settings of the comparison.
        explicit: the names of the explicit ones.
        scripts: the script of each protocol.
        folder: the run directories. Results in them are kept.
        train, val: the data, for the baselines on raw pixels.
        readable: function(source) that leaves out the images that can't be read.
        spares_stand_in: training images take the place of a missing validation set. They choose nothing.
    """

    def __init__(
        self, spec: ComparisonSpec, given: Settings, explicit: frozenset[str], scripts: Mapping[str, store.Script],
        folder: Path, train: Source, val: Source, readable: Callable[[Source], Source], spares_stand_in: bool = False,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.given = given
        self.scripts = scripts
        self.folder = folder
        self.train = train
        self.val = val
        self.readable = readable
        # All scores depend on these. Digests of names and labels are the same on all machines, and for a moved dataset.
        self.validation: Settings = {"spares_stand_in": True} if spares_stand_in else {}
        self.images = [fingerprint(source, with_labels=True) for source in (train, val)]
        self.shared = {name: given[name] for name in SHARED if name in explicit and name not in ARCHITECTURE}
        self.updates = {name: given[name] for name in UPDATES if name in explicit}
        self.recipes = _recipes_of(spec)
        for protocol, recipe in self.recipes.items():
            if ignored := sorted(OF_COMPARISON & scripts[protocol].settings({"config": recipe}).explicit):
                names = " ".join(f"`{name}`" for name in ignored)
                logger.info(f"{recipe}: the comparison has its own {names}")
        self.metric = next(iter(given.get("metric") or DEFAULT_METRICS[given["task"]]), ACCURACY)

    def settings(self, trial: Trial) -> Settings:
        """Returns the settings of a trial, without the hyperparameters that are chosen on held-out images.

        Raises:
            SystemExit: the script refuses them; its message is printed.
            ValueError: a recipe has several temperatures, or the learning rate of a probe.
        """
        if trial.encoder.name == PIXELS:
            return self._settings_of_pixels(trial)
        script = self.scripts[trial.protocol]
        recipe = self.recipes.get(trial.protocol)
        first: Settings = {"config": recipe} if recipe else DEFAULTS[trial.protocol]
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
        if trial.protocol == KNN and len(run.evaluation.temperature) > 1:
            text = f"{KNN}={recipe}"
            raise ValueError(f"recipes={as_yaml(text)}: it has the temperatures {run.evaluation.temperature}; give one")
        if trial.protocol in (LINEAR, ATTENTIVE) and run.optim.lr is not None:
            text = f"{trial.protocol}={recipe}"
            raise ValueError(f"recipes={as_yaml(text)}: it has lr={run.optim.lr:g}; give `blr`, one rate or several")
        largest = 2 ** max(1, (trial.size.labels // LEAST_UPDATES).bit_length() - 1)
        if trial.protocol != KNN and run.optim.batch_size > largest:
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
        title = f"{trial.protocol} of scikit-learn on {trial.size.labels} images"
        names = [name for name in (*DATASETS, *names_of(ImageSpec)) if name in given]
        return {"baseline": title, **{name: given[name] for name in names}, "seed": trial.draw}

    def result(self, trial: Trial) -> Result:
        """Returns the result of a trial. Held-out images of the first draw, or the first draws, choose hyperparameters.

        Raises:
            locks.Busy: another process computes it, or chooses the hyperparameters.
        """
        if trial.encoder.name == PIXELS:
            scores, command = self._fit_pixels(trial)
            score = scores["test_acc1"]
            chosen = scores["chosen"]
        else:
            pooling, value = self._choose(trial._replace(draw=0))
            name = GRIDS[trial.protocol]
            hyperparameters = {} if value is None else {name: value}
            scores, command = self._run(trial.name, trial, hyperparameters | _settings_of_pooling(pooling))
            score = scores[f"{self.metric}_k{value}" if name == "k" else f"test_{self.metric}"]
            texts = ["" if value is None else f"{name} {value:g}", POOLING_TITLES.get(pooling, "")]
            chosen = ", ".join(filter(None, texts))
        title = TITLES.get(trial.protocol, trial.protocol)
        return Result(
            trial.encoder.name, title, trial.size.labels, trial.draw, score, chosen, scores["seconds"], command,
            self.metric, scores.get("trained_parameters"), scores.get("peak_memory_gb"),
        )  # fmt: skip

    def _choose(self, trial: Trial) -> tuple[str, Any]:
        """Chooses the pooling and the value of the grid on held-out training images, by the mean over the splits.

        Returns:
            The pooling, "" if the protocol does not pool features; and the value, None if there is no grid.
        """
        run = self.scripts[trial.protocol].settings(self.settings(trial))
        poolings = _poolings_of(trial, run.model, "global_pool" in run.explicit)
        values, least, most = self._grid_of(trial, run.evaluation.k, run.optim.blr)
        if not values or len(poolings) == len(values) == 1:
            return poolings[0], values[0] if values else None
        draws = [trial._replace(draw=draw) for draw in range(trial.size.splits)]

        def scores_of(pooling: str, values: Sequence[Any]) -> Scores:
            found = [self._held_out_scores(one, pooling, values) for one in draws]
            return {value: statistics.fmean(scores[value] for scores in found) for value in values}

        chosen = grids.choose(poolings, values, scores_of, lower_is_better(self.metric), least, most)
        for one in draws:
            shutil.rmtree(self._features_of(one), ignore_errors=True)
        return chosen

    def _features_of(self, trial: Trial) -> Path:
        return self.folder / f"choices/{trial.name}/features"

    def _held_out_scores(self, trial: Trial, pooling: str, values: Sequence[Any]) -> Scores:
        """Returns the scores of values of the grid on held-out training images of a draw."""
        folder = f"choices/{trial.name}"
        kept = self._features_of(trial)
        settings = {"val_fraction": VAL_FRACTION, **_settings_of_pooling(pooling)}
        name = f"{folder}/{pooling}" if pooling else folder
        if trial.protocol == KNN:
            scores = self._run(f"{name}/{'-'.join(map(str, values))}", trial, settings | {"k": [*values]}, kept)[0]
            return {k: scores[f"{self.metric}_k{k}"] for k in values}
        return {rate: self._score_of(f"{name}/{rate}", trial, settings | {"blr": rate}, kept) for rate in values}

    def _grid_of(
        self, trial: Trial, ks: Sequence[int], blr: float | list[float] | None
    ) -> tuple[list[Any], float, float]:
        """Returns the values to choose from, and the limits of such values. `ks`, `blr`: settings of the script."""
        if trial.protocol == KNN:
            most = max(1, min(round(trial.size.labels * (1 - VAL_FRACTION)), trial.size.labels - 1))
            return [k for k in ks if k <= most] or [1], 1, most
        rates: Any = self.given["blr"] if trial.protocol in TUNED else blr  # the flag is for fine-tuning
        if trial.protocol == LORA and rates:
            rates = [float(f"{RATE_OF_LORA * rate:g}") for rate in rates]
        return (rates if isinstance(rates, list) else [rates] if rates else []), 0, math.inf

    def _score_of(self, name: str, trial: Trial, hyperparameters: Settings, kept: Path) -> float:
        """Returns the score of a rate: NaN, the worst, if the training diverges, as an extended grid may show."""
        try:
            return self._run(name, trial, hyperparameters, kept)[0][f"test_{self.metric}"]
        except ValueError as error:
            if not _has_diverged(error):
                raise
            shutil.rmtree(self.folder / name)  # the next comparison does not resume from the state before
            return math.nan

    def _run(self, name: str, trial: Trial, hyperparameters: Settings, kept: Path | None = None) -> tuple[Scores, str]:
        """Runs the script of a protocol; returns its scores and its command.

        Args:
            kept: folder of the features of a frozen encoder, which several runs read.
        """
        script = self.scripts[trial.protocol]
        out = self.folder / name
        settings = self.settings(trial) | hyperparameters
        if trial.protocol != KNN:
            settings |= {"output_dir": out, "resume": "auto"}
        options = dict(self.validation)
        if kept and trial.protocol not in TUNED:
            options["features"] = kept
            if trial.protocol != KNN:
                settings["cache_features"] = True
        try:
            scores = store.run_once(out, script, settings, self._scores, options, {"images": self.images})
        except locks.Busy:
            raise
        except ValueError as error:  # it may name a flag that the comparison does not have
            recipe = f"{trial.protocol}=YAML"
            raise ValueError(f"{error}; recipes={as_yaml(recipe)} passes other flags to {script.name}.py") from error
        if not self.spec.keep_checkpoints:
            for path in (*out.glob("*.pth"), *out.glob("tokens")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return scores, shlex.join(["python", f"{script.name}.py", *arguments(settings)])

    def _scores(self, out: Path, returned: Any) -> Scores:
        """Returns the scores of the neighbors that `main` has returned, or those in the last line of log.txt."""
        if isinstance(returned, Mapping):
            return {f"{self.metric}_k{k}": score for (k, _), score in returned.items()} | {"trained_parameters": 0}
        epochs = log.read(out)
        last = epochs[-1]
        scores = {name: value for name, value in last.items() if name.startswith(("test_", "chosen"))}
        memory = [epoch["peak_memory_gb"] for epoch in epochs if "peak_memory_gb" in epoch]  # with CUDA
        scores |= {"peak_memory_gb": max(memory)} if memory else {}
        return scores | {"trained_parameters": last["n_parameters"]}

    def _fit_pixels(self, trial: Trial) -> tuple[Scores, str]:
        """Fits a baseline of scikit-learn on the images of the same draw; returns its scores and a description."""
        settings = self.settings(trial)
        per_class = trial.size.per_class

        def compute(_: Path) -> Scores:
            few = self.readable(some_of_each_class(self.train, per_class, trial.draw) if per_class else self.train)
            images = ImageSpec.of(settings)
            workers = self.given["num_workers"]
            train, val = ((raw_pixels.read(source, images, workers), source.labels) for source in (few, self.val))
            accuracy, chosen = baselines.evaluate(trial.protocol, *train, *val, seed=trial.draw)
            return {"test_acc1": accuracy, "chosen": chosen}

        depends_on = settings | self.validation | {"images": self.images, "pixels": raw_pixels.VERSION}
        scores = store.kept(self.folder / trial.name, depends_on, compute)
        return scores, f"{settings.pop('baseline')}: {shlex.join(arguments(settings))}"


def _poolings_of(trial: Trial, spec: ModelSpec, is_given: bool) -> Sequence[str]:
    """Returns the poolings to choose from; [""] for a protocol that does not pool features, or a recipe with `pool`.

    Args:
        spec: of the trial, perhaps by a recipe.
        is_given: a recipe gives `global_pool`.
    """
    if trial.protocol not in (KNN, LINEAR) or spec.pool:
        return [""]
    if is_given and OF_TIMM not in trial.encoder.poolings:
        return [PATCHES if spec.global_pool else CLASS_TOKEN]
    return trial.encoder.poolings


def _has_diverged(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is that of a loss that is not finite."""
    return error is not None and (isinstance(error, NonFiniteLoss) or _has_diverged(error.__cause__))


def _settings_of_pooling(pooling: str) -> Settings:
    if pooling == BOTH:
        return {"pool": BOTH}
    return {"global_pool": pooling == PATCHES} if pooling in (CLASS_TOKEN, PATCHES) else {}


def _recipes_of(spec: ComparisonSpec) -> dict[str, str]:
    """Returns the recipe of each protocol that has one.

    Raises:
        ValueError: --recipes names another protocol, or one twice.
    """
    paths: dict[str, str] = {}
    for text in spec.recipes:
        protocol, _, name = text.partition("=")
        recipe = recipes.find(name)
        if protocol not in spec.protocols or protocol in paths or not recipe:
            protocols = ", ".join(spec.protocols)
            raise ValueError(f"recipes={as_yaml(text)}: give PROTOCOL=YAML once for each of {protocols}")
        paths[protocol] = recipe
    return paths
