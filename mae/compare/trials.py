"""The trials of a comparison: an encoder is evaluated with a protocol on a random subset of the labels."""

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mae.compare import baselines, store
from mae.compare.encoders import OF_ENCODER, PIXELS, Encoder, Flags, directory_of
from mae.compare.summary import ACCURACY, Result
from mae.data.labels import some_of_each_class
from mae.data.source import Source
from mae.evaluate.metrics import LOWER_IS_BETTER
from mae.evaluate.tasks import best_of
from mae.files import recipes
from mae.settings import REBUILDS, DataSpec, ImageSpec, ModelSpec, Run, names_of
from mae.settings.arguments import arguments
from mae.settings.choices import DEFAULT_METRICS
from mae.training import log

logger = logging.getLogger(__name__)

KNN, LINEAR, ATTENTIVE, FINETUNE = "knn", "linear", "attentive", "finetune"
TITLES = {KNN: "k-NN", LINEAR: "linear probe", ATTENTIVE: "attentive probe", FINETUNE: "fine-tuned"}
PROBE = {"cache_features": True, "epochs": 60, "warmup_epochs": 5, "batch_size": 256,
         "eval_every": 60, "save_every": 60}  # fmt: skip
# The flags of each protocol without a recipe.
DEFAULTS: dict[str, Flags] = {
    KNN: {"global_pool": True, "k": [5, 20, 100]},
    LINEAR: {**PROBE, "blr": [0.3, 1, 3, 10, 30, 100], "global_pool": True},
    ATTENTIVE: {**PROBE, "blr": [0.3, 1, 3, 10, 30], "probe": "attentive"},
    FINETUNE: {"batch_size": 128},
}
# Flags that all scripts share; the comparison passes those that are given.
SHARED = [*names_of(ModelSpec, ImageSpec, DataSpec), "device", "amp", "metric"]
VAL_FRACTION = 0.2  # of the training images of the first draw, held out to choose hyperparameters
LEAST_UPDATES = 3  # of an epoch: batches of few images are smaller


class Trial(NamedTuple):
    """An encoder, a protocol, a number of labels and a draw."""

    encoder: Encoder
    protocol: str  # for raw pixels the name of the baseline
    labels: int  # number of training images
    per_class: int | None  # of each class; None: all images
    draw: int

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return f"{directory_of(self.encoder.name)}/{directory_of(self.protocol)}/{self.labels}/{self.draw}"


class Trials:
    """Runs the scripts of a comparison in this process.

    Args:
        run: the settings of the comparison.
        scripts: the script of each protocol.
        folder: the run directories. Results in them are kept.
        budgets: epochs of fine-tuning for each number of labels.
        train, val: the data, for the baselines on raw pixels.
    """

    def __init__(
        self, run: Run, scripts: Mapping[str, store.Script], folder: Path, budgets: dict[int, int], train: Source,
        val: Source,
    ) -> None:  # fmt: skip
        self.run, self.scripts, self.folder, self.budgets = run, scripts, folder, budgets
        self.train, self.val = train, val
        self.shared = {name: run[name] for name in SHARED if name in run.explicit and name not in OF_ENCODER}
        self.recipes = _recipes_of(run)
        self.metric = next(iter(run.evaluation.metric or DEFAULT_METRICS[run.images.task]), ACCURACY)

    def flags(self, trial: Trial) -> Flags:
        """Returns the flags of a trial, without those that `_choose` returns.

        Raises:
            SystemExit: the script refuses them; its message is printed.
            ValueError: a recipe has several temperatures.
        """
        recipe = self.recipes.get(trial.protocol)
        first = {"config": recipe} if recipe else DEFAULTS[trial.protocol]
        # The images of a recipe are explicit. A recipe serves encoders of several architectures.
        settings = self._settings(trial, first)
        of_recipe = settings.explicit.intersection(names_of(ImageSpec))
        of_encoder = {
            name: value for name, value in trial.encoder.flags.items() if name in settings and name not in of_recipe
        }
        flags = {**first, **of_encoder, **self.shared, "seed": trial.draw}
        if trial.per_class:
            flags["train_per_class"] = trial.per_class
        if trial.protocol == FINETUNE and "finetune" not in flags:
            flags["layer_decay"] = 1  # no layer has pre-trained weights
        settings = self._settings(trial, flags)
        if trial.protocol == KNN and len(temperatures := settings.evaluation.temperature) > 1:
            text = f"{KNN}={recipe}"
            raise ValueError(f"recipes={text!r}: it has the temperatures {temperatures}; give one")
        largest = 2 ** max(1, (trial.labels // LEAST_UPDATES).bit_length() - 1)
        if trial.protocol != KNN and settings.optim.batch_size > largest:
            _log_batch(TITLES[trial.protocol], trial.labels, largest, settings.optim.batch_size)
            flags["batch_size"] = largest
        return flags

    def result(self, trial: Trial) -> Result:
        """Returns the result of a trial. Its hyperparameters are chosen on held-out images of the first draw.

        Raises:
            Busy: another process computes it, or chooses the hyperparameters.
        """
        if trial.encoder.name == PIXELS:
            scores, command = self._fit_pixels(trial)
            score = scores["test_acc1"]
        else:
            chosen = self._choose(trial._replace(draw=0))
            scores, command = self._run(trial.name, trial, {**self.flags(trial), **chosen})
            score = scores[f"{self.metric}_k{chosen['k']}" if trial.protocol == KNN else f"test_{self.metric}"]
            values = {"k": chosen.get("k"), "blr": chosen.get("blr") or scores.get("chosen_blr")}
            scores["chosen"] = ", ".join(f"{name} {value:g}" for name, value in values.items() if value)
        title = TITLES.get(trial.protocol, trial.protocol)
        return Result(
            trial.encoder.name, title, trial.labels, trial.draw, score, scores["chosen"], scores["seconds"], command,
            self.metric,
        )  # fmt: skip

    def _choose(self, trial: Trial) -> Flags:
        """Chooses the hyperparameters of an encoder, a protocol and a number of labels on held-out training images."""
        flags, choices = self.flags(trial), f"choices/{trial.name}"
        held_out = {**flags, "val_fraction": VAL_FRACTION}
        if trial.protocol == KNN:
            most = min(round(trial.labels * (1 - VAL_FRACTION)), trial.labels - 1)
            ks = [k for k in self._settings(trial, flags).evaluation.k if k <= most] or [1]
            scores = self._run(choices, trial, {**held_out, "k": ks})[0] if len(ks) > 1 else {}
            return {"k": self._best(ks, [scores[f"{self.metric}_k{k}"] for k in ks if scores])}
        if trial.protocol != FINETUNE:
            return {}  # a probe trains a head for each rate
        epochs = self.budgets[trial.labels]
        chosen = {"epochs": epochs, "warmup_epochs": epochs // 10, "eval_every": epochs, "save_every": epochs}
        rates: Any = self.run.optim.blr  # the flag takes several
        if not rates:
            return chosen
        found = [
            self._run(f"{choices}/{rate}", trial, {**held_out, **chosen, "blr": rate})[0]
            for rate in (rates if len(rates) > 1 else [])
        ]
        return {**chosen, "blr": self._best(rates, [scores[f"test_{self.metric}"] for scores in found])}

    def _best(self, values: Sequence[Any], scores: Sequence[float]) -> Any:
        """Returns the value with the best score; without scores, the first."""
        return values[best_of(scores, self.metric in LOWER_IS_BETTER) if scores else 0]

    def _settings(self, trial: Trial, flags: Flags) -> Run:
        return self.scripts[trial.protocol].settings(flags)

    def _run(self, name: str, trial: Trial, flags: Flags) -> tuple[store.Scores, str]:
        """Runs the script of a protocol; returns its scores and its command."""
        script, out = self.scripts[trial.protocol], self.folder / name
        if trial.protocol != KNN:
            flags = {**flags, "output_dir": out, "resume": "auto"}
        try:
            scores = store.run(out, script, flags, self._scores)
        except ValueError as error:  # it may name a flag that the comparison does not have
            recipe = f"{trial.protocol}=YAML"
            raise ValueError(f"{error}; recipes={recipe!r} passes other flags to {script.name}.py") from error
        if not self.run.comparison.keep_checkpoints:
            for path in (*out.glob("*.pth"), *out.glob("tokens")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return scores, shlex.join(["python", f"{script.name}.py", *arguments(flags)])

    def _scores(self, out: Path, found: Mapping[tuple[int, float], float] | None) -> store.Scores:
        """Returns the scores of the neighbors that `main` has returned, or those in the last line of log.txt."""
        if isinstance(found, Mapping):
            return {f"{self.metric}_k{k}": score for (k, _), score in found.items()}
        return {name: value for name, value in log.read(out)[-1].items() if name.startswith(("test_", "chosen"))}

    def _fit_pixels(self, trial: Trial) -> tuple[store.Scores, str]:
        """Fits a baseline of scikit-learn on the images of the same draw; returns its scores and a description."""
        flags = {**self.run.record(), **trial.encoder.flags, **self.shared}
        images = ImageSpec.of(flags)
        settings = {name: value for name, value in images.record().items() if name in REBUILDS and name in flags}

        def compute(_: Path) -> store.Scores:
            few = some_of_each_class(self.train, trial.per_class, trial.draw) if trial.per_class else self.train
            train, val = (
                (baselines.read(source, images, self.run.data.num_workers), source.labels) for source in (few, self.val)
            )
            accuracy, chosen = baselines.evaluate(trial.protocol, *train, *val, seed=trial.draw)
            return {"test_acc1": accuracy, "chosen": chosen}

        data = {name: self.run[name] for name in ("data_path", "dataset", "train_list", "val_list")}
        flags = {**data, **settings, "seed": trial.draw}
        title = f"{trial.protocol} of scikit-learn on {trial.labels} images"
        scores = store.kept(self.folder / trial.name, {"baseline": title, **flags}, compute)
        return scores, f"{title}: {shlex.join(arguments(flags))}"


def _recipes_of(run: Run) -> dict[str, str]:
    """Returns the recipe of each protocol that has one.

    Raises:
        ValueError: --recipes names another protocol, or one twice.
    """
    found: dict[str, str] = {}
    for text in run.comparison.recipes:
        protocol, _, name = text.partition("=")
        recipe = recipes.find(name)
        if protocol not in run.comparison.protocols or protocol in found or not recipe:
            protocols = ", ".join(run.comparison.protocols)
            raise ValueError(f"recipes={text!r}: give PROTOCOL=YAML once for each of {protocols}")
        found[protocol] = recipe
    return found


@cache  # once for all encoders and draws
def _log_batch(title: str, labels: int, largest: int, batch_size: int) -> None:
    logger.info(f"{title} with {labels} labels: batches of {largest} images, not {batch_size}")
