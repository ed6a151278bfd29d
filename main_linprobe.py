"""Linear and attentive probing: trains a classifier on the features of a frozen encoder.

Under a minute on a CPU (without --finetune, the encoder is untrained):

    python demo/unpack_data.py
    python main_linprobe.py --model vit_mini_patch4 --patch_size 7 --input_size 28 --in_chans 1 --cache_features \\
        --data_path demo/data/fashion_mnist --blr 0.05 0.1 0.2 --epochs 20 --output_dir runs/probe

The published recipe on ImageNet, 8 GPUs of one machine (effective batch size 16384):

    torchrun --nproc_per_node 8 main_linprobe.py --config recipes/linprobe_vit_base.yaml --data_path IMAGENET \\
        --batch_size 512 --accum_iter 4 --finetune mae_pretrain_vit_base --output_dir runs/base_probed

An attentive probe (Psomas et al. 2025), with an effective batch size of 4096:

    torchrun --nproc_per_node 8 main_linprobe.py --config recipes/linprobe_attentive_vit_base.yaml \\
        --data_path IMAGENET --finetune mae_pretrain_vit_base --output_dir runs/base_attentive
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mae.build
import mae.probes
import models_vit
from engine_finetune import evaluate_heads, evaluate_model, loss
from engine_linprobe import HeadLosses, make_heads, report_best_rate
from mae import parallel
from mae.checkpoints import checkpoint, run_directory
from mae.cli import entry_point, options
from mae.data import extra_inputs, labels, sampler, transforms
from mae.data.fingerprint import fingerprint
from mae.data.run_data import RunData
from mae.data.source import OpenDataset, Source
from mae.evaluate import tasks
from mae.evaluate.score_files import report_scores
from mae.probes import pools_tokens
from mae.session import PROBE, Session, open_session
from mae.settings import DataSpec, ImageSpec, ModelSpec, OptimSpec, Run
from mae.training import feature_files, trainer
from mae.training.callbacks import Callback
from mae.training.frozen_features import MAX_BATCH, FrozenFeatures, encode_images, encoder_state
from mae.training.labelled import load_for_evaluation, load_frozen, open_labelled
from mae.training.log import NullLog
from mae.training.precision import Precision

logger = logging.getLogger(__name__)

MIN_UPDATES = 50  # a run with fewer updates warns: the head may be as good as untrained


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script, with the published defaults."""
    parser = entry_point.parser("Linear or attentive probing of a Vision Transformer (He et al. 2021, appendix A.1).")
    options.add_data_options(parser, labels=True, rereads=True)
    options.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    options.add_supervised_options(parser, global_pool=False)
    options.add_optimizer_options(parser, several_blr=True)
    options.add(parser, *options.EVALUATION_FLAGS)
    options.add(parser, "probe", default="linear")
    options.add(parser, "pool", "num_queries", "cache_features", "held_out", "hflip")
    options.add_metric_options(parser, selects="checkpoint-best.pth, and the best of several --blr")
    options.add(parser, "class_weight", "regression_loss", *options.RUN_FLAGS)
    options.add_distributed_options(parser)
    parser.set_defaults(batch_size=512, epochs=90, weight_decay=0.0, warmup_epochs=10, save_every=1)
    return parser


def main(
    args: Namespace | Run,
    source: OpenDataset | None = None,
    callbacks: Sequence[Callback] = (),
    encoder: type[models_vit.Encoder] | None = None,
    features: Path | None = None,
    spares_stand_in: bool = False,
) -> None:
    """Trains for `--epochs` epochs and evaluates every `--eval_every` epochs. With --eval, it evaluates once.

    Args:
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.
        callbacks: called after every update and every epoch.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
        features: folder that keeps stored tokens for runs with the same images and encoder, as in `FrozenFeatures`.
        spares_stand_in: as in `RunData`.
    """
    session = open_session(get_args_parser(), args, "main_linprobe", uses=PROBE, source=source, encoder=encoder)
    run = session.run
    file = session.file
    encoder = session.code.encoder
    precision = session.precision
    data = session.open_data(spares_stand_in=spares_stand_in)
    if run.evaluation.eval and file:
        if run.machine.compile:
            logger.warning("`compile` has no effect with `eval`")
        probe, val = load_for_evaluation(partial(mae.build.probe, encoder=encoder), run.model, file, data)
        encoded = encode_images(data, val, probe.to(precision.device), min(run.optim.batch_size, MAX_BATCH), precision)
        task = tasks.task_of(file.settings | run.record(), val)
        head = probe.get_submodule("head")
        scores = evaluate_model(head, encoded, normalize=Tensor.float, precision=precision, task=task)
        report_scores(scores, val.classes, run.evaluation.report)
        return

    check_settings(run)
    with run_directory.locked(Path(run.machine.output_dir), run.machine.resume):  # also while features are stored
        train_probe(session, data, callbacks, features)


def check_settings(run: Run) -> None:
    """Raises ValueError if a setting of another probe is given; logs a warning if one of several rates is."""
    if run.model.num_queries != ModelSpec.num_queries and not pools_tokens(run.model.probe):
        raise ValueError(f"num_queries={run.model.num_queries} is for an attentive probe: omit it")
    if run.data.held_out != DataSpec.held_out and len(rates_of(run.optim.blr)) == 1:
        logger.warning("`held_out` has no effect with one `blr`: it chooses the best of several")


def train_probe(session: Session, data: RunData, callbacks: Sequence[Callback], kept: Path | None) -> None:
    """Trains the head on the features of the encoder of a file. Without a file, the encoder has random weights.

    The run directory must be locked. `kept` is as in `FrozenFeatures`.
    """
    run = session.run
    precision = session.precision
    rates = rates_of(run.optim.blr)
    several = len(rates) > 1
    train, val, statistics = open_sets(data, run.model.nb_classes, several, run.explicit)
    classes = train.classes
    require_usable_batches(run.optim, rates)
    facts = {"blr": rates if several else rates[0], "nb_classes": len(classes), "classes": classes, **statistics}
    model = build_model(replace(run.model, nb_classes=len(classes)), run.images, session.code.encoder, session.file)
    extra_inputs.require_fitting(model, train, val)
    model.to(precision.device)
    heads, optimizer = make_heads(model, rates, run.optim.weight_decay)
    sets = {"val": val}
    if several:
        train, held_out = labels.hold_out(train, run.data.held_out, run.data.seed, f"held_out={run.data.held_out:g}")
        facts["train_images"] = labels.identity(train, len(train) + len(held_out))
        sets = {"held_out": held_out, "val": val}
        model.head = mae.probes.ParallelHeads(heads)
        logger.info(
            f"a head for each of {len(heads)} rates: lines have the smallest loss of each batch, and the largest rate"
        )
    record = session.record(facts)
    task = tasks.task_of(record, val, train)
    test = partial(evaluate_heads, normalize=Tensor.float, precision=precision, task=task)  # stored tokens are fp16
    features = FrozenFeatures(
        run.model, data, model, precision, {**sets, "train": train}, run.optim.batch_size,
        Path(run.machine.output_dir), run.machine.resume, kept,
    )  # fmt: skip
    passes = {name: features.open(name) for name in sets}
    batches = open_batches(run.optim, data, train, features)
    if several and precision.overflow_is_normal:  # the hooks of `make_heads` hide overflows from the loss scaler
        precision = Precision("off", precision.device)
    criterion = HeadLosses(task.loss)

    def evaluate_epoch(epoch: int, log: NullLog) -> dict[str, Any]:
        """Evaluates the head with the best score on the held-out images."""
        best = 0
        best_rate = dict[str, float]()
        if several:
            held_out = [scores.stats()[task.selects] for scores in test(heads, passes["held_out"]())]
            best = tasks.best_of(held_out, task.lower_is_better)
            is_last = epoch + 1 == run.optim.epochs
            best_rate = report_best_rate(rates, best, task.title, held_out, *criterion.means(), is_last)
        (scores,) = test([heads[best]], passes["val"]())
        report_scores(scores, classes, run.evaluation.report)
        if several and parallel.is_main():
            write_probe(model, heads[best], {**record, "blr": rates[best]}, epoch)
        return {**scores.stats(), **best_rate, "n_parameters": sum(p.numel() for p in heads[0].parameters())}

    normalize = Tensor.float if run.data.cache_features else data.normalize
    if several:
        callbacks = [*callbacks, criterion]
    with trainer.opened(
        partial(loss, criterion=criterion, normalize=normalize), model, optimizer, batches, precision, record,
        run.optim, run.machine, fingerprint(train, True, val), callbacks=callbacks, loss_tag="loss",
        trained=model.head if run.data.cache_features else None, is_locked=True,
    ) as training:  # fmt: skip
        training.fit(
            evaluate_epoch, run.evaluation.eval_every, selects=task.best_by,
            lower_is_better=task.lower_is_better, saves_first=not features.are_stored,
        )  # fmt: skip


def build_model(spec: ModelSpec, images: ImageSpec, encoder: type[models_vit.Encoder] | None, file: Any) -> Any:
    """Builds the probe of a run, with the encoder of a file."""
    if pools_tokens(spec.probe) and file and "fc_norm.weight" in file.tensors:
        spec = replace(spec, global_pool=True)  # `probe` raises the error; `load_frozen` would ask for the flag first
    model = mae.build.probe(spec, images, encoder)
    load_frozen(model, file, spec.adapt_input)
    return model


def open_sets(
    data: RunData, nb_classes: int | None, several: bool, explicit: Collection[str]
) -> tuple[Source, Source, dict[str, Any]]:
    """Opens the training and the validation set, as `open_labelled`, for one or several rates."""
    train, val, statistics = open_labelled(data, nb_classes, data.data.cache_features or several)
    if not data.data.cache_features:
        train, val = data.cached(train, val)
    elif data.data.cache_images:
        logger.warning("`cache_images` has no effect with `cache_features`, which reads each image once")
    if data.data.cache_features and "hflip" in explicit:
        logger.warning(
            f"hflip={data.images.hflip:g} has no effect with `cache_features`, which reads images as in evaluation"
        )
    return train, val, statistics


def rates_of(blr: float | list[float] | None) -> list[float]:
    """Returns the base learning rates. Checkpoints record a single rate as a number."""
    assert blr is not None, "it has a default"
    return blr if isinstance(blr, list) else [blr]


def require_usable_batches(optim: OptimSpec, rates: Sequence[float]) -> None:
    """Raises ValueError if there are several rates and a setting of a single head, or if a batch is one image."""
    for name in ("lr", "clip_grad", "min_lr"):  # clip_grad: the norm of all heads; min_lr: of the largest rate
        value = getattr(optim, name)
        if len(rates) > 1 and value:
            raise ValueError(f"{name}={value:g} is for a single rate, and `blr` has {len(rates)} values; omit `{name}`")
    if optim.batch_size == 1:
        raise ValueError("batch_size=1: the batch norm of a probe needs several images; give batch_size=2 or more")


def open_batches(optim: OptimSpec, data: RunData, train: Any, features: FrozenFeatures) -> Any:
    """Returns the batches of stored features or of images, and warns if the run has fewer than MIN_UPDATES updates."""
    updates = optim.epochs * sampler.updates_per_epoch(len(train), optim.batch_size, optim.accum_iter)
    if updates < MIN_UPDATES:
        logger.warning(
            f"{updates} updates are few for {optim.epochs} epochs of {len(train):,} images, and the head may not "
            f"learn: lower batch_size={optim.batch_size}, or increase `epochs`"
        )
    if data.data.cache_features:
        return feature_files.FeatureBatches(*features.load("train"), optim.batch_size, data.data.seed, optim.accum_iter)
    augment = transforms.probe_transform(data.images.input_size, data.images.crop, data.images.hflip)
    return data.train_batches(train, augment, optim.batch_size, optim.accum_iter)


def write_probe(model: nn.Module, head: nn.Module, settings: dict[str, Any], epoch: int) -> None:
    """Writes probe.pth: the model with one of its heads, under the published names."""
    weights = {f"head.{name}": value for name, value in head.state_dict().items()}
    state = {"model": encoder_state(model) | checkpoint.snapshot(weights), "epoch": epoch, "args": settings}
    checkpoint.write(state, Path(settings["output_dir"]) / "probe.pth")


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
