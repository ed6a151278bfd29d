"""Writes a page about a run of main_pretrain.py or main_finetune.py: report.html, in its directory.

    python -m mae.inference.report runs/mine

The page begins with what the encoder is worth: classifiers on its features, on pixels, on random weights and on other
encoders (--against), on the same held-out images, which answer.json keeps. Reconstructions, commands, nearest
neighbors, curves and settings follow. It is of checkpoint-best.pth if the run has one, or of the newest checkpoint. It
is one file, which loads nothing else. With --map, a map of the images and lists of what stands out take the place of
the neighbors.
"""

import argparse
import logging
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mae.build
from mae import encoders, masking, parallel
from mae.checkpoints import run_directory
from mae.cli import entry_point, options
from mae.compare import answer, answer_page, choices, verdict
from mae.data import extra_inputs, labels, loader
from mae.data.image_facts import readable
from mae.data.labels import Subset, first_rows
from mae.data.open import open_source
from mae.data.run_data import RunData
from mae.data.source import Source, Stream, evenly_spaced, first_few, is_stream
from mae.evaluate import pictures, tables
from mae.files import atomic
from mae.inference import curation, export, extraction, features, image_map, neighbors, page, progress, tuned
from mae.inference.model import Autoencoder, Model, get_model
from mae.inference.state_dicts import encoder_of, without_adapters
from mae.plurals import counted
from mae.recommend import finetuning
from mae.settings import DATASETS, DataSpec, ImageSpec, ModelSpec
from mae.settings.arguments import arguments, in_words
from mae.settings.choices import CLASSIFICATION, MULTILABEL, REGRESSION
from mae.settings.fields import default_of
from mae.settings.run import FIELDS, differs
from mae.training import environment, log, online_probe
from mae.training.gate import KNN
from mae.training.precision import Precision
from mae.user_code import runs_code

logger = logging.getLogger(__name__)

NAME = "report.html"
OF_CLASSIFIER = {"test_acc1": "accuracy (%)", "test_acc5": "top-5 accuracy (%)"}  # titles of curves
FINETUNING = "main_finetune"
SCRIPTS = ("main_pretrain", FINETUNING)
IMAGES = 2_000  # evenly spaced images among which the neighbors are: minutes for ViT-B on a CPU
RECONSTRUCTIONS = 12
SELECTED = (
    f"{run_directory.BEST} was selected by k-NN in training (`probe_every`): its accuracy on the images that selected "
    f"it is optimistic."
)
RELEASED = "facebook/dinov2-small"  # an example
SLOWER = 2  # times as long as in the pre-training, an image takes in fine-tuning, about: all its patches are visible
FEW = 30  # epochs whose values are dots, because a line needs several
MEASURES = {
    "train_loss": "training loss", "test_loss": "held-out loss", "train_explained": "variance explained",
    "test_explained": "variance explained, held-out", "test_knn_acc1": "k-NN in training (%)",
    "test_knn_pixels": "k-NN of raw pixels in training (%)",
    "test_effective_rank": "effective rank", "test_uniformity": "uniformity",
}  # fmt: skip
TOGETHER = (
    ("train_loss", "test_loss"), ("train_explained", "test_explained"), ("test_knn_acc1", "test_knn_pixels"),
)  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser(
        "Writes a page about a run of main_pretrain.py or main_finetune.py: report.html, in its directory."
    )
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="directory of the run")
    parser.add_argument(
        "--map", action="store_true",
        help=f"a map of up to {image_map.IMAGES:,} training images in place of their neighbors, and lists of equal "
        "images, near-duplicates, outliers, and labels that the neighbors do not have; the lists are CSV files, too",
    )  # fmt: skip
    options.add_to(parser, "data_path", help="images of the run, if it read them elsewhere")
    options.add_against_option(parser)
    options.add_dataset_option(parser)
    options.add_to(parser, "encoder", "encoder_args", "num_workers", "device", "debug")
    options.add_to(parser, "batch_size", default=128)
    return parser


def main(args: argparse.Namespace) -> Path:
    """Writes the page, and returns its path."""
    log.start_logging()
    if not (args.run_dir / environment.FILE).is_file():
        raise ValueError(f"{args.run_dir} is no run directory: give the `output_dir` of a run")
    start = environment.read_last(args.run_dir)
    settings = start["settings"]
    entries = log.read(args.run_dir)
    if settings.get("script") not in SCRIPTS:
        given = f"{args.run_dir} is a run of {settings.get('script')}.py"
        raise ValueError(f"{given}: give a run of {' or '.join(f'{name}.py' for name in SCRIPTS)}")
    checkpoints = run_directory.best_first(args.run_dir)
    if not (entries and checkpoints):
        raise ValueError(f"{args.run_dir} has no completed epoch with a checkpoint yet")
    path = checkpoints[0]
    data = data_of(settings, args)
    if settings["script"] == FINETUNING:
        return write_tuned(args, start, entries, path, data)
    epochs, _ = run_directory.position(path)
    of_state = up_to(entries, epochs)
    device = parallel.choose_device(args.device)
    source = open_images(data)
    model: Any = get_model(path, device=device, **options.chosen_settings(args))
    extra_inputs.require_fitting(model, source)
    some: Source | None = None
    if not is_stream(source):
        some = Subset(source, np.array(evenly_spaced(len(source), IMAGES)))
        if data.on_bad_image == "skip":
            some = readable(some, model.in_chans, args.num_workers, model.values)
    spec = replace(ImageSpec.of(settings), task=task_of(source))
    images = labelled_or_reason(RunData(spec, replace(data, num_workers=args.num_workers), device), source)
    results = None
    sections = []
    without_labels = progress.explained(of_state)
    if some is not None and isinstance(model, Autoencoder):
        if isinstance(images, str):
            if args.against:
                logger.warning(f"`against` has no effect: {images}")
            result = page.paragraph(f"{without_labels} {images}", "verdict")
        else:
            how = answer.Extraction(Precision("auto", device), args.batch_size, args.num_workers)
            results = answer.compute(args.run_dir / answer.FILE, model, images, args.against, how)
            result = answer_page.section(results, without_labels)
        if not settings.get("init_from"):
            result += page.paragraph(progress.sentences(entries, settings["epochs"], len(source)))
        if path.name == run_directory.BEST and epochs:
            result += page.paragraph(SELECTED)
        sections.append(page.section("Is it worth it?", result))
    if isinstance(model, Autoencoder):
        drawn = reconstructions(model, source if some is None else some, ModelSpec.of(settings))
        sections.append(page.section("Reconstructions", drawn))
    labelled = labelled_images(settings, data, not isinstance(images, str) and has_all_labels(source))
    further = commands(args.run_dir, path, settings, data, source, labelled, model, results, entries)
    sections.append(page.section("What to do next", further))
    if args.map:
        sections += mapped(model, source, data, args)
    elif some is not None:
        sections.append(page.section("Nearest neighbors", nearest_images(model, some, len(source), args)))
    closed = answer_page.details(results) if results else ""
    closed += curves(entries) + note_of_probe(entries, settings) + page.definitions(measures_of(of_state))
    sections.append(page.details("Classifiers, curves, costs and settings", closed + settings_of(start)))
    title = f"Pre-training run {args.run_dir.resolve().name}"
    named = data.train_list or data.dataset or data.data_path
    about = f"{settings['model']} on {len(source):,} images of {named}. The pictures are of {state_of(path, epochs)}."
    return save(args.run_dir, page.render(title, about, facts_of(entries, of_state, settings, results), sections))


def has_all_labels(source: Source | Stream) -> bool:
    """Whether each image has a label, as supervised training needs it."""
    return not is_stream(source) and bool(np.min(source.labels, initial=0) >= 0 or np.ndim(source.labels) > 1)


def task_of(source: Source | Stream) -> str:
    """Returns what the labels of images mean: several of them are 0 or 1, and numbers have other values, too."""
    labels = np.asarray([] if is_stream(source) or not source.classes else source.labels)
    if labels.ndim < 2:
        return CLASSIFICATION
    return MULTILABEL if np.isin(labels, (0, 1)).all() else REGRESSION


def labelled_or_reason(data: RunData, source: Source | Stream) -> answer.Labelled | str:
    """Returns the images of an answer, or a sentence that says why there is none."""
    if is_stream(source) or not source.classes:
        return "The images have no labels, so that nothing says whether the features tell them apart."
    if data.images.task == MULTILABEL:
        return "The images have several labels each, and there is no baseline of such labels: no comparison is made."
    given = np.asarray(source.labels)
    if data.images.task == CLASSIFICATION and len(np.unique(given[given >= 0])) < 2:
        return "The images do not have several classes, so that nothing says whether the features tell them apart."
    try:
        return open_labelled(data, source)
    except ValueError as error:
        logger.warning(f"no images are evaluated: {error}")
        return f"No images are evaluated: {error}"


def open_labelled(data: RunData, source: Source) -> answer.Labelled:
    """Returns the images of an answer.

    Args:
        source: the training images. Those that a list repeats count once.

    Raises:
        ValueError: as in `labels.open_pair`.
        BadImage: as in `RunData.readable`.
    """
    rows = first_rows(source)
    if data.images.task == CLASSIFICATION:
        rows = rows[np.asarray(source.labels)[rows] >= 0]  # the others have no label
    open_split, total = data.splits(Subset(source, rows))
    train, val = labels.open_pair(open_split, data.images.task)
    train = data.readable(Subset(train, choices.stratified(np.asarray(train.labels), answer.MOST, 0)))
    val = data.readable(Subset(val, np.array(evenly_spaced(len(val), answer.MOST))))
    held_out = data.name_held_out(total)
    if data.images.task == CLASSIFICATION:
        missing = [name for number, name in enumerate(train.classes) if number not in val.labels]
        held_out += f" (none is of {first_few(missing)})" if missing else ""
    return answer.Labelled(train, val, held_out, data.images.task)


def state_of(path: Path, epochs: int) -> str:
    """Names a checkpoint after a number of epochs, and says which state checkpoint-best.pth is, or that it is gone."""
    if run_directory.lacks_best(path):
        return f"{path.name}: the best state, {run_directory.BEST}, is gone or damaged"
    if path.name != run_directory.BEST:
        return path.name
    if not epochs:
        return f"{path.name}, the start: no later state was better. A decoder that its file did not have is untrained"
    return f"{path.name}, the state after epoch {epochs - 1}"


def write_tuned(
    args: argparse.Namespace, start: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], path: Path, data: DataSpec
) -> Path:
    """Writes the page about a run of main_finetune.py, of a checkpoint; returns its path."""
    settings = start["settings"]
    encoder = options.chosen_settings(args).get("encoder")
    opened = replace(data, num_workers=args.num_workers, cache_images=False)
    found = tuned.evaluate(path, opened, encoder, args.device, args.batch_size)
    sections = [page.section("Curves", curves(entries))]
    if tuned.has_classes(found):
        evaluations = sum("test_loss" in entry for entry in entries)
        sections += [
            page.section("Which classes are confused", tuned.notes(path, evaluations) + tuned.confusion(found)),
            page.section("Images that are wrong", tuned.mistakes(found)),
        ]
    if args.map:
        model: Any = get_model(path, device=found.data.device, **options.chosen_settings(args))
        sections += mapped(model, open_images(data), data, args)
    sections += [
        page.section("What to do next", tuned_commands(path, data, encoders.user_code_of(settings))),
        page.section("Settings", settings_of(start)),
    ]
    title = f"Fine-tuning run {args.run_dir.resolve().name}"
    images = data.train_list or data.dataset or data.data_path
    started = f"started from {settings['finetune']}" if settings.get("finetune") else "started from random weights"
    epochs, _ = run_directory.position(path)
    about = f"{settings['model']} on {images}, {started}. The scores and pictures are of {state_of(path, epochs)}."
    facts = {**facts_of(entries, up_to(entries, epochs), settings), **tuned.facts_of(found)}
    return save(args.run_dir, page.render(title, about, facts, sections))


def tuned_commands(path: Path, data: DataSpec, code: Mapping[str, Any]) -> str:
    """Returns commands that use a classifier.

    Args:
        code: settings of an encoder of the user's code.
    """
    names = ("data_path", "dataset", "train_list", "val_list", "val_fraction")
    images = arguments({name: getattr(data, name) for name in names})
    lines = {
        "Evaluate, with the scores of each class": [
            "main_finetune", "--eval", "--resume", str(path), *images, "--report", f"{path.parent}/report",
        ],
        "Classify images": ["mae.inference.predict", "IMAGE", "--model", str(path)],
        "Export the classifier": [
            "mae.inference.export", "--model", str(path), "--to", "onnx", "--out", "classifier.onnx",
        ],
    }  # fmt: skip
    named = {title: ["python", "-m", *words, *arguments(code)] for title, words in lines.items()}
    return "".join(f"<h3>{title}</h3>{page.command(words)}" for title, words in named.items())


def save(run_dir: Path, text: str) -> Path:
    """Writes the page, and returns its path."""
    path = run_dir / NAME
    atomic.write_text(path, text)
    print(f"report: {path}")
    return path


def data_of(settings: Mapping[str, Any], args: argparse.Namespace) -> DataSpec:
    """Returns the dataset of a run, or that of the command line.

    Raises:
        ValueError: the dataset of the run is code, which a file must not make this program import.
    """
    given = {"data_path": args.data_path, "dataset": args.dataset}
    if args.data_path:
        return DataSpec.of({**settings, **dict.fromkeys(DATASETS), "extras": None, **given})
    if args.dataset:
        return DataSpec.of({**settings, "dataset": args.dataset})
    data = DataSpec.of(settings)
    if data.dataset and runs_code(data.dataset):
        raise ValueError(f"the dataset of the run is code: give {in_words({'dataset': data.dataset})}")
    return data


def open_images(data: DataSpec) -> Source | Stream:
    """Opens the training images; with their labels, if each has one class."""
    try:
        return features.open_labelled(data, "train")
    except ValueError as error:  # of the labels; another error is raised again
        source = open_source(data, "train", task=None)
        logger.warning(f"the labels of the images are not used: {error}")
        return source


def up_to(entries: Sequence[Mapping[str, Any]], epochs: int) -> list[Mapping[str, Any]]:
    """Returns the entries of log.txt up to the state after a number of epochs."""
    return [entry for entry in entries if entry["epoch"] < epochs]


def measures_of(of_state: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the last measures of a state, by their titles. `of_state`: its entries of log.txt, `up_to`."""
    last = {name: entry[name] for entry in of_state for name in MEASURES if name in entry}
    return {MEASURES[name]: f"{value:.4g}" for name, value in last.items()}


def facts_of(
    entries: Sequence[Mapping[str, Any]], of_state: Sequence[Mapping[str, Any]], settings: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Returns the main numbers of a run, by their titles."""
    facts = {
        "epochs": f"{entries[-1]['epoch'] + 1} of {settings['epochs']}",
        "training time": log.duration(sum(entry["seconds"] for entry in entries)),
    }
    measures = measures_of(of_state)
    for name in ("test_explained", "train_explained", "train_loss"):  # the log has none of the start
        if MEASURES[name] in measures:
            value = float(measures[MEASURES[name]])
            facts[MEASURES[name]] = f"{value:.1%}" if name.endswith("explained") else f"{value:.4g}"
            break
    if results:
        labels = verdict.sizes_of(results)[-1]
        accuracy = verdict.scores_of_best(results, verdict.ENCODER, labels).mean()
        name = "accuracy" if results["task"] == CLASSIFICATION else "r2"
        facts[f"{name}, {labels:,} labels"] = f"{accuracy:.1%}"
    return facts


def curves(entries: Sequence[Mapping[str, Any]]) -> str:
    """Draws the losses, and each other measure of --probe_every and of callbacks."""
    found = dict.fromkeys(name for entry in entries for name in entry if name.startswith("test_"))
    found |= dict.fromkeys(name for entry in entries for name in entry if name in chain(*TOGETHER))
    figures = [[name for name in names if name in found] for names in TOGETHER]
    figures += [[name] for name in found if name not in chain(*TOGETHER)]
    drawn = [names for names in figures if any(sum(name in entry for entry in entries) > 1 for name in names)]
    return f'<div class="curves">{"".join(curve(entries, names) for names in drawn)}</div>'


def note_of_probe(entries: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Returns a paragraph on the images of `probe_every`, which are not those of the verdict; "" without k-NN."""
    if not any(KNN in entry for entry in entries):
        return ""
    share = online_probe.HELD_OUT
    images = f"{1 - share:.0%} of the training images classify the other {share:.0%}, which are held out"
    if path := settings.get("probe_path"):
        images = f"the training images of {path} classify its held-out images"
    return page.paragraph(
        f"k-NN in training (`probe_every`): {online_probe.NEIGHBORS} nearest neighbors among {images}. The log of the "
        f"run has their numbers."
    )


def curve(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Draws entries of log.txt by epoch."""
    figure = tables.new_figure(5, 3)
    axes = figure.subplots()
    titles = [{**MEASURES, **OF_CLASSIFIER}.get(name, name) for name in names]
    for name, title in zip(names, titles, strict=True):
        points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
        axes.plot(*zip(*points, strict=True), label=title, marker="o" if len(points) <= FEW else "", markersize=4)
    axes.set_xlabel("epoch")
    axes.set_title(", ".join(titles), loc="left", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend(frameon=False)
    return page.image(tables.to_svg(figure), "svg+xml", f"{', '.join(titles)} by epoch")


def reconstructions(model: Autoencoder, source: Source | Stream, spec: ModelSpec) -> str:
    """Draws reconstructions of evenly spaced images, masked as in the run."""
    draw_noise, mask_ratio = mae.build.mask_sampler(spec, model)
    samples = extraction.samples_of(model, source, draw_noise=draw_noise)
    shown = pictures.show_range(model.normalize, pictures.decoded(samples))
    batch = loader.examples(samples, RECONSTRUCTIONS)
    scale = neighbors.scale_of(batch.images)
    pixels = pictures.reconstruction(
        model, batch.images, batch.noise, model.normalize, mask_ratio, scale, context=batch.context
    )
    titles = pictures.titled(1 - masking.num_visible(model.num_patches, mask_ratio) / model.num_patches)
    text = f"Training images that are not augmented. {pictures.NOTE} {shown}"
    return page.paragraph(text) + page.pair(pixels, len(batch.images), titles, "images and their reconstructions")


def rows_of(model: Model, source: Source, args: argparse.Namespace) -> torch.Tensor:
    """Computes the features of images, (n, D)."""
    precision = Precision("auto", parallel.choose_device(args.device))
    extractor = extraction.Extractor(model, None)
    return torch.from_numpy(
        extraction.extract(extractor, source, None, {}, args.batch_size, args.num_workers, precision)
    )


def nearest_images(model: Model, source: Source, total: int, args: argparse.Namespace) -> str:
    """Draws the nearest neighbors of evenly spaced images.

    Args:
        source: the images among which the neighbors are.
        total: number of images of the run.
    """
    rows = rows_of(model, source, args)
    chosen = evenly_spaced(len(source), neighbors.QUERIES)
    found = neighbors.find(rows, rows[chosen], chosen)
    columns = neighbors.columns_of(model, source, neighbors.read_images(model, source, chosen), found.indices)
    shown = pictures.show_range(model.normalize, pictures.decoded(extraction.samples_of(model, source)))
    pixels = pictures.tile(columns, model.normalize.displayed, neighbors.scale_of(columns[0]))
    among = f"{len(source):,} of the {total:,}" if len(source) < total else f"the {total:,}"
    text = f"The images with the nearest features, by cosine similarity, among {among} training images. "
    text += f"Features: {model.pooling}."
    if agreement := neighbors.agreement(source, rows):
        text += f" {agreement}."
    titles = neighbors.titles(len(columns) - 1)
    return page.paragraph(f"{text} {shown}") + page.pair(
        pixels, len(chosen), titles, "images and their nearest neighbors"
    )


def mapped(model: Model, source: Source | Stream, data: DataSpec, args: argparse.Namespace) -> list[str]:
    """Returns a map of the training images and lists of what stands out, and writes the CSV files.

    Raises:
        ValueError: the images are streamed, or too few.
    """
    if is_stream(source):
        raise ValueError(f"map=true: {source.title} has no order; give the folder of the images as `data_path`")
    extra_inputs.require_fitting(model, source)
    some = image_map.some_of(source)
    if data.on_bad_image == "skip":
        some = readable(some, model.in_chans, args.num_workers, model.values)
    survey = image_map.take(model, some, rows_of(model, some, args), len(source), args.num_workers, model.pooling.name)
    image_map.write_tables(args.run_dir / NAME, survey)
    return survey.sections


def labelled_images(settings: Mapping[str, Any], data: DataSpec, has_labels: bool) -> Mapping[str, Any]:
    """Returns the labelled images of a run, as settings. Without val/, the commands hold out a part of them."""
    named = {name: getattr(data, name) for name in ("data_path", "dataset", "train_list", "val_list")}
    return log.labelled_images(named, settings.get("probe_path"), has_labels)


def commands(
    run_dir: Path, checkpoint: Path, settings: Mapping[str, Any], data: DataSpec, source: Source | Stream,
    found: Mapping[str, Any], model: Model, results: Mapping[str, Any] | None, entries: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    """Returns commands that use a checkpoint.

    Args:
        found: from `labelled_images`.
        results: from `answer.compute`.
        entries: those of log.txt.
    """
    labelled = arguments(found)
    note = f"{labelled[-1]} has images in train/CLASS and val/CLASS. " if found is log.UNLABELLED else ""
    path = data.data_path or data.train_list  # the commands read paths that are relative to the list
    images = [*([path] if path else []), *arguments({"dataset": data.dataset})]
    if is_stream(source) or not images:
        images = ["IMAGES"]
    code = encoders.user_code_of(settings)
    file = str(checkpoint)
    skips = arguments({"on_bad_image": "skip"}) if data.on_bad_image == "skip" else []
    to_timm = not export.unsupported(without_adapters(encoder_of(model)), "timm")
    format_of_encoder = ["timm", "--out", "encoder"] if to_timm else ["safetensors", "--out", "encoder.safetensors"]
    lines = {
        "Classify by nearest neighbors": ["main_knn", *labelled, "--finetune", file, *skips],
        "Compute the features of all images": [
            "mae.inference.features", *images, "--model", file, *skips, "--out", "features.npz",
        ],
        "Find the neighbors of an image": [
            "mae.inference.neighbors", *images, "--model", file, *skips, "--query", "IMAGE", "--out", "neighbors.png",
        ],
        "Map the images, and list duplicates, outliers and labels that look wrong": [
            "mae.inference.image_map", *images, "--model", file, *skips, "--out", "map.html",
        ],
        "Export the encoder": [
            "mae.inference.export", "--model", file, "--encoder_only", "--to", *format_of_encoder,
        ],
    }  # fmt: skip
    if results:
        lines = {
            "Compare with a released encoder": ["mae.inference.report", str(run_dir), "--against", RELEASED],
            **lines,
        }
    if len(source) <= curation.NEIGHBORS:  # too few for a map
        lines = {title: words for title, words in lines.items() if words[0] != "mae.inference.image_map"}
    named_lines = {
        f"Fine-tune with labels{minutes_text(results, source, entries)}": log.finetune_command(found, file, code),
        **{title: ["python", "-m", *words, *arguments(code)] for title, words in lines.items()},
    }
    shown = [f"<h3>{title}</h3>{page.command(words)}" for title, words in named_lines.items()]
    note += "The first command writes a recipe for the labels, and prints the command that trains with it."
    if results and not all(one.is_better for one in verdict.of_baseline(results)):
        note = f"Where frozen features are not better than pixels, fine-tuning may be. {note}"
    return page.paragraph(note) + "".join(shown)


def minutes_text(
    results: Mapping[str, Any] | None, source: Source | Stream, entries: Sequence[Mapping[str, Any]]
) -> str:  # fmt: skip
    """Returns about how long a fine-tuning with all labels takes here, by the speed of the run; "" if unknown."""
    if not results or len(source) >= finetuning.MANY_LABELS:
        return ""
    labelled = finetuning.Labels(len(source), len(source.classes), 1, results["images"])
    images = finetuning.epochs_of(labelled) * len(source)
    minutes = math.ceil(SLOWER * images / statistics.median(entry["images_per_s"] for entry in entries) / 60)
    return f", about {counted(minutes, 'minute')}"


def settings_of(start: Mapping[str, Any]) -> str:
    """Returns the command of a start, the settings that are not the defaults, and all settings."""
    settings = start["settings"]
    defaults = {name: default_of(one) for name, (_, one) in FIELDS.items()}
    changed = {name: value for name, value in settings.items() if differs(name, value, defaults.get(name))}
    machine = {name: value for name, value in start.items() if name not in ("settings", "command")}
    return (
        f"<h3>Last start</h3>{page.command(shlex.split(start['command']))}{page.definitions(machine)}"
        f"<h3>Other than the defaults</h3>{page.definitions(changed)}"
        f"<details><summary>All {len(settings)} settings</summary>{page.definitions(settings)}</details>"
    )


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
