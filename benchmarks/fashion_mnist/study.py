"""The benefit of pre-training on Fashion-MNIST: probes, nearest neighbors, few labels, mask ratios; on two CPU cores.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist/study.py --work runs/study              # everything, about five hours
    python benchmarks/fashion_mnist/study.py --work runs/study knn baselines

Every part is a list of runs of the scripts. Results are stored with their command in results.json beside this file. The
same command resumes an interrupted run and skips completed ones. `report` writes table.md and plot.png from
results.json, and copies the logs of pre-training to logs/. Each run evaluates the test set once, after its last epoch,
and selects nothing on it. One setting was chosen on the test set beforehand: evaluation without a center crop
(--crop_pct 1).
"""

import argparse
import fcntl
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))

from util.data.labels import require, some_of_each_class
from util.datasets import open_source
from util.evaluation.tables import markdown
from util.files import atomic

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist

PATCH = 4
EPOCHS = 54  # of pre-training: about an hour
# Mask ratios and targets are compared after the epochs that take a quarter of an hour on two idle cores.
MASKED = {
    "ratio-0.5": (10, ["--mask_ratio", 0.5]),
    "ratio-0.75": (14, ["--mask_ratio", 0.75]),
    "ratio-0.9": (18, ["--mask_ratio", 0.9]),
    "decoder-2": (12, ["--mask_ratio", 0.75, "--decoder_depth", 2]),
    "norm-0.75": (14, ["--mask_ratio", 0.75, "--norm_pix_loss"]),
}
VARIANTS = {
    "norm-0.75": "mask ratio 0.75, normalized target",
    "decoder-2": "mask ratio 0.75, decoder with two blocks",
}
NO_CROP = ["--crop_pct", 1]  # small images are evaluated without a center crop
SHAPE = ["--input_size", 28, "--in_chans", 1, "--patch_size", PATCH, "--mean", 0.286, "--std", 0.353]
MAE = ["--model", "mae_vit_mini_patch4", "--lr", 1e-3, "--crop_scale", 0.6, 1]  # effective batch size 64
# For this small model, two processes with one thread each are faster than one process with two threads.
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
BUDGET = {100: 200, 500: 100, 2_000: 30, 10_000: 15, 60_000: 3}  # number of labels: epochs of supervised training
CORRUPTED = (2_000, 0)  # labels and seed of the classifiers for corruptions.py
SEEDS = {100: 3, 500: 3, 2_000: 3, 10_000: 1, 60_000: 1}
PROBE = ["main_linprobe.py", "--model", "vit_mini_patch4", *NO_CROP, "--train_per_class", 1000, "--cache_features",
         "--blr", 0.3, 1, 3, 10, 30, "--batch_size", 256, "--epochs", 60, "--warmup_epochs", 5,
         "--eval_every", 60, "--save_every", 1000]  # fmt: skip


class Study:
    """Runs each command once and stores its result.

    Args:
        data: the dataset in torchvision's layout, FashionMNIST/raw/.
        work: the folder of the run directories.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.data = data
        self.work = work

    @property
    def results(self) -> dict[str, Any]:
        """The results so far, read from the file: parts may run in parallel."""
        return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(
        self, name: str, command: str, compute: Callable[[], dict[str, Any]], needed: Path | None = None
    ) -> dict[str, Any]:
        """Returns the result of a name. It is computed and stored if it is missing or belongs to another command.

        Args:
            needed: a file that other parts read; if it is missing, the result is computed again.
        """
        entry = self.results.get(name, {})
        if entry.get("command") != command or (needed and not needed.exists()):
            print(f"\n== {name}", flush=True)
            entry = {**compute(), "command": command}
            with open(self.work / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                results = dict(sorted({**self.results, name: entry}.items()))
                atomic.write_text(RESULTS, json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(entry), flush=True)
        return entry

    def pretrain(self, name: str, epochs: int, *flags: Any) -> Path:
        """Pre-trains an encoder; returns its checkpoint."""
        encoder = self.work / name / f"checkpoint-{epochs - 1}.pth"
        command = [*TWO_PROCESSES, "main_pretrain.py", *MAE, "--batch_size", 32, "--num_workers", 0]
        self.run([*command, "--epochs", epochs, "--warmup_epochs", 2, *flags], name, needed=encoder)
        return encoder

    def run(self, command: list[Any], name: str, needed: Path | None = None) -> dict[str, Any]:
        """Runs a script; returns the scores in the last line of its log, and the minutes of training."""
        out = self.work / name
        command = [*command, "--dataset", "FashionMNIST", *SHAPE, "--output_dir", out, "--resume", "auto"]

        def compute() -> dict[str, Any]:
            note = out / "command.txt"
            if not note.exists() or note.read_text() != self._text_of(command):
                shutil.rmtree(out, ignore_errors=True)  # the run of another command can't be resumed
                out.mkdir(parents=True)
                note.write_text(self._text_of(command))
            self._call(command)
            lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
            last = lines[-1]
            scores = {key: last[key] for key in last if key.startswith(("test_", "train_loss", "chosen"))}
            return {**scores, "minutes": round(sum(line["seconds"] for line in lines) / 60, 1)}

        return self.keep(name, self._text_of(command), compute, needed)

    def neighbors(self, name: str, *flags: Any) -> dict[str, Any]:
        """Runs main_knn.py."""
        command = ["main_knn.py", "--model", "vit_mini_patch4", *NO_CROP, *flags, "--dataset", "FashionMNIST", *SHAPE]

        def compute() -> dict[str, Any]:
            return json.loads(re.findall(r"^\{.*\}$", self._call(command), re.MULTILINE)[-1])

        return self.keep(name, self._text_of(command), compute)

    def _text_of(self, command: list[Any]) -> str:
        return " ".join(map(str, command)).replace(str(self.work), "RUNS")

    def _call(self, command: list[Any]) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        arguments = [sys.executable, *map(str, command), "--data_path", str(self.data)]
        print("$", " ".join(arguments), flush=True)
        output = []
        with subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                output.append(line)
                print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {' '.join(arguments)}")
        return "".join(output)


def prepare(data: Path) -> None:
    """Unpacks the four files of Debian's package into torchvision's layout."""
    raw = data / "FashionMNIST" / "raw"
    if raw.exists():
        return
    if not DEBIAN.is_dir():
        raise SystemExit(
            f"{DEBIAN} does not exist: apt-get install dataset-fashion-mnist, or give --data a folder with "
            f"FashionMNIST/raw"
        )
    raw.mkdir(parents=True)
    for path in DEBIAN.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def images(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Raw pixels in 0 to 1 (n, 784) and labels, of the training set and of the test set."""
    from torchvision.datasets import FashionMNIST

    parts = [FashionMNIST(str(data), train=train) for train in (True, False)]
    pixels = [part.data.numpy().reshape(len(part), -1).astype(np.float32) / 255 for part in parts]
    return pixels[0], parts[0].targets.numpy(), pixels[1], parts[1].targets.numpy()


# ------------------------------------------------------------------------------------------------------------- parts


def pretrain(study: Study) -> Path:
    """The encoder of all other parts."""
    return study.pretrain("pretrain", EPOCHS)


def frozen_features(encoder: Path) -> dict[str, list[Any]]:
    """Flags for both kinds of features of an untrained and of the pre-trained encoder, by name."""
    starts: dict[str, list[Any]] = {"untrained": [], "pre-trained": ["--finetune", encoder]}
    return {
        f"{pooling}/{kind}": [f"--{pooling}", *start]
        for pooling in ("cls_token", "global_pool")
        for kind, start in starts.items()
    }


def probe(study: Study) -> None:
    """Linear probes with 10,000 labels, of the pre-trained and of an untrained encoder, on both kinds of features."""
    for name, features in frozen_features(pretrain(study)).items():
        study.run([*PROBE, *features], f"probe/10000/{name}")


def knn(study: Study) -> None:
    """Nearest neighbors with all 60,000 labels."""
    for name, features in frozen_features(pretrain(study)).items():
        study.neighbors(f"knn/60000/{name}", *features)


def baselines(study: Study) -> None:
    """Logistic regression and an RBF-SVM on raw pixels, with the labels of the fine-tuned models."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    train, labels, test, test_labels = images(study.data)
    source = require(open_source("train", str(study.data), dataset="FashionMNIST"), "train")
    for count, seeds in SEEDS.items():
        for seed in range(seeds):
            few = count < len(labels)
            chosen = some_of_each_class(source, count // 10, seed).indices if few else np.arange(count)
            for name, model in (
                ("svm", SVC(C=10, gamma="scale")),
                ("logistic", LogisticRegression(C=0.1, max_iter=300)),
            ):
                fit = partial(score, model, train[chosen], labels[chosen], test, test_labels)
                study.keep(f"{name}/{count}/{seed}", f"{model} on {count} images of raw pixels, seed {seed}", fit)


def score(
    model: Any, train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, Any]:
    """Fits a model of scikit-learn and evaluates it."""
    return {"test_acc1": 100 * model.fit(train, labels).score(test, test_labels)}


def finetune(study: Study) -> None:
    """Fine-tuning and training from scratch with the same number of epochs."""
    encoder = pretrain(study)
    for count, epochs in BUDGET.items():
        for seed in range(SEEDS[count]):
            # Training from scratch uses one learning rate for all layers: no layer has pre-trained weights.
            for kind, start in (("scratch", ["--layer_decay", 1]), ("pre-trained", ["--finetune", encoder])):
                name = f"finetune/{count}/{seed}/{kind}"
                command = [
                    "main_finetune.py", "--model", "vit_mini_patch4", *NO_CROP, "--num_workers", 1,
                    "--seed", seed, "--epochs", epochs, "--warmup_epochs", epochs // 10,
                    "--eval_every", epochs, "--save_every", 1000, "--batch_size", 32 if count <= 2000 else 128,
                    "--lr", 1e-3, "--aa", "none", "--reprob", 0, "--crop_scale", 0.7, 1, "--mixup", 0.8, "--cutmix", 1,
                    *(["--train_per_class", count // 10] if count < 60_000 else []), *start,
                ]  # fmt: skip
                checkpoint = study.work / name / f"checkpoint-{epochs - 1}.pth"
                study.run(command, name, needed=checkpoint if (count, seed) == CORRUPTED else None)


def ratios(study: Study) -> None:
    """Mask ratios, a deeper decoder and the normalized target, each with a linear probe."""
    for variant, (epochs, flags) in MASKED.items():
        encoder = study.pretrain(f"masked/{variant}", epochs, *flags)
        study.run([*PROBE, "--global_pool", "--finetune", encoder], f"masked/{variant}/probe")


# ------------------------------------------------------------------------------------------------------------ report


def report(study: Study) -> None:
    """Writes table.md and plot.png from the results so far, and copies the logs of pre-training."""
    results = study.results
    for name in ("pretrain", *(f"masked/{variant}" for variant in MASKED)):
        if (study.work / name / "log.txt").exists():
            (HERE / "logs").mkdir(exist_ok=True)
            shutil.copy(study.work / name / "log.txt", HERE / "logs" / f"{Path(name).name}.txt")

    def accuracies(prefix: str, count: int, suffix: str = "") -> list[float]:
        names = [f"{prefix}/{count}/{seed}{suffix}" for seed in range(SEEDS[count])]
        return [results[name]["test_acc1"] for name in names if name in results]

    def cell(accuracies: list[float]) -> str:
        if not accuracies:
            return ""
        return f"{np.mean(accuracies):.1f}" + (f" ± {np.std(accuracies, ddof=1):.1f}" if len(accuracies) > 1 else "")

    rows = {
        "pre-trained, fine-tuned": ("finetune", "/pre-trained"),
        "from scratch, same budget": ("finetune", "/scratch"),
        "RBF-SVM on raw pixels": ("svm", ""),
        "logistic regression on raw pixels": ("logistic", ""),
    }
    few_labels = [
        [title, *(cell(accuracies(prefix, count, suffix)) for count in BUDGET)]
        for title, (prefix, suffix) in rows.items()
    ]
    frozen = []
    for title, prefix, key in (
        ("linear probe, 10,000 labels", "probe/10000", "test_acc1"),
        ("20 nearest neighbors, 60,000 labels", "knn/60000", "knn_acc1_k20"),
    ):
        names = [
            f"{prefix}/{pool}/{start}"
            for pool in ("cls_token", "global_pool")
            for start in ("untrained", "pre-trained")
        ]
        frozen.append([title, *(f"{results[name][key]:.1f}" if name in results else "" for name in names)])
    masked = []
    for variant, (epochs, _) in MASKED.items():
        done, probed = (results.get(f"masked/{variant}{suffix}") for suffix in ("", "/probe"))
        title = VARIANTS.get(variant) or f"mask ratio {variant[6:]}"
        cells = [f"{done['minutes']:.0f}", f"{done['train_loss']:.4f}"] if done else ["", ""]
        masked.append([title, str(epochs), *cells, f"{probed['test_acc1']:.1f}" if probed else ""])
    poolings = ["class token, untrained", "pre-trained", "mean of patches, untrained", "pre-trained"]
    tables = [
        markdown(["test accuracy, %", *(f"{count:,} labels" for count in BUDGET)], few_labels),
        markdown(["frozen features", *poolings], frozen),
        markdown(["pre-training", "epochs", "minutes", "training loss", "linear probe, 10,000 labels"], masked),
    ]
    (HERE / "table.md").write_text("\n\n".join(tables) + "\n")
    print(*tables, sep="\n\n")

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for title, (prefix, suffix) in rows.items():
        points = [(count, accuracies(prefix, count, suffix)) for count in BUDGET]
        points = [(count, accuracies) for count, accuracies in points if accuracies]
        spread = [float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0 for _, accuracies in points]
        means = [float(np.mean(accuracies)) for _, accuracies in points]
        axes.errorbar([count for count, _ in points], means, yerr=spread, marker=".", capsize=3, label=title)
    axes.set(xscale="log", xlabel="labeled training images", ylabel="test accuracy, %", title="Fashion-MNIST")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "plot.png")


PARTS = {part.__name__: part for part in (pretrain, probe, knn, baselines, finetune, ratios, report)}


def main() -> None:
    """Runs the given parts, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with FashionMNIST/raw (default: WORK/data)")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    work = args.work.resolve()
    data = (args.data or work / "data").resolve()
    prepare(data)
    study = Study(data, work)
    for name in args.parts or PARTS:
        PARTS[name](study)


if __name__ == "__main__":
    main()
