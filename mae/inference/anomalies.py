"""Finds images with defects: patches that no normal image has (PatchCore, Roth et al. 2022).

    python -m mae.inference.anomalies NORMAL IMAGES --model CHECKPOINT --out defects

NORMAL and IMAGES are folders, archives or lists of images. They need no labels. The memory has features of the patches
of NORMAL. The score of an image is the largest distance of its patches to the nearest patch in the memory. A score is a
distance, without a unit: the command also scores normal images, each without its own patches in the memory, and counts
the images above all of them. The folder `defects` has

    scores.csv   the score of each image, and the share of the normal images with a lower score
    worst.png    the images with the highest scores, and their heat maps

If IMAGES has a class named good, normal or ok, the command prints the area under the ROC curve (AUROC).

In Python, for images of any kind:

    memory = fit(model, normal_images)
    scores, maps = memory(images)  # (B,), and (B, H, W) in the size of the input of the model
"""

import argparse
import copy
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mae import parallel
from mae.cli import entry_point, options
from mae.data import extra_inputs, transforms
from mae.data.batches import to_device
from mae.data.image_facts import readable
from mae.data.labels import Subset
from mae.data.loader import collate
from mae.data.pixels import size_of
from mae.data.samples import Samples
from mae.data.source import Source, evenly_spaced, first_few, require_random_access
from mae.evaluate import pictures, tables
from mae.files import spreadsheet
from mae.files.untrusted import printable, require_outside
from mae.fp32 import in_fp32
from mae.inference import extraction, features
from mae.inference.classes import NOT_IN_FEATURES, ImageLike, Images, Model
from mae.inference.model import get_model, to_bytes, to_rgb
from mae.settings import types
from mae.settings.choices import NO_CROP
from mae.training.log import start_logging
from mae.training.precision import Precision
from models_timm import TimmEncoder

logger = logging.getLogger(__name__)

SIZE = 5_000  # patches in the memory: 15 MB of two blocks of ViT-S
CANDIDATES = 100_000  # random patches of the normal images, among which the memory is chosen
PROJECTED = 128  # dimensions of the random projection for the coreset, as in the code of the paper
CHUNK = 1 << 25  # distances that are computed at once: 128 MB
COMPARED = 200  # normal images that are scored without their own patches
FEW = 20  # normal images, whose highest score says little
DRAWN = 24  # images in the picture
GAP = 8  # pixels between an image and its heat map
SIDE = 320  # pixels of the longer side of an image in the picture
NORMAL_NAMES = ("good", "normal", "ok")  # classes without defects; the first is that of MVTec AD


class Memory:
    """Features of the patches of normal images. A call scores images.

    The features of a patch are the outputs of blocks, averaged over neighboring patches (section 3.1 of the paper). At
    a border, the average is that of the patches that exist. Maps of coarser grids are scaled to the finest one, by
    bilinear interpolation.

    Args:
        model: its images are scaled as a whole to the size of its input. The crop of its evaluation would remove the
            defects at a border.
        blocks: indices of the blocks, or of the stages of a model of timm. Default: the blocks at half and three
            quarters of the depth, 5 and 8 of 12; of several grids, the two stages before the last one, as in the paper.
        average: side of the square of patches for the average, an odd number; 1: no average. Default: 3, as in the
            paper, if the blocks have several grids, as in convolutional networks; else 1, because a token of a
            transformer contains its neighbors.

    Attributes:
        rows: features (M, D).
        images: (M,), the number of the normal image that a row is of.

    Raises:
        ValueError: `average` is even.
    """

    rows: Tensor
    images: Tensor

    def __init__(self, model: Model, blocks: Sequence[int] | None = None, average: int | None = None) -> None:
        if average is not None and average % 2 == 0:
            raise ValueError(f"average={average}: give an odd number")
        self.model = copy.copy(model)  # with the same weights
        size = model.settings["input_size"]
        mode = model.settings.get("interpolation")
        self.model.preprocess = transforms.eval_transform(size, crop=NO_CROP, interpolation=mode)
        grids = model.reductions if isinstance(model, TimmEncoder) else [1] * len(model.blocks)
        depth = len(grids)
        has_stages = len({*grids}) > 1
        middle = {depth - 3, depth - 2} if has_stages else {depth // 2 - 1, 3 * depth // 4 - 1}
        self.blocks = sorted({max(0, block) for block in middle}) if blocks is None else blocks
        self.average = average or (3 if has_stages else 1)

    @torch.inference_mode()
    def __call__(self, images: Images, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Scores images, and computes their heat maps.

        Args:
            images: as in `ModelMixin.prepare`. They may have another size than the images of the memory.

        Returns:
            The scores (B,), the distance of the patch that is farthest from the memory; and the heat maps (B, H, W), in
            the size of the input of the model.

        Raises:
            ValueError, BadImage, OSError: as in `ModelMixin.prepare`.
        """
        distances = []
        maps = []
        for imgs in self.batches(images, batch_size):
            distances.append(self.distances(imgs).cpu())
            maps.append(heat_maps(distances[-1], *imgs.shape[2:]))
        return torch.cat(distances).amax(dim=(1, 2)), torch.cat(maps)

    def batches(self, images: Any, batch_size: int) -> Iterator[Tensor]:
        """Yields images of any kind as batches of the input of the model."""
        several = images if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
        with self.model.evaluating(*NOT_IN_FEATURES):
            for start in range(0, max(1, len(several)), batch_size):
                yield self.model.prepare(several[start : start + batch_size])

    def features(self, imgs: Tensor, **inputs: Tensor) -> Tensor:
        """Normalized images (B, c, H, W) -> features (B, D, h, w) of the finest grid, fp32."""
        maps = self.model.get_intermediate_maps(imgs, self.blocks, **inputs)
        options: Any = {"stride": 1, "padding": self.average // 2, "count_include_pad": False}
        means = [nn.functional.avg_pool2d(one.float(), self.average, **options) for one in maps]
        grid = max((one.shape[2:] for one in means), key=math.prod)
        return torch.cat([nn.functional.interpolate(one, grid, mode="bilinear") for one in means], dim=1)

    def sampler(self, count: int, seed: int = 0) -> Callable[..., Tensor]:
        """Returns a function: normalized images (B, c, H, W) -> features (B, k, D) of random patches of each image, or
        of all. Those of `count` images are CANDIDATES at most, or one of each image.
        """
        generator = torch.Generator().manual_seed(seed)

        def sample(imgs: Tensor, **inputs: Tensor) -> Tensor:
            rows = self.features(imgs, **inputs).flatten(2).transpose(1, 2)
            k = max(1, CANDIDATES // max(1, count))
            if k >= rows.shape[1]:
                return rows
            chosen = torch.rand(rows.shape[:2], generator=generator).argsort(dim=1)[:, :k, None].to(rows.device)
            return rows.gather(1, chosen.expand(-1, -1, rows.shape[2]))

        return sample

    def fill(self, rows: Tensor, size: int = SIZE, seed: int = 0) -> None:
        """Sets the features (n, k, D) of k patches of each normal image, or their `coreset` of this size."""
        self.images = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        self.rows = rows.flatten(0, 1)
        if size < len(self.rows):
            chosen = coreset(self.rows, size, seed)
            self.rows = self.rows[chosen]
            self.images = self.images[chosen]

    def distances(self, imgs: Tensor, without: Sequence[int] | None = None, **inputs: Tensor) -> Tensor:
        """Normalized images (B, c, H, W) -> distances of their patches to the nearest in the memory (B, h, w), fp32.

        Args:
            without: for each image, the normal image whose patches are ignored.
        """
        maps = self.features(imgs, **inputs)
        found = []
        for number, one in enumerate(maps.flatten(2).transpose(1, 2)):
            ignored = None if without is None else self.images == without[number]
            found.append(nearest(one, self.rows, ignored))
        return torch.stack(found).view(len(maps), *maps.shape[2:])


@torch.inference_mode()
def fit(
    model: Model, images: Sequence[ImageLike] | Tensor, blocks: Sequence[int] | None = None,
    average: int | None = None, size: int = SIZE, batch_size: int = 32, seed: int = 0,
) -> Memory:  # fmt: skip
    """Returns the memory of normal images.

    Args:
        images: a list of images as in `ModelMixin.prepare`, or a tensor (B, c, H, W).
        blocks, average: as in `Memory`.
        size: number of patches in the memory. If there are more, they are the `coreset` of CANDIDATES random patches.
        seed: of the random choices.

    Raises:
        ValueError, BadImage, OSError: as in `ModelMixin.prepare`, or there is no block with one of the indices.
    """
    memory = Memory(model, blocks, average)
    sample = memory.sampler(len(images), seed)
    memory.fill(torch.cat([sample(imgs) for imgs in memory.batches(images, batch_size)]), size, seed)
    return memory


@in_fp32
def nearest(rows: Tensor, memory: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Returns the Euclidean distance of each of rows (P, D) to the nearest row of a memory (M, D), fp32.

    The nearest row has the largest x m - |m|^2 / 2. Its distance is computed from the difference, without cancellation.

    Args:
        ignored: (M,), True for rows that are none of the memory.
    """
    center = memory.mean(dim=0)  # as in `coreset`
    others = memory - center
    halves = others.square().sum(dim=1) / 2
    if ignored is not None:
        halves = halves.masked_fill(ignored, torch.inf)
    parts = (rows - center).split(max(1, CHUNK // len(memory)))
    found = torch.cat([torch.addmm(halves, part, others.T, beta=-1).argmax(dim=1) for part in parts])
    return (rows - memory[found]).norm(dim=1)


def coreset(rows: Tensor, size: int, seed: int = 0) -> Tensor:
    """Returns indices (size,) of rows (N, D) to which all rows are near: greedy k-center (section 3.2 of the paper).

    The first row is random. The next one is always that with the largest distance to the chosen ones. More than
    PROJECTED dimensions are projected to so many by a random matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    if rows.shape[1] > PROJECTED:
        rows = rows @ torch.randn(rows.shape[1], PROJECTED, generator=generator).to(rows.device)
    rows = rows - rows.mean(dim=0)  # smaller numbers have smaller rounding errors
    halves = rows.square().sum(dim=1) / 2
    smallest = torch.full_like(halves, torch.inf)  # half the squared distance to the nearest chosen row
    chosen = torch.randint(len(rows), (size,), generator=generator).to(rows.device)
    for number in tqdm(range(size), desc="coreset", unit="patch", leave=False, disable=None):
        if number:
            chosen[number] = smallest.argmax()
        index = chosen[number]
        torch.minimum(smallest, halves + halves[index] - rows @ rows[index], out=smallest)
        smallest[index] = -torch.inf  # also of equal rows, none is chosen twice
    return chosen


def heat_maps(distances: Tensor, height: int, width: int) -> Tensor:
    """Distances of patches (B, h, w) -> (B, height, width): bilinear, and a Gaussian with a sigma of half a patch.

    Half a patch is the sigma of the paper, 4 pixels, for its grid of 28 x 28 patches of 224 x 224 pixels.
    """
    from scipy import ndimage  # takes a quarter of a second

    maps = nn.functional.interpolate(distances[:, None].float(), (height, width), mode="bilinear")[:, 0]
    sigma = (0, height / distances.shape[1] / 2, width / distances.shape[2] / 2)
    return torch.from_numpy(ndimage.gaussian_filter(maps.cpu().numpy(), sigma))


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser(
        "Finds images with defects: their patches have no similar patch in normal images (PatchCore). The scores are "
        "in DIR/scores.csv, and the images with the highest scores in DIR/worst.png."
    )
    kinds = "a folder, flat or nested, a tar or zip file of it, or a list (.csv, .json, .txt)"
    parser.add_argument("normal", metavar="NORMAL", help=f"images without defects: {kinds}")
    text = "images to score, as NORMAL; with a class named good, normal or ok, the command prints the AUROC"
    parser.add_argument("images", metavar="IMAGES", help=text)
    options.add_inference_options(
        parser, images=False, example="mae_pretrain_vit_base", also="; or timm:NAME, a model of timm"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--blocks", type=int, nargs="+", metavar="N",
        help="indices of the blocks with the features; -1 is the last one (default: those at half and three quarters "
        "of the depth; of convolutional networks of timm, the two stages before the last one)",
    )  # fmt: skip
    parser.add_argument(
        "--average", type=types.positive_int, metavar="N",
        help="average the features over N x N patches (default: 3 if the blocks have several grids, as in "
        "convolutional networks; else 1)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=types.positive_int, default=SIZE, metavar="M",
        help="patches in the memory. Of more patches, a coreset is chosen",
    )  # fmt: skip
    text = "side of the input in pixels; images are scaled to it as a whole, and a larger one shows smaller defects "
    options.add_to(parser, "input_size", default=None, help=f"{text}(default: that of the model)")
    options.add_to(parser, "batch_size", default=32)
    options.add_to(parser, "num_workers")
    options.add_exif(parser, "not applied to datasets")
    options.add_to(parser, "fast_jpeg", "amp", "nodata", "value_range", "channels_last")
    options.add_to(parser, "on_bad_image", default="error", help=options.EXCLUDES)
    return parser


def main(args: argparse.Namespace) -> Tensor:
    """Writes the files, prints what they contain, and returns the scores of the images (n,)."""
    start_logging()
    require_outside("out", [args.out], [args.normal, args.images])
    args.out.mkdir(parents=True, exist_ok=True)
    normal, tested = (_open(text) for text in (args.normal, args.images))  # first: a large model takes long
    _require_others(normal, tested, args)
    device = parallel.choose_device(args.device)
    size = {} if args.input_size is None else {"input_size": args.input_size}
    model = get_model(args.model, pretrained=True, device=device, **size, **options.chosen_settings(args))
    if args.on_bad_image == "skip":
        normal, tested = (readable(one, model.in_chans, args.num_workers, model.values) for one in (normal, tested))
    for source in (normal, tested):
        extra_inputs.require_fitting(model, source)
    memory = Memory(model, args.blocks, args.average)
    precision = Precision(args.amp, device)

    def compute(source: Source, function: Callable[..., Tensor]) -> Tensor:
        step = _Step(memory.model, function)
        sizes = (args.batch_size, args.num_workers)
        return torch.from_numpy(extraction.extract(step, source, None, {}, *sizes, precision, args.fast_jpeg))

    rows = compute(normal, memory.sampler(len(normal)))
    memory.fill(rows.to(device), args.memory)
    logger.info(
        f"memory: {len(memory.rows):,} of {len(rows) * rows.shape[1]:,} patches of {len(normal):,} normal images; "
        f"blocks {' '.join(map(str, memory.blocks))}"
    )
    compared = _without_own(memory, normal, compute)
    distances = compute(tested, memory.distances)
    return report(memory.model, tested, distances, compared, args.out)


class _Step(extraction.Extractor):
    """A function of normalized images and extra inputs, as `extraction.extract` takes it."""

    def __init__(self, model: Model, function: Callable[..., Tensor]) -> None:
        super().__init__(model, pool=None)
        self.function = function

    def forward(self, imgs: Tensor, **inputs: Tensor) -> Tensor:
        return self.function(imgs, **inputs)


def _open(text: str) -> Source:
    """Opens a folder, an archive or a list."""
    return require_random_access(features.open_labelled(features.data_in(text), "train"))


def _require_others(normal: Source, tested: Source, args: argparse.Namespace) -> None:
    """Raises ValueError if some of the images are normal images, whose distance would be 0."""
    known = {os.path.realpath(normal.name(index)) for index in range(len(normal))}
    both = sum(os.path.realpath(tested.name(index)) in known for index in range(len(tested)))
    if both:
        raise ValueError(
            f"{both:,} of the {len(tested):,} images of {args.images} are in {args.normal}, too, and their distance "
            f"would be 0: give other images"
        )


def _without_own(memory: Memory, normal: Source, compute: Callable[..., Tensor]) -> Tensor:
    """Returns the distances (m, h, w) of up to COMPARED normal images to the patches of the others. m may be 0."""
    if len(memory.images.unique()) < 2:
        logger.warning("the memory has patches of one image: the scores have no normal images to compare with")
        return torch.empty(0, 1, 1)
    chosen = evenly_spaced(len(normal), COMPARED)
    numbers = iter(chosen)  # `compute` takes the images in this order

    def distances(imgs: Tensor, **inputs: Tensor) -> Tensor:
        return memory.distances(imgs, list(itertools.islice(numbers, len(imgs))), **inputs)

    return compute(Subset(normal, np.array(chosen)), distances)


def report(model: Model, source: Source, distances: Tensor, compared: Tensor, out: Path) -> Tensor:
    """Writes the files of the command, prints what they contain, and returns the scores (n,).

    Args:
        source: the images of the distances (n, h, w).
        compared: distances of normal images (m, h, w), each without its own patches; m may be 0.
    """
    scores = distances.amax(dim=(1, 2))
    if not scores.isfinite().all():
        raise ValueError(f"the features of {int((~scores.isfinite()).sum()):,} images are not finite")
    if copies := int((scores == 0).sum()):
        logger.warning(
            f"{copies:,} of the images are copies of normal images: all of their patches have the distance 0"
        )
    normal = compared.amax(dim=(1, 2)).sort().values
    order = scores.argsort(descending=True, stable=True).tolist()
    counts = torch.searchsorted(normal, scores).tolist()
    below = [f"{count / len(normal):.4g}" if len(normal) else "" for count in counts]
    rows = [(source.name(index), f"{scores[index]:.6g}", below[index]) for index in order]
    spreadsheet.write(out / "scores.csv", [("image", "score", "normal_below"), *rows])
    draw(model, source, order[:DRAWN], distances, compared, out / "worst.png")
    if len(normal):
        print(
            f"{len(normal):,} normal images, each without its own patches: median score {normal.median():.4g}, highest "
            f"{normal[-1]:.4g}; images with a higher score: {int((scores > normal[-1]).sum()):,} of {len(scores):,}"
        )
        if len(normal) < FEW:
            logger.warning(f"the scores are compared with {len(normal)} normal images, which are few: give more")
    if text := auroc(source, scores.numpy()):
        print(text)
    print(f"scores: {out / 'scores.csv'}\npicture: {out / 'worst.png'}, the {min(DRAWN, len(scores))} highest scores")
    return scores


def auroc(source: Source, scores: np.ndarray) -> str:
    """Returns a text with the area under the ROC curve of scores (n,); "" if no image is of a normal class, or all.

    Images without a label are not counted.
    """
    labels = np.asarray(source.labels)
    good = [number for number, name in enumerate(source.classes) if name.lower() in NORMAL_NAMES]
    if not good or len(source.classes) == len(good) or labels.ndim > 1:
        return ""
    from sklearn.metrics import roc_auc_score  # takes a second

    is_good = np.isin(labels, good)[labels >= 0]
    if is_good.all() or not is_good.any():
        return ""
    area = roc_auc_score(~is_good, scores[labels >= 0])
    others = [name for number, name in enumerate(source.classes) if number not in good]
    return (
        f"image AUROC {area:.3f}: {int(is_good.sum()):,} images of {source.classes[good[0]]} against "
        f"{int((~is_good).sum()):,} of {printable(first_few(others))}"
    )


def draw(model: Model, source: Source, indices: Sequence[int], distances: Tensor, compared: Tensor, path: Path) -> None:
    """Draws images beside their heat maps.

    Colors begin at the 95 % quantile of the distances `compared`, and end at their maximum. A Gaussian makes the
    maximum of a heat map smaller, and it is drawn with the score as its maximum.

    Args:
        indices: of the images, among the distances (n, h, w).
        compared: distances of normal images (m, h, w). If m is 0, colors are those of the distances.
    """
    samples = extraction.samples_of(model, source)
    pictures.show_range(model.normalize, pictures.decoded(samples))
    low, high = np.quantile((compared if len(compared) else distances).numpy(), (0.95, 1))
    pairs = []
    for index in indices:
        picture = _picture(model, samples, index)
        heat = heat_maps(distances[index : index + 1], *picture.shape[:2])[0].numpy()
        heat *= distances[index].max().item() / max(heat.max(), 1e-12)
        level = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
        gap = np.full((len(picture), GAP, 3), 255, np.uint8)
        pairs.append(np.concatenate([picture, gap, overlay(picture, level)], axis=1))
    columns = min(4, len(pairs))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [4 * max(len(pair) / pair.shape[1] for pair in row) + 0.5 for row in rows]  # in inches
    figure = tables.new_figure(4 * columns, sum(heights))
    every = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).ravel()
    for axes in every:
        axes.axis("off")
    for axes, index, pair in zip(every, indices, pairs, strict=False):
        axes.imshow(pair)
        name = printable(os.sep.join(Path(source.name(index)).parts[-2:]))
        score = distances[index].max()
        above = ", above all normal images" if len(compared) and score > compared.max() else ""
        axes.set_title(f"{name[-40:]}\nscore {score:.4g}{above}", fontsize=8)
    tables.save(figure, path)


def _picture(model: Model, samples: Samples, index: int) -> np.ndarray:
    """Returns an image for display, uint8 (H, W, 3), whose longer side has SIDE pixels."""
    item = samples.read(index)
    sides = size_of(item.image)
    height, width = (max(1, round(SIDE * side / max(sides))) for side in sides)
    mode = "bicubic" if max(sides) > SIDE else "nearest"  # small pixels stay visible
    batch = collate([transforms.eval_transform((height, width), crop=NO_CROP, interpolation=mode)(item)])
    pixels = to_device(batch, model.normalize.mean.device).normalized(model.normalize)
    return to_bytes(to_rgb(model, pixels[0]))


def overlay(picture: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Returns a gray picture under a heat map: uint8 (H, W, 3), and levels (H, W) from 0, transparent, to 1, red."""
    gray = np.asarray(Image.fromarray(picture).convert("L"))[:, :, None]
    color = 255 * np.stack([np.ones_like(level), 1 - level, np.zeros_like(level)], axis=2)  # from yellow to red
    share = 0.7 * level[:, :, None]
    return ((1 - share) * gray + share * color).round().astype(np.uint8)


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
