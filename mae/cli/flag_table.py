"""The table of flags: their types, defaults and help. `options.py` adds them to the parsers of the scripts."""

from typing import Any

from mae.cli import choices
from mae.cli.choices import AUGMENTATION, DATA, DISTRIBUTED, EVALUATION, MODEL, OPTIMIZATION, RUN
from mae.cli.flags import (
    Range,
    Size,
    count,
    nodata,
    non_negative,
    positive,
    positive_int,
    positive_share,
    ratio,
    seed,
    share,
)
from mae.files import recipes
from mae.masking import MASKING_CHOICES
from mae.parallel import BACKENDS


def flag(group: str, **arguments: Any) -> dict[str, Any]:
    """Returns a row: a group of --help and arguments of `add_argument`. With `switch`, the default, it adds two flags:
    --NAME, and --no_NAME or the flag of `advice.OFF`, whose help is `off`.
    """
    return {"group": group, **arguments}


# A flag whose text differs between scripts gets it where it is added.
FLAGS: dict[str, dict[str, Any]] = {
    "data_path": flag(DATA, metavar="PATH"),
    "train_list": flag(DATA, metavar="FILE"),
    "val_list": flag(DATA, metavar="FILE", help="as --train_list, for the validation set"),
    "dataset": flag(DATA, metavar="NAME"),
    "download": flag(DATA, action="store_true"),
    "extras": flag(DATA, action="extend", nargs="+", metavar="NAME",
        help="columns of --train_list (CSV with a header, or keys of JSON) with numbers that are inputs of the model "
        "besides the image, by name (docs/datasets.md)"),
    "num_images": flag(DATA, type=positive_int, metavar="N",
        help="number of images in the shards of wds: (default: counted, which needs local files)"),
    "task": flag(DATA, default=choices.CLASSIFICATION, choices=choices.TASK_CHOICES,
        help="classification: one class for each image; multilabel: any number of classes, in a list as a;b or in one "
        "column of 0 and 1 for each class; regression: one or more numbers, which are standardized on the training "
        "set. The labels are those of --train_list, or vectors of a --dataset py:MODULE:FUNCTION"),
    "label_columns": flag(DATA, action="extend", nargs="+", metavar="NAME",
        help="columns of --train_list and --val_list (CSV with a header, or keys of JSON) with the labels (default: "
        "label, class or groundtruth)"),
    "nb_classes": flag(DATA, type=positive_int, metavar="N",
        help="number of classes, as a check; ids in lists that are below N are outputs (default: the number in the "
        "training set)"),
    "train_per_class": flag(DATA, type=positive_int, metavar="N",
        help="train on N images of each class, chosen by --seed (default: all images)"),
    "val_fraction": flag(DATA, type=ratio, metavar="R",
        help="to choose hyperparameters: hold out this fraction of the training images, also of those that "
        "--train_per_class chooses, and evaluate on it (default: evaluate on the validation set)"),
    "input_size": flag(DATA, default=224, type=positive_int, nargs="+", action=Size, metavar=("H", "W")),
    "in_chans": flag(DATA, default=3, type=positive_int, metavar="C", help="input channels: 3 RGB, 1 gray"),
    "mean": flag(DATA, type=float, nargs="+", metavar="M",
        help="mean of each channel, for pixel values in [0, 1] (default: ImageNet's, or as in the loaded weights)"),
    "std": flag(DATA, type=positive, nargs="+", metavar="S",
        help="standard deviation of each channel (default: as for --mean)"),
    "exif": flag(DATA, switch=None),
    "nodata": flag(DATA, type=nodata, metavar="nan|VALUE",
        help="pixels with this value in any channel of the input are invalid: they enter the model as the mean, "
        "and pre-training never scores them (default: the choice of the model's run, else all pixels are valid)"),
    "value_range": flag(DATA, type=float, nargs=2, action=Range, metavar=("MIN", "MAX"),
        help="values in the files that become 0 and 1, for pixels of any type (default: the choice of the model's run, "
        "else 8 and 16 bits are scaled to 0 to 1, and float values are unchanged)"),
    "channels_last": flag(DATA, switch=None,
        help="arrays (.npy files, and images of a dataset of your own) are (H, W, c); the checkpoint records it "
        "(default: the choice of the model's run, else the axis with an entry for each channel, if only one has)",
        off="arrays are (c, H, W)"),
    "min_valid": flag(DATA, default=0.5, type=positive_share, metavar="S",
        help="a patch with a smaller share of valid pixels is never visible and has no loss (--nodata, or masks of a "
        "--dataset)"),
    "crop": flag(DATA, default=choices.CROP_CHOICES[0], choices=choices.CROP_CHOICES,
        help="random: random crops in training, and the center in evaluation, with the aspect ratio of --input_size; "
        "none: the whole image, scaled to --input_size, for spectrograms and signals"),
    "crop_pct": flag(DATA, type=positive_share, metavar="S",
        help="side of the center crop in evaluation, as a fraction of the resized image (default: .875; 1 for squares "
        "above 224 pixels, and if the shorter side of --input_size is below 112)"),
    "short_side": flag(DATA, type=count, metavar="N",
        help="scale images so that their shorter side has N pixels, before the random scale in training and the "
        "windows in evaluation; 0: the size of the file (default: the shorter side of --input_size)"),
    "reduce_zero_label": flag(DATA, switch=False,
        help="ignore the value 0 in masks; the classes have the values 1 to N (ADE20K, LoveDA)"),
    "palette": flag(DATA, metavar="FILE",
        help="text file with a line `R G B NAME` for each class: its name, and its color in color masks and in "
        "pictures (default: numbers, and the colors of VOC)"),
    "num_workers": flag(DATA, default=choices.DEFAULT_WORKERS, type=count, metavar="N",
        help="data loader worker processes, at most one per CPU core of this process; 0: load in the training process"),
    "pin_mem": flag(DATA, switch=True, help="load batches into pinned memory, for faster copies to the GPU"),
    "fast_jpeg": flag(DATA, switch=False,
        help="decode color JPEG files with torchcodec, or else torchvision, and scale them with compiled code (numba): "
        "the same pixels at up to twice the throughput. Pillow decodes other files, and computes augmentation "
        "policies, as without the flag"),
    "cache_images": flag(DATA, switch=False,
        help="for small datasets: decode all images at the start and keep them in up to half of the memory of the "
        "machine, which its processes share. An image takes height x width x channels bytes. The batches are the same"),
    "cache_features": flag(DATA, action="store_true",
        help="compute the features of all images once, without augmentation, and train on them. --probe attentive "
        "stores patch tokens in fp16 in the folder tokens of --output_dir, and a resumed run reuses them if no image "
        "has changed"),
    "on_bad_image": flag(DATA, default="error", choices=("error", "skip")),
    "repeated_sampling": flag(DATA, default=1, type=positive_int, metavar="R",
        help="crops per decoded image, all in one batch. An epoch has R times as many samples: divide --epochs and "
        "--warmup_epochs by R"),
    "crop_scale": flag(AUGMENTATION, default=[0.2, 1.0], type=float, nargs=2, metavar=("MIN", "MAX"),
        help="range of the area of a random crop, as a fraction of the image"),
    "crop_ratio": flag(AUGMENTATION, default=[3 / 4, 4 / 3], type=positive, nargs=2, metavar=("MIN", "MAX"),
        help="range of the aspect ratio (width / height) of a random crop, relative to that of --input_size"),
    "hflip": flag(AUGMENTATION, default=0.5, type=share, metavar="P", help="probability of a horizontal flip"),
    "vflip": flag(AUGMENTATION, default=0.0, type=share, metavar="P",
        help="probability of a vertical flip, for images without an upper side, such as microscope images"),
    "rotate90": flag(AUGMENTATION, switch=False,
        help="rotate images by random multiples of 90 degrees; needs a square --input_size"),
    "scale": flag(AUGMENTATION, default=[0.5, 2.0], type=positive, nargs=2, metavar=("MIN", "MAX"),
        help="range of the random scale of an image, before the random crop of --input_size"),
    "aa": flag(AUGMENTATION, default="rand-m9-mstd0.5-inc1", metavar="POLICY",
        help="augmentation policy, as timm names it, or none"),
    "color_jitter": flag(AUGMENTATION, type=non_negative, metavar="S",
        help="strength of color jitter, with --aa none (default: 0)"),
    "reprob": flag(AUGMENTATION, default=0.25, type=share, metavar="P", help="probability of random erasing"),
    "remode": flag(AUGMENTATION, default="pixel", choices=("const", "rand", "pixel"),
        help="values of erased pixels: const: 0; rand: one random color; pixel: random for each pixel"),
    "recount": flag(AUGMENTATION, default=1, type=positive_int, metavar="N", help="largest number of erased areas"),
    "resplit": flag(AUGMENTATION, action="store_true", help="accepted but ignored"),
    "mixup": flag(AUGMENTATION, default=0.0, type=non_negative, metavar="A", help="alpha of mixup; 0: no mixup"),
    "cutmix": flag(AUGMENTATION, default=0.0, type=non_negative, metavar="A", help="alpha of cutmix; 0: no cutmix"),
    "cutmix_minmax": flag(AUGMENTATION, type=share, nargs=2, metavar=("MIN", "MAX"),
        help="range of the side of the cutmix box, as a fraction of the image (default: sampled with --cutmix)"),
    "mixup_prob": flag(AUGMENTATION, default=1.0, type=share, metavar="P", help="probability of mixup or cutmix"),
    "mixup_switch_prob": flag(AUGMENTATION, default=0.5, type=share, metavar="P",
        help="probability of cutmix if both are enabled"),
    "mixup_mode": flag(AUGMENTATION, default="batch", choices=("batch", "pair", "elem"),
        help="sample the mixing parameters once per batch, pair or element"),
    "patch_size": flag(MODEL, type=positive_int, nargs="+", action=Size, metavar=("P", "P"),
        help="patch size in pixels: one number for squares, or height and width (default: the patch size in the name "
        "of the model)"),
    "qk_norm": flag(MODEL, choices=("layer", "rms"),
        help="normalize queries and keys of each head, as ViT-22B does, against diverging attention: layer: LayerNorm; "
        "rms: RMSNorm (default: the choice of the loaded weights, else no norm)"),
    "num_cls_tokens": flag(MODEL, type=positive_int, metavar="T",
        help="number of class tokens; heads and k-NN use their mean (default: as in the loaded weights, else 1)"),
    "encoder": flag(MODEL, metavar="MODULE:CLASS",
        help="your own encoder: a class derived from models_vit.Encoder, from a module on Python's path or in the "
        "working directory. Files record its name, and do not import it"),
    "encoder_args": flag(MODEL, action="extend", nargs="+", metavar="NAME=VALUE",
        help="arguments of the class of --encoder, such as groups=3 (default: as in the loaded weights)"),
    "model_class": flag(MODEL, metavar="MODULE:CLASS",
        help="your own method: a class derived from models_mae.MaskedAutoencoderViT (docs/method.md). Files record its "
        "name, and do not import it"),
    "model_args": flag(MODEL, action="extend", nargs="+", metavar="NAME=VALUE",
        help="arguments of the class of --model_class, such as bins=9"),
    "mask_ratio": flag(MODEL, default=0.75, type=ratio, metavar="R", help="fraction of masked patches"),
    "masking": flag(MODEL, default="random", choices=MASKING_CHOICES,
        help="masked patches: random; block, large rectangles as in BEiT; or grid, three of every 2x2 patches"),
    "mask_block": flag(MODEL, default=1, type=positive_int, metavar="N",
        help="--masking random masks blocks of NxN patches instead of single patches; Pixio has 4"),
    "learned_pos_embed": flag(MODEL, action="store_true",
        help="learn the positions of encoder and decoder (default: the fixed sine-cosine tables)"),
    "drop_path": flag(MODEL, default=0.0, type=ratio, metavar="R",
        help="stochastic depth: drop rate of the last block of the encoder; it grows linearly from 0 at the first"),
    "decoder_depth": flag(MODEL, type=positive_int, metavar="N",
        help="number of decoder blocks (default: the model's)"),
    "norm_pix_loss": flag(MODEL, switch=False, help="normalize each target patch by its own mean and variance"),
    "init_from": flag(MODEL, default="", metavar="FILE",
        help="start at epoch 0 from the weights and settings in this file (default: random weights)"),
    "finetune": flag(MODEL, default="", metavar="FILE|NAME",
        help="weights to start from: a checkpoint file, or a published name such as mae_pretrain_vit_base "
        "(default: random weights)"),
    "global_pool": flag(MODEL, switch=False, help="classify the mean of the patch tokens",
        off="classify the class token"),
    "adapt_input": flag(MODEL, default="error", choices=choices.ADAPT_CHOICES,
        help="if the weights of --finetune have a different number of input channels: error: abort; mean: each channel "
        "starts from the mean of their channels; repeat: from their channels, repeated; skip: the patch projection is "
        "initialized at random"),
    "head": flag(MODEL, default=choices.HEAD_CHOICES[0], choices=choices.HEAD_CHOICES,
        help="linear: batch norm and a 1 x 1 convolution on the tokens of the last block; dpt: a dense prediction "
        "transformer on four evenly spaced blocks (Ranftl et al. 2021)"),
    "probe": flag(MODEL, default=choices.LINEAR, choices=choices.PROBE_CHOICES,
        help="linear: a linear layer on the pooled features; attentive: learned queries pool the patch tokens for the "
        "linear layer (efficient probing, Psomas et al. 2025)"),
    "num_queries": flag(MODEL, default=choices.NUM_QUERIES, type=positive_int, metavar="Q",
        help="queries of --probe attentive; a divisor of the width of the encoder"),
    "grad_checkpointing": flag(MODEL, action="store_true",
        help="recompute activations in the backward pass: less memory, a third more computation"),
    "batch_size": flag(OPTIMIZATION, default=64, type=positive_int, metavar="N", help="batch size per process (GPU)"),
    "accum_iter": flag(OPTIMIZATION, default=1, type=positive_int, metavar="N",
        help="iterations per update (optimizer step). Effective batch size = batch_size x accum_iter x processes"),
    "epochs": flag(OPTIMIZATION, default=400, type=positive_int, metavar="N", help="number of epochs"),
    "warmup_epochs": flag(OPTIMIZATION, default=40, type=non_negative, metavar="N",
        help="epochs of linear warm-up, then the decay"),
    "lr_schedule": flag(OPTIMIZATION, metavar="MODULE:FUNCTION",
        help="your own decay: function(progress) returns the factor of the learning rate for the progress after the "
        "warm-up, 0 to 1. Files record its name, and do not import it (default: a cosine)"),
    "updates_per_epoch": flag(OPTIMIZATION, type=positive_int, metavar="N",
        help="number of updates per epoch; the next epoch continues where this one ended, and the data are reshuffled "
        "after each pass (default: one pass)"),
    "lr": flag(OPTIMIZATION, type=non_negative, metavar="LR"),
    "blr": flag(OPTIMIZATION, default=1e-3, type=non_negative, metavar="LR",
        help="base learning rate: lr = blr x effective batch size / 256"),
    "min_lr": flag(OPTIMIZATION, default=0.0, type=non_negative, metavar="LR",
        help="learning rate at the end of the decay"),
    "poly_power": flag(OPTIMIZATION, default=0.9, type=positive, metavar="P",
        help="power of the polynomial decay: the rate is proportional to (1 - progress)^P"),
    "optimizer": flag(OPTIMIZATION, metavar="MODULE:FUNCTION",
        help="your own optimizer: function(model, groups) returns it for groups of parameters. Files record "
        "its name, and do not import it (default: AdamW)"),
    "weight_decay": flag(OPTIMIZATION, default=0.05, type=non_negative, metavar="W",
        help="weight decay; biases and other one-dimensional parameters have none"),
    "layer_decay": flag(OPTIMIZATION, default=0.75, type=positive, metavar="D",
        help="layer-wise learning rate decay: the factor from each layer to the layer below"),
    "unfreeze_blocks": flag(OPTIMIZATION, type=count, metavar="K",
        help="train the head and the last K blocks only (default: all parameters)"),
    "smoothing": flag(OPTIMIZATION, default=0.1, type=ratio, metavar="S", help="label smoothing"),
    "class_weight": flag(OPTIMIZATION, choices=["balanced"],
        help="balanced: the loss of an image is divided by the share of its class in the training set, so that small "
        "and large classes count equally (default: all images count equally)"),
    "regression_loss": flag(OPTIMIZATION, choices=choices.REGRESSION_LOSSES,
        help="loss of --task regression, on standardized targets; huber: l2 below one standard deviation, and l1 above "
        "(default: l1)"),
    "clip_grad": flag(OPTIMIZATION, type=positive, metavar="NORM",
        help="clip the gradient to this norm (default: no clipping)"),
    "on_nonfinite": flag(OPTIMIZATION, default="abort", choices=("abort", "skip"),
        help="if a loss or gradient is not finite: abort after saving a checkpoint, or skip the update"),
    "eval": flag(EVALUATION, action="store_true",
        help="evaluate the weights of --resume or --finetune on the validation set, and exit"),
    "eval_every": flag(EVALUATION, default=1, type=positive_int, metavar="N",
        help="evaluate every N epochs, and after the last one"),
    "report": flag(EVALUATION, metavar="DIR",
        help="folder for the scores per class and the confusion matrix (CSV and picture)"),
    "dist_eval": flag(EVALUATION, action="store_true",
        help="accepted but ignored: the evaluation is always distributed, and exact"),
    "held_out": flag(EVALUATION, default=0.1, type=ratio, metavar="R",
        help="fraction of the training set that is held out to choose among several --blr"),
    "metric": flag(EVALUATION, action="extend", nargs="+", choices=choices.METRIC_CHOICES, metavar="NAME"),
    "vis_every": flag(EVALUATION, default=20, type=count, metavar="N",
        help="log reconstructions to TensorBoard every N epochs; 0: never"),
    "probe_every": flag(EVALUATION, default=0, type=count, metavar="N",
        help="every N epochs, log the k-NN accuracy and the effective rank (RankMe) of the class token of unmasked "
        "images; the training stays the same; 0: never"),
    "probe_path": flag(EVALUATION, metavar="PATH",
        help="labelled dataset of --probe_every, with class folders in train/ and val/ (default: the training images, "
        "of which a tenth is classified by the others)"),
    "k": flag(EVALUATION, default=[10, 20, 100], type=positive_int, nargs="+", metavar="K",
        help="numbers of neighbors"),
    "temperature": flag(EVALUATION, default=[0.07], type=positive, nargs="+", metavar="T",
        help="temperature T of the weight of a neighbor, exp(cosine similarity / T). Several values print a table of "
        "all combinations with --k; the best of them is optimistic, because the validation set selects it"),
    "encoders": flag(EVALUATION, required=True, nargs="+", metavar="[NAME=]ENCODER",
        help="checkpoint files, published names, timm:MODEL (a Vision Transformer of timm with its weights), scratch "
        "(random weights in the architecture of the first file, or of --model), pixels (logistic regression and an "
        "RBF-SVM on raw pixels). NAME is the title in the table (default: the name of the file)"),
    "protocols": flag(EVALUATION, nargs="+", metavar="P"),
    "labels": flag(EVALUATION, nargs="+", default=["all"], metavar="N",
        help="numbers of labeled training images, equally many of each class; all: the whole training set"),
    "draws": flag(EVALUATION, nargs="+", type=positive_int, default=[3], metavar="N",
        help="number of random subsets of each number of labels; all labels are a single one. One value, or one for "
        "each of --labels"),
    "budget": flag(EVALUATION, nargs="+", type=positive_int, default=[50], metavar="N",
        help="epochs of each fine-tuning run; one value, or one for each of --labels. It sets main_finetune.py "
        "--epochs, and main_finetune.py --warmup_epochs to a tenth of them, also with --recipes"),
    "recipes": flag(EVALUATION, nargs="+", default=[], metavar="P=YAML",
        help="a recipe for the script of a protocol, such as finetune=finetune_fashion_mnist, instead of "
        "the settings of this script. Its flags for images (crop, input_size, ...) replace those that encoders record"),
    "config": flag(RUN, type=recipes.find, metavar="YAML",
        help="recipe: a file of `flag: value` lines, or the name of one in recipes/; flags override it"),
    "output_dir": flag(RUN, default="./output_dir", metavar="DIR", help="run directory: checkpoints, log.txt"),
    "log_dir": flag(RUN, default="./output_dir", metavar="DIR",
        help="folder of TensorBoard events; --output_dir if only that is set"),
    "resume": flag(RUN, default="", metavar="FILE|auto",
        help="resume from this checkpoint, which must be the newest one if it is in --output_dir; auto: from the "
        "newest valid one in --output_dir, if any (default: start a new run)"),
    "start_epoch": flag(RUN, default=0, type=count, metavar="N", help="first epoch of a run that is not resumed"),
    "save_every": flag(RUN, default=20, type=positive_int, metavar="N", help="save a checkpoint every N epochs"),
    "keep_last": flag(RUN, type=positive_int, metavar="K",
        help="keep only the newest K of these checkpoints (default: all)"),
    "save_minutes": flag(RUN, default=15.0, type=non_negative, metavar="M",
        help="minutes between writes of checkpoint-last.pth, also within an epoch"),
    "seed": flag(RUN, default=0, type=seed, metavar="N",
        help="random seed of weights, sample order, augmentation and masks"),
    "device": flag(RUN, default="auto", metavar="NAME",
        help="cpu, cuda, cuda:N, mps, or auto: cuda, else mps, else cpu"),
    "debug": flag(RUN, action="store_true", help="print the traceback of an error"),
    "amp": flag(RUN, default="auto", choices=choices.AMP_CHOICES,
        help="mixed precision; auto: bf16 on CUDA (fp16 on older GPUs), and for training on CPUs with AVX512-BF16 or "
        f"AMX; else off. {choices.TF32}; bf16 and fp16 do so for the products that remain in fp32. off: fp32. A "
        "resumed run has the precision of its checkpoint"),
    "compile": flag(RUN, action="store_true",
        help="compile the model with torch.compile: higher throughput, after up to a minute of compilation"),
    "jobs": flag(RUN, type=positive_int, default=1, metavar="N",
        help="number of runs at a time, which share the CPU cores or the GPU"),
    "keep_checkpoints": flag(RUN, switch=False, help="keep the checkpoints of completed runs"),
    "fsdp": flag(DISTRIBUTED, action="store_true",
        help="shard weights, gradients and optimizer states over the processes (FSDP2)"),
    "dist_backend": flag(DISTRIBUTED, default="auto", choices=BACKENDS,
        help="communication backend; auto: nccl for GPUs, else gloo"),
    "dist_timeout": flag(DISTRIBUTED, default=600, type=positive, metavar="S",
        help="seconds to wait for another process before the run fails"),
    "dist_url": flag(DISTRIBUTED, default="env://", metavar="URL", help="address at which the processes connect"),
    "world_size": flag(DISTRIBUTED, default=1, type=int, metavar="N",
        help="accepted but ignored: the launcher sets it"),
    "dist_on_itp": flag(DISTRIBUTED, action="store_true", help="accepted but ignored"),
}  # fmt: skip
