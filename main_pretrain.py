"""Masked pre-training (He et al. 2021) on a folder of images.

A small model on the pictures of demo/data, under a minute on a CPU:

    python demo/unpack_data.py
    python main_pretrain.py --config recipes/pretrain_fashion_mnist.yaml --epochs 2 --output_dir runs/fashion

The published recipe on ImageNet, 8 GPUs of one machine:

    torchrun --nproc_per_node 8 main_pretrain.py --config recipes/pretrain_vit_large.yaml --data_path IMAGENET \\
        --batch_size 64 --accum_iter 8 --output_dir runs/large --resume auto
"""

import argparse
import logging
from argparse import Namespace
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train_one_epoch
from util import cli, datasets, dist, loader, lr_sched, pictures, runlog, runstate, transforms, weights
from util.loop import NonFiniteGuard
from util.precision import Precision
from util.samples import Samples

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
    runstate.prepare_output_dir(output_dir, args.resume)
    torch.manual_seed(args.seed)

    model = models_mae.build(vars(args))
    if args.init_from:
        weights.init_mae(model, args.init_from)
    model.to(device)

    source = datasets.open_source(
        "train", args.data_path, args.train_list, args.dataset, download=args.download, num_images=args.num_images
    )
    drawn = {"in_chans": args.in_chans, "seed": args.seed, "num_noise": model.num_patches,
             "on_bad_image": args.on_bad_image}  # fmt: skip
    samples = Samples(source, transforms.pretrain_transform(args.input_size, args.crop_scale, args.hflip), **drawn)
    examples = loader.examples(Samples(source, transforms.eval_transform(args.input_size), **drawn), EXAMPLES)
    pin_memory = args.pin_mem and device.type == "cuda"
    batches = loader.TrainLoader(samples, args.batch_size, args.seed, args.num_workers, pin_memory)
    normalize = transforms.Normalize(*transforms.channel_statistics(args.in_chans, args.mean, args.std)).to(device)

    global_batch_size = args.batch_size * dist.world_size()
    effective_batch_size = global_batch_size * args.accum_iter
    logger.info("settings: " + " ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    lr = lr_sched.scaled_lr(args.lr, args.blr, effective_batch_size)
    # The published groups: no decay on biases and 1-D weights, and so decay on the class and mask tokens.
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = partial(lr_sched.adjust_learning_rate, optimizer, args=Namespace(**{**vars(args), "lr": lr}))
    precision = Precision(args.amp, device)
    logger.info(f"{args.model} on {device} in {precision.name}, {dist.world_size()} process(es)")

    progress = runstate.Progress(effective_batch_size, global_batch_size, args.start_epoch)
    runstate.resume(args.resume, output_dir, model, optimizer, precision.scaler, vars(args), progress)
    collect = partial(runstate.collect, model, optimizer, precision.scaler, vars(args))
    saver = runstate.open_saver(
        output_dir, collect, progress, epochs=args.epochs, save_every=args.save_every, save_minutes=args.save_minutes
    )
    first_x = int(1000 * (progress.epoch + progress.first_step / len(batches)))
    step_options = {
        "schedule": schedule,
        "precision": precision,
        "guard": NonFiniteGuard(args.on_nonfinite, precision.overflow_is_normal),
        "accum_iter": args.accum_iter,
        "clip_grad": args.clip_grad,
        "saver": saver,
    }
    wrapped = dist.wrap(model, device)

    if progress.epoch >= args.epochs:
        logger.info(f"nothing is left to do: the run has its {args.epochs} epochs")
    with closing(runlog.open_log(output_dir, Path(args.log_dir), args.epochs, progress.epoch, first_x)) as log:
        for epoch in range(progress.epoch, args.epochs):
            meters = runlog.Meters(**progress.meters)
            train_one_epoch(
                wrapped,
                batches,
                optimizer,
                mask_ratio=args.mask_ratio,
                normalize=normalize,
                epoch=epoch,
                first_step=progress.first_step,
                meters=meters,
                log=log,
                **step_options,
            )
            progress.next_epoch()
            # The line first: a run stopped between the two writes that epoch, and its line, again.
            log.end_epoch(meters.means() | batches.counts())
            saver.save_epoch(epoch)
            if args.vis_every and dist.is_main() and (epoch % args.vis_every == 0 or epoch == args.epochs - 1):
                images, _, noise = examples
                log.picture(
                    "reconstruction", pictures.reconstruction(model, images, noise, normalize, args.mask_ratio), epoch
                )


if __name__ == "__main__":
    cli.run(main, get_args_parser())
