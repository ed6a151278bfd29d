"""The robustness test sets of ImageNet (`main_finetune.py --eval --suite`): folders, labels, scores and a table.

A suite has one folder of images, or several with a score each: ImageNet-V2 has up to three, and ImageNet-C has 75.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mae import parallel
from mae.checkpoints.checkpoint import compute_digest
from mae.data import transforms
from mae.data.kinds.archives import open_archive
from mae.data.kinds.folders import find_files
from mae.data.kinds.listing import Listing
from mae.data.labels import Subset
from mae.data.run_data import RunData
from mae.data.source import evenly_spaced, first_few, versions
from mae.evaluate import tables, tasks
from mae.evaluate.imagenet import NUM_CLASSES, synsets
from mae.files import locks
from mae.files.results import Results
from mae.settings import fields as roles
from mae.settings import names_with
from mae.settings.choices import SUITES
from mae.suggestions import did_you_mean

logger = logging.getLogger(__name__)

A, R, SKETCH, V2, REAL, C = SUITES
# The published top-1 errors of AlexNet, means over five severities (Hendrycks & Dietterich 2019).
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = range(1, 6)
VARIANTS = ("matched-frequency", "threshold", "top")  # of ImageNet-V2: its folders are imagenetv2-VARIANT...
# The paper's fine-tuned models (He et al. 2021, appendix B): top-1 accuracy in percent; mCE for ImageNet-C.
COMPARED = 1_000  # images of a folder, whose times are compared
MODELS = ("ViT-B/16", "ViT-L/16", "ViT-H/14", "ViT-H/14, 448")
PUBLISHED = {
    C: (51.7, 41.8, 33.8, 36.8), A: (35.9, 57.1, 68.2, 76.7), R: (48.3, 59.9, 64.4, 66.5),
    SKETCH: (34.5, 45.3, 49.6, 50.9),
}  # fmt: skip
# Images of a folder. For ReaL: the number of ImageNet's 50,000 validation images that have a label.
IMAGES = {A: 7_500, R: 30_000, SKETCH: 50_889, V2: 10_000, REAL: 46_837, C: 50_000}


class Suite(NamedTuple):
    """A robustness suite.

    Attributes:
        name: one of SUITES.
        path: its folder or archive.
        sources: the images of its folders, by their names in the table. Labels are indices of the suite's classes.
        columns: the class of ImageNet-1K of each class of the suite, as a column of the logits.
        answers: all correct labels of each image, if there may be several; then there is one folder.
        crop_pct: the crop ratio of an evaluation. The images of imagenet-c are center crops. None: that of the model.
    """

    name: str
    path: Path
    sources: dict[str, Subset]
    columns: list[int]
    answers: list[list[int]] | None = None
    crop_pct: float | None = None


class Restricted(torch.nn.Module):
    """Restricts a classifier to the classes of a suite: logits (B, 1000) -> logits (B, len(columns))."""

    columns: torch.Tensor

    def __init__(self, model: torch.nn.Module, columns: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("columns", torch.tensor(columns))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images)
        return logits[:, self.columns]


def classes_of(name: str) -> list[str]:
    """Returns the names of the class folders of a suite, in the order of its labels; imagenet-a and -r have 200."""
    if name in (A, R):
        listed = resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_synsets.txt"
        return sorted(listed.read_text().split())
    return [str(number) for number in range(NUM_CLASSES)] if name == V2 else synsets()


def open_suite(entry: str, data_path: str | None, limit: int | None = None) -> Suite:
    """Opens the images of a suite.

    Args:
        entry: NAME=PATH, the folder of the unpacked archives; of a suite with one folder, also an uncompressed tar or
            zip file. Or NAME: its folder is `data_path`/NAME, and of imagenet-real `data_path` itself.
        data_path: the folder of ImageNet. Default: the working directory.
        limit: number of evenly spaced images of each folder to use. Default: all.

    Raises:
        ValueError: the suite is unknown, a folder or a class is missing, or a folder is not a class of the suite.
    """
    name, _, given = entry.partition("=")
    if name not in SUITES:
        raise ValueError(f"suite={name}: give some of {', '.join(SUITES)}{did_you_mean(name, SUITES)}")
    path = Path(given or Path(data_path or "", "" if name == REAL else name)).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"suite={name}: there is no {path}; give suite={name}=PATH")
    paths = {name: path}
    answers = None
    columns = list(range(NUM_CLASSES))
    if name == V2:
        paths = _variants(path)
    elif name == C:
        paths = _corruptions(path)
    elif name == REAL and (path / "val").is_dir():
        paths = {name: path / "val"}
    files = {title: open_archive(path, None) if path.is_file() else find_files(path) for title, path in paths.items()}
    if name == REAL:
        source, answers = _with_real_labels(files[name], paths[name], limit)
        sources = {name: source}
    else:
        sources = {title: _with_class_folders(name, files[title], paths[title], limit) for title in files}
    for title, source in sources.items():
        if not limit and len(source) != IMAGES[name]:
            logger.warning(f"{title}: {len(source):,} images, but {IMAGES[name]:,} were published")
    if name in (A, R):
        columns = [synsets().index(synset) for synset in classes_of(name)]
    return Suite(name, path, sources, columns, answers, 1.0 if name == C else None)


def open_suites(
    entries: Sequence[str], data_path: str | None, limit: int | None, crop_pct: float | None, of_file: float | None
) -> list[Suite]:
    """Opens suites, as `open_suite`, with the crop ratio of their images.

    Args:
        crop_pct: the crop ratio, if it is explicit. Default: that of the file; of imagenet-c, whose images are center
            crops, 1.
        of_file: that of the file.
    """
    opened = [open_suite(entry, data_path, limit) for entry in entries]
    return [suite._replace(crop_pct=crop_pct or suite.crop_pct or of_file) for suite in opened]


def _variants(root: Path) -> dict[str, Path]:
    """Returns the folders of the variants of ImageNet-V2 that exist; `root` may be one of them."""
    found: dict[str, Path] = {}
    for variant in VARIANTS:
        start = f"imagenetv2-{variant}"
        folders = [path for path in (root, *root.glob("*")) if path.name.startswith(start) and path.is_dir()]
        if len(folders) > 1:
            raise ValueError(f"suite={V2}: {folders[0]} and {folders[1]} are the same variant; give one of them")
        found |= {f"{V2} {variant}": path for path in folders}
    if not found:
        raise ValueError(f"suite={V2}: {root} contains no folder of its archives, such as imagenetv2-{VARIANTS[0]}")
    return found


def _corruptions(root: Path) -> dict[str, Path]:
    """Returns the 75 folders of ImageNet-C: CORRUPTION/SEVERITY, in `root` or in a folder of it, such as noise/."""
    found: dict[str, Path] = {}
    for name in ALEXNET:
        folders = (root / name, *root.glob(f"*/{name}"))
        folder = next((path for path in folders if path.is_dir()), root / name)
        found |= {f"{name}/{severity}": folder / str(severity) for severity in SEVERITIES}
    if missing := [title for title, path in found.items() if not path.is_dir()]:
        raise ValueError(
            f"suite={C}: {len(missing)} of the {len(found)} folders CORRUPTION/SEVERITY are missing in {root} and its "
            f"subfolders: {first_few(missing)}"
        )
    return found


def _with_class_folders(name: str, files: Listing, path: Path, limit: int | None) -> Subset:
    classes = classes_of(name)
    found = {files.classes[number] for number in np.unique(files.labels)} if files.classes else set()
    unknown = sorted(found - {*classes})
    missing = sorted({*classes} - found)
    if unknown or missing:
        raise ValueError(
            f"suite={name}: the class folders of {path} are not the {len(classes)} of {name}: unknown are "
            f"{first_few(unknown) or 'none'}, and missing or empty {first_few(missing) or 'none'}"
        )
    number_of = {folder: number for number, folder in enumerate(classes)}
    numbers = np.array([number_of.get(folder, -1) for folder in files.classes])  # -1: an empty folder, of any name
    return Subset(files, np.array(evenly_spaced(len(files), limit or len(files))), classes, numbers)


def _with_real_labels(files: Listing, path: Path, limit: int | None) -> tuple[Subset, list[list[int]]]:
    """Returns the validation images of ImageNet that have a label of ReaL (Beyer et al. 2020), and all labels of each.

    timm contains the labels, by file names. Class folders have no effect.
    """
    from timm.data import RealLabelsImagenet

    labels = RealLabelsImagenet([""] * 50_000).real_labels
    names = [Path(name).name for name in files.names]
    if strange := [name for name in names if name not in labels]:
        raise ValueError(
            f"suite={REAL}: {len(strange)} files in {path}, such as {strange[0]}, do not have the names of the "
            f"published files, ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00050000.JPEG, which the labels need"
        )
    labelled = np.flatnonzero([bool(labels[name]) for name in names])
    if not len(labelled):
        raise ValueError(f"suite={REAL}: none of the {len(names)} images in {path} has a label")
    files.classes = synsets()
    files.labels = np.array([(labels[name] or [0])[0] for name in names])
    chosen = labelled[evenly_spaced(len(labelled), limit or len(labelled))]
    return Subset(files, chosen), [labels[names[index]] for index in chosen]


def warn_of_unused(settings: Mapping[str, Any]) -> None:
    """Logs a warning that names the settings of a run that have no effect on suites."""
    names = ("metric", "report", "dataset", "val_list", "val_fraction")
    if unused := [f"`{name}`" for name in names if settings.get(name)]:
        logger.warning(f"no effect with `suite`: {' '.join(unused)}")


def settings_of(model: torch.nn.Module, settings: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Returns what results depend on besides the suite: settings of the run, and a digest of the weights."""
    names = [*names_with(roles.MODEL, roles.IMAGES), "subset", "fast_jpeg"]
    found = {name: settings[name] for name in names if name in settings}
    return {**found, "precision": precision, "weights": compute_digest(model.state_dict())}


def evaluate(
    suites: Sequence[Suite],
    evaluate_source: Callable[[Suite, Subset], tasks.Evaluation],
    record: Mapping[str, Any],
    output_dir: Path,
) -> str:
    """Evaluates the suites that have no results yet, and stores the results of each suite in suites.json.

    Args:
        evaluate_source: evaluates the model on the images of a folder of a suite, such as `evaluate_folder`.
        record: what the results depend on besides the suite, as `settings_of`.
        output_dir: folder of suites.json, whose keys are a suite and a digest of all that its results depend on.

    Returns:
        A table with the published results.

    Raises:
        ValueError: suites.json is damaged, or another process writes to it.
    """
    results = Results(output_dir / "suites.json")
    rows: list[list[str]] = []
    with locks.locked(output_dir, "suites.lock") if parallel.is_main() else nullcontext():
        finished = parallel.from_rank_0(results.read)
        for suite in suites:
            images = {"images": _counts(suite), "files": parallel.from_rank_0(partial(_digests, suite))}
            settings = {**record, "crop_pct": suite.crop_pct, "path": str(suite.path), **images}
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
            key = f"{suite.name} {digest[:16]}"
            if key in finished:
                logger.info(f"{suite.name}: finished before, in {results.path}")
                result = finished[key]
            else:
                result = _evaluate_suite(suite, evaluate_source)
                if parallel.is_main():
                    results.add({key: {"settings": settings, **result}})
            rows += _rows(suite, result)
    return tables.markdown(["suite", "images", "score", "this model", *MODELS], rows)


def evaluate_folder(
    model: torch.nn.Module, data: RunData, batch_size: int,
    evaluate_model: Callable[[torch.nn.Module, Any], tasks.Evaluation], suite: Suite, source: Subset,
) -> tasks.Evaluation:  # fmt: skip
    """Evaluates a classifier of ImageNet-1K on the images of a folder of a suite, restricted to its classes.

    Args:
        evaluate_model: evaluates a model on batches.
    """
    transform = transforms.eval_transform(data.images.input_size, suite.crop_pct, data.images.crop)
    batches = data.eval_batches(source, batch_size, transform=transform)
    return evaluate_model(Restricted(model, suite.columns).to(data.normalize.std.device), batches)


def _digests(suite: Suite) -> dict[str, str]:
    """Returns a digest of some images of each folder: imagenet-c has millions, whose times take minutes to read."""
    some = {
        title: Subset(source, np.array(evenly_spaced(len(source), COMPARED))) for title, source in suite.sources.items()
    }
    return {title: compute_digest(versions(few)) for title, few in some.items()}


def _counts(suite: Suite) -> dict[str, int]:
    return {title: len(source) for title, source in suite.sources.items()}


def _evaluate_suite(suite: Suite, evaluate_source: Callable[[Suite, Subset], tasks.Evaluation]) -> dict[str, Any]:
    """Returns the accuracies of each folder, in percent. If images have several labels, any of them is correct."""
    scores: dict[str, dict[str, float]] = {}
    for title, source in suite.sources.items():
        evaluation = evaluate_source(suite, source)
        if suite.answers is None:
            scores[title] = {name: value for name, value in evaluation.scores().items() if name != "loss"}
        else:
            pairs = zip(evaluation.predictions, suite.answers, strict=True)
            scores[title] = {"acc1": 100 * float(np.mean([answer in answers for answer, answers in pairs]))}
        logger.info(f"{title}: {tasks.text(scores[title])} ({len(source):,} images)")
    return {"scores": scores, **(corruption_errors(scores) if suite.name == C else {})}


def corruption_errors(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Returns the mean corruption error in percent, and those of the 15 corruptions (Hendrycks & Dietterich 2019).

    The error of a corruption is the sum of the errors of its severities, relative to the sum of AlexNet's.

    Args:
        scores: with the top-1 accuracy `acc1` in percent of each CORRUPTION/SEVERITY.
    """
    errors: dict[str, float] = {}
    for name, alexnet in ALEXNET.items():
        five = np.array([100 - scores[f"{name}/{severity}"]["acc1"] for severity in SEVERITIES])
        errors[name] = 100 * float(five.sum()) / (len(SEVERITIES) * 100 * alexnet)
    return {"mce": float(np.mean([*errors.values()])), "corruption_errors": errors}


def _rows(suite: Suite, result: Mapping[str, Any]) -> list[list[str]]:
    """Returns the rows of a suite: one for each folder, and one for ImageNet-C."""
    counts = _counts(suite)
    published = [str(number) for number in PUBLISHED.get(suite.name, [""] * len(MODELS))]
    if suite.name == C:
        return [[C, f"{sum(counts.values()):,}", "mCE", f"{result['mce']:.1f}", *published]]
    accuracies = {title: f"{scores['acc1']:.1f}" for title, scores in result["scores"].items()}
    return [[title, f"{counts[title]:,}", "Acc@1", accuracies[title], *published] for title in counts]
