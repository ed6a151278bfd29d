"""Masked pre-training (He et al. 2021) on a folder of images.

A small model on the pictures of demo/data, under a minute on a CPU:

    python main_pretrain.py --config recipes/pretrain_fashion_mnist.yaml --epochs 1 --output_dir /tmp/mae

The published recipe on ImageNet, 8 GPUs of one machine:

    torchrun --nproc_per_node 8 main_pretrain.py --config recipes/pretrain_vit_large.yaml --data_path IMAGENET \\
        --batch_size 64 --accum_iter 8 --output_dir runs/large --resume auto
"""

import argparse
import logging
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train_one_epoch
from util import checkpoint, cli, datasets, dist, lr_sched, pictures, runlog, transforms, weights
from util.precision import Precision

logger = logging.getLogger(__name__)

MODELS = sorted(name for name in vars(models_mae) if name.startswith("mae_vit_"))
EXAMPLES = 8  # images in TensorBoard's picture of reconstructions


def get_args_parser() -> argparse.ArgumentParser:
    """All flags, with the published defaults."""
    parser = cli.parser("Masked pre-training of a Vision Transformer (He et al. 2021).")
    cli.add_run_options(parser)
    cli.add_data_options(parser)
    cli.add_model_options(parser, MODELS, default="mae_vit_large_patch16")
    cli.add_pretrain_options(parser)
    cli.add_optimizer_options(parser)
    cli.add_distributed_options(parser)
    return parser


def main(args: Namespace) -> None:
    """Trains for `args.epochs` epochs; leaves checkpoints, log.txt and TensorBoard's files."""
    device = dist.init(args.device, args.dist_url)
    runlog.start_logging()
    output_dir = Path(args.output_dir)
    checkpoint.prepare_output_dir(output_dir, args.resume)
    torch.manual_seed(args.seed)

    model = models_mae.build(vars(args))
    if args.init_from:
        weights.init_mae(model, args.init_from)
    model.to(device)

    source = datasets.open_source(args.data_path, "train")
    samples = datasets.Samples(
        source,
        transforms.pretrain_transform(args.input_size, args.crop_scale),
        in_chans=args.in_chans,
        seed=args.seed,
        num_noise=model.num_patches,
    )
    loader = datasets.train_loader(samples, args.batch_size, args.seed, args.num_workers, args.pin_mem)
    normalize = transforms.Normalize(*transforms.channel_statistics(args.in_chans, args.mean, args.std)).to(device)

    global_batch_size = args.batch_size * dist.world_size()
    effective_batch_size = global_batch_size * args.accum_iter
    lr = lr_sched.scaled_lr(args.lr, args.blr, effective_batch_size)
    # The published groups: no decay on biases and 1-D weights, and so decay on the class and mask tokens.
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = partial(lr_sched.adjust_learning_rate, optimizer, args=Namespace(**{**vars(args), "lr": lr}))
    precision = Precision(args.amp, device)

    progress = checkpoint.Progress(effective_batch_size, global_batch_size, args.start_epoch)
    state = checkpoint.find(args.resume, output_dir)
    if state is not None:
        checkpoint.restore_training(state, model, optimizer, precision.scaler, progress)
    wrapped = dist.wrap(model, device)

    runlog.log_header(model, args, device=str(device), precision=precision.name, lr=lr)
    first_x = int(1000 * (progress.epoch + progress.first_step / len(loader)))
    log = runlog.open_log(output_dir, Path(args.log_dir), args.epochs, progress.epoch, first_x)
    collect = partial(checkpoint.training_state, model, optimizer, precision.scaler, vars(args))
    saver = checkpoint.open_saver(
        output_dir, collect, progress, epochs=args.epochs, save_every=args.save_every, save_minutes=args.save_minutes
    )
    images, _, noise = datasets.examples(
        datasets.Samples(
            source,
            transforms.eval_transform(args.input_size),
            in_chans=args.in_chans,
            seed=args.seed,
            num_noise=model.num_patches,
        ),
        EXAMPLES,
    )

    if progress.epoch >= args.epochs:
        logger.info(f"nothing is left to do: the run has its {args.epochs} epochs")
    for epoch in range(progress.epoch, args.epochs):
        meters = runlog.Meters(**progress.meters)
        train_one_epoch(
            wrapped,
            loader,
            optimizer,
            mask_ratio=args.mask_ratio,
            normalize=normalize,
            epoch=epoch,
            first_step=progress.first_step,
            schedule=schedule,
            precision=precision,
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            on_nonfinite=args.on_nonfinite,
            meters=meters,
            log=log,
            saver=saver,
        )
        progress.next_epoch()
        if args.vis_every and dist.is_main() and (epoch % args.vis_every == 0 or epoch == args.epochs - 1):
            picture = pictures.reconstruction(model, images, noise, normalize, args.mask_ratio)
            log.picture("reconstruction", picture, epoch)
        # The line first: a run stopped between the two writes that epoch, and its line, again.
        log.end_epoch(meters.means())
        saver.save_epoch(epoch)
    log.close()


if __name__ == "__main__":
    cli.run(main, get_args_parser())
