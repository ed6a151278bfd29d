"""Semantic segmentation: trains a head on a pre-trained encoder, or fine-tunes both.

Images and masks are pairs of files with the same names, in folders such as images/training and annotations/training
(--finetune FILE starts from a file of main_pretrain.py; without it, the encoder is untrained):

    python main_segment.py --data_path SCENES --nb_classes 21 --model vit_base_patch16 --input_size 512 \\
        --finetune mae_pretrain_vit_base --output_dir runs/scenes

ADE20K with a linear head on a frozen encoder, 8 GPUs of one machine (16 images per update):

    torchrun --nproc_per_node 8 main_segment.py --config recipes/segment_ade20k_vit_huge.yaml \\
        --data_path ADEChallengeData2016 --batch_size 2 --finetune mae_pretrain_vit_huge --output_dir runs/ade20k
"""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mae.build
import models_vit
from engine_finetune import loss
from engine_segment import evaluate, pixel_loss, report_scores, warn_of_lacking_classes
from mae import parallel
from mae.cli import entry_point, options
from mae.data import extra_inputs, transforms
from mae.data.fingerprint import fingerprint
from mae.data.kinds.pairs import MASKS_READ, first_classes
from mae.data.run_data import RunData
from mae.data.segmentation_masks import MOST_CLASSES, VOC, MaskFormat, read_palette
from mae.data.source import OpenDataset, Source, require_random_access
from mae.evaluate.segmentation import Scores
from mae.files import recipes
from mae.session import SEGMENTER, Session, open_session
from mae.settings import ImageSpec, ModelSpec, OptimSpec, Run
from mae.sizes import to_pair
from mae.training import optimizers, trainer
from mae.training.callbacks import Callback
from mae.training.compiling import compile_model
from mae.training.labelled import load_frozen
from mae.training.log import NullLog
from mae.training.optimizers import param_groups_lrd
from mae.weights import loading, model_settings
from models_segment import Segmenter

logger = logging.getLogger(__name__)


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script."""
    parser = entry_point.parser("Semantic segmentation with the encoder of a masked autoencoder.")
    options.add_pair_options(parser)
    options.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    options.add_optimizer_options(parser, lr=2e-4)
    options.add_segmentation_options(parser)
    options.add(parser, *options.EVALUATION_FLAGS, *options.RUN_FLAGS)
    options.add_distributed_options(parser)
    parser.set_defaults(batch_size=16, epochs=60, warmup_epochs=0, weight_decay=0.01, save_every=1)
    return parser


def main(
    args: Namespace | Run,
    source: OpenDataset | None = None,
    callbacks: Sequence[Callback] = (),
    encoder: type[models_vit.Encoder] | None = None,
    optimizer: optimizers.MakeOptimizer | None = None,
) -> Scores | None:
    """Trains for `--epochs` epochs and evaluates the model every `--eval_every` epochs.

    With --eval, it evaluates a segmentation model once and returns the result.

    Args:
        source: function(split, data_path) that returns a dataset of images and masks, in place of --dataset py:.
        callbacks: called after every update and every epoch.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
        optimizer: function(model, groups) that returns an optimizer, in place of --optimizer MODULE:FUNCTION.
    """
    session = open_session(
        get_args_parser(), args, "main_segment", uses=SEGMENTER, source=source, encoder=encoder, optimizer=optimizer
    )
    run = session.run
    file = session.file
    precision = session.precision
    facts = pair_settings(run.model, run.images, run.data.dataset, file if run.evaluation.eval else None)
    classes = facts["classes"]
    spec = replace(run.model, nb_classes=len(classes))
    images = replace(run.images, colors=facts["colors"], short_side=facts["short_side"])
    data = session.open_data(images)
    evaluation = partial(
        evaluate, normalize=data.normalize, precision=precision.of_evaluation(), num_classes=len(classes),
        window=to_pair(run.images.input_size), batch_size=run.optim.batch_size,
    )  # fmt: skip

    if run.evaluation.eval and file:
        val = open_split(data, "val", classes)  # first, because a large model takes long
        model = mae.build.segmenter(spec, images, session.code.encoder)
        return evaluate_file(session, data, file, model, val, evaluation)

    train = open_split(data, "train", classes)
    val = open_split(data, "val", classes)
    data.check_statistics(train)
    if parallel.is_main():
        warn_of_lacking_classes(first_classes(train), classes, f"{min(len(train), MASKS_READ)} training")
    model = mae.build.segmenter(spec, images, session.code.encoder)
    if file or not (run.machine.finetune or run.model.unfreeze_blocks == "all"):
        load_frozen(model, file, run.model.adapt_input, classes)
    extra_inputs.require_fitting(model, train, val)
    model.to(precision.device)
    augment = transforms.segmentation_transform(
        images.input_size, facts["short_side"], run.augmentation.scale, images.hflip, data.statistics[0]
    )
    batches = data.train_batches(train, augment, run.optim.batch_size, run.optim.accum_iter)
    built = optimizers.build(run.optim.optimizer, session.code.optimizer, model, groups_of(model, session))
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"{num_parameters:,} parameters to train, {len(train):,} images of {len(classes)} classes")
    val_batches = eval_batches(data, val)

    def evaluate_epoch(epoch: int, log: NullLog) -> dict[str, Any]:
        scores = evaluation(model, val_batches)
        report_scores(scores, classes, run.evaluation.report)
        return {**scores.stats(), "n_parameters": num_parameters}

    with trainer.opened(
        partial(loss, criterion=pixel_loss, normalize=data.normalize), model, built, batches, precision,
        session.record(facts), run.optim, run.machine, fingerprint(train, True, val), callbacks=callbacks,
        forward=partial(model, data.blank_image()), loss_tag="loss",
    ) as training:  # fmt: skip
        training.fit(evaluate_epoch, run.evaluation.eval_every, selects="test_miou", saves_first=True)
    return None


def groups_of(model: Segmenter, session: Session) -> list[dict[str, Any]]:
    """Returns the parameter groups of the optimizer. Warnings name settings of an encoder that is trained."""
    optim = session.run.optim
    given = {"drop_path": session.run.model.drop_path > 0, "layer_decay": optim.layer_decay != OptimSpec.layer_decay}
    for name in (name for name, is_given in given.items() if is_given and model.frozen):
        logger.warning(f"`{name}` has no effect, because the encoder is frozen: give `unfreeze_blocks`")
    return param_groups_lrd(model, optim.weight_decay, model.no_weight_decay(), optim.layer_decay)


def evaluate_file(
    session: Session, data: RunData, file: loading.Weights, model: Segmenter, val: Source,
    evaluation: Callable[..., Scores],
) -> Scores:  # fmt: skip
    """Evaluates the segmentation model of a file on the validation set."""
    device = session.precision.device
    loading.load_classifier(model, file)
    model.to(device)
    if session.run.machine.compile:
        compile_model(model, device, freeze_weights=True)
    extra_inputs.require_fitting(model, val)
    scores = evaluation(model, eval_batches(data, val))
    report_scores(scores, val.classes, session.run.evaluation.report)
    return scores


def eval_batches(data: RunData, val: Source) -> torch.utils.data.DataLoader:
    """Returns single images and masks of the validation set. The masks have their own size."""
    assert data.images.short_side is not None, "`pair_settings` sets it"
    transform = transforms.scaled_transform(data.images.short_side)
    return data.eval_batches(val, 1, transform=transform)


def pair_settings(
    spec: ModelSpec, images: ImageSpec, dataset: str | None = None, file: loading.Weights | None = None
) -> dict[str, Any]:
    """Returns the classes of the masks, their colors, and the scale of the images, as checkpoints record them.

    Args:
        dataset: the setting.
        file: the file to evaluate, if any. Its classes are used.

    Raises:
        ValueError: the number of classes is unknown, or `nb_classes` differs from the palette or the file.
    """
    recorded = model_settings.classifier_settings(file)
    classes = recorded.get("classes") or []
    colors = recorded.get("colors")
    if images.palette:
        palette = read_palette(Path(recipes.find(images.palette, ".txt")))
        if classes not in ([], palette.names) and classes != [str(number) for number in range(len(classes))]:
            raise ValueError(
                f"palette={images.palette} has the classes {', '.join(palette.names)}: give them the names and "
                f"the order of the model: {', '.join(classes)}"
            )
        classes = palette.names
        colors = [value for color in palette.colors for value in color]
    elif not classes and (dataset or "").startswith("VOCSegmentation"):
        classes = list(VOC)
    elif not classes and spec.nb_classes:
        classes = [str(number) for number in range(spec.nb_classes)]
    if not classes:
        raise ValueError(
            "`nb_classes` is needed: the number of classes in the masks, without the ignored value 255; or give "
            "palette=FILE with a line `R G B NAME` for each class"
        )
    origin = f"palette={images.palette}" if images.palette else "the dataset"
    count, owner = (file.num_classes, file.origin) if file else (len(classes), origin)
    if count > MOST_CLASSES:
        raise ValueError(f"nb_classes={count}: masks of 8 bits have at most {MOST_CLASSES} classes")
    if spec.nb_classes not in (None, count):
        raise ValueError(f"nb_classes={spec.nb_classes}: {owner} has {count} classes; omit `nb_classes`")
    if len(classes) != count:
        raise ValueError(f"{origin} has {len(classes)} classes, and {owner} has {count}")
    short_side = min(to_pair(images.input_size)) if images.short_side is None else images.short_side
    return {"nb_classes": count, "classes": classes, "colors": colors, "short_side": short_side}


def open_split(run_data: RunData, split: str, classes: list[str]) -> Source:
    """Opens the images of a split and their masks. For "val", it logs the protocol, on which scores depend."""
    images = run_data.images
    if split == "val":
        height, width = to_pair(images.input_size)
        scale = f"scaled to a shorter side of {images.short_side} pixels" if images.short_side else "at their own size"
        logger.info(f"evaluation: images {scale}, windows of {height} x {width} pixels, at the resolution of masks")
    colors = np.reshape(images.colors, (-1, 3)).tolist() if images.colors else None
    mask_format = MaskFormat(classes, images.reduce_zero_label, colors)
    pairs = require_random_access(run_data.open_split(split, masks=mask_format))
    logger.info(f"{len(pairs):,} images with masks for {split}")
    return pairs


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
