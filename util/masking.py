"""Which patches are masked. Everywhere: 0 (False) is visible, 1 (True) is masked.

The paper compares three ways to choose them (section 4.1, table 1f and figure 6): random, block, grid.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

MASKING_CHOICES = ("random", "block", "grid")
GRID_RATIO = 0.75  # of grid masking: one patch of every 2 x 2 is visible


def noise_from_mask(mask: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[Tensor, float]:
    """Turns a mask into the noise and the ratio for which `MaskedAutoencoderViT.random_masking` masks its patches.

    Args:
        mask: (B, N), (B, rows, columns) or per pixel (B, H, W); 1 or True is removed, and one removed pixel removes
            its whole patch.
        grid_size: (rows, columns) of patches.
        patch_size: (rows, columns) of pixels in a patch.

    Returns:
        Noise (B, N), 0 at visible and 1 at masked patches, and the mask ratio.

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
    count = int(kept[0])
    if not torch.all(kept == count):
        raise ValueError(f"all masks of a batch must keep as many patches; these keep {sorted(set(kept.tolist()))}")
    if count == 0:
        raise ValueError("a mask must keep at least one patch")
    # Half a patch more than the mask keeps, against the truncation of floating-point error in `num_kept`.
    return removed.float(), max(0.0, 1 - (count + 0.5) / (rows * columns))


def shuffle(x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, int]:
    """The order of an image's patches by ascending noise, and how many of them, from the first on, are kept.

    Args:
        x: patches or tokens (B, N, D).
        noise: (B, N), drawn by torch.rand unless given. It is the only random number a forward pass takes, so that a
            seed keeps the same patches as in the published code.

    Returns:
        ids_shuffle (B, N) and K = int(N·(1 - mask_ratio)).

    Raises:
        ValueError: the ratio is outside [0, 1) or keeps no patch, or the noise has another shape.
    """
    B, N, _ = x.shape
    kept = num_kept(N, mask_ratio)
    if not 0 <= mask_ratio < 1 or kept == 0:
        raise ValueError(f"mask_ratio {mask_ratio} keeps {kept} of {N} patches; it must be in [0, 1) and keep one")
    if noise is None:
        noise = torch.rand(B, N, device=x.device)
    elif noise.shape != (B, N):
        raise ValueError(f"noise or mask must be given for {B} images of {N} patches; got {tuple(noise.shape)}")
    return torch.argsort(noise, dim=1, stable=True), kept


def random_mask(
    batch_size: int, grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Patches drawn without replacement, as the model itself draws them -> bool (B, rows, columns)."""
    noise = torch.rand(batch_size, math.prod(grid_size), generator=generator)
    removed = noise.argsort(dim=1).argsort(dim=1) >= num_kept(math.prod(grid_size), mask_ratio)
    return removed.unflatten(1, grid_size)


def block_mask(
    batch_size: int, grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Large random rectangles, as BEiT draws them (Bao et al. 2021, algorithm 1) -> bool (B, rows, columns).

    Blocks of 16 patches at least and sides of 3:10 to 10:3 are added until the share is reached; the last one is cut
    off row by row, so that every image keeps as many patches.
    """
    rows, columns = grid_size
    num_removed = rows * columns - num_kept(math.prod(grid_size), mask_ratio)
    masks = torch.zeros(batch_size, rows, columns, dtype=torch.bool)
    for mask in masks:
        while (left := num_removed - int(mask.sum())) > 0:
            share, log_ratio, down, right = torch.rand(4, generator=generator).tolist()
            area = 16 + share * max(0, left - 16)
            ratio = math.exp((2 * log_ratio - 1) * math.log(10 / 3))
            height = min(rows, max(1, round(math.sqrt(area * ratio))))
            width = min(columns, max(1, round(math.sqrt(area / ratio))))
            top, start = int(down * (rows - height + 1)), int(right * (columns - width + 1))
            block = torch.zeros_like(mask)
            block[top : top + height, start : start + width] = True
            new = (block & ~mask).flatten().nonzero()[:left, 0]
            mask.view(-1)[new] = True
    return masks


def grid_mask(batch_size: int, grid_size: tuple[int, int], step: int = 2) -> Tensor:
    """Keeps one patch of every `step` x `step`, the first, of four in the paper -> bool (B, rows, columns)."""
    mask = torch.ones(grid_size, dtype=torch.bool)
    mask[::step, ::step] = False
    return mask.expand(batch_size, -1, -1)


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay. The truncation of floating-point error (100 patches at .9 keep 9) is the published one."""
    return int(num_patches * (1 - mask_ratio))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Of each image's tokens (B, N, D) those with the numbers (B, n), in their order: (B, n, D)."""
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def sampler(masking: str, grid_size: tuple[int, int], mask_ratio: float) -> tuple[Callable[[], Tensor], float]:
    """How training chooses the masked patches of an image.

    Args:
        masking: one of MASKING_CHOICES.
        grid_size: (rows, columns) of patches.
        mask_ratio: of random and block masking.

    Returns:
        A function that returns noise (N,) from PyTorch's default generator, and the mask ratio, both for
        `MaskedAutoencoderViT.forward`.

    Raises:
        ValueError: the ratio masks all or none of the patches, or grid masking has another ratio than its own.
    """
    check_ratio(math.prod(grid_size), mask_ratio)
    if masking == "random":
        return partial(torch.rand, math.prod(grid_size)), mask_ratio
    if masking == "block":
        return partial(_noise_of, partial(block_mask, 1, grid_size, mask_ratio), grid_size), mask_ratio
    if mask_ratio != GRID_RATIO:
        raise ValueError(f"--mask_ratio {mask_ratio:g}: --masking grid masks three of every 2x2 patches; leave it out")
    mask = grid_mask(1, grid_size)
    return partial(_noise_of, partial(grid_mask, 1, grid_size), grid_size), noise_from_mask(mask, grid_size, (1, 1))[1]


def _noise_of(draw_mask: Callable[[], Tensor], grid_size: tuple[int, int]) -> Tensor:
    return noise_from_mask(draw_mask(), grid_size, (1, 1))[0][0]


def check_ratio(num_patches: int, mask_ratio: float) -> None:
    """What training needs: patches that are visible, and patches that are masked.

    Raises:
        ValueError: all or none of the patches would be masked.
    """
    if num_patches < 2:
        raise ValueError("the images have a single patch: give a larger --input_size, or a smaller --patch_size")
    kept = num_kept(num_patches, mask_ratio)
    if kept == num_patches:
        raise ValueError(
            f"--mask_ratio {mask_ratio:g} masks none of the {num_patches} patches, and only masked ones have a loss: "
            f"nothing would be trained; give --mask_ratio 0.75"
        )
    if kept == 0:
        most = next(share / 1000 for share in range(999, 0, -1) if num_kept(num_patches, share / 1000))
        raise ValueError(
            f"--mask_ratio {mask_ratio:g} leaves none of the {num_patches} patches visible: give --mask_ratio {most:g} "
            f"or less"
        )
