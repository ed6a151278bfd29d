"""k-nearest-neighbor classification on the features of a frozen encoder, without training.

Under a minute on a CPU (without --finetune, the encoder is untrained):

    python demo/unpack_data.py
    python main_knn.py --model vit_mini_patch4 --patch_size 7 --input_size 28 --in_chans 1 \\
        --data_path demo/data/fashion_mnist

On ImageNet, 8 GPUs of one machine:

    torchrun --nproc_per_node 8 main_knn.py --model vit_base_patch16 --data_path IMAGENET --batch_size 256 \\
        --finetune mae_pretrain_vit_base
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import models_vit
from mae.cli import entry_point, options
from mae.data import extra_inputs
from mae.data.run_data import RunData
from mae.data.source import OpenDataset, Source
from mae.evaluate import tasks
from mae.evaluate.knn import predict
from mae.evaluate.tables import markdown
from mae.files import results
from mae.session import FEATURES, Session, open_session
from mae.settings import Run
from mae.training.frozen_features import FrozenFeatures
from mae.training.labelled import build_frozen, open_labelled

logger = logging.getLogger(__name__)


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script."""
    parser = entry_point.parser("Weighted k-nearest-neighbor classification on frozen features (Wu et al. 2018).")
    options.add_data_options(parser, labels=True)
    options.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    options.add_supervised_options(parser, global_pool=False)
    options.add(parser, "pool", "k", "temperature")
    options.add_metric_options(parser, selects="the best of several --temperature")
    options.add(parser, "on_bad_image", default="error", help=options.EXCLUDES)
    options.add(parser, "config", *options.COMPUTE_FLAGS)
    options.add_to(options.group_of(parser, "data"), "batch_size", default=256)
    options.add_distributed_options(parser)
    return parser


def main(
    args: Namespace | Run, source: OpenDataset | None = None, encoder: type[models_vit.Encoder] | None = None
) -> dict[tuple[int, float], float]:
    """Logs the scores, and returns the one that selects (the accuracy in percent), for every pair of k and temperature.

    Args:
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
    """
    session = open_session(get_args_parser(), args, "main_knn", uses=FEATURES, source=source, encoder=encoder)
    run = session.run
    data = session.open_data()
    train, val, statistics = open_labelled(data, run.model.nb_classes, True)
    ks = run.evaluation.k if "k" in session.explicit else at_most(len(train), run.evaluation.k)
    task = tasks.task_of({**run.record(), **statistics}, val)
    frozen = open_features(session, data, train, val)
    bank = frozen.load("train")
    queries = frozen.load("val")
    del frozen  # to free the memory of the encoder
    found = predict(
        *bank, *queries, lambda means, truth: task.columns(task.outputs_of(means), truth), ks=ks,
        temperatures=run.evaluation.temperature, num_classes=len(train.classes), device=session.precision.device,
    )  # fmt: skip
    evaluations = {pair: task.evaluation(columns, len(train.classes)) for pair, columns in found.items()}
    name = task.selects.removeprefix("test_")
    scores = {pair: scores_of(evaluation) for pair, evaluation in evaluations.items()}
    values = {pair: found[name] for pair, found in scores.items()}
    report(scores, list(values)[tasks.best_of([*values.values()], task.lower_is_better)])
    return values


def open_features(
    session: Session, data: RunData, train: Source, val: Source, kept: Path | None = None
) -> FrozenFeatures:
    """Builds the encoder of a run. `kept` is as in `FrozenFeatures`."""
    run = session.run
    model = build_frozen(run.model, run.images, session.file, session.code.encoder, has_all=kept is not None)
    extra_inputs.require_fitting(model, train, val)
    model.to(session.precision.device)
    return FrozenFeatures(
        run.model, data, model, session.precision, {"train": train, "val": val}, run.optim.batch_size,
        Path(run.machine.output_dir), kept=kept,
    )  # fmt: skip


def encode(args: Namespace | Run, train: Source, val: Source, kept: Path) -> dict[str, list[np.ndarray]]:
    """Returns the features of two datasets by pooling, as `FrozenFeatures.load_all` does.

    Args:
        kept: folder of the features, which resumes and serves further calls.
    """
    session = open_session(get_args_parser(), args, "main_knn", uses=FEATURES, encoder=None)
    data = session.open_data()
    data.check_statistics(train)
    return open_features(session, data, train, val, kept).load_all()


def at_most(count: int, ks: Sequence[int]) -> list[int]:
    """Returns numbers of neighbors. The number of training images, `count`, takes the place of larger ones."""
    limited = [*dict.fromkeys(min(k, count) for k in ks)]
    if limited != ks:
        logger.info(f"k={limited}: there are {count:,} training images")
    return limited


def scores_of(evaluation: Any) -> dict[str, float]:
    """Returns the scores without the loss; the accuracy is exact in its last digit."""
    scores = {name: score for name, score in evaluation.scores().items() if name not in ("loss", f"acc{tasks.TOP}")}
    if "acc1" in scores:
        scores["acc1"] = 100 * int((evaluation.labels == evaluation.predictions).sum()) / len(evaluation.labels)
    return scores


def report(scores: Mapping[tuple[int, float], Mapping[str, float]], best: tuple[int, float]) -> None:
    """Logs scores by (k, temperature): a line for each k; for several temperatures, a table and its best entry."""
    ks, temperatures = (list(dict.fromkeys(values)) for values in zip(*scores, strict=True))
    first = tasks.TITLES.get(name := next(iter(scores[best])), name)
    texts = {pair: tasks.text(found).removeprefix(f"{first} ") for pair, found in scores.items()}
    names = {(k, t): f"k{k}" if len(temperatures) == 1 else f"k{k}_t{t:g}" for k, t in scores}
    if len(temperatures) == 1:
        for (k, _), text in texts.items():
            logger.info(f"* {k}-NN {first} {text}")
    else:
        shown = texts | {best: f"**{texts[best]}**"}
        titles = ["k", *(f"temperature {temperature:g}" for temperature in temperatures)]
        rows = [[str(k), *(shown[k, temperature] for temperature in temperatures)] for k in ks]
        logger.info("\n" + markdown(titles, rows))
        logger.info(
            f"* {best[0]}-NN {first} {texts[best]} with temperature {best[1]:g}, the best of {len(scores)}; it "
            f"is optimistic, because the validation set selected it"
        )
    tasks.warn_of_undefined(scores[best])
    logged = list(dict.fromkeys(name for found in scores.values() for name in found))
    entries = {
        f"knn_{name}_{names[pair]}": found[name] for name in logged for pair, found in scores.items() if name in found
    }
    logger.info(results.to_line(entries))


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
