"""Segmentation: the encoder of a Vision Transformer with a linear or a DPT head that predicts the class of each pixel.

    >>> import torch
    >>> from models_segment import Segmenter
    >>> model = Segmenter(21, "dpt", img_size=64, patch_size=16, embed_dim=192, depth=12, num_heads=3)
    >>> model(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 21, 64, 64])

Letters in shapes: B images, H x W pixels, D channels of a token, K classes, h x w patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models_vit import VisionTransformer, init_classifier

DPT_CHANNELS = (256, 512, 1024, 1024)  # of the four maps, from fine to coarse (Ranftl et al. 2021, ViT-L)
DPT_FEATURES = 256


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Scales maps bilinearly; the corners of both sizes coincide."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


class LinearHead(nn.Module):
    """Batch norm and a 1 x 1 convolution on patch tokens that are concatenated with the class token.

    Args:
        dim: D.
        num_classes: K.
    """

    num_layers = 1  # blocks whose tokens the head takes

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2 * dim)
        self.classifier = init_classifier(nn.Conv2d(2 * dim, num_classes, 1))

    def forward(self, maps: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Patch tokens of the last block (B, D, h, w), and its class token (B, D) -> logits (B, K, h, w)."""
        (last,) = maps
        patches = last.flatten(2).transpose(1, 2)
        features = torch.cat([patches, classes[:, None].expand_as(patches)], dim=2)  # channels last, which is faster
        return self.classifier(self.norm(features.transpose(1, 2).unflatten(2, last.shape[2:])))


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions with a residual connection: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map to the result of the coarser maps, and scales the sum to the size of the next map."""

    def __init__(self, channels: int, is_first: bool) -> None:
        super().__init__()
        self.skip = None if is_first else ResidualUnit(channels)  # the coarsest map has nothing to be added to
        self.unit = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip is not None:
            x = x + self.skip(finer)
        return self.project(resized(self.unit(x), size))


class DPTHead(nn.Module):
    """The dense prediction transformer (Ranftl et al. 2021) for four blocks of the encoder.

    The tokens of each block become maps of 4, 2, 1 and 1/2 times the resolution of the patches, from the first to the
    last block. They are fused from coarse to fine. Class tokens are not used.

    Args:
        dim: D.
        num_classes: K.
    """

    num_layers = 4

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        first, second, _, last = DPT_CHANNELS
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in DPT_CHANNELS)
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, stride=2, padding=1),
            ]
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, DPT_FEATURES, 3, padding=1, bias=False) for channels in DPT_CHANNELS
        )
        self.fusions = nn.ModuleList(Fusion(DPT_FEATURES, is_first=number == 0) for number in range(4))
        self.output = nn.Sequential(
            nn.Conv2d(DPT_FEATURES, DPT_FEATURES, 3, padding=1, bias=False), nn.BatchNorm2d(DPT_FEATURES), nn.ReLU()
        )
        self.classifier = init_classifier(nn.Conv2d(DPT_FEATURES, num_classes, 1))

    def forward(self, maps: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Patch tokens of four blocks (B, D, h, w); `classes` is not used -> logits (B, K, 8 h, 8 w)."""
        layers = zip(maps, self.projects, self.resizes, self.convs, strict=True)
        scaled = [conv(resize(project(tokens))) for tokens, project, resize, conv in layers]
        x = scaled[-1]
        sizes = [tuple(finer.shape[2:]) for finer in scaled[-2::-1]]
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
        for fusion, finer, size in zip(self.fusions, [None, *scaled[-2::-1]], sizes, strict=True):
            x = fusion(x, finer, size)
        return self.classifier(self.output(x))


HEADS: dict[str, type[LinearHead] | type[DPTHead]] = {"linear": LinearHead, "dpt": DPTHead}


class Segmenter(VisionTransformer):
    """A Vision Transformer that predicts the class of each pixel. Its tensors have the names of the encoder, and head.

    Args:
        num_classes: K.
        head: "linear", on the last block, or "dpt", on four evenly spaced blocks. The final norm of the encoder
            normalizes the tokens of each.
        encoder: arguments of `VisionTransformer`.

    Raises:
        ValueError: the encoder has fewer blocks than the head takes.
    """

    def __init__(self, num_classes: int, head: str = "linear", **encoder: Any) -> None:
        super().__init__(num_classes=0, global_pool=False, **encoder)
        self.num_classes = num_classes
        depth = len(self.blocks)
        count = HEADS[head].num_layers
        if depth < count:
            raise ValueError(f"head {head!r} takes the tokens of {count} blocks, and the encoder has {depth}")
        self.layers = [depth * number // count - 1 for number in range(1, count + 1)]
        self.head = HEADS[head](self.embed_dim, num_classes)

    def forward(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> logits (B, K, H, W)."""
        layers = self.get_intermediate_layers(imgs, self.layers, **context)
        size = (imgs.shape[2], imgs.shape[3])
        maps = [self.patch_maps(self.patch_tokens(tokens), *size) for tokens in layers]
        return resized(self.head(maps, self.class_features(layers[-1])), size)
