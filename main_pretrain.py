"""Masked pre-training (He et al. 2021) on a folder of images.

A small model on the images of demo/data, under a minute on a CPU:

    python demo/unpack_data.py
    python main_pretrain.py --config recipes/pretrain_fashion_mnist.yaml --epochs 2 --output_dir runs/fashion

The published recipe on ImageNet, 8 GPUs of one machine:

    torchrun --nproc_per_node 8 main_pretrain.py --config recipes/pretrain_vit_large.yaml --data_path IMAGENET \\
        --batch_size 64 --accum_iter 8 --output_dir runs/large --resume auto
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import mae.build
import models_mae
from engine_pretrain import loss
from mae import masking, parallel
from mae.cli import entry_point, options
from mae.context import require_context
from mae.data import loader
from mae.data.fingerprint import fingerprint
from mae.data.source import OpenDataset
from mae.session import INITIAL_WEIGHTS, Code, Session, open_session
from mae.settings import ImageSpec, ModelSpec, Run
from mae.training import explained, measured_runs, optimizers, preserving, trainer
from mae.training.callbacks import Callback
from mae.training.gate import KNN, open_gate
from mae.training.log import NullLog, log_commands
from mae.training.lr_sched import Schedule
from mae.training.optimizers import param_groups_weight_decay
from mae.training.precision import Precision
from mae.training.unlabelled import open_images, open_online_probe, open_samples, with_required_terms
from models_vit import Encoder

if TYPE_CHECKING:
    from mae.weights.reading import Weights

EXAMPLES = 8  # reconstructions in TensorBoard
BETAS = (0.9, 0.95)  # of AdamW, as published


def get_args_parser() -> ArgumentParser:
    """Returns the parser of the script, with the published defaults."""
    parser = entry_point.parser("Masked pre-training of a Vision Transformer (He et al. 2021).")
    options.add_data_options(parser, rereads=True)
    options.add_model_options(parser, models_mae.MODELS, default="mae_vit_large_patch16")
    options.add(
        parser, "num_images", "repeated_sampling", "min_valid", *options.CROP_FLAGS, "mask_ratio", "masking",
        "mask_block", "learned_pos_embed", "drop_path", "decoder_depth", "norm_pix_loss", "uniformity", "model_class",
        "model_args", "init_from", "preserve", "unfreeze_blocks", "grad_checkpointing", "lr_schedule",
        "updates_per_epoch", "vis_every", "probe_every", "probe_path", "fsdp",
    )  # fmt: skip
    options.add_optimizer_options(parser)
    options.add(parser, *options.RUN_FLAGS)
    options.add_distributed_options(parser)
    return parser


def main(
    args: Namespace | Run,
    model_class: Callable[..., models_mae.MaskedAutoencoderViT] = models_mae.MaskedAutoencoderViT,
    callbacks: Sequence[Callback] = (),
    source: OpenDataset | None = None,
    encoder: type[Encoder] | None = None,
    optimizer: optimizers.MakeOptimizer | None = None,
    lr_schedule: Schedule | None = None,
) -> None:
    """Trains for `--epochs` epochs. Writes checkpoints, log.txt and TensorBoard files.

    Args:
        args: the settings: a `Run`, or a Namespace, whose entries are explicit. Others are the defaults of the script.
        model_class: class of the model, or a `partial` of it, in place of --model_class. A subclass changes the method.
        callbacks: called after every update and every epoch.
        source: function(split, data_path) that returns a dataset, in place of --dataset py:MODULE:FUNCTION.
        encoder: class derived from `models_vit.Encoder`, in place of --encoder MODULE:CLASS.
        optimizer: function(model, groups) that returns an optimizer, in place of --optimizer MODULE:FUNCTION.
        lr_schedule: function(progress) -> factor of the learning rate after the warm-up, in place of --lr_schedule.
    """
    session = open_session(
        get_args_parser(), args, "main_pretrain", uses=INITIAL_WEIGHTS, source=source, model_class=model_class,
        encoder=encoder, optimizer=optimizer, lr_schedule=lr_schedule,
    )  # fmt: skip
    run = session.run
    code = session.code
    precision = session.precision
    data = session.open_data()
    train = open_images(data, run.evaluation)  # first, because a large model takes long
    model, facts = open_model(session)
    draw_noise, mask_ratio = mae.build.mask_sampler(run.model, model)
    num_visible = masking.num_visible(model.num_patches, mask_ratio)
    samples, full_images = open_samples(data, train, run.augmentation, draw_noise, model, num_visible)
    takes_part = parallel.is_main() or run.machine.fsdp  # sharded weights need all processes
    vis_every = run.evaluation.vis_every if model.predicts_pixels and takes_part else 0
    examples = loader.examples(full_images, EXAMPLES, run.data.num_workers) if vis_every else None
    batches = loader.TrainLoader(
        samples, run.optim.batch_size, run.data.seed, run.data.num_workers, data.pin_memory, run.data.repeated_sampling,
        run.optim.accum_iter, run.optim.updates_per_epoch,
    )  # fmt: skip

    # As published: biases and 1-D weights have no weight decay; the class and mask tokens have weight decay.
    groups = param_groups_weight_decay(model, run.optim.weight_decay)
    built = optimizers.build(run.optim.optimizer, code.optimizer, model, groups, betas=BETAS)
    probe = open_online_probe(
        run.evaluation, data, full_images, mask_ratio, run.optim.batch_size, precision, run.model, model
    )

    def after_epoch(epoch: int, log: NullLog) -> dict[str, Any]:
        if epoch == 0 and not run.machine.init_from:
            measured_runs.warn_of_short_run(run.optim.epochs * len(batches) * batches.images_per_iteration, len(train))
        if examples and (epoch % vis_every == 0 or epoch == run.optim.epochs - 1):
            from mae.evaluate import pictures  # takes a moment, and a run without examples does not draw

            names = loader.example_names(full_images, EXAMPLES)
            picture = pictures.reconstructed_examples(model, examples, names, data.normalize, mask_ratio)
            log.picture("reconstruction", picture, epoch)
        if probe and ((epoch + 1) % run.evaluation.probe_every == 0 or epoch == run.optim.epochs - 1):
            return probe.scores(model)
        return {}

    with trainer.opened(
        with_required_terms(partial(loss, mask_ratio=mask_ratio, normalize=data.normalize), run.model), model, built,
        batches, precision, session.record(facts), run.optim, run.machine, fingerprint(train, with_labels=False),
        callbacks=callbacks, lr_schedule=code.lr_schedule, forward=partial(model, data.blank_image(), mask_ratio),
        further_entries=explained.open_share(model, samples, data, mask_ratio, run.optim.batch_size),
    ) as training:  # fmt: skip
        gate = open_gate(run.machine.init_from, probe, training.progress)
        training.fit(after_epoch, run.evaluation.eval_every, selects=KNN if gate else "", gate=gate)
    log_commands(
        run.machine.output_dir, run.optim.epochs, run.data, run.model, run.evaluation, bool(train.classes), bool(gate)
    )


def open_model(session: Session) -> tuple[models_mae.MaskedAutoencoderViT, dict[str, Any]]:
    """Builds the model of a run, and its loss `preserve`. Returns it, and what the run records of it."""
    run = session.run
    device = session.precision.device
    build = partial(build_model, run.model, run.images, session.code, session.file, session.precision)
    model = build(run.machine.fsdp)
    start = partial(build, is_sharded=True, method="get_intermediate_layers")
    facts = preserving.open_term(model, run.model.preserve, run.images, session.file, device, run.machine.fsdp, start)
    session.file = None  # its memory
    if not session.code.has_published_model(run.model):  # programs that read the checkpoints do not have the class
        facts["predicts_pixels"] = model.predicts_pixels
    return model, facts


def build_model(
    spec: ModelSpec, images: ImageSpec, code: Code, file: "Weights | None", precision: Precision, is_sharded: bool,
    method: str = "reconstruct",
) -> models_mae.MaskedAutoencoderViT:  # fmt: skip
    """Builds the model of a run, with the weights of a file.

    Args:
        method: as in `fsdp.shard`.

    Raises:
        ValueError: a step of the model lacks the context; or as in `mae.build.autoencoder`.
    """
    # `fsdp` initializes the shards. The constructor of a subclass may set weights and buffers, which have to exist.
    with torch.device("meta" if is_sharded and code.has_published_model(spec) else "cpu"):
        model = mae.build.autoencoder(spec, images, code.model_class, code.encoder)
    require_context(type(model))  # the noise of the batches determines the masks
    mae.build.log_sizes(model)
    if is_sharded:
        from mae.training import fsdp  # takes a second

        fsdp.shard(model, mae.build.blocks_of(model), precision.device, precision.dtype, method)
    if file:
        from mae.weights import loading

        loading.init_mae(model, file)
    return model.to(precision.device)


if __name__ == "__main__":
    entry_point.run_script(main, get_args_parser())
