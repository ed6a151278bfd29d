"""What a pre-training is worth: its encoder, pixels, random weights and other encoders on the same held-out images.

The results are in answer.json in the run directory, from which `mae.compare.verdict` makes the sentences and the table.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mae.checkpoints.checkpoint import compute_digest
from mae.compare import choices, verdict
from mae.compare.predictors import BASELINES, USES, Predictor, judged
from mae.compare.verdict import ENCODER, PIXELS, RANDOM
from mae.data import equal_images, extra_inputs, raw_pixels
from mae.data.fingerprint import fingerprint
from mae.data.source import Source
from mae.files import atomic
from mae.inference import extraction
from mae.inference.classes import NOT_IN_FEATURES
from mae.inference.model import Autoencoder, Model, get_model
from mae.pooling import TITLES, pooled
from mae.settings import ImageSpec
from mae.settings.choices import BOTH, CLASS_TOKEN, CLASSIFICATION, PATCHES, POOL_CHOICES
from mae.sizes import to_pair
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

FILE = "answer.json"
VERSION = 1  # of the computation: results of another one are computed again
MOST = 10_000  # labelled images, and held-out images
SIZE = 500  # labels, besides all of them; at most half of them
DRAWS = 5  # of SIZE labels. With three, equal encoders are called better too often: their variance is a guess

READING = ("exif", "nodata", "value_range", "channels_last")  # settings of a run that other encoders take
DARK = 0.25  # of the range of values, below which images of more than 8 bits are dark

Options = dict[str, tuple[np.ndarray, np.ndarray]]  # features of the labelled and of the held-out images, by their name


class Labelled(NamedTuple):
    """The images of an answer."""

    train: Source  # at most MOST
    val: Source  # held-out images, at most MOST
    held_out: str  # what the latter are, in words
    task: str

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the classes of both sets, (n,); or their numbers (n, C), in units of their spread in the second."""
        train, val = (np.asarray(source.labels) for source in (self.train, self.val))
        if self.task == CLASSIFICATION:
            return train, val
        spread = np.maximum(val.std(axis=0), np.finfo(np.float32).eps)
        return train / spread, val / spread


class Extraction(NamedTuple):
    """How features are computed."""

    precision: Precision
    batch_size: int
    num_workers: int


class Row(NamedTuple):
    """A row of the results, before its features are computed."""

    title: str
    kind: str
    digest: str  # of what its features depend on besides the images
    options: Callable[[], Options]
    facts: Mapping[str, Any]


class _Poolings(extraction.Extractor):
    """Normalized images (B, c, H, W) -> the features of several poolings, one beside the other."""

    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__(model, None)
        self.names = names

    def forward(self, imgs: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if len(self.names) == 1:
            return super().forward(imgs, **inputs)
        tokens = self.model.compute_features(imgs, "tokens", **inputs)
        return torch.cat([pooled(self.model, tokens, name) for name in self.names], dim=1)


def open_encoder(name: str, device: str | torch.device = "cpu", **settings: Any) -> Model:
    """Opens an encoder that a run is compared with, at the input size that its file records.

    Args:
        settings: how the values of the images are read.

    Raises:
        ValueError: there is no such file or name, it can't be downloaded, or the file is damaged or has no encoder.
    """
    try:
        return get_model(name, pretrained=True, device=device, **settings)
    except ValueError as error:
        raise ValueError(f"against={name}: {error}") from error


def read(file: Path) -> dict[str, Any]:
    """Returns the content of a file of results; {} if there is none, or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def compute(
    file: Path, model: Autoencoder, images: Labelled, against: Sequence[str], how: Extraction
) -> dict[str, Any]:  # fmt: skip
    """Computes the rows that a file of results does not have, and writes it after each of them.

    Rows of other encoders that are in the file, and not in `against`, are kept.

    Args:
        file: the results. Those of other images, or of an earlier state of the model, are computed again.
        model: the encoder of the run.
        against: names or files of other encoders.

    Returns:
        The content of the file.
    """
    begin = time.perf_counter()
    of_images = {
        "version": VERSION, "task": images.task, "labels": len(images.train), "images": len(images.val),
        "held_out": images.held_out, "digests": fingerprint(images.train, with_labels=True, val=images.val),
    }  # fmt: skip
    results = read(file)
    if any(results.get(name) != value for name, value in of_images.items()):
        results = {**of_images, "equal": "", "rows": {}}
    for row in _rows(model, images, against, how, results):
        if results["rows"].get(row.title, {}).get("digest") == row.digest:
            continue
        logger.info(f"{row.title}: computing its features of {len(images.train) + len(images.val):,} images")
        started = time.perf_counter()
        options = row.options()
        images_per_s = (len(images.train) + len(images.val)) / (time.perf_counter() - started)
        results["rows"][row.title] = {
            "kind": row.kind, "digest": row.digest, "images_per_s": round(images_per_s, 1), **row.facts,
            "uses": _uses(row.kind, options, images),
        }  # fmt: skip
        is_done = is_complete(results)
        results["sentences"] = verdict.sentences(results) if is_done else []
        results["differences"] = verdict.numbers(results) if is_done else {}
        atomic.write_text(file, json.dumps(results, indent=1) + "\n")
    logger.info(f"{' '.join(results['sentences'])} ({time.perf_counter() - begin:.0f} s)")
    if results["equal"]:
        logger.warning(results["equal"])
    return results


def is_complete(results: Mapping[str, Any]) -> bool:
    """Whether results have the rows of every answer."""
    return {ENCODER, PIXELS, RANDOM} <= results.get("rows", {}).keys()


def _rows(
    model: Autoencoder, images: Labelled, against: Sequence[str], how: Extraction, results: dict[str, Any]
) -> Iterator[Row]:  # fmt: skip
    """Yields the rows of an answer. That of the pixels adds to the results how many held-out images are not new."""
    spec = ImageSpec.of(model.settings)

    def pixels() -> Options:
        rows = [raw_pixels.read(source, spec, how.num_workers) for source in (images.train, images.val)]
        results["equal"] = equal_images.sentence(images.train, images.val, *map(equal_images.of_pictures, rows))
        return {"": (rows[0], rows[1])}

    def row_of(title: str, kind: str, encoder: Model) -> Row:
        extra_inputs.require_fitting(encoder, images.train, images.val)
        height, width = to_pair(encoder.settings["input_size"])
        facts = {
            "input": f"{height} px" if height == width else f"{height} x {width} px",
            "has_random_weights": bool(encoder.random_weights(*NOT_IN_FEATURES)),
        }  # fmt: skip
        return Row(title, kind, compute_digest(encoder.state_dict()), partial(_features, encoder, images, how), facts)

    yield row_of(ENCODER, "run", model)
    yield Row(PIXELS, "pixels", compute_digest([raw_pixels.VERSION, spec.record()]), pixels, {})
    yield row_of(RANDOM, "random", with_random_weights(model))
    values = {name: model.settings[name] for name in READING if model.settings.get(name) is not None}
    brightest = float((model.normalize.mean + 3 * model.normalize.std).max())
    if against and not spec.value_range and 0 < brightest < DARK:
        logger.warning(
            f"`against`: the images have values up to about {brightest:.2g} of their range, and other encoders get "
            f"dark images: for a fair comparison, start a run with `value_range`, such as 0 4095"
        )
    for name in against:
        yield row_of(name, "other", open_encoder(name, how.precision.device, **values))


def with_random_weights(model: Autoencoder) -> Autoencoder:
    """Returns a new model of the same settings and pooling, with the weights of the seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = type(model)(dict(model.settings))
    network.pooling = model.pooling
    network.initial = {}  # no warning: the weights are meant to be random
    return network.to(model.normalize.mean.device)


def _features(model: Model, images: Labelled, how: Extraction) -> Options:
    """Computes the features of all poolings, that of `pooling_of` first."""
    names = [model.pooling.name]
    if names[0] in POOL_CHOICES and not model.settings.get("global_pool"):
        names = [*dict.fromkeys([*names, CLASS_TOKEN, PATCHES])]
    extractor = _Poolings(model, names)
    train, val = (
        extraction.extract(extractor, source, None, {}, how.batch_size, how.num_workers, how.precision)
        for source in (images.train, images.val)
    )
    width = train.shape[1] // sum(1 + (name == BOTH) for name in names)
    ends = np.cumsum([width * (1 + (name == BOTH)) for name in names])[:-1]
    parts = zip(np.split(train, ends, axis=1), np.split(val, ends, axis=1), strict=True)
    return {TITLES[name]: part for name, part in zip(names, parts, strict=True)}


def _uses(kind: str, options: Options, images: Labelled) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of all uses of features, by their titles: for each number of labels, those of its draws."""
    from joblib import Parallel, delayed

    named = USES[images.task]
    if kind == "pixels":
        named = {predictor.title: predictor for predictor in BASELINES[images.task]}
    truth, wanted = images.targets()
    sizes = sizes_of(len(truth))
    jobs = [
        delayed(_use)(predictor, options, truth, wanted, rows, draw, images.task)
        for predictor in named.values()
        for labels, draws in sizes
        for draw in range(draws)
        for rows in [choices.stratified(truth, labels, draw)]
    ]
    # Processes take seconds to start. They get arrays that may be written: PyTorch warns of others.
    processes = -1 if len(truth) >= verdict.LEAST_LABELS else 1
    done = Parallel(n_jobs=processes, mmap_mode="c", return_as="generator")(jobs)
    found = iter(tqdm(done, "classifiers", len(jobs), unit="fit", leave=False, disable=None))
    return {
        title: [{"labels": labels, "draws": [next(found) for _ in range(draws)]} for labels, draws in sizes]
        for title in named
    }


def sizes_of(count: int) -> list[tuple[int, int]]:
    """Returns the numbers of labels, and the number of draws of each, for a number of labelled images.

    Draws of a part of the labels also say how far the results depend on the labels: few labels have draws of a half.
    """
    part = [(min(SIZE, count // 2), DRAWS)] if count >= verdict.LEAST_LABELS else []
    return [*part, (min(count, MOST), 1)]


def _use(
    predictor: Predictor, options: Options, truth: np.ndarray, wanted: np.ndarray, rows: np.ndarray, draw: int,
    task: str,
) -> dict[str, Any]:  # fmt: skip
    """Fits a predictor on a draw of labels, with the choice by these labels alone; returns its scores."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # other processes have the other cores
        few = {name: train[rows] for name, (train, _) in options.items()}
        chosen = choices.choose(predictor, few, truth[rows], draw, task)
        queries = options[chosen.option][1]
        (outputs,) = predictor.predict(few[chosen.option], truth[rows], queries, [chosen.values])
    texts = filter(None, [predictor.in_words(chosen.values), chosen.option, chosen.note])
    return {
        "chosen": ", ".join(texts), "by_cross_validation": chosen.score,
        "scores": verdict.packed(judged(outputs, wanted, task), task),
    }  # fmt: skip
