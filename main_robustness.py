"""Robustness: evaluates an ImageNet classifier on ImageNet-A, -R, -Sketch, -V2 and -C, and with the labels of ReaL.

    python main_robustness.py --suite imagenet-a --data_path imagenet-a --model mae_finetuned_vit_base \\
        --output_dir runs/robustness
    torchrun --nproc_per_node 8 main_robustness.py --suite imagenet-c --data_path ImageNet-C \\
        --model runs/base_finetuned/checkpoint-99.pth --output_dir runs/robustness

docs/results.md has the sources of the images and the results of the paper. The same command resumes an interrupted
suite. """

import json
import logging
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine_finetune import evaluate
from mae import parallel
from mae.checkpoints import checkpoint
from mae.cli import entry_point, options
from mae.data import loader
from mae.data.samples import Samples
from mae.evaluate import robustness, robustness_report
from mae.evaluate.tasks import Evaluation
from mae.files import locks
from mae.files.results import Results
from mae.inference.imagenet import TIMM, RestrictedClassifier, load
from mae.settings import Run, types
from mae.settings.choices import NO_CROP
from mae.training import log
from mae.training.compiling import compile_model
from mae.training.precision import Precision
from mae.weights.recorded_settings import warn_of_changes

logger = logging.getLogger(__name__)


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script."""
    parser = entry_point.parser("Robustness of an ImageNet classifier (He et al. 2021, appendix B).")
    group = parser.add_argument_group("suite")
    group.add_argument(
        "--suite",
        required=True,
        choices=robustness.SUITES,
        metavar="NAME",
        help=", ".join(robustness.SUITES),
    )
    options.add_to(
        group, "data_path", default=None, required=True, metavar="PATH",
        help="folder with the unpacked archives of the suite, or imagenet-a.tar or imagenet-r.tar",
    )  # fmt: skip
    group.add_argument(
        "--subset",
        type=types.positive_int,
        metavar="N",
        help="evaluate N evenly spaced images per test set (default: all)",
    )
    options.add_to(
        group, "crop_pct", default=None, type=types.positive_share, metavar="S",
        help="side of the center crop, as a fraction of the resized image (default: the model's; 1 for imagenet-c, "
        "whose images are center crops)",
    )  # fmt: skip
    options.add_to(
        group, "output_dir", default="runs/robustness", metavar="DIR",
        help="folder of scores, table (.md, .csv) and picture; existing scores are reused",
    )  # fmt: skip
    options.add_inference_options(parser, images=False, also=f"; or {TIMM}NAME, a model of timm")
    options.add_extraction_options(parser)
    options.add_distributed_options(parser)
    return parser


def main(args: Namespace) -> str:
    """Evaluates the cells that have no scores yet. Prints, writes and returns the table.

    Raises:
        ValueError: another process evaluates the suite with the same output directory.
    """
    device = parallel.init(args.device, args.dist_url, args.dist_timeout, args.dist_backend)
    log.start_logging()
    with locks.locked(Path(args.output_dir), f"{args.suite}.lock") if parallel.is_main() else nullcontext():
        return _evaluate(args, device)


def _evaluate(args: Namespace, device: torch.device) -> str:
    precision = Precision(args.amp, device)
    suite = robustness.find(args.suite, Path(args.data_path).expanduser())
    crop_pct = args.crop_pct or (1.0 if args.suite == "imagenet-c" else None)
    classifier = load(args.model, crop_pct, device, **options.chosen_settings(args, reads=False))
    if args.crop_pct and classifier.data_config.get("crop") == NO_CROP:
        raise ValueError(f"--crop_pct {args.crop_pct:g}: the model has --crop none, and sees whole images; omit it")
    given = {name: value for name in ("crop_pct", "exif") if (value := getattr(args, name)) is not None}
    warn_of_changes(args.model, Run.of(given), classifier.recorded)
    exif = classifier.recorded.get("exif") if args.exif is None else args.exif
    model = RestrictedClassifier(classifier.model, suite.columns).to(device)
    if args.compile:
        compile_model(model, device, freeze_weights=True)
    out = Path(args.output_dir) / args.suite
    settings = json.loads(json.dumps({  # equal to settings that a file records
        "model": args.model, "weights": checkpoint.compute_digest(model.state_dict()),
        **classifier.data_config, "data_path": str(suite.root), "subset": args.subset, "amp": precision.name,
        "exif": bool(exif), "encoder": args.encoder, "encoder_args": args.encoder_args,
    }))  # fmt: skip
    results = Results(out.with_suffix(".json"))
    scores_of = robustness_report.cells_of(results, settings)
    for number, name in enumerate(suite.cells, start=1):
        cell, started = robustness.open_cell(suite, name, args.subset), time.perf_counter()
        place = f", {number} of {len(suite.cells)}" if len(suite.cells) > 1 else ""
        same = {"images": len(cell.source), "folder": suite.cells[name].name}  # ImageNetV2 has several of a variant
        is_complete = name in scores_of and {**same, **scores_of[name]}.items() >= same.items()
        if parallel.gather(is_complete)[0]:  # rank 0 decides for all processes
            logger.info(f"{name}: scores reused from {results.path}{place}")
            continue
        if parallel.is_main() and not args.subset and len(cell.source) != robustness.IMAGES[args.suite]:
            logger.warning(f"{name}: {len(cell.source):,} images, but {robustness.IMAGES[args.suite]:,} were published")
        samples = Samples(
            cell.source, classifier.transform, in_chans=3, seed=0, fast_jpeg=args.fast_jpeg,
            exif=bool(exif), values=classifier.values,
        )  # fmt: skip
        batches = loader.eval_loader(samples, args.batch_size, args.num_workers, device.type == "cuda")
        progress = tqdm(batches, desc=name, unit="batch", leave=False, disable=None if parallel.is_main() else True)
        evaluation = evaluate(model, progress, normalize=classifier.normalize, precision=precision)
        scores_of[name] = scores = {**same, **score(evaluation, cell)}
        if parallel.is_main():
            results.add({"settings": settings, "cells": scores_of})
        seconds = time.perf_counter() - started
        balanced = f" balanced accuracy {scores['balanced_acc']:.3f}" if "balanced_acc" in scores else ""
        logger.info(f"{name}: Acc@1 {scores['acc1']:.3f}{balanced} ({len(samples):,} images, {seconds:.0f} s{place})")

    table = ""
    if parallel.is_main():
        cells = {name: scores_of[name] for name in suite.cells}
        part = f", a subset of {args.subset} images per cell" if args.subset else ""
        table = robustness_report.write(out, args.suite, cells, f"{args.suite}, {args.model}{part}")
        logger.info(f"\n{table}\ntable and picture: {out}.md, {out}.csv, {out}.png")
    return table


def score(evaluation: Evaluation, cell: robustness.Cell) -> robustness_report.Scores:
    """Returns the accuracies on a cell in percent.

    If images have several correct labels, any of them counts, and there is no other score.
    """
    images = len(evaluation.labels)
    if cell.answers is not None:
        correct = [answer in answers for answer, answers in zip(evaluation.predictions, cell.answers, strict=True)]
        return {"images": images, "acc1": 100 * float(np.mean(correct))}
    return {"images": images, **{name: value for name, value in evaluation.scores().items() if name != "loss"}}


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
