"""Ablations of pre-training: encoders that differ in one setting are pre-trained and compared."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import main_pretrain
from benchmarks import scripts
from benchmarks.model_table import pretraining_macs
from benchmarks.scripts import ROOT
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store, summary
from mae.evaluate.tables import markdown
from mae.files import atomic
from mae.files.results import Results
from mae.settings.arguments import arguments
from mae.training import log

DATA = Path("demo/data/fashion_mnist")
# The demo has whole images and larger updates.
PRETRAIN = {"config": "recipes/pretrain_fashion_mnist.yaml", "crop": "random", "crop_scale": [0.6, 1.0], "lr": 1e-3}
CURVE = (0, 1, 4, 9, 19, 79, 199, 999)  # epochs whose losses are kept


class Run(NamedTuple):
    """A pre-training on the first images of each class."""

    images: int
    epochs: int
    others: dict[str, Any]  # flags of main_pretrain.py


class Ablation:
    """Pre-trains encoders, compares them with main_compare.py, and keeps their results.

    results.json and table.md hold the results so far. An encoder that has a result of the same command is left out.

    Args:
        here: folder of results.json and table.md.
        work: folder of the run directories.
        runs: the encoders by name.
        shared: flags of main_pretrain.py that all runs share.
        evaluation: flags of main_compare.py.
        data: folder with train/ and val/, each with a folder for each class.
        baselines: encoders without pre-training, as main_compare.py names them. `scratch` has the architecture of the
            first encoder.
    """

    def __init__(
        self,
        here: Path,
        work: Path,
        runs: Mapping[str, Run],
        shared: dict[str, Any],
        evaluation: dict[str, Any],
        data: Path = DATA,
        baselines: Sequence[str] = (),
    ) -> None:
        self.here, self.work, self.runs, self.shared = here, work, runs, shared
        self.evaluation, self.data = evaluation, data
        self.baselines, self.results = baselines, Results(here / "results.json")

    def flags(self, name: str) -> dict[str, Any]:
        """Returns the flags of main_pretrain.py for an encoder."""
        images, epochs, others = self.runs[name]
        return {
            **self.shared, "data_path": self.data / "train", "train_list": self.work / f"{images}.txt",
            "epochs": epochs, "warmup_epochs": max(1, epochs // 20), "save_every": epochs, "vis_every": 0,
            "resume": "auto", "output_dir": self.work / name, **others,
        }  # fmt: skip

    def command(self, name: str) -> str:
        """Returns the command that pre-trains an encoder."""
        return shlex.join(["python", "main_pretrain.py", *arguments(self.flags(name))])

    def macs(self, name: str) -> float:
        """Returns the multiply-adds of all forward passes of a pre-training."""
        args = entry_point.parse(main_pretrain.get_args_parser(), arguments(self.flags(name)))
        return pretraining_macs(args) * self.runs[name].images * self.runs[name].epochs

    def write_list(self, images: int) -> None:
        """Writes a list of the first images of each class, equally many."""
        folder = self.data / "train"
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        files = [file for path in classes for file in sorted(path.iterdir())[: images // len(classes)]]
        atomic.write_text(self.work / f"{images}.txt", "".join(f"{file.relative_to(folder)}\n" for file in files))

    def pretrain(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Pre-trains encoders; returns the loss of the last epoch and the minutes of training, by name."""
        self.work.mkdir(parents=True, exist_ok=True)
        for images in {self.runs[name].images for name in names}:
            self.write_list(images)

        def read(out: Path, _: object) -> dict[str, Any]:
            lines = log.read(out)
            losses = {line["epoch"]: line["train_loss"] for line in lines if line["epoch"] in CURVE}
            return {
                "loss": lines[-1]["train_loss"], "losses": losses,
                "minutes": sum(line["seconds"] for line in lines) / 60,
            }  # fmt: skip

        trained: dict[str, dict[str, Any]] = {}
        for name in names:
            trained[name] = scores = store.run(self.work / name, Script(main_pretrain), self.flags(name), read)
            progress = f"[{len(trained)}/{len(names)}] {name}"
            print(f"{progress}: loss {scores['loss']:.4f}, {scores['minutes']:.1f} minutes", flush=True)
        return trained

    def checkpoint(self, name: str) -> Path:
        """Returns the last checkpoint of an encoder."""
        return self.work / name / f"checkpoint-{self.runs[name].epochs - 1}.pth"

    def compare(self, names: Sequence[str], baselines: Sequence[str]) -> Path:
        """Evaluates encoders and baselines; returns the folder with the results of main_compare.py."""
        out = self.work / "compare"
        encoders = [*baselines, *(f"{name}={self.checkpoint(name)}" for name in names)]
        scripts.run("main_compare.py", *arguments({**self.evaluation, "encoders": encoders, "output_dir": out}))
        return out

    def accuracies(self, names: Sequence[str], baselines: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Evaluates encoders and baselines; returns the accuracies of the draws, by encoder and protocol."""
        accuracies: dict[str, dict[str, list[float]]] = {name: {} for name in [*baselines, *names]}
        if not accuracies:
            return {}
        for result in summary.read(self.compare(names or list(self.runs)[:1], baselines)):
            if result.encoder in accuracies:
                accuracies[result.encoder].setdefault(result.protocol, []).append(result.accuracy)
        return accuracies

    def table(self) -> str:
        """Returns the table of the results so far in Markdown.

        An accuracy is the mean ± the standard deviation over the draws. The cost of a pre-training is relative to the
        cost of the first encoder.
        """
        results = self.results.read()
        protocols = list(dict.fromkeys(protocol for result in results.values() for protocol in result["accuracies"]))
        lines = []
        for name in (name for name in (*self.baselines, *self.runs) if name in results):
            pretraining = [""] * 4
            if name in self.runs:
                run, cost = self.runs[name], self.macs(name) / self.macs(next(iter(self.runs)))
                pretraining = [f"{run.images:,}", f"{run.epochs:,}", f"{cost:.2f}", f"{results[name]['loss']:.4f}"]
            accuracies = results[name]["accuracies"]
            entries = [summary.Entry(name, title, dict(enumerate(accuracies[title]))) for title in protocols]
            lines.append([name, *pretraining, *map(str, entries)])
        return markdown(["encoder", "images", "epochs", "cost", "loss", *(f"{name}, %" for name in protocols)], lines)

    def run(self, names: Sequence[str]) -> None:
        """Pre-trains and evaluates the encoders of `names` that have no result; writes and prints the table."""
        results = self.results.read()
        names = [name for name in names if results.get(name, {}).get("command") != self.command(name)]
        trained = self.pretrain(names)
        baselines = [name for name in self.baselines if name not in results]
        accuracies = self.accuracies(names, baselines)
        results |= {name: {"accuracies": accuracies[name]} for name in baselines}
        for name in names:
            kept = {key: trained[name][key] for key in ("loss", "losses")}
            results[name] = {**kept, "command": self.command(name), "accuracies": accuracies[name]}
        self.results.add(results)
        atomic.write_text(self.here / "table.md", self.table() + "\n")
        print(self.table())

    def get_args_parser(self, description: str | None) -> argparse.ArgumentParser:
        """Returns the parser of the command of a study: names of encoders, or none for all."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        names = ", ".join(self.runs)

        def encoder(name: str) -> str:
            if name not in self.runs:
                raise argparse.ArgumentTypeError(f"there is no encoder {name}; the names are {names}")
            return name

        parser.add_argument("names", nargs="*", type=encoder, metavar="NAME", help=f"{names} (default: all)")
        return parser

    def main(self, args: argparse.Namespace) -> None:
        """Runs the study for the encoders of the command."""
        os.chdir(ROOT)
        self.run(args.names or list(self.runs))
