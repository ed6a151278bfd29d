"""The trials of a comparison: an encoder is evaluated with a protocol on a random subset of the labels."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mae.compare import baselines, store
from mae.compare.encoders import ARCHITECTURE, PIXELS, Encoder, directory_of
from mae.compare.store import Scores, Settings
from mae.compare.summary import ACCURACY, Result
from mae.data.labels import some_of_each_class
from mae.data.source import Source
from mae.evaluate.metrics import LOWER_IS_BETTER
from mae.evaluate.tasks import best_of
from mae.files import locks, recipes
from mae.settings import DATASETS, DataSpec, ImageSpec, ModelSpec, Run, names_of
from mae.settings.arguments import arguments
from mae.settings.choices import DEFAULT_METRICS
from mae.settings.values import as_yaml
from mae.training import log

KNN, LINEAR, ATTENTIVE, FINETUNE = "knn", "linear", "attentive", "finetune"
TITLES = {KNN: "k-NN", LINEAR: "linear probe", ATTENTIVE: "attentive probe", FINETUNE: "fine-tuned"}
PROBE = {"cache_features": True, "epochs": 60, "warmup_epochs": 5, "batch_size": 256,
         "eval_every": 60, "save_every": 60}  # fmt: skip
# The settings of each protocol without a recipe.
DEFAULTS: dict[str, Settings] = {
    KNN: {"global_pool": True, "k": [5, 20, 100]},
    LINEAR: {**PROBE, "blr": [0.3, 1, 3, 10, 30, 100], "global_pool": True},
    ATTENTIVE: {**PROBE, "blr": [0.3, 1, 3, 10, 30], "probe": "attentive"},
    FINETUNE: {"batch_size": 128},
}
# Settings that all scripts share; the comparison passes those that are given.
SHARED = [*names_of(ModelSpec, ImageSpec, DataSpec), "device", "amp", "metric"]
VAL_FRACTION = 0.2  # of the training images of the first draw, held out to choose hyperparameters
LEAST_UPDATES = 3  # of an epoch: batches of few images are smaller


class Size(NamedTuple):
    """A number of labels."""

    labels: int  # number of training images
    per_class: int | None  # of each class; None: all images
    draws: int  # number of random subsets
    epochs: int  # of fine-tuning


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
        run: the settings of the comparison.
        scripts: the script of each protocol.
        folder: the run directories. Results in them are kept.
        train, val: the data, for the baselines on raw pixels.
    """

    def __init__(self, run: Run, scripts: Mapping[str, store.Script], folder: Path, train: Source, val: Source) -> None:
        self.run, self.scripts, self.folder = run, scripts, folder
        self.train, self.val = train, val
        self.shared = {name: run[name] for name in SHARED if name in run.explicit and name not in ARCHITECTURE}
        self.recipes = _recipes_of(run)
        self.metric = next(iter(run.evaluation.metric or DEFAULT_METRICS[run.images.task]), ACCURACY)

    def settings(self, trial: Trial) -> Settings:
        """Returns the settings of a trial, without the hyperparameters that are chosen on held-out images.

        Raises:
            SystemExit: the script refuses them; its message is printed.
            ValueError: a recipe has several temperatures.
        """
        if trial.encoder.name == PIXELS:
            return self._settings_of_pixels(trial)
        script, recipe = self.scripts[trial.protocol], self.recipes.get(trial.protocol)
        first: Settings = {"config": recipe} if recipe else DEFAULTS[trial.protocol]
        # The images of a recipe are explicit. A recipe serves encoders of several architectures.
        run = script.settings(first)
        if trial.encoder.without:  # a recipe may name another model
            first = {name: run[name] for name in run.explicit - {"config", *trial.encoder.without}}
        of_encoder = run.names - run.explicit.intersection(names_of(ImageSpec))
        settings = first | {name: value for name, value in trial.encoder.settings.items() if name in of_encoder}
        shared = {name: value for name, value in self.shared.items() if name not in trial.encoder.without}
        settings |= shared | {"seed": trial.draw}
        if trial.size.per_class:
            settings["train_per_class"] = trial.size.per_class
        if trial.protocol == FINETUNE:
            epochs = trial.size.epochs
            settings |= {"epochs": epochs, "warmup_epochs": epochs // 10, "eval_every": epochs, "save_every": epochs}
        run = script.settings(settings)
        if trial.protocol == KNN and len(run.evaluation.temperature) > 1:
            text = f"{KNN}={recipe}"
            raise ValueError(f"recipes={as_yaml(text)}: it has the temperatures {run.evaluation.temperature}; give one")
        largest = 2 ** max(1, (trial.size.labels // LEAST_UPDATES).bit_length() - 1)
        if trial.protocol != KNN and run.optim.batch_size > largest:
            settings["batch_size"] = largest
        return settings

    def _settings_of_pixels(self, trial: Trial) -> Settings:
        """Returns the data and the images of a baseline."""
        given = {**self.run.record(), **trial.encoder.settings, **self.shared}
        title = f"{trial.protocol} of scikit-learn on {trial.size.labels} images"
        names = [name for name in (*DATASETS, *names_of(ImageSpec)) if name in given]
        return {"baseline": title, **{name: given[name] for name in names}, "seed": trial.draw}

    def result(self, trial: Trial) -> Result:
        """Returns the result of a trial. Its hyperparameters are chosen on held-out images of the first draw.

        Raises:
            locks.Busy: another process computes it, or chooses the hyperparameters.
        """
        if trial.encoder.name == PIXELS:
            scores, command = self._fit_pixels(trial)
            score, chosen = scores["test_acc1"], scores["chosen"]
        else:
            hyperparameters = self._choose(trial._replace(draw=0))
            scores, command = self._run(trial.name, trial, hyperparameters)
            k, rate = hyperparameters.get("k"), hyperparameters.get("blr") or scores.get("chosen_blr")
            score = scores[f"{self.metric}_k{k}" if k else f"test_{self.metric}"]
            chosen = f"k {k}" if k else f"blr {rate:g}" if rate else ""
        title = TITLES.get(trial.protocol, trial.protocol)
        return Result(
            trial.encoder.name, title, trial.size.labels, trial.draw, score, chosen, scores["seconds"], command,
            self.metric,
        )  # fmt: skip

    def _choose(self, trial: Trial) -> Settings:
        """Chooses the hyperparameters of an encoder, a protocol and a number of labels on held-out training images."""
        choices, held_out = f"choices/{trial.name}", {"val_fraction": VAL_FRACTION}
        if trial.protocol == KNN:
            most = min(round(trial.size.labels * (1 - VAL_FRACTION)), trial.size.labels - 1)
            numbers = self.scripts[KNN].settings(self.settings(trial)).evaluation.k
            ks = [k for k in numbers if k <= most] or [1]
            if len(ks) == 1:
                return {"k": ks[0]}
            scores = self._run(choices, trial, held_out | {"k": ks})[0]
            return {"k": self._best({k: scores[f"{self.metric}_k{k}"] for k in ks})}
        rates: Any = self.run.optim.blr  # the flag takes several
        if trial.protocol != FINETUNE or not rates:
            return {}  # a probe trains a head for each rate
        if len(rates) == 1:
            return {"blr": rates[0]}
        runs = {rate: self._run(f"{choices}/{rate}", trial, held_out | {"blr": rate})[0] for rate in rates}
        return {"blr": self._best({rate: scores[f"test_{self.metric}"] for rate, scores in runs.items()})}

    def _best(self, scores: Mapping[Any, float]) -> Any:
        """Returns the value with the best score."""
        return list(scores)[best_of(list(scores.values()), self.metric in LOWER_IS_BETTER)]

    def _run(self, name: str, trial: Trial, hyperparameters: Settings) -> tuple[Scores, str]:
        """Runs the script of a protocol; returns its scores and its command."""
        script, out = self.scripts[trial.protocol], self.folder / name
        settings = self.settings(trial) | hyperparameters
        if trial.protocol != KNN:
            settings |= {"output_dir": out, "resume": "auto"}
        try:
            scores = store.run(out, script, settings, self._scores)
        except locks.Busy:
            raise
        except ValueError as error:  # it may name a flag that the comparison does not have
            recipe = f"{trial.protocol}=YAML"
            raise ValueError(f"{error}; recipes={as_yaml(recipe)} passes other flags to {script.name}.py") from error
        if not self.run.comparison.keep_checkpoints:
            for path in (*out.glob("*.pth"), *out.glob("tokens")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return scores, shlex.join(["python", f"{script.name}.py", *arguments(settings)])

    def _scores(self, out: Path, returned: Any) -> Scores:
        """Returns the scores of the neighbors that `main` has returned, or those in the last line of log.txt."""
        if isinstance(returned, Mapping):
            return {f"{self.metric}_k{k}": score for (k, _), score in returned.items()}
        return {name: value for name, value in log.read(out)[-1].items() if name.startswith(("test_", "chosen"))}

    def _fit_pixels(self, trial: Trial) -> tuple[Scores, str]:
        """Fits a baseline of scikit-learn on the images of the same draw; returns its scores and a description."""
        settings, per_class = self.settings(trial), trial.size.per_class

        def compute(_: Path) -> Scores:
            few = some_of_each_class(self.train, per_class, trial.draw) if per_class else self.train
            images, workers = ImageSpec.of(settings), self.run.data.num_workers
            train, val = ((baselines.read(source, images, workers), source.labels) for source in (few, self.val))
            accuracy, chosen = baselines.evaluate(trial.protocol, *train, *val, seed=trial.draw)
            return {"test_acc1": accuracy, "chosen": chosen}

        scores = store.kept(self.folder / trial.name, settings, compute)
        return scores, f"{settings.pop('baseline')}: {shlex.join(arguments(settings))}"


def _recipes_of(run: Run) -> dict[str, str]:
    """Returns the recipe of each protocol that has one.

    Raises:
        ValueError: --recipes names another protocol, or one twice.
    """
    paths: dict[str, str] = {}
    for text in run.comparison.recipes:
        protocol, _, name = text.partition("=")
        recipe = recipes.find(name)
        if protocol not in run.comparison.protocols or protocol in paths or not recipe:
            protocols = ", ".join(run.comparison.protocols)
            raise ValueError(f"recipes={as_yaml(text)}: give PROTOCOL=YAML once for each of {protocols}")
        paths[protocol] = recipe
    return paths
