r"""Patches of several frames or slices, with 3-D positions and tube masks, for video clips and volumes.

    python main_pretrain.py --encoder examples.tubes:Tubes --encoder_args tube=2 masks=true --in_chans 16 ...

The channels of an image are its frames, or the slices of a volume; the colors of a frame are neighbors. A token has
`tube` frames of a patch. The convolution over their channels equals a 3-D convolution whose kernel is its stride.

The positions are fixed: sines and cosines of column, row (6/16 of the channels each) and time (4/16), as in Prithvi-EO
(Jakubik et al. 2023). A tube mask is the same for all time steps, so that a patch can't be copied from the frame
before (VideoMAE, Tong et al. 2022).

Weights for single frames are inflated (Carreira and Zisserman 2017), that is, repeated over the frames of a token and
divided by their number. Fine-tuning and probes do it with `--adapt_input repeat`, if the frames have the colors of the
file, and with `--adapt_input mean` for gray frames:

    python main_finetune.py --finetune FILE --adapt_input mean --encoder examples.tubes:Tubes --in_chans 16 ...
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.channel_groups import GroupEmbed, Groups
from mae.masking import num_visible, ratio_of
from mae.position_tables import get_1d_sincos_pos_embed_from_grid
from mae.sizes import Size
from models_vit import PatchEmbed


class Tubes(Groups):
    """Tokens of several frames.

    Args:
        tube: frames of a token.
        colors: channels of a frame.
        masks: mask the same patches in all time steps: int(patches · (1 - mask_ratio)) are visible in each.
    """

    def __init__(self, *, tube: int = 2, colors: int = 1, masks: bool = False, **arguments: Any) -> None:
        self.masks = masks
        self.groups, rest = divmod(arguments["in_chans"], tube * colors)
        if rest or arguments.get("learned_pos_embed"):
            raise ValueError(
                f"tokens of {tube} frames with {colors} channels need a multiple of {tube * colors} channels "
                f"(in_chans={arguments['in_chans']}), and fixed positions (learned_pos_embed=false)"
            )
        super().__init__(**arguments)
        for table in (self.pos_embed, getattr(self, "decoder_pos_embed", self.pos_embed)):
            table.requires_grad_(False).copy_(self.table(table.shape[2], self.patch_embed.grid_size))

    def make_patch_embed(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> PatchEmbed:
        return GroupEmbed(self.groups, img_size, patch_size, in_chans, embed_dim)

    def table(self, dim: int, grid: tuple[int, int]) -> Tensor:
        """Returns the positions (1, T + N, dim). The grids of the time steps are below each other.

        Raises:
            ValueError: `dim` is not a multiple of 16.
        """
        if dim % 16:
            raise ValueError(f"the positions in time and space need a multiple of 16 channels, got {dim}")
        positions = np.meshgrid(*map(np.arange, (self.groups, grid[0] // self.groups, grid[1])), indexing="ij")
        widths = (4 * dim // 16, 6 * dim // 16, 6 * dim // 16)
        parts = [get_1d_sincos_pos_embed_from_grid(*pair) for pair in zip(widths, positions, strict=True)]
        table = torch.from_numpy(np.concatenate(parts[::-1], axis=1)).float()
        return torch.nn.functional.pad(table, (0, 0, self.num_prefix_tokens, 0)).unsqueeze(0)

    def resize_table(self, table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        return table if old_grid == new_grid else self.table(table.shape[2], new_grid).to(table)

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.masks:
            noise = torch.rand(x.shape[:2], device=x.device) if noise is None else noise
            steps = noise.unflatten(1, (self.groups, -1))
            is_drawn = (noise < 1) | noise.isinf()
            is_same = ((steps > 0) == (steps[:, :1] > 0)).all()  # the masked patches have ranks
            torch._assert_async(is_drawn.all() | is_same, "masks=true: the mask splits tubes; give masking=random")
            first = steps[:, 0]
            ranks = first.argsort(dim=1, stable=True).argsort(dim=1).float()  # noise may have equal numbers
            noise = ranks.repeat(1, self.groups)
            visible = self.groups * num_visible(first.shape[1], mask_ratio)
            mask_ratio = ratio_of(visible, x.shape[1])
        return super().random_masking(x, mask_ratio, noise, **context)  # type: ignore[misc]
