"""Every flag, once, in groups. A main takes the groups that it needs and sets its task's defaults."""

import argparse
from collections.abc import Collection

from util.cli.choices import ADAPT_CHOICES, AMP_CHOICES, DEFAULT_WORKERS
from util.cli.flags import (
    Size,
    add_switch,
    count,
    non_negative,
    positive,
    positive_int,
    positive_share,
    ratio,
    seed,
    share,
)
from util.dist import BACKENDS
from util.masking import MASKING_CHOICES


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where a run reads its settings, writes its files, and computes."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", metavar="YAML", help="recipe that sets defaults; flags given beside it win")
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="checkpoints and log.txt go here")
    group.add_argument(
        "--log_dir",
        default="./output_dir",
        metavar="DIR",
        help="TensorBoard's files go here; --output_dir if only that is given",
    )
    group.add_argument(
        "--resume", default="", metavar="FILE|auto",
        help="continue a run from this checkpoint; auto: from the newest in --output_dir that is whole, or start",
    )  # fmt: skip
    group.add_argument(
        "--start_epoch", default=0, type=count, metavar="N", help="first epoch, where nothing is resumed"
    )
    group.add_argument(
        "--save_every", default=20, type=positive_int, metavar="N", help="epochs between checkpoints kept"
    )
    group.add_argument(
        "--keep_last", type=positive_int, metavar="K", help="of those, keep the newest K only; None keeps all"
    )
    group.add_argument(
        "--save_minutes", default=15.0, type=non_negative, metavar="M",
        help="minutes between states in checkpoint-last.pth, also in the middle of an epoch",
    )  # fmt: skip
    _add_compute_options(group)


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """How a command without a run of its own computes."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", metavar="YAML", help="recipe that sets defaults; flags given beside it win")
    _add_compute_options(group)
    group.add_argument("--batch_size", default=256, type=positive_int, metavar="N", help="images a process and batch")


def add_inference_options(parser: argparse.ArgumentParser, images: bool = True, also: str = "") -> None:
    """What a command has that uses a trained model: on images, unless it says otherwise.

    Args:
        also: what it takes for a model beside all that the others take.
    """
    if images:
        parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--model", required=True, metavar="FILE",
        help="a checkpoint of anybody's, a folder of transformers, or a published name, such as mae_finetuned_vit_base"
        + also,
    )  # fmt: skip
    _add_device(parser)


def add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """How many images go through a model at once."""
    parser.add_argument("--batch_size", default=128, type=positive_int, metavar="N", help="images at once")
    _add_num_workers(parser)
    _add_amp(parser)


def _add_device(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_amp(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--amp", default="auto", choices=AMP_CHOICES, help="mixed precision; auto: bf16 or fp16 on CUDA, else off"
    )


def _add_num_workers(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--num_workers", default=DEFAULT_WORKERS, type=count, metavar="N",
        help="worker processes that load data, at most one a core; 0: this process loads it",
    )  # fmt: skip


def _add_compute_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", default=0, type=seed, help="of all that is drawn: weights, order, crops, masks")
    _add_device(group)
    _add_amp(group)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What the samples are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", metavar="PATH",
        help="folder of images, flat or nested, or one with train/ in it; or a tar or zip file of such a folder",
    )  # fmt: skip
    add_source_options(group)
    group.add_argument(
        "--input_size", default=224, type=positive_int, nargs="+", action=Size, metavar=("H", "W"),
        help="pixels of a side, or height and width",
    )  # fmt: skip
    group.add_argument("--mean", type=float, nargs="+", metavar="M", help="of each channel, 0 to 1; None is ImageNet's")
    group.add_argument(
        "--std", type=positive, nargs="+", metavar="S", help="of each channel, 0 to 1; None is ImageNet's"
    )
    add_switch(group, "pin_mem", True, "load into pinned memory, which a GPU reads faster")


def add_source_options(group: argparse._ActionsContainer) -> None:
    """Where images come from other than --data_path, and how they are read."""
    group.add_argument(
        "--train_list", metavar="FILE",
        help="text, CSV or JSON file that names the images: a path, and a label if you like; or iNaturalist's JSON",
    )  # fmt: skip
    group.add_argument(
        "--dataset", metavar="NAME",
        help="a data set of torchvision by its class, CIFAR10 or STL10:unlabeled, with its files in --data_path; "
        "hf:NAME_OR_FOLDER, of Hugging Face; wds:SHARDS, of WebDataset: s/{000..127}.tar",
    )  # fmt: skip
    group.add_argument("--download", action="store_true", help="let torchvision fetch the files of --dataset")
    group.add_argument(
        "--num_images", type=positive_int, metavar="N", help="images in all shards; None counts those of files"
    )
    group.add_argument("--in_chans", default=3, type=positive_int, metavar="C", help="channels: 3 is RGB, 1 is grey")
    _add_num_workers(group)


def add_model_options(parser: argparse.ArgumentParser, models: Collection[str], default: str) -> None:
    """Which network."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=default, choices=models, metavar="NAME", help=f"one of {', '.join(models)}")
    group.add_argument(
        "--patch_size", type=positive_int, nargs="+", action=Size, metavar=("P", "P"),
        help="pixels of a patch's side, or height and width; None is the model's own",
    )  # fmt: skip


def add_optimizer_options(parser: argparse.ArgumentParser, several_blr: bool = False) -> None:
    """How it is trained."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", default=64, type=positive_int, metavar="N", help="images a process and batch")
    group.add_argument("--epochs", default=400, type=positive_int, metavar="N", help="passes over the data")
    group.add_argument(
        "--accum_iter", default=1, type=positive_int, metavar="N",
        help="iterations per update; effective batch size = batch_size x accum_iter x processes",
    )  # fmt: skip
    group.add_argument(
        "--weight_decay", default=0.05, type=non_negative, metavar="W", help="not on biases and 1-D weights"
    )
    group.add_argument("--lr", type=non_negative, help="highest learning rate; None: blr x effective batch / 256")
    if several_blr:
        group.add_argument(
            "--blr", default=[0.1], type=positive, nargs="+",
            help="base learning rate, for a batch of 256; of several, each trains a head of its own",
        )  # fmt: skip
    else:
        group.add_argument("--blr", default=1e-3, type=non_negative, help="base learning rate, for a batch of 256")
    group.add_argument(
        "--min_lr", default=0.0, type=non_negative, metavar="LR", help="learning rate at the end of the cosine"
    )
    group.add_argument("--warmup_epochs", default=40, type=non_negative, metavar="N", help="epochs of linear warm-up")
    group.add_argument(
        "--clip_grad", type=positive, metavar="NORM", help="largest norm of the gradient; None: no clipping"
    )
    group.add_argument(
        "--compile", action="store_true",
        help="generate code for the model: faster steps, after a minute or more at the first one",
    )  # fmt: skip
    group.add_argument(
        "--on_nonfinite", default="abort", choices=("abort", "skip"),
        help="when a loss or gradient is not finite: save and end the run, or leave the step out",
    )  # fmt: skip
    group.add_argument(
        "--on_bad_image", default="error", choices=("error", "skip"),
        help="where an image can't be read: end the run, or take another in its place, up to a tenth of an epoch's",
    )  # fmt: skip


def add_pretrain_options(parser: argparse.ArgumentParser) -> None:
    """What only masked pre-training has."""
    group = parser.add_argument_group("masked pre-training")
    group.add_argument("--mask_ratio", default=0.75, type=ratio, metavar="R", help="share of masked patches")
    group.add_argument(
        "--masking", default="random", choices=MASKING_CHOICES,
        help="which patches are masked: random ones; large blocks (as in BEiT); or all but one of every 2x2 (grid)",
    )  # fmt: skip
    group.add_argument(
        "--decoder_depth", type=positive_int, metavar="N", help="blocks of the decoder; None is the model's own"
    )
    _add_recompute_option(group)
    group.add_argument(
        "--fsdp", action="store_true", help="share weights, gradients and optimizer states among processes (FSDP2)"
    )
    add_switch(group, "norm_pix_loss", False, "predict patches normalised by their own mean and variance")
    _add_crop_options(group, [0.2, 1.0])
    add_switch(
        group, "fast_jpeg", False,
        "JPEG files by torchcodec, crops scaled by code made for it: twice as many images a core, of the same pixels",
    )  # fmt: skip
    group.add_argument(
        "--repeated_sampling", default=1, type=positive_int, metavar="R",
        help="crops of each image that is read, in one batch; an epoch is then R times as long: divide --epochs and "
        "--warmup_epochs by R",
    )  # fmt: skip
    group.add_argument("--init_from", default="", metavar="FILE", help="start from this file's weights (nothing else)")
    group.add_argument(
        "--vis_every", default=20, type=count, metavar="N",
        help="epochs between TensorBoard pictures of reconstructions; 0: none",
    )  # fmt: skip


def add_supervised_options(parser: argparse.ArgumentParser, global_pool: bool) -> None:
    """Where features come from, and the classes."""
    group = parser.add_argument_group("encoder and classes")
    group.add_argument(
        "--finetune", default="", metavar="FILE|NAME",
        help="start from these weights: a file of ours or of others, or a published name such as mae_pretrain_vit_base",
    )  # fmt: skip
    group.add_argument(
        "--adapt_input", default="error", choices=ADAPT_CHOICES,
        help="where --finetune is for other channels: each of ours starts from their mean, they repeat in turn, or the "
        "patch projection starts untrained (skip)",
    )  # fmt: skip
    group.add_argument("--val_list", metavar="FILE", help="as --train_list, for validation")
    group.add_argument(
        "--crop_pct", type=positive_share, metavar="S",
        help="side of the centre crop that is evaluated, as a share of the scaled image's; None is .875, and 1 above "
        "224 pixels, as published; give 1 for pictures as small as CIFAR's",
    )  # fmt: skip
    group.add_argument(
        "--nb_classes", type=positive_int, metavar="N", help="a check on the data, which tells the classes itself"
    )
    group.add_argument(
        "--train_per_class", type=positive_int, metavar="N", help="train on N images of each class, drawn by --seed"
    )
    on, off = (" (the default)", "") if global_pool else ("", " (the default)")
    group.add_argument(
        "--global_pool", action="store_true", default=global_pool, help="classify the mean of patch tokens" + on
    )
    group.add_argument(
        "--cls_token", action="store_false", dest="global_pool", default=global_pool,
        help="classify the class token" + off,
    )  # fmt: skip


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """How a classifier is evaluated."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_every", default=1, type=positive_int, metavar="N", help="epochs between evaluations; the last is one"
    )
    group.add_argument("--eval", action="store_true", help="evaluate --resume (or --finetune) and end; needs val/ only")
    group.add_argument(
        "--dist_eval", action="store_true", help="without effect: processes always share the evaluation, exactly"
    )
    group.add_argument(
        "--report", metavar="DIR", help="write accuracy by class and the confusion matrix there, as CSV and picture"
    )


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """What linear probing has."""
    group = parser.add_argument_group("linear probing")
    group.add_argument(
        "--cache_features", action="store_true",
        help="compute the features of all images once, without augmentation, and train on those",
    )  # fmt: skip
    group.add_argument(
        "--held_out", default=0.1, type=ratio, metavar="R",
        help="share of the training images that chooses among several --blr, and is not trained on",
    )  # fmt: skip


def add_knn_options(parser: argparse.ArgumentParser) -> None:
    """What classification by neighbours has."""
    group = parser.add_argument_group("nearest neighbours")
    group.add_argument(
        "--k", default=[10, 20, 100], type=positive_int, nargs="+", metavar="K", help="numbers of neighbours"
    )
    group.add_argument(
        "--temperature", default=0.07, type=positive, metavar="T", help="of the weights, exp(cosine / T)"
    )


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """What fine-tuning changes in the model, and how its images are augmented."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--drop_path", default=0.1, type=ratio, metavar="R", help="stochastic depth of the last block")
    group.add_argument(
        "--layer_decay", default=0.75, type=positive, metavar="D", help="learning rate of a layer to that above it"
    )
    group.add_argument(
        "--unfreeze_blocks", type=count, metavar="K",
        help="train the last K blocks and the head only; None: everything",
    )  # fmt: skip
    _add_recompute_option(group)
    group = parser.add_argument_group("augmentation")
    _add_crop_options(group, [0.08, 1.0])
    group.add_argument("--color_jitter", type=non_negative, metavar="S", help="strength, where there is no --aa")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's name of one, or none")
    group.add_argument("--smoothing", default=0.1, type=ratio, metavar="S", help="label smoothing")
    group.add_argument("--reprob", default=0.25, type=share, metavar="P", help="chance of random erasing")
    group.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what fills the erased")
    group.add_argument("--recount", default=1, type=positive_int, metavar="N", help="most rectangles erased")
    group.add_argument("--resplit", action="store_true", help="without effect; accepted for old scripts")
    group.add_argument("--mixup", default=0.0, type=non_negative, metavar="A", help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", default=0.0, type=non_negative, metavar="A", help="alpha of cutmix; 0: none")
    group.add_argument(
        "--cutmix_minmax", type=share, nargs=2, metavar=("MIN", "MAX"), help="share of a side in place of an alpha"
    )
    group.add_argument("--mixup_prob", default=1.0, type=share, metavar="P", help="chance of either")
    group.add_argument("--mixup_switch_prob", default=0.5, type=share, metavar="P", help="of cutmix, where both are on")
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what shares a draw")


def _add_recompute_option(group: argparse._ActionsContainer) -> None:
    """For models that would not fit otherwise."""
    group.add_argument(
        "--grad_checkpointing", action="store_true",
        help="keep less for the backward pass and compute it again there: less memory, a third more arithmetic",
    )  # fmt: skip


def _add_crop_options(group: argparse._ArgumentGroup, crop_scale: list[float]) -> None:
    """Two that small pictures, and those in which left is not right, need otherwise."""
    group.add_argument(
        "--crop_scale", default=crop_scale, type=float, nargs=2, metavar=("MIN", "MAX"),
        help="share of the image's area that a random crop takes",
    )  # fmt: skip
    group.add_argument(
        "--hflip", default=0.5, type=share, metavar="P", help="chance of a horizontal flip; 0 where left is not right"
    )


def add_distributed_options(parser: argparse.ArgumentParser) -> None:
    """Flags of launchers. Ranks and counts come from the environment that torchrun sets."""
    group = parser.add_argument_group("several processes (start with torchrun, srun or submitit_*.py)")
    group.add_argument("--world_size", default=1, type=int, help="taken from the launcher; accepted for old scripts")
    group.add_argument(
        "--local_rank", "--local-rank", default=-1, type=int, help="taken from the launcher; accepted for old scripts"
    )
    group.add_argument("--dist_on_itp", action="store_true", help="without effect; accepted for old scripts")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument(
        "--dist_backend", default="auto", choices=BACKENDS, help="how they talk; auto: nccl for GPUs, else gloo"
    )
    group.add_argument(
        "--dist_timeout", default=600, type=positive, metavar="S",
        help="seconds that a process waits for the others before it takes one of them for dead and ends",
    )  # fmt: skip
