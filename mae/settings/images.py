"""Settings of the images: how a picture becomes the input of a model, and the augmentation in training."""

# fmt: off
from collections.abc import Set
from dataclasses import dataclass

from mae.settings.choices import CLASSIFICATION, CROP_CHOICES, NO_CROP, TASK_CHOICES
from mae.settings.fields import FIXED, HEAD, IMAGES, LABELS, TRAINING, Values, fact, setting
from mae.settings.types import count, nodata, non_negative, path, positive, positive_int, positive_share, share
from mae.sizes import Size


@dataclass(frozen=True)
class ImageSpec(Values, group="data", role=IMAGES):
    """How a picture becomes the input of a model, and what its label means."""

    input_size: Size = setting(224, positive_int, resumed=FIXED, action="size", metavar=("H", "W"))
    in_chans: int = setting(3, positive_int, resumed=FIXED, metavar="C", help="input channels: 3 RGB, 1 gray")
    # None: ImageNet's
    mean: list[float] | None = setting(None, float, resumed=FIXED, nargs="+", metavar="M",
        help="mean of each channel, for pixel values in [0, 1] (default: ImageNet's, or as in the loaded weights)")
    std: list[float] | None = setting(None, positive, resumed=FIXED, nargs="+", metavar="S",
        help="standard deviation of each channel (default: as for --mean)")
    crop: str = setting(CROP_CHOICES[0], resumed=FIXED, choices=CROP_CHOICES,
        help="random: random crops in training, and the center in evaluation, with the aspect ratio of --input_size; "
        "none: the whole image, scaled to --input_size, for spectrograms and signals")
    crop_pct: float | None = setting(None, positive_share, resumed=FIXED, metavar="S",
        help="side of the center crop in evaluation, as a fraction of the resized image (default: .875; 1 for "
        "squares above 224 pixels, and if the shorter side of --input_size is below 112)")
    interpolation: str | None = fact(None)  # of scaling in evaluation, of models of timm; None: bicubic
    exif: bool | None = setting(None, resumed=FIXED, action="switch")  # orientation; None: of photographs
    # may change labels
    hflip: float = setting(0.5, share, group="augmentation", role=TRAINING, metavar="P",
        help="probability of a horizontal flip")
    crop_ratio: list[float] = setting([3 / 4, 4 / 3], positive, group="augmentation", role=TRAINING, resumed=FIXED,
        nargs=2, metavar=("MIN", "MAX"),
        help="range of the aspect ratio (width / height) of a random crop, relative to that of --input_size")
    crop_scale: list[float] = setting([0.2, 1.0], float, group="augmentation", role=TRAINING, resumed=FIXED, nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the area of a random crop, as a fraction of the image")
    # NaN is text
    nodata: float | str | None = setting(None, nodata, resumed=FIXED, metavar="nan|VALUE",
        help="pixels with this value in any channel of the input are invalid: they enter the model as the mean, and "
        "pre-training never scores them (default: the choice of the model's run, else all pixels are valid)")
    value_range: list[float] | None = setting(None, float, resumed=FIXED, action="range", metavar=("MIN", "MAX"),
        help="values in the files that become 0 and 1, for pixels of any type (default: the choice of the model's "
        "run, else 8 and 16 bits are scaled to 0 to 1, and float values are unchanged)")
    channels_last: bool | None = setting(None, resumed=FIXED, action="switch",
        help="arrays (.npy files, and images of a dataset of your own) are (H, W, c); the checkpoint records it "
        "(default: the choice of the model's run, else the axis with an entry for each channel, if only one "
        "has)",
        off="arrays are (c, H, W)")
    min_valid: float = setting(0.5, positive_share, role=TRAINING, resumed=FIXED, metavar="S",
        help="a patch with a smaller share of valid pixels is never visible and has no loss (--nodata, or masks of a "
        "--dataset)")
    task: str = setting(CLASSIFICATION, role=LABELS, resumed=FIXED, choices=TASK_CHOICES,
        help="classification: one class for each image; multilabel: any number of classes, in a list as a;b or in "
        "one column of 0 and 1 for each class; regression: one or more numbers, which are standardized on the "
        "training set. The labels are those of --train_list, or vectors of a --dataset py:MODULE:FUNCTION")
    label_columns: list[str] | None = setting(None, role=LABELS, action="extend", nargs="+", metavar="NAME",
        help="columns of --train_list and --val_list (CSV with a header, or keys of JSON) with the labels (default: "
        "label, class or groundtruth)")
    short_side: int | None = setting(None, count, resumed=FIXED, metavar="N",
        help="scale images so that their shorter side has N pixels, before the random scale in training and the "
        "windows in evaluation; 0: the size of the file (default: the shorter side of --input_size)")
    reduce_zero_label: bool = setting(False, role=HEAD, resumed=FIXED, action="switch",
        help="ignore the value 0 in masks; the classes have the values 1 to N (ADE20K, LoveDA)")
    colors: list[int] | None = fact(None, role=HEAD)
    palette: str | None = setting(None, path, role=TRAINING, metavar="FILE",
        help="text file with a line `R G B NAME` for each class: its name, and its color in color masks and in "
        "pictures (default: numbers, and the colors of VOC)")


@dataclass(frozen=True)
class AugmentationSpec(Values, group="augmentation", role=TRAINING):
    """The augmentation of training images, besides crops and flips."""

    vflip: float = setting(0.0, share, metavar="P",
        help="probability of a vertical flip, for images without an upper side, such as microscope images")
    rotate90: bool = setting(False, action="switch",
        help="rotate images by random multiples of 90 degrees; needs a square --input_size")
    scale: list[float] = setting([0.5, 2.0], positive, nargs=2, metavar=("MIN", "MAX"),
        help="range of the random scale of an image, before the random crop of --input_size")
    aa: str = setting("rand-m9-mstd0.5-inc1", metavar="POLICY", help="augmentation policy, as timm names it, or none")
    color_jitter: float | None = setting(None, non_negative, metavar="S",
        help="strength of color jitter, with --aa none (default: 0)")
    reprob: float = setting(0.25, share, metavar="P", help="probability of random erasing")
    remode: str = setting("pixel", choices=("const", "rand", "pixel"),
        help="values of erased pixels: const: 0; rand: one random color; pixel: random for each pixel")
    recount: int = setting(1, positive_int, metavar="N", help="largest number of erased areas")
    resplit: bool = setting(False, action="store_true", help="accepted but ignored")
    mixup: float = setting(0.0, non_negative, metavar="A", help="alpha of mixup; 0: no mixup")
    cutmix: float = setting(0.0, non_negative, metavar="A", help="alpha of cutmix; 0: no cutmix")
    cutmix_minmax: list[float] | None = setting(None, share, nargs=2, metavar=("MIN", "MAX"),
        help="range of the side of the cutmix box, as a fraction of the image (default: sampled with --cutmix)")
    mixup_prob: float = setting(1.0, share, metavar="P", help="probability of mixup or cutmix")
    mixup_switch_prob: float = setting(0.5, share, metavar="P", help="probability of cutmix if both are enabled")
    mixup_mode: str = setting("batch", choices=("batch", "pair", "elem"),
        help="sample the mixing parameters once per batch, pair or element")


def unused_crops(crop: str | None, names: Set[str]) -> list[str]:
    """Returns the settings of crops among `names`, which have no effect if `crop` is none."""
    return sorted(names & {"crop_scale", "crop_ratio", "crop_pct"}) if crop == NO_CROP else []
