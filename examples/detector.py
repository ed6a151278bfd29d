"""Detection: Mask R-CNN of torchvision on an encoder of this library, with the simple feature pyramid of ViTDet.

    from examples.detector import build_detector
    from mae import get_model

    encoder = get_model("mae_pretrain_vit_base", pretrained=True)
    detector = build_detector(encoder, num_classes=91)
    losses = detector(pictures, targets)  # as torchvision documents

All blocks attend globally. The windows of ViTDet save memory on large pictures.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from models_vit import LayerNorm


class LayerNorm2d(LayerNorm):
    """Layer norm of the channels of maps (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """An encoder with maps of 4, 2, 1 and 1/2 times the resolution of its last patch tokens (Li et al. 2022, sec. 3).

    torchvision needs strides that are powers of two. The encoder therefore gets images in which a patch of p pixels
    covers `stride` pixels of the picture, the nearest power. For p = 16, both are equal.
    """

    out_channels = 256

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.stride = 2 ** round(math.log2(self.patch_size))
        width = encoder.pos_embed.shape[2]
        channels = self.out_channels
        double = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        quadruple = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2), LayerNorm2d(width // 2, eps=1e-6), nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        )  # fmt: skip
        scales = [(quadruple, width // 4), (double, width // 2), (nn.Identity(), width), (nn.MaxPool2d(2), width)]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale, nn.Conv2d(inputs, channels, 1, bias=False), LayerNorm2d(channels, eps=1e-6),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels, eps=1e-6),
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


def build_detector(encoder: Any, num_classes: int) -> MaskRCNN:
    """Returns Mask R-CNN on an encoder, with the background as class 0. It scales pictures to 12 x 12 patches."""
    pyramid = SimplePyramid(encoder)
    side = 12 * pyramid.stride
    mean = encoder.normalize.mean.flatten()
    std = encoder.normalize.std.flatten()
    anchors = AnchorGenerator(tuple((pyramid.stride * scale,) for scale in (1, 2, 4, 8)), ((0.5, 1.0, 2.0),) * 4)
    return MaskRCNN(
        pyramid, num_classes, min_size=side, max_size=side, image_mean=mean.tolist(), image_std=std.tolist(),
        rpn_anchor_generator=anchors, box_batch_size_per_image=32, box_score_thresh=0.0,
    )  # fmt: skip
