"""Masks parts of photographs and reconstructs them with a masked autoencoder.

python -m mae.inference.reconstruct demo/photos/*.jpg --model mae_visualize_vit_large --out grid.png
python -m mae.inference.reconstruct photo.jpg --model runs/mine/checkpoint-last.pth --mask_box 40 60 200 120 --out a.png
"""

import argparse
import logging
from collections.abc import Sequence
from math import ceil, prod

import torch
from PIL import Image, ImageDraw, ImageFont

from mae import masking, parallel
from mae.cli import entry_point, flags, options
from mae.data.batches import to_device
from mae.data.item import Item
from mae.data.loader import collate
from mae.data.pixels import BadImage, Picture, size_of
from mae.data.stages import CenterCrop, Scale, Stages
from mae.data.transforms import NO_CROP
from mae.evaluate import pictures
from mae.files import atomic
from mae.files.untrusted import require_files, require_outside
from mae.inference.classes import Autoencoder, ImageLike, Model
from mae.inference.model import get_model
from mae.reconstruction import Reconstruction
from mae.settings import types
from mae.training.log import start_logging

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".webp", ".bmp", *(s for s, k in Image.registered_extensions().items() if k in Image.SAVE))
LABEL_GAP = 6  # pixels between a label and its row
MAX_PATCHES = 2**16  # of a scaled image: attention takes time that grows with their square
MIN_SIDE = 160  # minimum short side of a picture, in pixels; smaller pictures are enlarged
Box = tuple[int, int, int, int]  # left, top, width, height, in pixels of the image file


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Masks patches of photographs of any shape and reconstructs them.")
    options.add_inference_options(parser, example="mae_visualize_vit_large")
    parser.add_argument(
        "--out",
        type=flags.new_file(*SUFFIXES),
        required=True,
        metavar="FILE",
        help="output picture, with one row per image",
    )
    parser.add_argument(
        "--mask_ratio", default=0.75, type=types.ratio, metavar="R",
        help="fraction of masked patches, or of masked blocks if the model was pre-trained with main_pretrain.py "
        "--mask_block",
    )  # fmt: skip
    parser.add_argument("--seed", default=0, type=types.seed, metavar="N", help="random seed of the mask")
    parser.add_argument(
        "--mask_box", "--hide", type=int, nargs=4, action="append", metavar=("X", "Y", "W", "H"),
        help="mask the patches that this rectangle touches, instead of random patches: left, top, width, height in "
        "pixels of the image; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--short_side",
        type=types.positive_int,
        metavar="S",
        help="scale images to this short side, in pixels (default: the input size of the model)",
    )
    return parser


def main(args: argparse.Namespace) -> list[Reconstruction]:
    """Writes the picture, prints the error of the masked pixels, and returns the reconstructions."""
    start_logging()
    require_files(args.images)  # before the model is built
    require_outside("out", [args.out], args.images)
    model = get_model(
        args.model, pretrained=True, device=parallel.choose_device(args.device), **options.chosen_settings(args),
    )  # fmt: skip
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"model={args.model} has no decoder of pixels and can't reconstruct: give a checkpoint of "
            f"main_pretrain.py, or a published file with a decoder, such as mae_visualize_vit_large"
        )
    if model.norm_pix_loss:
        logger.info("the model predicts normalized patches: their mean and contrast are taken from the original")
    reconstructions = []
    for path in args.images:
        try:
            result = reconstruct(model, path, args.mask_ratio, args.seed, args.mask_box, args.short_side, args.amp)
        except BadImage:
            raise  # it names the image
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        reconstructions.append(result)
        rows, columns = model.patch_embed.grid_of(*result.original.shape[2:])
        masked = f"{int(result.mask.sum())} of {rows} x {columns} patches masked"
        print(f"{path}: {masked}, {error_text(model, result)}", flush=True)
    pictures.show_range(model.normalize, (model.decode(path).image for path in args.images))
    with atomic.replacing(args.out) as written:
        grid(model, reconstructions).save(written)
    print(f"picture: {args.out}")
    return reconstructions


def reconstruct(
    model: Autoencoder,
    image: ImageLike,
    mask_ratio: float = 0.75,
    seed: int = 0,
    mask_boxes: Sequence[Box] | None = None,
    short_side: int | None = None,
    amp: str | None = None,
) -> Reconstruction:
    """Masks patches of an image and reconstructs them.

    Args:
        image: an image of any shape. It is scaled; only margins that do not fill a patch are cropped. A float tensor
            is a picture with values from 0 to 1, as `model.open` returns it, not the output of `model.prepare`.
        mask_ratio: fraction of masked patches; of a model that was pre-trained with `--mask_block`, of masked blocks.
        seed: random seed of the mask.
        mask_boxes: rectangles in pixels of the image. The patches that they touch are masked instead of random patches.
        short_side: short side of the scaled image, in pixels. Default: the input size of the model.
        amp: as in `ModelMixin.autocast`.

    Returns:
        Tensors (1, c, H, W) in the value range of the input, as `MaskedAutoencoderViT.reconstruct` returns them.

    Raises:
        ValueError: a rectangle is outside of the image, no patch is visible, or there are more than MAX_PATCHES.
        BadImage, OSError: the image can't be read.
    """
    item = model.decode(image)
    picture = item.image
    device = model.cls_token.device
    if item.valid is not None:
        logger.warning("invalid pixels are the mean in the input, in the original and in the PSNR")
    imgs = uncropped_input(model, item, short_side)
    if mask_boxes:
        scaled = scaled_size(model, size_of(picture), short_side)
        mask = boxes_to_mask(mask_boxes, size_of(picture), scaled, imgs.shape[2:])
        return model.reconstruct(imgs, mask=mask[None].to(device), amp=amp)
    grid_size = model.patch_embed.grid_of(*imgs.shape[2:])
    side = model.settings.get("mask_block") or 1
    noise = masking.random_block_noise(grid_size, side, torch.Generator().manual_seed(seed))
    mask_ratio = masking.ratio_of_patches(noise, mask_ratio)
    return model.reconstruct(imgs, mask_ratio, noise=noise[None].to(device), amp=amp)


def uncropped_input(model: Model, picture: Picture | Item, short_side: int | None = None) -> torch.Tensor:
    """Converts a picture of any shape to the input of a model (1, c, H, W).

    The picture is scaled. Only margins that do not fill a patch are cropped. Invalid pixels are 0, the mean.

    Args:
        picture: a picture as `model.open` returns it, or an item as `model.decode` returns it.
        short_side: short side of the scaled picture, in pixels. Default: the input size of the model.
    """
    item = picture if isinstance(picture, Item) else model.decode(picture)
    height, width = scaled_size(model, size_of(item.image), short_side)
    rows, columns = model.patch_embed.patch_size
    covered = (height - height % rows, width - width % columns)
    transform = Stages(Scale((height, width)), CenterCrop(covered))
    batch = to_device(collate([transform(item)]), model.cls_token.device)
    return batch.normalized(model.normalize).to(model.cls_token.dtype)


def scaled_size(model: Model, size: tuple[int, int], short_side: int | None = None) -> list[int]:
    """Returns [height, width] of a picture of `size` that is scaled to a short side, and has at least one patch.

    The default of a model that was trained with --crop none is its input size, as in training.

    Raises:
        ValueError: the scaled picture has more than MAX_PATCHES patches.
    """
    if short_side is None and model.settings.get("crop") == NO_CROP:
        return list(model.patch_embed.img_size)
    patch = model.patch_embed.patch_size
    short_side = short_side or min(model.patch_embed.img_size)
    scale = max(short_side / min(size), *(p / side for side, p in zip(size, patch, strict=True)))
    scaled = [max(p, round(side * scale)) for side, p in zip(size, patch, strict=True)]
    if (count := prod(side // p for side, p in zip(scaled, patch, strict=True))) > MAX_PATCHES:
        raise ValueError(
            f"the image of {size[1]} x {size[0]} pixels (width x height) is scaled to {scaled[1]} x {scaled[0]}, which "
            f"are {count:,} patches, more than {MAX_PATCHES:,}: crop it, or give a smaller `short_side`"
        )
    return scaled


def boxes_to_mask(
    boxes: Sequence[Box], size: tuple[int, int], scaled: Sequence[int], covered: Sequence[int]
) -> torch.Tensor:
    """Converts rectangles to a mask of all pixels that they touch (H, W); 1 is masked.

    Args:
        boxes: rectangles in pixels of the image.
        size: (height, width) of the image.
        scaled: (height, width) of the scaled image.
        covered: (H, W) of its center, without the margins that `uncropped_input` crops.

    Raises:
        ValueError: a rectangle is empty, or outside of the part of the image that the patches cover.
    """
    mask = torch.zeros(*covered)
    pixels = f"the image has {size[1]} x {size[0]} pixels (width x height)"
    for left, top, width, height in boxes:
        box = f"mask_box=[{left}, {top}, {width}, {height}]"
        rows, columns = (
            pixel_range(start, length, *sides)
            for start, length, *sides in ((top, height, size[0], scaled[0], covered[0]),
                                          (left, width, size[1], scaled[1], covered[1]))
        )  # fmt: skip
        if not mask[rows, columns].numel():
            raise ValueError(f"{box} touches no patch: {pixels}")
        if min(left, top) < 0 or left + width > size[1] or top + height > size[0]:
            logger.warning(f"{box} reaches over the border, and is cut there: {pixels}")
        mask[rows, columns] = 1
    return mask


def pixel_range(start: int, length: int, side: int, scaled: int, covered: int) -> slice:
    """Returns the pixels of the center of a scaled side that a part of the side touches; they may be empty."""
    margin = round((scaled - covered) / 2)  # as in torchvision's center_crop
    # floor and ceil
    first = start * scaled // side - margin
    end = -(-(start + length) * scaled // side) - margin
    return slice(max(0, first), max(0, end))


def error_text(model: Autoencoder, reconstruction: Reconstruction) -> str:
    """Returns the PSNR of the masked pixels; their RMSE, if the range of the values is unknown."""
    if model.normalize.fits_unit_range:
        return f"PSNR {psnr(model, reconstruction):.2f} dB"
    error = (reconstruction.pasted - reconstruction.original).square()
    num_values = reconstruction.mask.mean() * error[0].numel()
    return f"RMSE {float((error.sum() / num_values.clamp(min=1)).sqrt()):.3f} standard deviations"


def psnr(model: Autoencoder, reconstruction: Reconstruction) -> float:
    """Returns the peak signal-to-noise ratio of the masked pixels, in dB. Images have values from 0 to 1."""
    error = (model.normalize.inverse(reconstruction.pasted) - model.normalize.inverse(reconstruction.original)).square()
    num_values = reconstruction.mask.mean() * error[0].numel()
    return float(-10 * torch.log10(error.sum() / num_values.clamp(min=1)))


def grid(
    model: Autoencoder, reconstructions: Sequence[Sequence[torch.Tensor]], labels: Sequence[str] = ()
) -> Image.Image:
    """Returns a picture with a row for each image, and titles above the columns.

    Args:
        reconstructions: results of `reconstruct`, or the first of their images: `result[:2]` omits the prediction.
        labels: a text at the left of each row, of one or more lines.
    """
    scale = max(1, MIN_SIDE // min(reconstructions[0][0].shape[2:]))
    rows = [[pictures.tile([part], model.normalize.displayed, scale) for part in row[:4]] for row in reconstructions]
    titles = pictures.TITLES[: len(rows[0])]
    has_prediction = len(titles) == len(pictures.TITLES)
    height = pictures.HEADER * (1 + has_prediction) + sum(len(row[0]) + pictures.GAP for row in rows)
    font = ImageFont.load_default()
    step = max(*(row[0].shape[1] for row in rows), *(ceil(font.getlength(title)) for title in titles)) + pictures.GAP
    widths = [ceil(font.getlength(line)) + 2 * LABEL_GAP for text in labels for line in text.split("\n")]
    margin = max(widths, default=0)
    sheet = Image.new("RGB", (margin + len(rows[0]) * step, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((margin + (column + 0.5) * step, 3), title, fill="black", anchor="ma")
    top = pictures.HEADER
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            # Centered in its column, because images may have different widths.
            left = margin + column * step + (step - picture.shape[1]) // 2
            sheet.paste(Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture), (left, top))
        if labels:
            pen.text((margin - LABEL_GAP, top), labels[number], fill="black", align="right", anchor="ra")
        top += len(row[0]) + pictures.GAP
    if has_prediction:
        pen.text((margin + 3, top + 3), pictures.NOTE, fill="black")
    return sheet


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
