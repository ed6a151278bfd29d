"""Fine-tuning: trains a classifier, from a pre-trained encoder or from scratch.

Under a minute on a CPU, from scratch on a few labels (--finetune FILE starts from a file of main_pretrain.py):

    python demo/unpack_data.py
    python main_finetune.py --model vit_mini_patch4 --patch_size 7 --input_size 28 --in_chans 1 --aa none --reprob 0 \\
        --data_path demo/data/fashion_mnist --train_per_class 50 --epochs 5 --output_dir runs/few_labels

The published recipe on ImageNet, 8 GPUs of one machine (effective batch size 1024):

    torchrun --nproc_per_node 8 main_finetune.py --config recipes/finetune_vit_base.yaml --data_path IMAGENET \\
        --batch_size 128 --finetune mae_pretrain_vit_base --output_dir runs/base_finetuned --resume auto
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import mae.build
import models_vit
from engine_finetune import evaluate_model
from engine_finetune import loss as loss_of_batch
from mae.cli import entry_point, options
from mae.data import extra_inputs, transforms
from mae.data.fingerprint import fingerprint
from mae.data.labels import has_ids
from mae.data.run_data import RunData
from mae.data.source import OpenDataset
from mae.evaluate import tasks
from mae.evaluate.imagenet import require_imagenet
from mae.evaluate.score_files import report_scores
from mae.session import CLASSIFIER, Session, open_session
from mae.settings import AugmentationSpec, ImageSpec, ModelSpec, Run
from mae.training import optimizers, trainer
from mae.training.callbacks import Callback
from mae.training.compiling import compile_model
from mae.training.labelled import load_for_evaluation, open_labelled
from mae.training.log import NullLog, log_report_command
from mae.training.mixup import Loss, make_criterion, make_erasing, make_mixup, smoothing_of
from mae.training.optimizers import param_groups_lrd
from mae.weights import loading

logger = logging.getLogger(__name__)

HEAD_STD = 2e-5  # std of the weights of a new head, as published; its first gradients hardly change the encoder


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script, with the published defaults."""
    parser = entry_point.parser("Fine-tuning of a Vision Transformer to a classifier (He et al. 2021, appendix A.1).")
    options.add_data_options(parser, labels=True, rereads=True)
    options.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    options.add_supervised_options(parser, global_pool=True)
    options.add_optimizer_options(parser)
    options.add(
        parser, "drop_path", "grad_checkpointing", "layer_decay", "unfreeze_blocks", "smoothing", *options.CROP_FLAGS,
        "aa", "color_jitter", "reprob", "remode", "recount", "resplit", "mixup", "cutmix", "cutmix_minmax",
        "mixup_prob", "mixup_switch_prob", "mixup_mode", *options.EVALUATION_FLAGS, "suite", "subset",
    )  # fmt: skip
    options.add_metric_options(parser, selects="checkpoint-best.pth")
    options.add(parser, "class_weight", "regression_loss", *options.RUN_FLAGS)
    options.add_distributed_options(parser)
    parser.set_defaults(epochs=50, min_lr=1e-6, warmup_epochs=5, save_every=1, drop_path=0.1, crop_scale=[0.08, 1.0])
    return parser


def main(
    args: Namespace | Run, source: OpenDataset | None = None, callbacks: Sequence[Callback] = (),
    encoder: type[models_vit.Encoder] | None = None, optimizer: optimizers.MakeOptimizer | None = None,
    spares_stand_in: bool = False, loss: Loss | None = None,
    model_class: Callable[..., models_vit.VisionTransformer] = models_vit.VisionTransformer,
) -> tasks.Evaluation | None:  # fmt: skip
    """Trains and evaluates a classifier for `--epochs` epochs; with --eval, returns the result of one evaluation.

    Args:
        args: the settings: a `Run`, or a Namespace, whose entries are explicit. Others are the defaults of the script.
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.
        callbacks: called after every update and every epoch.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
        optimizer: function(model, groups) that returns an optimizer, in place of --optimizer MODULE:FUNCTION.
        spares_stand_in: as in `RunData`.
        loss: function(outputs, labels) -> loss (), in place of that of --task. `test_loss` is that of --task.
        model_class: class of the model, or a `partial` of it, such as a `VisionTransformer` with another head.
    """
    session = open_session(
        get_args_parser(), args, "main_finetune", uses=CLASSIFIER, source=source, encoder=encoder, optimizer=optimizer,
        model_class=model_class, loss=loss,
    )  # fmt: skip
    run = session.run
    file = session.file
    precision = session.precision
    data = session.open_data(spares_stand_in=spares_stand_in)

    build = partial(mae.build.classifier, encoder=session.code.encoder, model_class=model_class)
    if run.evaluation.eval and file:
        return evaluate_file(session, data, file, build)

    train, val, statistics = open_labelled(data, run.model.nb_classes)
    classes = train.classes
    smoothing = smoothing_of(run.optim.smoothing, run.images.task, "smoothing" in session.explicit)
    record = session.record({"nb_classes": len(classes), "classes": classes, **statistics, "smoothing": smoothing})
    task = tasks.task_of(record, val, train)
    mixup = make_mixup(
        run.augmentation, run.images.task, run.optim.class_weight, smoothing, run.optim.batch_size,
        len(classes), extra_inputs.shapes_of(train),
    )  # fmt: skip
    train, val = data.cached(train, val)
    model = build_model(build, run.model, run.images, classes, file, has_ids(train))
    extra_inputs.require_fitting(model, train, val)
    model.to(precision.device)

    augment = augmentation(run.images, run.augmentation, data.statistics[0])
    batches = data.train_batches(train, augment, run.optim.batch_size, run.optim.accum_iter)
    criterion = make_criterion(loss, task.loss, smoothing, mixup is not None, session.explicit)
    erase = make_erasing(run.augmentation, precision.device)
    groups = param_groups_lrd(model, run.optim.weight_decay, model.no_weight_decay(), run.optim.layer_decay)
    built = optimizers.build(run.optim.optimizer, session.code.optimizer, model, groups)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"{num_parameters:,} parameters to train, {len(train):,} images {task.of_outputs(len(classes))}")
    val_batches = data.eval_batches(val, run.optim.batch_size)

    def evaluate_epoch(epoch: int, log: NullLog) -> dict[str, Any]:
        scores = evaluate_model(
            model, val_batches, normalize=data.normalize, precision=precision.of_evaluation(), task=task
        )
        report_scores(scores, classes, run.evaluation.report)
        return {**scores.stats(), "n_parameters": num_parameters}

    with trainer.opened(
        partial(loss_of_batch, criterion=criterion, normalize=data.normalize, erase=erase, mixup=mixup), model,
        built, batches, precision, record, run.optim, run.machine, fingerprint(train, True, val), callbacks=callbacks,
        forward=partial(model, data.blank_image()), loss_tag="loss",
    ) as training:  # fmt: skip
        training.fit(evaluate_epoch, run.evaluation.eval_every, task.best_by, task.lower_is_better, saves_first=True)
    log_report_command(run.machine.output_dir, run.data, run.model)
    return None


def build_model(
    build: Callable[..., models_vit.VisionTransformer],
    spec: ModelSpec,
    images: ImageSpec,
    classes: Sequence[str],
    file: loading.Weights | None,
    has_ids: bool = False,
) -> models_vit.VisionTransformer:
    """Builds the classifier of a run, with the encoder of a file."""
    model = build(replace(spec, nb_classes=len(classes)), images)
    takes_head = file and loading.load_encoder(model, file, spec.adapt_input, classes, images.task, has_ids)
    if file and not takes_head and isinstance(model.head, nn.Linear):
        nn.init.normal_(model.head.get_parameter("weight"), std=HEAD_STD)
    return model


def evaluate_file(
    session: Session, data: RunData, file: loading.Weights, build: Callable[..., nn.Module]
) -> tasks.Evaluation | None:
    """Evaluates the classifier of a file on the validation set; with --suite, on these suites, and returns None."""
    run = session.run
    test = partial(evaluate_model, normalize=data.normalize, precision=session.precision.of_evaluation())
    if run.evaluation.suite:
        evaluate_suites(session, data, file, build, test)
        return None
    model, val = load_for_evaluation(build, run.model, file, data)
    model.to(session.precision.device)
    if run.machine.compile:
        compile_model(model, session.precision.device, freeze_weights=True)
    batches = data.eval_batches(val, run.optim.batch_size)
    scores = test(model, batches, task=tasks.task_of(file.settings | run.record(), val))
    report_scores(scores, val.classes, run.evaluation.report)
    return scores


def evaluate_suites(
    session: Session, data: RunData, file: loading.Weights, build: Callable[..., nn.Module],
    test: Callable[..., tasks.Evaluation],
) -> None:  # fmt: skip
    """Evaluates the classifier of a file on the robustness suites of --suite, and logs a table of the results.

    Args:
        test: evaluates a model on batches.

    Raises:
        ValueError: the classifier is not one of ImageNet-1K, or a folder is no folder of its suite.
    """
    from mae.evaluate import suites  # a training does not need it

    run = session.run
    suites.warn_of_unused(run.record())
    require_imagenet(file.settings, file.num_classes, file.origin)
    crop_pct = run.images.crop_pct if "crop_pct" in session.explicit else None
    opened = suites.open_suites(
        run.evaluation.suite or (), run.data.data_path, run.evaluation.subset, crop_pct, run.images.crop_pct
    )
    model = build(replace(run.model, nb_classes=file.num_classes), run.images)
    loading.load_classifier(model, file)
    model.to(session.precision.device)
    record = suites.settings_of(model, run.record(), session.precision.of_evaluation().name)
    if run.machine.compile:
        compile_model(model, session.precision.device, freeze_weights=True)
    evaluate_folder = partial(suites.evaluate_folder, model, data, run.optim.batch_size, test)
    table = suites.evaluate(opened, evaluate_folder, record, Path(run.machine.output_dir))
    logger.info(f"\n{table}")


def augmentation(images: ImageSpec, changes: AugmentationSpec, mean: Sequence[float]) -> transforms.Transform:
    """Returns the augmentation of the training images; `mean` fills areas that it leaves empty."""
    if changes.color_jitter and changes.aa not in (None, "", "none"):
        logger.warning(f"color_jitter={changes.color_jitter:g} has no effect with aa={changes.aa}: give aa=none")
    return transforms.finetune_transform(
        images.input_size, mean, changes.aa, changes.color_jitter, images.crop_scale, images.hflip, crop=images.crop,
        crop_ratio=images.crop_ratio, vflip=changes.vflip, rotate90=changes.rotate90,
    )  # fmt: skip


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
