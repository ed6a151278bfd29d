"""Pre-training on few images, on two CPU cores: one setting at a time, digits, and squares of photographs.

    python demo/unpack_data.py
    python benchmarks/small_data/study.py                # settings, on Fashion-MNIST: about three hours
    python benchmarks/small_data/study.py digits         # 15 minutes
    python benchmarks/small_data/study.py photographs    # 30 minutes

Encoders are pre-trained without labels. main_compare.py then compares them with the same architecture from scratch, by
a linear probe and fine-tuning. The results are written beside this file. The same command resumes an interrupted study.
The images and the encoders are in runs/small_data.

settings: 1,000 or 10,000 images of Fashion-MNIST; 500 labels, three random subsets of them. table.md has the accuracies
and the costs; results.json has the losses and the commands too.
digits, photographs: also raw pixels. STUDY.md and STUDY.csv have the accuracies, and the command of every run. The
digits are the 1,797 images of 8 x 8 pixels of scikit-learn, 1,000 of them for pre-training and 100 or all labels. The
squares of 96 x 96 pixels are of 16 photographs of scikit-image and scikit-learn, which are the classes: the training
images are from the left 60 % of a photograph, the test images from the rest.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import main_pretrain
from benchmarks import image_sets, scripts
from benchmarks.model_table import pretraining_macs
from mae.cli import entry_point
from mae.cli.script import Script
from mae.compare import store, summary
from mae.evaluate.tables import markdown
from mae.files import atomic
from mae.settings.arguments import arguments
from mae.training import log

HERE = Path(__file__).parent
WORK = image_sets.WORK
CURVE = (0, 1, 4, 9, 19, 79, 199, 999)  # epochs whose losses are kept


class Encoder(NamedTuple):
    """A pre-training on the first images of each class."""

    images: int
    epochs: int
    flags: dict[str, Any]  # of main_pretrain.py


class Study(NamedTuple):
    """Encoders, and flags that they share."""

    encoders: Mapping[str, Encoder]
    shared: dict[str, Any]  # flags of main_pretrain.py
    evaluation: dict[str, Any]  # flags of main_compare.py
    baselines: list[str]  # encoders of main_compare.py; `scratch` has the architecture of the first encoder
    data: Path  # with train/ and val/, each with a folder for each class
    work: Path  # of the run directories

    def flags(self, name: str) -> dict[str, Any]:
        """Returns the flags of main_pretrain.py for an encoder."""
        images, epochs, others = self.encoders[name]
        return {
            **self.shared, "data_path": self.data / "train", "train_list": self.work / f"{images}.txt",
            "epochs": epochs, "warmup_epochs": max(1, epochs // 20), "save_every": epochs, "vis_every": 0,
            "resume": "auto", "output_dir": self.work / name, **others,
        }  # fmt: skip

    def macs(self, name: str) -> float:
        """Returns the multiply-adds of all forward passes of a pre-training."""
        run = entry_point.parse(main_pretrain.get_args_parser(), arguments(self.flags(name)))
        return pretraining_macs(run) * self.encoders[name].images * self.encoders[name].epochs

    def write_list(self, images: int) -> None:
        """Writes a list of the first images of each class, equally many."""
        folder = self.data / "train"
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        files = [file for path in classes for file in sorted(path.iterdir())[: images // len(classes)]]
        atomic.write_text(self.work / f"{images}.txt", "".join(f"{file.relative_to(folder)}\n" for file in files))

    def pretrain(self) -> dict[str, dict[str, Any]]:
        """Pre-trains the encoders; returns their losses by epoch, and the seconds, by name."""
        self.work.mkdir(parents=True, exist_ok=True)

        def read(out: Path, _: object) -> dict[str, Any]:
            losses = {line["epoch"]: line["train_loss"] for line in log.read(out)}
            kept = {epoch: loss for epoch, loss in losses.items() if epoch in CURVE}
            return {"loss": losses[max(losses)], "losses": kept}

        trained: dict[str, dict[str, Any]] = {}
        for name, encoder in self.encoders.items():
            self.write_list(encoder.images)
            trained[name] = scores = store.run_once(self.work / name, Script(main_pretrain), self.flags(name), read)
            print(f"{name}: loss {scores['loss']:.4f}, {scores['seconds'] / 60:.1f} minutes", flush=True)
        return trained

    def compare(self) -> Path:
        """Evaluates encoders and baselines; returns the folder with the results of main_compare.py."""
        out = self.work / "compare"
        checkpoints = (
            f"{name}={self.work / name / f'checkpoint-{encoder.epochs - 1}.pth'}"
            for name, encoder in self.encoders.items()
        )
        flags = {**self.evaluation, "encoders": [*self.baselines, *checkpoints], "output_dir": out}
        scripts.run_python("main_compare.py", *arguments(flags))
        return out

    def table(self, results: Mapping[str, Any]) -> str:
        """Returns the table of the settings in Markdown.

        An accuracy is the mean ± the standard deviation over the draws. The cost of a pre-training is relative to the
        cost of the first encoder.

        Args:
            results: by encoder, as results.json has them.
        """
        protocols = list(dict.fromkeys(protocol for result in results.values() for protocol in result["accuracies"]))
        rows = []
        for name in (*self.baselines, *self.encoders):
            pretraining = [""] * 4
            if name in self.encoders:
                encoder = self.encoders[name]
                cost = self.macs(name) / self.macs(next(iter(self.encoders)))
                loss = results[name]["loss"]
                pretraining = [f"{encoder.images:,}", f"{encoder.epochs:,}", f"{cost:.2f}", f"{loss:.4f}"]
            accuracies = results[name]["accuracies"]
            entries = [summary.Entry(name, title, dict(enumerate(accuracies[title]))) for title in protocols]
            rows.append([name, *pretraining, *map(str, entries)])
        return markdown(["encoder", "images", "epochs", "cost", "loss", *(f"{name}, %" for name in protocols)], rows)

    def run(self, out: Path, name: str) -> None:
        """Pre-trains and evaluates all encoders; writes the results to a folder.

        Args:
            name: "settings", or the name of the files.
        """
        trained = self.pretrain()
        compared = self.compare()
        if name != "settings":
            shutil.copyfile(compared / "table.md", out / f"{name}.md")
            shutil.copyfile(compared / "results.csv", out / f"{name}.csv")
            return
        results: dict[str, Any] = {name: {"accuracies": {}} for name in (*self.baselines, *self.encoders)}
        for result in summary.read(compared):
            results[result.encoder]["accuracies"].setdefault(result.protocol, []).append(result.accuracy)
        for name, scores in trained.items():
            command = shlex.join(["python", "main_pretrain.py", *arguments(self.flags(name))])
            results[name] |= {"command": command, "loss": scores["loss"], "losses": scores["losses"]}
        atomic.write_text(out / "results.json", json.dumps(results, indent=1, sort_keys=True) + "\n")
        atomic.write_text(out / "table.md", self.table(results) + "\n")
        print(self.table(results))


# Each encoder differs from "base", or from "1000-images", in one setting.
SETTINGS = {
    "base": Encoder(10_000, 20, {}),
    "1000-images": Encoder(1_000, 200, {}),
    "epochs-5": Encoder(10_000, 5, {}),
    "epochs-80": Encoder(10_000, 80, {}),
    "mask-0.5": Encoder(10_000, 20, {"mask_ratio": 0.5}),
    "mask-0.9": Encoder(10_000, 20, {"mask_ratio": 0.9}),
    "patch-7": Encoder(10_000, 20, {"patch_size": 7}),
    "patch-2": Encoder(10_000, 20, {"patch_size": 2}),
    "crop-0.2": Encoder(10_000, 20, {"crop_scale": [0.2, 1]}),
    "no-crop": Encoder(10_000, 20, {"crop_scale": [1, 1]}),
    "lr-0.0003": Encoder(10_000, 20, {"lr": 3e-4}),
    "lr-0.003": Encoder(10_000, 20, {"lr": 3e-3}),
    "decoder-2": Encoder(10_000, 20, {"decoder_depth": 2}),
    "normalized-target": Encoder(10_000, 20, {"norm_pix_loss": True}),
    "1000-images-epochs-20": Encoder(1_000, 20, {}),
    "1000-images-epochs-1000": Encoder(1_000, 1_000, {}),
    "1000-images-mask-0.5": Encoder(1_000, 200, {"mask_ratio": 0.5}),
    "1000-images-crop-0.2": Encoder(1_000, 200, {"crop_scale": [0.2, 1]}),
}
DIGITS = {
    "patch-2": Encoder(1_000, 200, {"patch_size": 2}),
    "patch-1": Encoder(1_000, 200, {"patch_size": 1}),
    "patch-2-mask-0.5": Encoder(1_000, 200, {"patch_size": 2, "mask_ratio": 0.5}),
}
PHOTOGRAPHS = {
    "patch-12": Encoder(960, 200, {"patch_size": 12}),
    "patch-16": Encoder(960, 200, {"patch_size": 16}),
    "patch-12-crop-0.6": Encoder(960, 200, {"patch_size": 12, "crop_scale": [0.6, 1]}),
}
SHARED = {"model": "mae_vit_mini_patch4", "batch_size": 64, "lr": 1e-3, "amp": "bf16", "num_workers": 1}
EVALUATION = {"num_workers": 1, "crop_pct": 1, "protocols": ["linear", "finetune"], "draws": [3]}
OF_DIGITS = {"input_size": 8, "in_chans": 1, "mean": [0.306], "std": [0.377]}


def other_images(
    name: str, encoders: Mapping[str, Encoder], shared: dict[str, Any], evaluation: dict[str, Any]
) -> Study:
    """Returns the study of images of another kind."""
    work = WORK / name
    recipe = f"finetune=benchmarks/small_data/finetune_{name}.yaml"
    data = work / "images"
    evaluation = {**EVALUATION, **evaluation, "data_path": data, "recipes": [recipe]}
    return Study(encoders, {**SHARED, **shared}, evaluation, ["scratch", "pixels"], data, work)


STUDIES = {
    "settings": Study(
        SETTINGS,
        {**scripts.PRETRAIN, "patch_size": 4, "amp": "bf16", "num_workers": 1},
        {**EVALUATION, "data_path": scripts.DATA, "input_size": 28, "in_chans": 1, "labels": [500], "budget": [30],
         "recipes": ["finetune=recipes/finetune_fashion_mnist_full.yaml"]},
        ["scratch"],
        scripts.DATA,
        WORK,
    ),
    "digits": other_images(
        "digits", DIGITS,
        {**OF_DIGITS, "crop_scale": [0.8, 1], "hflip": 0},
        {**OF_DIGITS, "labels": [100, "all"], "budget": [100, 50]},
    ),
    "photographs": other_images(
        "photographs", PHOTOGRAPHS,
        {"input_size": image_sets.SIDE},
        {"input_size": image_sets.SIDE, "labels": [160, "all"], "budget": [60, 20]},
    ),
}  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="settings", choices=STUDIES, help="default: settings")
    return parser


def main() -> None:
    """Runs a study."""
    name = get_args_parser().parse_args().study
    os.chdir(scripts.ROOT)
    if name in image_sets.WRITERS:
        image_sets.images_of(name)
    STUDIES[name].run(HERE, name)


if __name__ == "__main__":
    main()
