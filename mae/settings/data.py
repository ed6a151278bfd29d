"""Settings of the data set of a run."""

# fmt: off
from dataclasses import dataclass

from mae.settings.choices import DEFAULT_WORKERS
from mae.settings.fields import DATA, FIXED, FREE, MACHINE, SPLIT, TRAINING, Values, fact, setting
from mae.settings.types import count, path, positive_int, ratio
from mae.settings.types import seed as seed_type


@dataclass(frozen=True)
class DataSpec(Values, group="data", role=DATA):
    """The images of a run, and how they are read."""

    data_path: str | None = setting(None, path, resumed=FREE, metavar="PATH")
    dataset: str | None = setting(None, metavar="NAME")
    train_list: str | None = setting(None, path, resumed=FREE, metavar="FILE")
    val_list: str | None = setting(None, path, resumed=FREE, metavar="FILE",
        help="as --train_list, for the validation set")
    train_folders: list[str] | None = setting(None, path, nargs=2, metavar=("IMAGES", "MASKS"), resumed=FREE,
        help="the folders of the training images and of their masks. File names are equal except for suffixes")
    val_folders: list[str] | None = setting(None, path, nargs=2, metavar=("IMAGES", "MASKS"), resumed=FREE,
        help="the folders of the validation images and of their masks. File names are equal except for suffixes")
    extras: list[str] | None = setting(None, resumed=FIXED, action="extend", nargs="+", metavar="NAME",
        help="columns of --train_list (CSV with a header, or keys of JSON) with numbers that are inputs of the model "
        "besides the image, by name (docs/data.md)")
    download: bool = setting(False, role=MACHINE, action="store_true")
    train_per_class: int | None = setting(None, positive_int, role=SPLIT, metavar="N",
        help="train on N images of each class, chosen by --seed (default: all images)")
    val_fraction: float | None = setting(None, ratio, role=SPLIT, resumed=FIXED, metavar="R",
        help="to choose hyperparameters: hold out this fraction of the training images, also of those that "
        "--train_per_class chooses, and evaluate on it (default: evaluate on the validation set, or without one on a "
        "fifth of the training images)")
    train_images: str | None = fact(None, resumed=FREE)  # no flag; FREE: they are compared as classes are
    held_out_images: str | None = fact(None, resumed=FREE)  # the same
    held_out: float = setting(0.1, ratio, group="evaluation", resumed=FIXED, metavar="R",
        help="fraction of the training set that is held out to choose among several --blr")
    on_bad_image: str | None = setting(None, resumed=FREE, choices=("error", "skip"))
    fast_jpeg: bool = setting(False, action="switch",
        help="decode color JPEG files with torchcodec, and scale color images with PyTorch instead of Pillow: up to "
        "twice the throughput. Three pixel values in a thousand differ by 1 of 255")
    fast_jpeg_resize: str = fact("pytorch")  # no flag; before df1688b4: numba
    cache_images: bool = setting(False, resumed=FREE, action="switch",
        help="for small datasets: decode all images once, into a file in the folder $MAE_CACHE (default: "
        "~/.cache/mae), which all processes of a machine read, and later runs. An image takes height x width x "
        "channels bytes. The batches are the same")
    num_workers: int = setting(DEFAULT_WORKERS, count, role=MACHINE, metavar="N",
        help="data loader worker processes, at most one per CPU core of this process; 0: load in the training "
        "process")
    pin_mem: bool = setting(True, resumed=FREE, action="switch",
        help="load batches into pinned memory, for faster copies to the GPU")
    seed: int = setting(0, seed_type, group="run", role=SPLIT, metavar="N",
        help="random seed of weights, sample order, augmentation and masks")
    num_images: int | None = setting(None, positive_int, role=TRAINING, metavar="N",
        help="number of images in the shards of wds: (default: counted, which needs local files)")
    cache_features: bool = setting(False, role=TRAINING, action="store_true",
        help="compute the features of all images once, without augmentation, and train on them. --probe attentive "
        "stores patch tokens in fp16 in the folder tokens of --output_dir, and a resumed run reuses them if no "
        "image has changed")
    repeated_sampling: int = setting(1, positive_int, role=TRAINING, metavar="R",
        help="crops per decoded image, all in one batch. An epoch has R times as many samples: divide --epochs and "
        "--warmup_epochs by R")
