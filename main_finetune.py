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
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mae.build
import models_vit
from engine_finetune import (
    evaluate,
    load_for_evaluation,
    open_labelled,
    open_weights,
    report_scores,
    train_one_epoch,
)
from mae.checkpoints import run_directory
from mae.cli import entry_point, options
from mae.cli.advice import AdvisedError, Remedy
from mae.data import extras, transforms
from mae.data.labels import has_ids
from mae.data.run_data import RunData
from mae.data.user_sets import OpenDataset, with_source
from mae.evaluate import tasks
from mae.lr_decay import param_groups_lrd
from mae.settings import DataSpec, ImageSpec, RunSpec, specs
from mae.settings.choices import CLASSIFICATION
from mae.training import optimizers, run_log, trainer
from mae.training.compiling import compile_model
from mae.training.loop import Callback
from mae.training.precision import Precision
from mae.weights import loading
from mae.weights.recorded_settings import with_recorded_settings

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
        "mixup_prob", "mixup_switch_prob", "mixup_mode", *options.EVALUATION_FLAGS,
    )  # fmt: skip
    options.add_metric_options(parser, selects="checkpoint-best.pth")
    options.add(parser, "class_weight", "regression_loss", *options.RUN_FLAGS)
    options.add_distributed_options(parser)
    parser.set_defaults(epochs=50, min_lr=1e-6, warmup_epochs=5, save_every=1, drop_path=0.1, crop_scale=[0.08, 1.0])
    return parser


def main(
    args: Namespace,
    source: OpenDataset | None = None,
    callbacks: Sequence[Callback] = (),
    encoder: type[models_vit.Encoder] | None = None,
    optimizer: optimizers.MakeOptimizer | None = None,
) -> tasks.Evaluation | None:
    """Trains and evaluates a classifier for `args.epochs` epochs; with --eval, returns the result of one evaluation.

    Args:
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.
        callbacks: called after every update and every epoch.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
        optimizer: function(model, groups) that returns an optimizer, in place of --optimizer MODULE:FUNCTION.
    """
    from timm.loss import SoftTargetCrossEntropy  # timm takes more than a second

    args, encoder = entry_point.with_own(with_source(args, source), "encoder", encoder)
    args, optimizer = entry_point.with_own(args, "optimizer", optimizer)
    args, precision = trainer.start(args, "main_finetune")
    device = precision.device
    file = open_weights(vars(args))
    args = with_recorded_settings(args, file, mae.build.classifier_settings(file), trains=not args.eval)
    images = partial(run_directory.interrupted_images, Path(args.output_dir), args.resume)
    data = RunData(ImageSpec.of(vars(args)), DataSpec.of(vars(args)), device, source, images)

    build = partial(mae.build.classifier, encoder=encoder)
    if args.eval and file:
        return evaluate_file(args, data, file, precision, build)

    run_directory.prepare(Path(args.output_dir), args.resume)
    train, val, statistics = open_labelled(data, args.nb_classes)
    classes, smoothing = train.classes, smoothing_of(args)
    settings = {**vars(args), "nb_classes": len(classes), "classes": classes, **statistics, "smoothing": smoothing}
    labels, mixup = tasks.task_of(settings, val, train), mixing(args, len(classes), extras.shapes_of(train))
    train, val = data.cached(train, val)
    model = build_model(args, build, settings, file, has_ids(train))
    extras.require_fitting(model, train, val)
    model.to(device)

    augment = transforms.keeps_label(augmentation(args, data.statistics[0]))
    batches = data.train_batches(train, augment, args.batch_size, args.accum_iter)
    criterion = SoftTargetCrossEntropy() if mixup else partial(labels.loss, smoothing=smoothing)
    erase = erasing(args, device)
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    built = optimizers.build(args.optimizer, optimizer, model, groups)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"{num_parameters:,} parameters to train, {len(train):,} images {labels.of_outputs(len(classes))}")

    test = partial(
        evaluate, data_loader=data.eval_batches(val, args.batch_size), normalize=data.normalize,
        precision=precision.of_evaluation(), task=labels,
    )  # fmt: skip

    def evaluate_epoch(epoch: int, log: run_log.NullLog) -> dict[str, Any]:
        scores = test(model)
        report_scores(scores, classes, args.report)
        return {**scores.stats(), "n_parameters": num_parameters}

    train_epoch = partial(train_one_epoch, criterion=criterion, normalize=data.normalize, erase=erase, mixup=mixup)
    task = trainer.Task(
        train_epoch, evaluate_epoch, "loss", evaluates=True, metric=labels.selects,
        lower_is_better=labels.lower_is_better, callbacks=callbacks, forward=model,
    )  # fmt: skip
    trainer.run(model, built, batches, precision, task, RunSpec.of(settings), settings)
    return None


def build_model(
    args: Namespace,
    build: Callable[..., models_vit.VisionTransformer],
    settings: Mapping[str, Any],
    file: loading.Weights | None,
    has_ids: bool = False,
) -> models_vit.VisionTransformer:
    """Builds the classifier of a run, with the encoder of a file, and freezes blocks (--unfreeze_blocks)."""
    model = build(*specs(settings))
    if file and not loading.load_encoder(model, file, args.adapt_input, settings["classes"], args.task, has_ids):
        nn.init.normal_(model.head.get_parameter("weight"), std=HEAD_STD)
    if args.unfreeze_blocks is not None:
        mae.build.freeze_below(model, args.unfreeze_blocks)
    return model


def evaluate_file(
    args: Namespace, data: RunData, file: loading.Weights, precision: Precision, build: Callable[..., nn.Module]
) -> tasks.Evaluation:
    """Evaluates the classifier of a file on the validation set."""
    model, val = load_for_evaluation(build, vars(args), file, data)
    model.to(precision.device)
    if args.compile:
        compile_model(model, precision.device, freeze_weights=True)
    scores = evaluate(
        model, data.eval_batches(val, args.batch_size), normalize=data.normalize, precision=precision.of_evaluation(),
        task=tasks.task_of(file.settings | vars(args), val),
    )  # fmt: skip
    report_scores(scores, val.classes, args.report)
    return scores


def augmentation(args: Namespace, mean: Sequence[float]) -> transforms.ImageTransform:
    """Returns the augmentation of the training images; `mean` fills areas that it leaves empty."""
    return transforms.finetune_transform(
        args.input_size, mean, args.aa, args.color_jitter, args.crop_scale, args.hflip, crop=args.crop,
        crop_ratio=args.crop_ratio, vflip=args.vflip, rotate90=args.rotate90,
    )  # fmt: skip


def smoothing_of(args: Namespace) -> float:
    """Returns the label smoothing of the training; 0 if the labels are not classes.

    Raises:
        ValueError: it is given, and the labels are not classes.
    """
    if args.task == CLASSIFICATION:
        return args.smoothing
    if args.smoothing and "smoothing" in entry_point.explicit(args):
        remedy = Remedy({"smoothing": 0})
        raise AdvisedError(f"--task {args.task} has no label smoothing", remedy, about={"smoothing": args.smoothing})
    return 0.0


def erasing(args: Namespace, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Returns the random erasing of --reprob; None if it is 0."""
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=str(device))
    return erase if args.reprob else None


def mixing(args: Namespace, num_classes: int, extra_names: Collection[str] = ()) -> Callable[..., Any] | None:
    """Returns mixup and cutmix of timm, or None if both are disabled.

    Raises:
        ValueError: the classes have weights; the images have extra inputs, which are not mixed; the batch size is odd,
            and images are mixed in pairs; or the range of --cutmix_minmax is empty.
    """
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    if args.class_weight or args.task != CLASSIFICATION or extra_names:
        off = {"mixup": 0, "cutmix": 0, "cutmix_minmax": None}
        disabled = Remedy({name: off[name] for name in off if getattr(args, name)})
        about = {name: getattr(args, name) for name in off if getattr(args, name)}
        if extra_names:
            names = ", ".join(sorted(extra_names))
            raise AdvisedError(f"images are mixed, and their extra inputs ({names}) are not", disabled, about=about)
        about |= {"task": args.task} if args.task != CLASSIFICATION else {"class_weight": args.class_weight}
        raise AdvisedError("mixed images have no single class", disabled, about=about)
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise ValueError("--cutmix_minmax: give the smaller fraction first")
    if args.batch_size % 2:
        raise ValueError(f"--batch_size {args.batch_size}: --mixup and --cutmix mix pairs; give an even number")
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
