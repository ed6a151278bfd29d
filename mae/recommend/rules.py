"""The rules of a recipe: settings of pre-training with their reasons, from the facts of images and a machine.

The numbers come from the paper (He et al. 2021), from benchmarks/LEADERBOARD.md and from docs/small_data.md.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mae.data.image_facts import rounded
from mae.plurals import counted
from mae.recommend.facts import MAX_CROPPED, Images, Machine, largest_crop
from mae.settings.choices import SMALL
from mae.sizes import Size, side_or_sides, to_pair
from mae.training import measured_runs
from models_vit import SIZES

MODELS = ("mini_patch4", "tiny_patch16", "small_patch16", "base_patch16", "large_patch16")  # from small to large
PARAMETERS_PER_PATCH = 4  # of the dataset; ViT-H on ImageNet-1K has 2.5, and mini on the images of the demo 5
MAX_SECONDS = 8 * 3600  # that a recipe takes if no time is given
MAX_EPOCHS = 1600  # the longest published run
PROBE_SHARE = 0.1  # of the time, for the measurements of a run with labels
MEASUREMENTS = 20
ROUNDING = 1e-6  # epochs
MAX_SIDE = 224  # pixels
PATCH_SCALE = 1.25  # patch side = scale x root of the image side: 7 of 28 pixels, 12 of 96, 16 of 224
PATCH_TOLERANCE = 1.5  # ratio to this side, up to which a divisor of the image side is better
MIN_GRID = 4  # patches along the shorter side
# Measured on small images. For ViT-B with 4,096 images, the rule for others has 1.9e-3, and the paper 2.4e-3.
LR = 2e-3
WIDTH = 128
BATCH = 128
UPDATES_PER_EPOCH = 64  # at least, so that large batches have enough updates
MAX_BATCH = 4096  # images per update, as published
MAX_PROCESS_BATCH = 256  # images in the memory of a GPU at a time
MIN_PROCESS_BATCH = 16  # images, below which a process is no faster


class Line(NamedTuple):
    """A setting of a recipe."""

    name: str
    value: Any
    reason: str
    is_warning: bool = False  # the recipe does not do what was asked for


def patch_of(height: int, width: int) -> int:
    """Returns the side of a patch in pixels, for images of height x width pixels.

    It grows with the root of the shorter side. A common divisor of both sides is preferred.

    Raises:
        ValueError: a side has fewer than MIN_GRID pixels.
    """
    shorter = min(height, width)
    largest = shorter // MIN_GRID
    best = PATCH_SCALE * math.sqrt(shorter)
    if not largest:
        raise ValueError(f"images of {height} x {width} pixels are too small: give at least {MIN_GRID} pixels a side")
    divisors = [side for side in range(1, largest + 1) if math.gcd(height, width) % side == 0]
    nearest = min(divisors, key=lambda side: abs(math.log(side / best)))
    is_near = 1 / PATCH_TOLERANCE <= nearest / best <= PATCH_TOLERANCE
    return nearest if is_near else min(largest, round(best))


def grid_of(input_size: Size, patch_size: Size) -> tuple[int, int]:
    """Returns the numbers of patches along both sides of an image."""
    height, width = to_pair(input_size)
    rows, columns = to_pair(patch_size)
    return height // rows, width // columns


def image_lines(images: Images, input_size: Size | None = None, patch_size: Size | None = None) -> list[Line]:
    """Returns the settings of the input and the augmentation.

    Args:
        input_size: the size that is given.
        patch_size: that of the encoder to continue. Default: `patch_of` the size.

    Raises:
        ValueError: as `patch_of`, or the given size is no multiple of the patch size.
    """
    shorter = images.shorter
    is_whole = images.has_one_shape and (shorter < SMALL or images.elongation > MAX_CROPPED)
    height, width = (min(shorter, MAX_SIDE),) * 2
    is_large = is_whole and shorter >= SMALL  # the rows of small images may be signals: they are not scaled
    scale = min(1.0, MAX_SIDE / math.sqrt(images.height * images.width)) if is_large else 1.0
    if is_whole:
        height, width = (max(1, round(scale * side)) for side in (images.height, images.width))
    if input_size:
        height, width = to_pair(input_size)
    rows, columns = to_pair(patch_size or patch_of(height, width))
    if not input_size:
        height = rows * max(MIN_GRID, round(height / rows))
        width = columns * max(MIN_GRID, round(width / columns))
    elif height % rows or width % columns:
        of = "the encoder" if patch_size else "this size"
        patch = side_or_sides((rows, columns))
        raise ValueError(f"input_size={input_size}: give multiples of {patch}, the patch size of {of}")
    low, high = images.spread
    sides = f"half of the images have at most {shorter} pixels along the shorter side"
    sides = sides if low < high else f"the shorter side has {low} pixels"
    is_multiple = shorter % rows == 0 and shorter % columns == 0
    multiple = "; the nearest multiple of the patch size" if shorter <= MAX_SIDE and not is_multiple else ""
    if shorter < MIN_GRID * max(rows, columns):
        multiple = f"; at least {MIN_GRID} patches along each side"
    capped = f"; {MAX_SIDE} as published" if shorter > MAX_SIDE else ""
    if scale < 1 and not input_size:
        sides = f"the shape of {images.height} x {images.width} pixels; about as many pixels as {MAX_SIDE} x {MAX_SIDE}"
        multiple = capped = ""
    why = "that of the encoder" if patch_size else "the patch side grows with the root of the image side"
    grid = f"{height // rows} x {width // columns} patches: {why}"
    return [
        Line("input_size", side_or_sides((height, width)), sides + multiple + capped),
        Line("patch_size", side_or_sides((rows, columns)), grid),
        *_value_lines(images),
        *_crop_lines(images, is_whole),
    ]


def _value_lines(images: Images) -> list[Line]:
    channels = {1: "gray images; color ones are converted", 3: "color images; gray and transparent ones are converted"}
    lines = [Line("in_chans", images.in_chans, channels.get(images.in_chans, "channels of the files"))]
    mean = np.array(images.mean)
    std = np.array(images.std)
    of = "of these images, for pixels from 0 to 1"
    if images.value_range:
        low, high = images.value_range
        low, high = rounded([low, high], [high - low] * 2)
        reason = "the values of the files, which become 0 and 1: pictures of the log show this range"
        lines.append(Line("value_range", [low, high], reason))
        mean = (mean - low) / (high - low)
        std = std / (high - low)
        of = "of these images in this range"
    return [*lines, Line("mean", rounded(mean, std), of), Line("std", _rounded(std), of)]


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _crop_lines(images: Images, is_whole: bool) -> list[Line]:
    if is_whole and images.shorter < SMALL:
        crops = [Line("crop", "none", f"whole images: better than crops below {SMALL} pixels, and faster")]
    elif is_whole:
        crops = [Line("crop", "none", f"whole images: a crop would show at most {largest_crop(images):.0%} of one")]
    elif images.shorter < SMALL:
        crops = [
            Line("crop", "random", "aspect ratios differ"),
            Line("crop_scale", [0.6, 1.0], "large crops, because the images are small"),
        ]
    else:
        crops = [
            Line("crop", "random", f"as published, for images of {SMALL} pixels or more"),
            Line("crop_scale", [0.2, 1.0], "as published"),
        ]
    return [
        *crops,
        Line("hflip", 0.5, "as published; 0 if a mirrored image means something else, as of letters and signals"),
        Line("vflip", 0.0, "0.5, and rotate90: true, if the images have no upper side, as of microscopes"),
    ]


def parameters_of(model: str) -> int:
    """Returns the number of parameters in the blocks of an encoder."""
    size = SIZES[model]
    return 12 * size["depth"] * size["embed_dim"] ** 2  # attention has 4 D x D, the MLP 8


def models_for(images: Images, patches: int) -> list[str]:
    """Returns the models that the number of patches allows, from small to large: at least the smallest one.

    Args:
        patches: number of patches in an image.
    """
    most = PARAMETERS_PER_PATCH * patches * images.distinct
    return [MODELS[0], *(model for model in MODELS[1:] if parameters_of(model) <= most)]


def model_line(images: Images, patches: int, model: str) -> Line:
    """Returns the model of a recipe."""
    needed = measured_runs.images_needed(images.count)
    reason = (
        f"{parameters_of(model):,} parameters for {patches * images.distinct:,} patches; a larger model needs one "
        f"for every {PARAMETERS_PER_PATCH} parameters, and time for {needed:,} images"
    )
    return Line("model", f"mae_vit_{model}", reason)


def processes_of(machine: Machine, count: int) -> int:
    """Returns the number of processes: one for each GPU, or one for each core that has enough images of a batch.

    Args:
        count: number of images.
    """
    return machine.gpus or min(machine.cores, max(1, effective_batch(count, False) // MIN_PROCESS_BATCH))


def effective_batch(count: int, has_gpu: bool) -> int:
    """Returns the number of images per update: a power of two, at most all `count` images."""
    largest = min(MAX_BATCH, max(BATCH, count // UPDATES_PER_EPOCH)) if has_gpu else BATCH
    return 2 ** int(math.log2(min(largest, count)))


def batch_lines(count: int, wanted: int, processes: int, repeats: int = 1) -> list[Line]:
    """Returns the settings of the batches of `count` images, with about `wanted` images per update.

    Args:
        repeats: the batch of a process is a multiple of it.
    """
    of_process = max(1, wanted // processes)
    accum_iter = math.ceil(of_process / MAX_PROCESS_BATCH)
    batch_size = of_process // accum_iter
    batch_size -= batch_size % 2 if batch_size > 1 else 0  # mixup takes pairs
    batch_size = max(repeats, batch_size // repeats * repeats)
    effective = batch_size * accum_iter * processes
    split = f"{counted(effective, 'image')} per update in {counted(processes, 'process')}"
    lines = [Line("batch_size", batch_size, f"{split}; an epoch has {counted(count // effective, 'update')}")]
    if accum_iter > 1:
        lines.append(Line("accum_iter", accum_iter, f"at most {MAX_PROCESS_BATCH} images are in memory at a time"))
    return lines


def images_per_update(lines: Iterable[Line], processes: int) -> int:
    """Returns the number of images per update of the settings of a recipe."""
    settings = {line.name: line.value for line in lines}
    of_process: int = settings["batch_size"] * settings.get("accum_iter", 1)
    return of_process * processes


def optimization_lines(images: Images, machine: Machine, model: str, repeats: int = 1) -> list[Line]:
    """Returns the settings of the loss, the batches and the learning rate.

    Args:
        repeats: `repeated_sampling`: an epoch has each image so many times.
    """
    processes = processes_of(machine, images.count)
    width = SIZES[model]["embed_dim"]
    batches = batch_lines(images.total * repeats, effective_batch(images.count, machine.gpus > 0), processes, repeats)
    lr = LR * WIDTH / width * math.sqrt(images_per_update(batches, processes) / BATCH)
    rate = (
        f"{LR:g} for {WIDTH} channels and {BATCH} images per update; a wider model has a smaller rate, a larger batch "
        f"one that grows with its root"
    )
    return [
        Line(
            "norm_pix_loss",
            True,
            "up to a point better on the leaderboard, with garments; 7 points worse on generated cells, and 3 with "
            "much noise (benchmarks/noise.md): try false for microscope images",
        ),
        Line(
            "uniformity",
            0.1,
            "3 to 4 points better on the leaderboard with letters; 0 may be better for photographs: 1 to 2 points",
        ),
        *batches,
        Line("optimizer", "muon", "better on the leaderboard with letters (1 to 2 points) and photographs (3)"),
        Line("lr", float(f"{lr:.2g}"), rate),
    ]


def loading_lines(images: Images, machine: Machine) -> list[Line]:
    """Returns the settings of reading images."""
    lines = [_cache_line(images, machine)]
    if machine.gpus:
        lines.append(Line("num_workers", machine.cores // machine.gpus, "the cores of a GPU"))
    else:
        lines.append(Line("num_workers", 0, "the processes compute on all cores: each loads its own batches"))
    if images.bad:
        reason = f"{images.bad:.1%} of the images can't be read; others replace them"
        lines.append(Line("on_bad_image", "skip", reason))
    return lines


def _cache_line(images: Images, machine: Machine) -> Line:
    """Returns whether decoded images are kept in a file."""
    size = f"{images.num_bytes / 1e6:,.0f} MB of decoded images"
    if images.is_deep:
        return Line("cache_images", False, "images of more than 8 bits can't be cached")
    if images.num_bytes > machine.cache_bytes:
        return Line("cache_images", False, f"{size} are too many, or change in each epoch")
    return Line("cache_images", True, f"{size}: they are decoded once instead of in each epoch")


def seconds_needed(count: int, images_per_epoch: int, images_per_s: float, startup: float) -> float:
    """Returns the time of the complete epochs that process `images_needed`. Arguments as in `length_lines`."""
    epochs = math.ceil(measured_runs.images_needed(count) / images_per_epoch)
    return startup + epochs * images_per_epoch / images_per_s


def probed_length_lines(images_per_epoch: int, images_per_s: float, startup: float, seconds: float) -> list[Line]:
    """Returns the settings of `length_lines`, for a run that measures k-NN within the time, if a tenth is enough."""
    epoch = images_per_epoch / images_per_s  # about the time of a measurement
    count = max(0, min(MEASUREMENTS, int(PROBE_SHARE * (seconds - startup) / epoch)))
    epochs, *others = length_lines(images_per_epoch, images_per_s, startup + count * epoch, seconds)
    if not count:
        return [epochs, *others]
    reason = "k-NN of held-out images beside that of raw pixels, in at most a tenth of the time"
    return [epochs, *others, Line("probe_every", math.ceil(epochs.value / count), reason)]


def length_lines(images_per_epoch: int, images_per_s: float, startup: float, seconds: float) -> list[Line]:
    """Returns the number of epochs, of which the last ends in time, and the warm-up.

    Args:
        images_per_epoch: images of the complete updates of an epoch.
        images_per_s: throughput of the training.
        startup: seconds that a run takes besides its updates.
        seconds: time of the run.
    """
    fitting = int((seconds - startup) * images_per_s / images_per_epoch + ROUNDING)
    epochs = min(MAX_EPOCHS, max(1, fitting))
    reason = f"they fit the time at {images_per_s:,.0f} images/s, measured here"
    if fitting > MAX_EPOCHS:
        reason = f"{MAX_EPOCHS:,} is the longest published run; {fitting:,} would fit"
    if fitting < 1:
        minutes = (startup + images_per_epoch / images_per_s) / 60
        reason = f"one epoch exceeds the time: the run takes {minutes:,.1f} minutes"
    return [
        Line("epochs", epochs, reason, is_warning=fitting < 1),
        Line("warmup_epochs", epochs / 20, "a twentieth of the epochs"),
        Line("save_every", math.ceil(epochs / 10), "at most ten checkpoints"),
    ]
