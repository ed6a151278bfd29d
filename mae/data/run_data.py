"""The datasets of a run and their batches, from its settings."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from mae import parallel
from mae.data import extra_inputs, image_facts, loader, transforms
from mae.data.kinds.folders import NoValidation, with_missing
from mae.data.kinds.listing import Listing
from mae.data.open import open_source
from mae.data.pixels import PixelValues
from mae.data.samples import Samples
from mae.data.source import OpenDataset, Source, Stream
from mae.settings import DataSpec, ImageSpec
from mae.sizes import to_pair

if TYPE_CHECKING:
    from mae.data.segmentation_masks import MaskFormat

logger = logging.getLogger(__name__)

STAND_IN = 0.2  # of the training images of a dataset without a validation set


class RunData:
    """The datasets of a run, their batches for this process, and the normalization of images on the device.

    Args:
        images: how a picture becomes the input of the model.
        data: the datasets, and how they are read.
        device: the device of the model.
        function: the function of the dataset, if the caller gives one instead of its name.
        interrupted_images: returns the names of the training images of a run that resumes within an epoch. With
            `on_bad_image` "skip", those that have disappeared from their folder since are images that can't be read.
        spares_stand_in: with `val_fraction`, the images that take the place of a missing validation set are not used,
            either.
    """

    def __init__(
        self, images: ImageSpec, data: DataSpec, device: torch.device, function: OpenDataset | None = None,
        interrupted_images: Callable[[], list[str]] = list, spares_stand_in: bool = False,
    ) -> None:  # fmt: skip
        self.images = images
        self.data = data
        self.device = device
        self.function = function
        self.interrupted_images = interrupted_images
        self.spares_stand_in = spares_stand_in
        self.values = PixelValues(images.nodata, images.value_range, images.channels_last)
        self.statistics = transforms.channel_statistics(images.in_chans, images.mean, images.std)
        self.normalize = transforms.Normalize(*self.statistics).to(device)
        self.pin_memory = data.pin_mem and device.type == "cuda"

    def blank_image(self) -> torch.Tensor:
        """Returns a batch of one image (1, c, H, W) of zeros, on the device."""
        return torch.zeros(1, self.images.in_chans, *to_pair(self.images.input_size), device=self.device)

    def open_split(self, split: str, reads_labels: bool = True, masks: "MaskFormat | None" = None) -> Source | Stream:
        """Opens the dataset of a split, "train" or "val".

        Args:
            reads_labels: read the labels of lists and of datasets of the user's code.
            masks: as in `open_source`.

        Raises:
            ValueError: no dataset is given, the dataset does not exist, or it has no images.
        """
        data = self.data
        task = self.images.task if reads_labels else None
        found = open_source(
            data, split, task=task, label_columns=self.images.label_columns, masks=masks, function=self.function
        )
        skips = split == "train" and data.on_bad_image == "skip" and not data.train_list
        if skips and isinstance(found, Listing):
            return with_missing(found, parallel.from_rank_0(self.interrupted_images))
        return found

    def splits(self, train: Source | None = None) -> tuple[Callable[[str], Source], int]:
        """Returns a function that returns the set "train" or "val", and the number of all training images if STAND_IN
        of them take the place of a missing validation set; else 0. It logs what the validation set is.

        Args:
            train: the training set, if it is open.
        """
        from mae.data import labels

        opened: Any = {} if train is None else {"train": train}
        try:
            opened["val"] = self.open_split("val")
        except NoValidation:
            train = labels.require(train or self.open_split("train"), "train", self.images.task)
            parts: Any = labels.hold_out(train, STAND_IN, 0, "no validation set")
            return dict(zip(("train", "val"), parts, strict=True)).__getitem__, len(train)
        logger.info(f"held-out images: {len(opened['val']):,} of {self.name_held_out(0)}")
        return lambda split: opened[split] if split in opened else self.open_split(split), 0  # type: ignore[return-value]

    def name_held_out(self, total: int) -> str:
        """Names the validation set of `splits`, whose second result is `total`."""
        data = self.data
        if total:
            return (
                f"the {total:,} training images, because there is no validation set; a pre-training on all of them has "
                f"seen them without labels"
            )
        if data.val_list or data.dataset:
            return str(data.val_list or f"the split val of {data.dataset}")
        return f"{data.data_path}/val"

    def check_statistics(self, source: Source | Stream) -> None:
        """Checks --mean and --std against some images, as `image_facts.check_statistics`."""
        images = self.images
        image_facts.check_statistics(source, images.in_chans, images.mean, images.std, self.normalize, self.values)

    def open_pair(
        self, nb_classes: int | None = None, reads_in_order: bool = False
    ) -> tuple[Source, Source, dict[str, str]]:
        """Opens the training and the validation set. With `val_fraction`, held-out training images are the latter.

        Without a validation set, a fifth of the training images takes its place, whatever `seed` is.

        With `on_bad_image` "skip", images that can't be read are excluded where no other image may replace them. The
        split does not depend on them.

        Args:
            nb_classes: the expected number of classes; None: any number.
            reads_in_order: features of the training images are stored, or some of the images are held out later.

        Returns:
            The sets, and `labels.identity` of the images that were chosen at random, by the names of settings.

        Raises:
            ValueError: a set can't be opened or has no labels, or their classes differ.
            BadImage: more than `loader.MAX_BAD_SHARE` of the training images, or all held-out images, can't be read.
        """
        from mae.data import labels

        data = self.data
        holds_out = bool(data.val_fraction)
        if holds_out and data.val_list:
            logger.warning("`val_list` has no effect with `val_fraction`, which evaluates on training images")
        open_split, total = self.splits() if not holds_out or self.spares_stand_in else (self.open_split, 0)
        train, val = labels.open_pair(
            open_split, self.images.task, nb_classes=nb_classes, train_per_class=data.train_per_class,
            seed=data.seed, validation=not holds_out,
        )  # fmt: skip
        self.check_statistics(train)
        chosen = {"train_images": labels.identity(train, len(train))} if data.train_per_class else {}
        if total and not holds_out:
            chosen["held_out_images"] = labels.identity(val, total)
            val = self.readable(val, total)
        if data.val_fraction:
            train, val = labels.hold_out(train, data.val_fraction, data.seed, f"val_fraction={data.val_fraction:g}")
            chosen["held_out_images"] = labels.identity(val, len(train) + len(val))
            val = self.readable(val, len(train) + len(val))
        if reads_in_order:
            train = self.readable(train)
        return train, val, chosen

    def readable(self, source: Source, total: int | None = None) -> Source:
        """Returns a dataset; with `on_bad_image` "skip", without the images that can't be read.

        Args:
            total: as in `image_facts.readable`.
        """
        if self.data.on_bad_image != "skip":
            return source
        return image_facts.readable(source, self.images.in_chans, self.data.num_workers, self.values, total)

    def open_val(self) -> tuple[Source, dict[str, str]]:
        """Opens the validation set; with `val_fraction`, the held-out training images. Returns as `open_pair`.

        A warning says how many of its files equal training images, if there are any.
        """
        from mae.data import equal_images, labels

        if self.data.val_fraction:
            train, val, chosen = self.open_pair()
            equal_images.warn(train, val)
            return val, chosen
        open_split, total = self.splits()
        val = labels.require(open_split("val"), "val", self.images.task)
        self.check_statistics(val)
        if not self.data.dataset:
            with suppress(ValueError):  # an evaluation needs no training images
                equal_images.warn(open_split("train"), val)
        return val, {"held_out_images": labels.identity(val, total)} if total else {}

    def cached(self, *sources: Any) -> Sequence[Any]:
        """Returns the datasets; with --cache_images, with their decoded images in files.

        Raises:
            BadImage: an image can't be read, and is not skipped.
            ValueError: the images take too much disk space, or a dataset of the user's code augments them.
        """
        data = self.data
        if not data.cache_images:
            return sources
        if any(map(extra_inputs.shapes_of, sources)):
            logger.warning("`cache_images` has no effect with extra inputs: images are decoded at each access")
            return sources
        from mae.data import image_cache

        transform = transforms.scaled_transform(0)
        train = sources[0]
        return [
            image_cache.cached(
                self.samples(source, transform, data.on_bad_image if source is train else None), data.num_workers
            )
            for source in sources
        ]

    def samples(
        self, source: Source | Stream, transform: transforms.Transform, on_bad_image: str | None = None,
        draw_noise: Callable[[], torch.Tensor] | None = None,
    ) -> Samples:  # fmt: skip
        """Returns the decoded and transformed samples of a dataset. The arguments are as in `Samples`."""
        return Samples(
            source, transform, in_chans=self.images.in_chans, seed=self.data.seed, draw_noise=draw_noise,
            on_bad_image=on_bad_image, fast_jpeg=self.data.fast_jpeg, exif=bool(self.images.exif),
            values=self.values,
        )  # fmt: skip

    def train_batches(
        self, source: Source, transform: transforms.Transform, batch_size: int, accum_iter: int
    ) -> loader.TrainLoader:
        """Returns the augmented batches of a training set for this process."""
        samples = self.samples(source, transform, self.data.on_bad_image)
        return loader.TrainLoader(
            samples, batch_size, self.data.seed, self.data.num_workers, self.pin_memory, accum_iter=accum_iter
        )

    def eval_batches(
        self, source: Source, batch_size: int, on_bad_image: str | None = None,
        transform: transforms.Transform | None = None,
    ) -> torch.utils.data.DataLoader:  # fmt: skip
        """Returns the batches of a dataset for this process, resized and cropped for an evaluation.

        Args:
            on_bad_image: "error" if --on_bad_image excludes images of the dataset; error messages then name the flag.
            transform: default: `transforms.eval_transform`.
        """
        if transform is None:
            images = self.images
            transform = transforms.eval_transform(images.input_size, images.crop_pct, images.crop, images.interpolation)
        samples = self.samples(source, transform, on_bad_image)
        return loader.eval_loader(samples, batch_size, self.data.num_workers, self.pin_memory)
