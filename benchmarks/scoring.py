"""Accuracies of the leaderboard: of an encoder and of raw pixels, with few labels and with all.

The score is the mean of those in SCORED.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

import main_knn
from benchmarks import scripts
from mae.cli import entry_point
from mae.compare import choices
from mae.compare.predictors import BASELINES
from mae.data import raw_pixels
from mae.data.labels import some_of_each_class
from mae.data.open import open_source
from mae.data.source import Source
from mae.evaluate import knn
from mae.files import spreadsheet
from mae.settings import DataSpec, ImageSpec
from mae.settings.arguments import arguments
from mae.settings.choices import CLASSIFICATION
from mae.training import log

SCORED = ("500 labels", "k-NN")
FINETUNE = {
    "model": "vit_mini_patch4", "aa": "none", "reprob": 0, "cache_images": True, "num_workers": 0, "crop": "random",
    "crop_scale": [0.7, 1.0], "crop_pct": 1.0, "batch_size": 32, "epochs": 30, "warmup_epochs": 3, "eval_every": 30,
    "save_every": 1000, "lr": 1e-3,
}  # fmt: skip
LINPROBE = {
    "model": "vit_mini_patch4", "pool": "cls", "cache_features": True, "num_workers": 0, "batch_size": 256,
    "blr": [3, 10, 30], "epochs": 30, "warmup_epochs": 3, "eval_every": 30, "save_every": 1000,
}  # fmt: skip
LABELS = 500
DRAWS = 3  # of labels
NEIGHBORS = 20
OTHERS = "10,000 other training"  # images that were not pre-trained on
TEST = "10,000 test"
EVALUATED = 10_000


def hold_out(data_path: Path, out: Path) -> dict[str, Path]:
    """Writes lists of four fifths and of a fifth of the training images; returns the flags that read them."""
    images = sorted((scripts.ROOT / data_path / "train").glob("*/*"))
    flags = {"train_list": out / "train.csv", "val_list": out / "held_out.csv"}
    for flag, path in flags.items():
        chosen = [image for number, image in enumerate(images) if (number % 5 == 0) == (flag == "val_list")]
        spreadsheet.write(path, [("path", "label"), *((image, image.parent.name) for image in chosen)])
    return flags


def other_images(data_path: Path, every: Path, out: Path) -> dict[str, dict[str, Path]]:
    """Writes lists of images that are not in `data_path`, of a larger dataset with the same classes.

    Args:
        every: folder of the larger dataset. Its training images contain those of `data_path`.

    Returns:
        By the name of a set, the flags that read it: 10,000 of the other training images, which may choose, and all
        images of val/.
    """
    train = sorted((scripts.ROOT / data_path / "train").glob("*/*"))
    known = set(map(_pixels, train))
    others = [path for path in sorted(every.glob("train/*/*")) if _pixels(path) not in known]
    sets = {OTHERS: others[:: max(1, len(others) // EVALUATED)], TEST: sorted(every.glob("val/*/*"))}
    found = {}
    for number, (name, images) in enumerate(sets.items()):
        flags = {"train_list": out / f"train{number}.csv", "val_list": out / f"val{number}.csv"}
        for path, listed in zip(flags.values(), (train, images), strict=True):
            spreadsheet.write(path, [("path", "label"), *((image, image.parent.name) for image in listed)])
        found[name] = flags
    return found


def count(image_list: Path) -> int:
    """Returns the number of images in a list that this module has written."""
    with image_list.open() as lines:
        return sum(1 for _ in lines) - 1


def _pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def standard_error(accuracies: Sequence[float], images: int) -> float:
    """Returns the standard error of the mean of accuracies in percent that are measured on the same images.

    It is that of accuracies which err on the same images: an upper bound.
    """
    return statistics.fmean(100 * math.sqrt(one / 100 * (1 - one / 100) / images) for one in accuracies)


def labels_per_class(data_path: Path) -> int:
    """Returns the number of labels of each class that are LABELS together, or a few less."""
    return LABELS // sum(1 for _ in (scripts.ROOT / data_path / "train").iterdir())


def of_encoder(file: Path, flags: dict[str, Any], seed: int, out: Path, threads: int = 2) -> dict[str, float]:
    """Returns the accuracies of an encoder in percent: fine-tuned with few labels, of neighbors, of a linear probe.

    Args:
        threads: of a fine-tuning; 1 in a study that is started once for each core.
    """
    shared = ("data_path", "train_list", "val_list", "encoder")
    encoder_flags: dict[str, Any] = {name: flags[name] for name in shared if name in flags} | {"finetune": file}
    few = {"train_per_class": labels_per_class(flags["data_path"])}
    tuned = []
    for draw in range(DRAWS):
        run_directory = out / f"draw{draw}"
        drawn = {"seed": 10 * seed + draw, "output_dir": run_directory}
        scripts.run_python(
            "main_finetune.py", *arguments({**FINETUNE, **encoder_flags, **few, **drawn}), threads=threads
        )
        tuned.append(log.read(run_directory)[-1]["test_acc1"])
    scripts.run_python(
        "main_linprobe.py", *arguments({**LINPROBE, **encoder_flags, "seed": seed, "output_dir": out / "linear"})
    )
    linear = log.read(out / "linear")[-1]["test_acc1"]
    found = {"500 labels": statistics.fmean(tuned), "k-NN": neighbors(encoder_flags), "linear": linear}
    return {name: round(accuracy, 2) for name, accuracy in found.items()}


def neighbors(flags: dict[str, Any]) -> float:
    """Returns the accuracy of k-NN in percent."""
    knn_flags = {"pool": "cls", **flags, "model": "vit_mini_patch4", "k": [NEIGHBORS], "num_workers": 0}
    (accuracy,) = main_knn.main(entry_point.parse(main_knn.get_args_parser(), arguments(knn_flags))).values()
    return accuracy


def of_pixels(flags: dict[str, Any], seed: int) -> dict[str, float]:
    """Returns the accuracies of raw pixels in percent: fitted with few labels, and of neighbors with all labels.

    The best baseline of a comparison counts, by its mean over the draws of labels.
    """
    lists: Any = {name: str(flags[name]) for name in ("train_list", "val_list") if name in flags}
    data = DataSpec(data_path=str(scripts.ROOT / flags["data_path"]), **lists)
    images = ImageSpec(input_size=flags["input_size"], in_chans=flags["in_chans"], crop="none")
    train, val = (cast(Source, open_source(data, split)) for split in ("train", "val"))
    bank, queries = (raw_pixels.read(source, images, 0) for source in (train, val))
    fitted = [list[float]() for _ in BASELINES[CLASSIFICATION]]
    for draw in range(10 * seed, 10 * seed + DRAWS):
        few = some_of_each_class(train, labels_per_class(flags["data_path"]), draw)
        pixels = raw_pixels.read(few, images, 0)
        for found, predictor in zip(fitted, BASELINES[CLASSIFICATION], strict=True):
            chosen = choices.choose(predictor, {"": pixels}, few.labels, draw)
            (outputs,) = predictor.predict(pixels, few.labels, queries, [chosen.values])
            found.append(100 * float((outputs.argmax(axis=1) == val.labels).mean()))
    near = 100 * knn.accuracy(bank, train.labels, queries, val.labels, NEIGHBORS)
    return {"500 labels": round(max(map(statistics.fmean, fitted)), 2), "k-NN": round(near, 2)}
