"""Models of timm as frozen encoders: their tokens and pooled features."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mae.sizes import Size, to_pair
from mae.suggestions import did_you_mean
from models_vit import Encoder, VisionTransformer

logger = logging.getLogger(__name__)


class TimmEncoder(VisionTransformer):
    """A model of timm with the interface of a frozen `VisionTransformer`, whose head is that of a probe.

    Its pooled features are those of timm: `forward_head(forward_features(images), pre_logits=True)`. The pixels of a
    map (B, D, h, w) are patch tokens.

    Args:
        name: name in timm.
        img_size: that of its weights.
        in_chans: channels c of the images. The colors of the model are c, c + 3, ... : the features are those of
            timm's `adapt_input_conv`.

    Raises:
        ValueError: timm does not have the model, it has no features, or `img_size` is not that of its weights.
    """

    net: Any  # the model of timm

    def __init__(self, name: str, img_size: Size, in_chans: int) -> None:
        import timm

        Encoder.__init__(self)  # the network takes the place of the parts of a VisionTransformer
        self.name = name
        self.in_chans = in_chans
        self.global_pool = False
        self.frozen = False
        self.head_pools = False
        self.pools_both = False
        self.num_classes = 0
        require_name(name)
        self.net = timm.create_model(name)
        self.net.reset_classifier(0)
        self.colors, *size = self.net.pretrained_cfg["input_size"]
        if to_pair(img_size) != tuple(size):
            raise ValueError(f"input_size={img_size}: timm:{name} has {size[0]} x {size[1]} pixels; omit `input_size`")
        if in_chans != self.colors:
            logger.warning(f"timm:{name} has weights for {self.colors} channels, which are adapted to {in_chans}")
        self.head: nn.Module = nn.Identity()
        with torch.no_grad():
            features = self.net.eval().forward_features(torch.zeros(1, self.colors, *size))
            try:
                self.widths = [self.net.forward_head(features, pre_logits=True).flatten(1).shape[1]]
            except (AttributeError, TypeError) as error:
                raise ValueError(f"timm:{name}: timm has no pooled features of this model ({error})") from error
        # The tokens of several grids are a list. Without a number of prefix tokens, a class token is not told apart.
        names = [name for name, _ in self.net.named_parameters(recurse=False)]
        is_counted = hasattr(self.net, "num_prefix_tokens") or not any(key.startswith("cls_token") for key in names)
        is_grid = isinstance(features, Tensor) and features.ndim in (3, 4)
        self.has_tokens = is_grid and (features.ndim == 4 or is_counted)
        self.length, width = self._tokens(features).shape[1:] if self.has_tokens else (0, 0)
        self.widths.append(width)

    @property
    def embed_dim(self) -> int:  # type: ignore[override]
        """D, channels of the input of the head."""
        return self.widths[self.head_pools]

    @property
    def num_prefix_tokens(self) -> int:
        """T, the number of class tokens and registers. They precede the patch tokens."""
        return getattr(self.net, "num_prefix_tokens", 0)

    @property
    def num_patches(self) -> int:
        """N, the number of patch tokens."""
        return self.length - self.num_prefix_tokens

    def class_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T + N, D) -> the class token (B, D).

        Raises:
            ValueError: the model has none.
        """
        if getattr(self.net, "cls_token", None) is None:
            raise ValueError(f"pool=cls: timm:{self.name} has no class token; give pool=avg, or omit `pool`")
        return tokens[:, 0]

    def get_intermediate_layers(
        self, imgs: Tensor, n: int | Sequence[int] = 1, norm: bool = True, return_attention: bool = False,
        **context: Any,
    ) -> Any:  # fmt: skip
        """Returns the tokens (B, T + N, D) of timm's `forward_features` for images (B, c, H, W).

        Raises:
            ValueError: the model has no tokens, or they are those of other layers.
        """
        if n != 1 or not norm or return_attention:
            raise ValueError(f"timm:{self.name}: only the tokens of the last layer of models of timm are read")
        return [self._tokens(self.net.forward_features(self._to_colors(imgs)))]

    @property
    def reductions(self) -> list[int]:
        """Pixels along the side of a token, of the output of each block or stage, as timm lists them."""
        return [layer["reduction"] for layer in getattr(self.net, "feature_info", [])]

    def get_intermediate_maps(self, imgs: Tensor, n: int | Sequence[int], **context: Any) -> list[Tensor]:
        """Returns the outputs of blocks or stages for images (B, c, H, W) as maps (B, D, h, w), without norm.

        Raises:
            ValueError: timm does not return them, or there is no block with one of the indices.
        """
        depth = len(self.reductions)
        if not depth or not hasattr(self.net, "forward_intermediates"):
            raise ValueError(f"timm:{self.name}: timm does not return the outputs of its blocks")
        indices = range(max(0, depth - n), depth) if isinstance(n, int) else n
        if missing := [index for index in indices if not -depth <= index < depth]:
            raise ValueError(f"there is no block {missing[0]}: the indices of the {depth} blocks are 0 to {depth - 1}")
        chosen = sorted({index % depth for index in indices})
        return self.net.forward_intermediates(self._to_colors(imgs), chosen, intermediates_only=True)

    def forward_features(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> the input of the head: pooled features (B, D), or patch tokens (B, N, D)."""
        features = self.net.forward_features(self._to_colors(imgs))
        if self.head_pools:
            return self.patch_tokens(self._tokens(features))
        return self.net.forward_head(features, pre_logits=True).flatten(1)

    def _tokens(self, features: Any) -> Tensor:
        """Output of timm's `forward_features` -> tokens (B, T + N, D)."""
        if not self.has_tokens:
            raise ValueError(f"timm:{self.name} has no tokens of one grid, but pooled features only")
        if features.ndim == 3:
            return features
        axis = 3 if getattr(self.net, "output_fmt", None) == "NHWC" else 1
        return features.movedim(axis, 3).flatten(1, 2)

    def _to_colors(self, imgs: Tensor) -> Tensor:
        """Images (B, c, H, W) -> images with the channels of the weights."""
        if self.in_chans == self.colors:
            return imgs
        if self.in_chans == 1:
            return imgs.expand(-1, self.colors, -1, -1)
        sums = [imgs[:, color :: self.colors].sum(dim=1) for color in range(self.colors)]
        return torch.stack(sums, dim=1) * (self.colors / self.in_chans)


def require_name(name: str) -> None:
    """Raises ValueError if timm does not have a model. A name of another kind may load files and code."""
    import timm  # takes more than a second

    if not timm.is_model(name):
        raise ValueError(f"timm:{name}: timm has no such model{did_you_mean(name, timm.list_models())}")
