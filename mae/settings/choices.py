"""Choices and defaults that other packages also use."""

from mae.sizes import Size, to_pair

TIMM = "timm:"  # before the name of a model of timm
BACKENDS = ("auto", "nccl", "gloo")
AMP_CHOICES = ("auto", "bf16", "fp16", "tf32", "off")
TF32 = (  # in the help of --amp
    "tf32: fp32, but matrix products on CUDA round their factors to 10 bits of mantissa, a relative error of up to "
    "5e-4 each"
)
ADAPT_CHOICES = ("error", "mean", "repeat", "skip")
TASK_CHOICES = ("classification", "multilabel", "regression")
CLASSIFICATION, MULTILABEL, REGRESSION = TASK_CHOICES
SUITES = ("imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "imagenet-real", "imagenet-c")
REGRESSION_LOSSES = ("l1", "l2", "huber")
DEFAULT_WORKERS = 32  # default of --num_workers; more are rarely faster, and each holds two batches
SHORT_SIDE = 256  # pixels, of the copies of examples/resize_folder.py
POOL_CHOICES = ("cls", "avg", "both")
CLASS_TOKEN, PATCHES, BOTH = POOL_CHOICES
NUM_QUERIES = 32  # default of --num_queries
NO_CROP = "none"  # the value of --crop for whole images
CROP_CHOICES = ("random", NO_CROP)
HEAD_CHOICES = ("linear", "dpt")  # of segmentation
SMALL = 112  # pixels: for inputs with a shorter side below, the default evaluation crops nothing


def default_crop_pct(input_size: Size) -> float:
    """Returns the published crop ratio; 1 if the shorter side is below SMALL, where it would crop what matters."""
    return 1.0 if min(to_pair(input_size)) < SMALL else published_crop_pct(input_size)


def published_crop_pct(input_size: Size) -> float:
    """Returns the published crop ratio: 0.875, and 1 for squares above 224 pixels."""
    height, width = to_pair(input_size)
    return 1.0 if height == width > 224 else 0.875
