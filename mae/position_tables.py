"""Position embeddings: the fixed 2-D sine-cosine table of the MAE, and interpolation of learned tables."""

from typing import Any

import numpy as np
import torch

from mae.sizes import Size, to_pair


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """Encodes positions (M,) as (M, embed_dim) float64: the sines of all frequencies, followed by their cosines.

    Raises:
        ValueError: `embed_dim` is odd.
    """
    return _encode(torch.from_numpy(np.asarray(pos, dtype=np.float64).reshape(-1)), embed_dim).numpy()


def _encode(positions: torch.Tensor, embed_dim: int) -> torch.Tensor:
    """Positions (M,) float64 -> (M, embed_dim) float64."""
    if embed_dim % 2:
        raise ValueError(f"a sine-cosine table needs an even number of channels for each axis, got {embed_dim}")
    half = embed_dim // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = torch.outer(positions, omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: Size, cls_token: bool = False) -> np.ndarray:
    """Returns the fixed table of He et al. 2021, appendix A.1 ("we use the sine-cosine version").

    The first half of the channels encodes the column (x), the second half the row (y). The published weights were
    trained with this order, those of mmpretrain with the opposite order.

    Args:
        embed_dim: number of channels, a multiple of 4.
        grid_size: (rows, columns) of the patch grid, or the side of a square grid.
        cls_token: add a row of zeros for the class token before the rows of the patches.

    Returns:
        (rows * columns [+ 1], embed_dim) float64, patches in row-major order.

    Raises:
        ValueError: `embed_dim` is not a multiple of 4.
    """
    return _sincos(embed_dim, to_pair(grid_size), int(cls_token), torch.device("cpu"), torch.float64).numpy()


def _sincos(
    embed_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the table (T + N, embed_dim). torch.compile traces this function without a graph break."""
    rows, columns = grid_size
    y, x = (torch.arange(length, dtype=torch.float64, device=device) for length in grid_size)
    y, x = (_encode(positions, embed_dim // 2).to(dtype) for positions in (y, x))
    table = torch.cat([x.expand(rows, -1, -1), y.unsqueeze(1).expand(-1, columns, -1)], dim=-1)
    return torch.nn.functional.pad(table.flatten(0, 1), (0, 0, num_prefix_tokens, 0))


def sincos_table(
    embed_dim: int,
    grid_size: tuple[int, int],
    num_prefix_tokens: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns `get_2d_sincos_pos_embed` after rows of zeros for the class tokens: float32 (1, T + N, embed_dim)."""
    return _sincos(embed_dim, grid_size, num_prefix_tokens, torch.device(device), torch.float32).unsqueeze(0)


def sincos_or(
    interpolated: torch.Tensor,
    table: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int,
) -> torch.Tensor:
    """Returns the sine-cosine table for `new_grid`, if `table` is the one for `old_grid`; else `interpolated`.

    The tables of mmpretrain are those of the paper with swapped halves: the row first.

    Args:
        interpolated: `table` for the new grid (1, T + N, D).
        table: (1, T + M, D), for M patches.
        old_grid: (rows, columns) of `table`.
        new_grid: (rows, columns) of the result.
        num_prefix_tokens: T.
    """
    dim = table.shape[-1]
    device = "cpu" if table.is_mps else table.device  # MPS has no fp64
    old, new = (sincos_table(dim, size, num_prefix_tokens, device).to(table) for size in (old_grid, new_grid))
    result = interpolated
    for shift in (dim // 2, 0):
        is_close = torch.isclose(table, old.roll(shift, -1), atol=1e-2)  # files of half precision, too
        result = torch.where(is_close.all(), new.roll(shift, -1), result)  # an `if` would wait for the GPU
    return result


def resize_pos_embed(
    pos_embed: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = False
) -> torch.Tensor:
    """Interpolates a learned table (1, T + N, D) bicubically to another patch grid.

    The rows of the T class tokens are unchanged.

    Args:
        old_grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the result.
        antialias: filter before a reduction, as DINOv2 with registers does.
    """
    if old_grid == new_grid:
        return pos_embed
    num_patches = old_grid[0] * old_grid[1]
    cls_rows = pos_embed[:, :-num_patches]
    patches = pos_embed[:, -num_patches:]
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(
        patches.float(), size=new_grid, mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([cls_rows, patches.to(pos_embed.dtype).flatten(2).transpose(1, 2)], dim=1)


def interpolate_pos_embed(
    model: Any,
    checkpoint_model: dict[str, torch.Tensor],
    old_grid: tuple[int, int] | None = None,
    name: str = "pos_embed",
) -> None:
    """Interpolates a position table of `checkpoint_model` in place to the patch grid of a model.

    Fine-tuning at 448 pixels needs it (He et al. 2021, section 4.1).

    Args:
        model: has `patch_embed.grid_size` and `num_prefix_tokens`; or `patch_embed.num_patches`, of a square grid, and
            `pos_embed`, as the models of the published code. Its `resize_table`, if any, interpolates.
        checkpoint_model: state dict; unchanged if it has no table of this name.
        old_grid: (rows, columns) of the patches in the checkpoint. Default: a square, as in published files.
        name: key of the table.

    Raises:
        ValueError: `old_grid` does not fit the table, or is not given for a table that is neither square nor of the
            size of the model.
    """
    if name not in checkpoint_model:
        return
    table = checkpoint_model[name]
    new_grid = getattr(model.patch_embed, "grid_size", None) or to_pair(round(model.patch_embed.num_patches**0.5))
    if hasattr(model, "num_prefix_tokens"):
        num_prefix_tokens = model.num_prefix_tokens
    else:
        num_prefix_tokens = model.pos_embed.shape[1] - model.patch_embed.num_patches
    num_patches = table.shape[1] - num_prefix_tokens
    if old_grid is None:
        side = round(num_patches**0.5)
        old_grid = (side, side) if side * side == num_patches else new_grid
    if old_grid[0] * old_grid[1] != num_patches:
        raise ValueError(
            f"the position table of the checkpoint has {num_patches} patches, which is not a square; "
            f"it can only be loaded into a model of the same size (input_size, patch_size)"
        )
    checkpoint_model[name] = getattr(model, "resize_table", resize_pos_embed)(table, old_grid, new_grid)
