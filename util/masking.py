"""Which patches are removed. Everywhere: 0 (False) is kept, 1 (True) is removed."""

import torch
from torch import Tensor


def noise_from_mask(mask: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[Tensor, int]:
    """Turns a caller's mask into noise for `MaskedAutoencoderViT.random_masking`, and the number of patches it keeps.

    Args:
        mask: (B, N), (B, rows, columns) or per pixel (B, H, W); 1 or True is removed, and one removed pixel removes
            its whole patch.
        grid_size: (rows, columns) of patches.
        patch_size: (rows, columns) of pixels in a patch.

    Returns:
        Noise (B, N), 0 at kept and 1 at removed patches, and the number K of patches kept in each image.

    Raises:
        ValueError: the mask has another shape, keeps nothing, or keeps different numbers of patches in one batch.
    """
    rows, columns = grid_size
    height, width = rows * patch_size[0], columns * patch_size[1]
    removed = mask.bool()
    if removed.shape[1:] == (height, width):
        removed = removed.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).any(dim=4).any(dim=2)
    if removed.shape[1:] == (rows, columns):
        removed = removed.flatten(1)
    if removed.shape[1:] != (rows * columns,):
        raise ValueError(
            f"a mask must be (B, {rows * columns}), (B, {rows}, {columns}) or (B, {height}, {width}); "
            f"got {tuple(mask.shape)}"
        )
    kept = (~removed).sum(dim=1)
    num_kept = int(kept[0])
    if not torch.all(kept == num_kept):
        raise ValueError(f"all masks of a batch must keep as many patches; these keep {sorted(set(kept.tolist()))}")
    if num_kept == 0:
        raise ValueError("a mask must keep at least one patch")
    return removed.float(), num_kept
