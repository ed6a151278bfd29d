"""Groups of channels with a projection and tokens each: SatMAE (Cong et al. 2022), ChannelViT (Bao et al. 2024).

    python main_pretrain.py --encoder examples.channel_groups:ChannelGroups --encoder_args groups=3 --in_chans 9 ...

The channels of an image are split into groups of equal size. An image of N patches has G·N tokens, which are masked
independently of each other. In the encoder, the position of a token is that of its patch plus a learned embedding of
its group. In the decoder, the grids of the groups are below each other, and the position tells the group.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mae.sizes import Size
from models_vit import Encoder, PatchEmbed


class GroupEmbed(PatchEmbed):
    """Embeds the patches of each group by the same projection: (B, c, H, W) -> (B, G·N, D)."""

    def __init__(self, groups: int, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        self.groups = groups
        if in_chans % groups:
            raise ValueError(f"encoder_args=[groups={groups}]: it must divide in_chans={in_chans}")
        super().__init__(img_size, patch_size, in_chans // groups, embed_dim)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().grid_of(height, width)
        return self.groups * rows, columns

    def forward(self, imgs: Tensor) -> Tensor:
        parts = imgs.unflatten(1, (self.groups, -1)).flatten(0, 1)
        return self.proj(parts).flatten(2).unflatten(0, (-1, self.groups)).transpose(2, 3).flatten(1, 2)


class SeparateEmbed(GroupEmbed):
    """Embeds the patches of each group by a projection of its own."""

    def __init__(self, groups: int, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__(groups, img_size, patch_size, in_chans, embed_dim)
        self.projections = nn.ModuleList(
            nn.Conv2d(in_chans // groups, embed_dim, self.patch_size, self.patch_size) for _ in range(groups)
        )
        del self.proj

    def forward(self, imgs: Tensor) -> Tensor:
        parts = zip(self.projections, imgs.chunk(self.groups, dim=1), strict=True)
        return torch.cat([projection(part).flatten(2) for projection, part in parts], dim=2).transpose(1, 2)


class Groups(Encoder):
    """Tokens of each of G groups of channels. The grids of the groups are below each other."""

    groups: int  # G

    def patch_maps(self, patches: Tensor, height: int, width: int) -> Tensor:
        return super().patch_maps(patches.unflatten(1, (self.groups, -1)).mean(dim=1), height, width)

    # The decoder predicts the channels of the group of a token.

    def patchify(self, imgs: Tensor) -> Tensor:
        p, q = self.patch_embed.patch_size
        x = imgs.unflatten(1, (self.groups, -1)).unflatten(3, (-1, p)).unflatten(5, (-1, q))  # (B, G, c, h, p, w, q)
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)

    def unpatchify(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        rows, columns = grid_size or self.patch_embed.grid_size
        p, q = self.patch_embed.patch_size
        x = x.reshape(x.shape[0], self.groups, rows // self.groups, columns, p, q, -1)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4).flatten(1, 2)


class ChannelGroups(Groups):
    """Tokens of each group of channels, with embeddings of the groups.

    Args:
        groups: G, the number of groups.
    """

    def __init__(self, *, groups: int, **arguments: Any) -> None:
        self.groups = groups
        super().__init__(**arguments)
        self.group_embed = nn.Parameter(torch.empty(groups, 1, self.cls_token.shape[2]).normal_(std=0.02))

    def make_patch_embed(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> PatchEmbed:
        return SeparateEmbed(self.groups, img_size, patch_size, in_chans, embed_dim)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        table = super().positions(grid)
        count = grid[0] * grid[1] // self.groups
        classes = table[:, : self.num_prefix_tokens]
        patches = self.patch_tokens(table)[:, :count]
        return torch.cat([classes, (patches + self.group_embed).flatten(0, 1).unsqueeze(0)], dim=1)
