"""Robustness: what a classifier of ImageNet scores on ImageNet-A, -R, -Sketch, -V2, -C, and under the labels of ReaL.

    python main_robustness.py --suite imagenet-a --data_path imagenet-a --model mae_finetuned_vit_base \\
        --output_dir runs/robustness
    torchrun --nproc_per_node 8 main_robustness.py --suite imagenet-c --data_path ImageNet-C \\
        --model runs/base_finetuned/checkpoint-99.pth --output_dir runs/robustness

Where to get the images, and what the paper's models score on them, is told in RESULTS.md. A suite that was stopped
goes on with the same command.
"""

import argparse
import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from engine_finetune import Evaluation, evaluate
from inference.model import get_model
from util import checkpoint, cli, dist, flags, loader, options, runlog, suite_report, suites
from util.precision import Precision
from util.samples import Samples
from util.transforms import Normalize, Transform

logger = logging.getLogger(__name__)

TIMM = "timm:"


class Classifier(NamedTuple):
    """What is evaluated: of ours, or of timm's."""

    model: nn.Module  # images (B, 3, H, W) to logits (B, 1000)
    transform: Transform
    normalize: nn.Module


class Among(nn.Module):
    """Answers among some classes only: logits (B, 1000) to theirs (B, number of them)."""

    def __init__(self, model: nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits if len(self.classes) == logits.shape[1] else logits[:, self.classes]


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.parser("Robustness of an ImageNet classifier (He et al. 2021, appendix B).")
    group = parser.add_argument_group("suite")
    group.add_argument("--suite", required=True, choices=suites.SUITES, metavar="NAME", help=", ".join(suites.SUITES))
    group.add_argument(
        "--data_path", required=True, metavar="PATH", help="where its published archive, or archives, were unpacked"
    )
    group.add_argument(
        "--subset", type=flags.positive_int, metavar="N", help="N images of each cell, evenly spread; None: all"
    )
    group.add_argument(
        "--crop_pct", type=flags.positive_share, metavar="S",
        help="side of the centre crop, as a share of the scaled image's; None is the model's own, and 1 for "
        "imagenet-c, whose images are such crops",
    )  # fmt: skip
    group.add_argument(
        "--output_dir", default="runs/robustness", metavar="DIR",
        help="scores, table (.md, .csv) and picture go here; what is done is not done again",
    )  # fmt: skip
    options.add_inference_options(parser, images=False, also=f"; or {TIMM}NAME, any model of timm's")
    options.add_extraction_options(parser)
    options.add_distributed_options(parser)
    return parser


def main(args: Namespace) -> str:
    """Evaluates every cell that is not done; prints, writes and returns the table."""
    device = dist.init(args.device, args.dist_url, args.dist_timeout, args.dist_backend)
    runlog.start_logging()
    precision = Precision(args.amp, device)
    suite = suites.find(args.suite, Path(args.data_path).expanduser())
    crop_pct = args.crop_pct or (1.0 if args.suite == "imagenet-c" else None)
    classifier = load(args.model, crop_pct, device)
    model = Among(classifier.model, suite.among)
    out = Path(args.output_dir) / args.suite
    results = suite_report.Results(out.with_suffix(".json"), {
        "model": args.model, "weights": checkpoint.compute_digest(checkpoint.snapshot(dict(model.state_dict()))),
        "data_path": args.data_path, "subset": args.subset, "crop_pct": crop_pct, "amp": precision.name,
    })  # fmt: skip
    todo = dist.gather([name for name in suite.cells if name not in results.cells])[0]  # all do the same
    if len(todo) < len(suite.cells):
        logger.info(f"{len(suite.cells) - len(todo)} of {len(suite.cells)} cells are in {results.path} already")

    for number, name in enumerate(todo, start=1):
        started = time.perf_counter()
        cell = suites.open_cell(suite, name, args.subset)
        samples = Samples(cell.source, classifier.transform, in_chans=3, seed=0)
        batches = loader.eval_loader(samples, args.batch_size, args.num_workers, device.type == "cuda")
        shown = tqdm(batches, desc=name, unit="batch", leave=False, disable=None if dist.is_main() else True)
        found = evaluate(model, shown, normalize=classifier.normalize, precision=precision)
        scores = score(found, cell)
        if dist.is_main():
            results.add(name, scores)
        seconds = time.perf_counter() - started
        left = f", {number} of {len(todo)}" if len(todo) > 1 else ""
        logger.info(f"{name}: Acc@1 {scores['acc1']:.3f} ({len(samples):,} images, {seconds:.0f} s{left})")

    table = ""
    if dist.is_main():
        cells = {name: results.cells[name] for name in suite.cells}
        part = f", a subset of {args.subset} images a cell" if args.subset else ""
        table = suite_report.write(out, args.suite, cells, f"{args.suite}, {args.model}{part}")
        logger.info(f"\n{table}\ntable and picture: {out}.md, {out}.csv, {out}.png")
    return table


def load(name: str, crop_pct: float | None, device: torch.device) -> Classifier:
    """A model with what belongs to it.

    Args:
        name: as for `inference.get_model`, or timm:NAME.
        crop_pct: None: the model's own.

    Raises:
        ValueError: there is none, or it does not know ImageNet-1K's classes.
    """
    if name.startswith(TIMM):
        classifier = _load_timm(name, crop_pct)
        known = None
    else:
        settings: dict[str, Any] = {"crop_pct": crop_pct} if crop_pct else {}
        ours = get_model(name, pretrained=True, **settings)
        classifier = Classifier(ours, ours.transform, ours.normalize)
        known = ours.settings.get("classes")
    num_classes = getattr(classifier.model, "num_classes", 0)
    if num_classes != suites.NUM_CLASSES:
        what = f"answers with {num_classes} classes" if num_classes else "has no classes: it is no classifier"
        raise ValueError(f"--model {name} {what}; these suites are for classifiers of ImageNet-1K, which have 1000")
    if known and known != suites.synsets():
        raise ValueError(
            f"--model {name} was trained on other classes than ImageNet-1K's, or they are called otherwise: the first "
            f"of them is {known[0]}, and not {suites.synsets()[0]}"
        )
    return Classifier(classifier.model.to(device), classifier.transform, classifier.normalize.to(device))


def _load_timm(name: str, crop_pct: float | None) -> Classifier:
    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True)
    except Exception as error:  # unknown names, files that are missing, no network
        raise ValueError(f"--model {name}: timm says: {' '.join(str(error).split())}") from error
    config = resolve_model_data_config(model) | ({"crop_pct": crop_pct} if crop_pct else {})
    transform: Any = create_transform(**config, is_training=False, normalize=False)  # to bytes
    return Classifier(model, transform, Normalize(config["mean"], config["std"]))


def score(found: Evaluation, cell: suites.Cell) -> suite_report.Scores:
    """Per cent of a cell's images that are answered right.

    Where several labels are right, any of them will do as the first answer; five answers are not asked for there.
    """
    images = len(found.labels)
    acc1 = found.acc1
    if cell.answers is not None:
        acc1 = 100 * float(np.mean([p in right for p, right in zip(found.predictions, cell.answers, strict=True)]))
        return {"images": images, "acc1": acc1}
    assert found.num_in_top is not None, "there are more than five classes"
    return {"images": images, "acc1": acc1, "acc5": 100 * found.num_in_top / images}


if __name__ == "__main__":
    cli.run(main, get_args_parser())
