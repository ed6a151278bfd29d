"""Draws masked images of a dataset, their reconstructions and the originals: as pictures, or as curves of signals.

python examples/reconstructions.py --model runs/sounds/checkpoint-9.pth --data_path data/sounds \
    --dataset py:examples.data_spectrograms:open_dataset --out sounds.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples run from a clone

import torch
from torch import Tensor

from mae.cli import entry_point, flags, options
from mae.data import loader
from mae.data.open import open_source
from mae.data.samples import Samples
from mae.evaluate import tables
from mae.files.untrusted import require_outside
from mae.inference.model import get_model
from mae.settings import DataSpec

ROWS = 2  # images, evenly spaced in the validation set
TITLES = ("masked", "reconstruction + visible", "original")


def reconstruct(model: Any, samples: Samples) -> list[Tensor]:
    """Returns the normalized images of TITLES, (ROWS, c, H, W). Masked pixels of the first are NaN."""
    chosen = torch.linspace(0, len(samples) - 1, ROWS + 2).long()[1:-1].tolist()
    batch = loader.collate([samples[0, index].item for index in chosen])
    noise = torch.rand(ROWS, model.num_patches, generator=torch.Generator().manual_seed(0))
    images = batch.normalized(model.normalize)
    result = model.reconstruct(images, model.settings["mask_ratio"], noise=noise, **batch.context)
    mask = model.unpatchify(result.mask.unsqueeze(2).expand(-1, -1, model.values_per_patch))
    return [result.original.masked_fill(mask.bool(), torch.nan), result.pasted, result.original]


def beside(image: Tensor, count: int) -> Tensor:
    """Returns the middle channels of `count` equal parts of an image (c, H, W), with gaps: (1, H, count·(W + 1)).

    0: the image itself.
    """
    if not count:
        return image
    chosen = image[(torch.arange(count) + 0.5).mul(len(image) / count).long()]
    return torch.nn.functional.pad(chosen, (0, 1), value=torch.nan).transpose(0, 1).flatten(1).unsqueeze(0)


def draw(axes: Any, image: Tensor, as_curves: bool) -> None:
    """Draws the rows of the first channel as curves, or the first three channels (else one) as a picture."""
    axes.set(xticks=[], yticks=[])
    if as_curves:
        axes.plot((image[0] - 6 * torch.arange(image.shape[1])[:, None]).T.numpy(), color="black", linewidth=0.8)
        axes.set_ylim(-6 * image.shape[1], 6)
    else:
        colors = (image[: 3 if len(image) >= 3 else 1] / 5 + 0.5).nan_to_num(1).clamp(0, 1)  # masked: white
        axes.imshow(colors.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)


def main(args: argparse.Namespace) -> None:
    """Writes the figure."""
    require_outside("out", [args.out], [args.data_path])
    model: Any = get_model(args.model, pretrained=True, **options.chosen_settings(args))
    source = open_source(DataSpec(data_path=args.data_path, dataset=args.dataset), "val")
    samples = Samples(source, model.preprocess, in_chans=model.in_chans, seed=0, values=model.values)
    parts = reconstruct(model, samples)
    parts = [torch.stack([beside(image, args.frames) for image in part]) for part in parts]
    height, width = parts[0].shape[2:]
    as_curves = model.patch_embed.patch_size[0] == 1
    figure = tables.new_figure(6, 0.3 + ROWS * 2 * (0.6 if as_curves else height / width))
    for row, axes in enumerate(figure.subplots(ROWS, len(TITLES), squeeze=False)):
        for column, part in enumerate(parts):
            draw(axes[column], part[row], as_curves)
            axes[column].set_title(TITLES[column] if row == 0 else "", fontsize=9)
    tables.save(figure, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Draws masked images, reconstructions and originals of a validation set.")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="checkpoint of main_pretrain.py")
    options.add_to(parser, "encoder", "encoder_args")
    parser.add_argument("--data_path", metavar="PATH", help="as --data_path of main_pretrain.py")
    parser.add_argument("--dataset", metavar="NAME", help="as --dataset of main_pretrain.py")
    parser.add_argument(
        "--frames", type=int, default=0, metavar="N", help="draw N channels as frames or slices beside each other"
    )
    parser.add_argument("--out", type=flags.new_file(".png", ".svg", ".pdf"), required=True, metavar="FILE")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
