"""Detection: Mask R-CNN of torchvision on an encoder of this library, with the simple feature pyramid of ViTDet.

    python demo/detection.py --model demo/output/pretrain/checkpoint-119.pth

The command composes pictures of garments on textures, whose boxes and masks are known, trains the encoder with a
detector on them, and prints the losses and the best detection in a further picture. The losses fall within ten updates;
detections need more (`--updates`). All blocks attend globally. The windows of ViTDet save memory on large pictures.
"""

import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo runs from a clone

import numpy as np
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import masks_to_boxes

from demo.segmentation import ARCHIVE, SIDE, make_pictures, make_textures
from mae import parallel
from mae.cli import entry_point, options
from mae.inference.export import encoder_of
from mae.inference.model import ARCHITECTURES, Autoencoder, Model, get_model
from mae.settings import types

CELLS, GARMENTS = 3, 3  # cells along a side of a picture; garments in a picture
BATCH = 2  # pictures of an update


class SimplePyramid(nn.Module):
    """An encoder with maps of 4, 2, 1 and 1/2 times the resolution of its last patch tokens (Li et al. 2022, sec. 3).

    torchvision needs strides that are powers of two. The encoder therefore gets images in which a patch of p pixels
    covers `stride` pixels of the picture, the nearest power. For p = 16, both are equal.
    """

    out_channels = 256

    def __init__(self, encoder: Model) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.stride = 2 ** round(math.log2(self.patch_size))
        width, channels = encoder.pos_embed.shape[2], self.out_channels
        double = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        quadruple = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2), LayerNorm2d(width // 2), nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        )  # fmt: skip
        scales = [(quadruple, width // 4), (double, width // 2), (nn.Identity(), width), (nn.MaxPool2d(2), width)]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale, nn.Conv2d(inputs, channels, 1, bias=False), LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels),
            )
            for scale, inputs in scales
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Normalized pictures (B, c, H, W) -> maps (B, 256, h, w), from fine to coarse."""
        sides = [side // self.stride * self.patch_size for side in pictures.shape[2:]]
        imgs = F.interpolate(pictures, sides, mode="bilinear", antialias=True)
        tokens = self.encoder.patch_tokens(self.encoder.get_intermediate_layers(imgs, norm=False)[0])
        features = self.encoder.patch_maps(tokens, *sides)
        return {str(number): level(features) for number, level in enumerate(self.levels)}


def build_detector(encoder: Model, num_classes: int) -> MaskRCNN:
    """Returns Mask R-CNN on an encoder, with the background as class 0. It scales pictures to 12 x 12 patches."""
    pyramid = SimplePyramid(encoder)
    side, mean, std = 12 * pyramid.stride, encoder.normalize.mean.flatten(), encoder.normalize.std.flatten()
    anchors = AnchorGenerator(tuple((pyramid.stride * scale,) for scale in (1, 2, 4, 8)), ((0.5, 1.0, 2.0),) * 4)
    return MaskRCNN(
        pyramid, num_classes, min_size=side, max_size=side, image_mean=mean.tolist(), image_std=std.tolist(),
        rpn_anchor_generator=anchors, box_batch_size_per_image=32, box_score_thresh=0.0,
    )  # fmt: skip


def make_scenes(count: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Composes garments in cells of textures.

    Returns:
        Pictures (count, 1, H, W), from 0 to 1, and the boxes (n, 4), labels (n,) and masks (n, H, W) of each.
    """
    generator = np.random.default_rng(seed)
    pictures, targets = make_textures(count, generator, CELLS * SIDE), []
    garments, masks = (
        array.reshape(count, GARMENTS, SIDE, SIDE) for array in make_pictures("train", count * GARMENTS, seed)
    )
    for picture, sources, classes in zip(pictures, garments, masks, strict=True):
        areas = np.zeros((GARMENTS, *picture.shape), dtype=np.uint8)
        for index, cell in enumerate(generator.choice(CELLS**2, GARMENTS, replace=False)):
            top, left = SIDE * (cell // CELLS), SIDE * (cell % CELLS)
            place = slice(top, top + SIDE), slice(left, left + SIDE)
            areas[index][place] = classes[index] > 0
            picture[place] = np.where(classes[index] > 0, sources[index], picture[place])
        boxes = masks_to_boxes(torch.from_numpy(areas)) + torch.tensor([0, 0, 1, 1])  # the last pixel is included
        labels = torch.from_numpy(classes.max(axis=(1, 2))).long()
        targets.append({"boxes": boxes, "labels": labels, "masks": torch.from_numpy(areas)})
    return torch.from_numpy(pictures)[:, None] / 255, targets


def describe(names: list[str], objects: dict[str, Tensor], index: int) -> str:
    """Returns the class and the box of an object as text."""
    box = " ".join(f"{value:.0f}" for value in objects["boxes"][index].tolist())
    return f"{names[objects['labels'][index]]} at ({box})"


def get_args_parser() -> ArgumentParser:
    """The flags of the command."""
    parser = entry_point.parser("Trains a detector with the encoder of a model on generated pictures.")
    options.add_inference_options(parser, images=False, also=", or vit_tiny_patch16 and others with random weights")
    parser.add_argument("--updates", default=10, type=types.positive_int, metavar="N", help="number of updates")
    return parser


def main(args: Namespace) -> list[float]:
    """Trains the detector, prints its losses and its best detection in a further picture, and returns the losses."""
    torch.manual_seed(0)
    device = parallel.choose_device(args.device)
    model = get_model(args.model, pretrained=args.model not in ARCHITECTURES)
    encoder = encoder_of(model) if isinstance(model, Autoencoder) else model  # its positions are interpolated
    names = ["texture", *np.load(ARCHIVE, allow_pickle=False)["classes"].tolist()]
    detector = build_detector(encoder, len(names)).to(device)
    pictures, targets = make_scenes(args.updates * BATCH + 1, seed=0)
    pictures = pictures.expand(-1, encoder.in_chans, -1, -1).to(device)
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    losses = []
    detector.train()
    for first in range(0, args.updates * BATCH, BATCH):
        parts = detector([*pictures[first : first + BATCH]], targets[first : first + BATCH])
        loss = torch.stack([*parts.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"update {len(losses)}: loss {losses[-1]:.3f} ({', '.join(f'{n} {v:.3f}' for n, v in parts.items())})")
    detector.eval()
    with torch.inference_mode():
        (detection,) = detector([pictures[-1]])
    garments = [describe(names, targets[-1], index) for index in range(GARMENTS)]
    print(f"detected: {describe(names, detection, 0)}, score {detection['scores'][0]:.2f}; true: {', '.join(garments)}")
    return losses


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
