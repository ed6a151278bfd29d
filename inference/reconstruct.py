"""Masks parts of photographs and reconstructs them with a masked autoencoder.

python -m inference.reconstruct demo/photos/*.jpg --model mae_visualize_vit_large --out grid.png
python -m inference.reconstruct photo.jpg --model runs/mine/checkpoint-last.pth --hide 40 60 200 120 --out grid.png
"""

import argparse
import logging
from collections.abc import Sequence
from math import ceil

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inference.model import Autoencoder, ImageLike, Model, get_model, open_image
from models_mae import Reconstruction
from util import dist, masking
from util.cli import entry_point, flags, options
from util.data.decode import Picture, size_of
from util.data.transforms import to_tensor
from util.evaluation import pictures
from util.files import atomic
from util.training.run_log import start_logging

logger = logging.getLogger(__name__)

TITLES = ("original", "masked", "prediction", "pasted")
SUFFIXES = (".png", ".jpg", ".webp", ".bmp", *(s for s, k in Image.registered_extensions().items() if k in Image.SAVE))
HEADER = 18  # pixels above the pictures
LABEL_GAP = 6  # pixels between a label and its row
MIN_SIDE = 160  # minimum short side of a picture, in pixels; smaller pictures are enlarged
Box = tuple[int, int, int, int]  # left, top, width, height, in pixels of the image file


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Masks patches of photographs of any shape and reconstructs them.")
    options.add_inference_options(parser)
    parser.add_argument(
        "--out",
        type=flags.new_file(*SUFFIXES),
        required=True,
        metavar="FILE",
        help="output picture, with one row per image",
    )
    parser.add_argument(
        "--mask_ratio", default=0.75, type=flags.ratio, metavar="R",
        help="fraction of masked patches, or of masked blocks if the model was pre-trained with main_pretrain.py "
        "--mask_block",
    )  # fmt: skip
    parser.add_argument("--seed", default=0, type=flags.seed, metavar="N", help="random seed of the mask")
    parser.add_argument(
        "--hide", type=int, nargs=4, action="append", metavar=("X", "Y", "W", "H"),
        help="mask this rectangle instead: left, top, width, height in pixels of the image; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--short_side",
        type=flags.positive_int,
        metavar="S",
        help="scale images to this short side, in pixels (default: the input size of the model)",
    )
    return parser


def main(args: argparse.Namespace) -> list[Reconstruction]:
    """Writes the picture, prints the PSNR of the masked pixels, and returns the reconstructions."""
    start_logging()
    model = get_model(args.model, pretrained=True, device=dist.choose_device(args.device))
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"--model {args.model} has no decoder and can't reconstruct: give a checkpoint of main_pretrain.py, or a "
            f"published file with a decoder, such as mae_visualize_vit_large"
        )
    if model.norm_pix_loss:
        logger.info("the model predicts normalized patches: their mean and contrast are those of the original")
    reconstructions = []
    for path in args.images:
        reconstructions.append(reconstruct(model, path, args.mask_ratio, args.seed, args.hide, args.short_side))
        rows, columns = model.patch_embed.grid_of(*reconstructions[-1].original.shape[2:])
        num_masked = int(reconstructions[-1].mask.sum())
        quality = f"PSNR {psnr(model, reconstructions[-1]):.2f} dB"
        print(f"{path}: {num_masked} of {rows} x {columns} patches masked, {quality}", flush=True)
    with atomic.replacing(args.out) as written:
        grid(model, reconstructions).save(written)
    print(f"picture: {args.out}")
    return reconstructions


def reconstruct(
    model: Autoencoder,
    image: ImageLike,
    mask_ratio: float = 0.75,
    seed: int = 0,
    hide: Sequence[Box] | None = None,
    short_side: int | None = None,
) -> Reconstruction:
    """Masks patches of an image and reconstructs them.

    Args:
        image: an image of any shape. It is scaled; only margins that do not fill a patch are cropped.
        mask_ratio: fraction of masked patches; of a model that was pre-trained with `--mask_block`, of masked blocks.
        seed: random seed of the mask.
        hide: rectangles in pixels of the image. Their patches are masked instead of random patches.
        short_side: short side of the scaled image, in pixels. Default: the input size of the model.

    Returns:
        Tensors (1, c, H, W) in the value range of the input, as `MaskedAutoencoderViT.reconstruct` returns them.

    Raises:
        ValueError: a rectangle is outside of the image, or no patch is visible.
        BadImage, OSError: the image can't be read.
    """
    picture = open_image(image, model.in_chans)
    device = model.cls_token.device
    imgs = uncropped_input(model, picture, short_side)
    if hide:
        mask = boxes_to_mask(hide, size_of(picture), imgs.shape[2:])
        return model.reconstruct(imgs, mask=mask[None].to(device))
    grid_size = model.patch_embed.grid_of(*imgs.shape[2:])
    side = model.settings.get("mask_block") or 1
    noise = masking.random_block_noise(grid_size, side, torch.Generator().manual_seed(seed))
    return model.reconstruct(imgs, masking.ratio_of_patches(noise, mask_ratio), noise=noise[None].to(device))


def uncropped_input(model: Model, picture: Picture, short_side: int | None = None) -> Tensor:
    """Converts a picture of any shape to the input of a model (1, c, H, W).

    The picture is scaled. Only margins that do not fill a patch are cropped.

    Args:
        short_side: short side of the scaled picture, in pixels. Default: the input size of the model.
    """
    small = fit(picture, short_side or min(model.patch_embed.img_size), model.patch_embed.patch_size)
    return model.normalize(to_tensor(small)[None].to(model.cls_token.device))


def fit(picture: Picture, short_side: int, patch: tuple[int, int]) -> Picture:
    """Scales a picture to a short side, and crops the margins that do not fill a patch."""
    from torchvision.transforms import functional as TF  # takes more than a second

    height, width = size_of(picture)
    scale = max(short_side / min(height, width), patch[0] / height, patch[1] / width)
    scaled = [max(p, round(side * scale)) for side, p in zip((height, width), patch, strict=True)]
    covered = [side - side % p for side, p in zip(scaled, patch, strict=True)]
    return TF.center_crop(TF.resize(picture, scaled, interpolation=TF.InterpolationMode.BICUBIC), covered)


def boxes_to_mask(boxes: Sequence[Box], size: tuple[int, int], scaled: Sequence[int]) -> Tensor:
    """Converts rectangles to a pixel mask (H, W); 1 is masked.

    Args:
        boxes: rectangles in pixels of the image.
        size: (height, width) of the image.
        scaled: (H, W) of the scaled image.

    Raises:
        ValueError: a rectangle is empty or outside of the image.
    """
    mask = torch.zeros(*scaled)
    down, along = scaled[0] / size[0], scaled[1] / size[1]
    for left, top, width, height in boxes:
        if width < 1 or height < 1 or left + width <= 0 or top + height <= 0 or left >= size[1] or top >= size[0]:
            raise ValueError(
                f"--hide {left} {top} {width} {height}: the image has {size[1]} x {size[0]} pixels; give left, top, "
                f"width and height of a rectangle in it"
            )
        rows = slice(max(0, int(top * down)), max(1, round((top + height) * down)))
        columns = slice(max(0, int(left * along)), max(1, round((left + width) * along)))
        mask[rows, columns] = 1
    return mask


def psnr(model: Autoencoder, reconstruction: Reconstruction) -> float:
    """Returns the peak signal-to-noise ratio of the masked pixels, in dB."""
    error = (model.normalize.inverse(reconstruction.pasted) - model.normalize.inverse(reconstruction.original)).square()
    num_values = reconstruction.mask.mean() * error[0].numel()
    return float(-10 * torch.log10(error.sum() / num_values.clamp(min=1)))


def grid(model: Autoencoder, reconstructions: Sequence[Sequence[Tensor]], labels: Sequence[str] = ()) -> Image.Image:
    """Returns a picture with a row for each image, and titles above the columns.

    Args:
        reconstructions: results of `reconstruct`, or the first of their images: `result[:2]` omits the prediction.
        labels: a text at the left of each row, of one or more lines.
    """
    scale = max(1, MIN_SIDE // min(reconstructions[0][0].shape[2:]))
    rows = [[pictures.tile([part], model.normalize.inverse, scale) for part in row[:4]] for row in reconstructions]
    step = max(row[0].shape[1] for row in rows) + pictures.GAP
    height = HEADER + sum(len(row[0]) + pictures.GAP for row in rows)
    font = ImageFont.load_default()
    widths = [ceil(font.getlength(line)) + 2 * LABEL_GAP for text in labels for line in text.split("\n")]
    margin = max(widths, default=0)
    sheet = Image.new("RGB", (margin + len(rows[0]) * step, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES[: len(rows[0])]):
        pen.text((margin + (column + 0.5) * step, 3), title, fill="black", anchor="ma")
    top = HEADER
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            # Centered in its column, because images may have different widths.
            left = margin + column * step + (step - picture.shape[1]) // 2
            sheet.paste(Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture), (left, top))
        if labels:
            pen.text((margin - LABEL_GAP, top), labels[number], fill="black", align="right", anchor="ra")
        top += len(row[0]) + pictures.GAP
    return sheet


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
