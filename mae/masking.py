"""Masking of patches. In all masks 0 (False) is visible and 1 (True) is masked.

The paper compares three strategies (section 4.1, table 1f and figure 6): random, block, grid.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mae.registry import Choice, find

# function() -> noise (N,) from PyTorch's default generator, and the mask ratio, for `MaskedAutoencoderViT.forward`
Sampler = tuple[Callable[[], Tensor], float]
GRID_RATIO = 0.75  # mask ratio of grid masking: one patch of every 2 x 2 is visible


def noise_from_mask(mask: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[Tensor, float]:
    """Converts a mask to the noise and the mask ratio for which `MaskedAutoencoderViT.random_masking` returns the mask.

    Args:
        mask: (B, N), (B, rows, columns) or per pixel (B, H, W); 1 or True is masked. A patch with a masked pixel is
            masked.
        grid_size: (rows, columns) of patches.
        patch_size: (rows, columns) of pixels in a patch.

    Returns:
        Noise (B, N), 0 at visible and 1 at masked patches, and the mask ratio.

    Raises:
        ValueError: the mask has another shape, or the number of visible patches differs between images.
    """
    rows, columns = grid_size
    height = rows * patch_size[0]
    width = columns * patch_size[1]
    masked = mask.bool()
    if masked.shape[1:] == (height, width):
        masked = masked.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).any(dim=4).any(dim=2)
    if masked.shape[1:] == (rows, columns):
        masked = masked.flatten(1)
    if masked.shape[1:] != (rows * columns,):
        raise ValueError(
            f"a mask must be (B, {rows * columns}), (B, {rows}, {columns}) or (B, {height}, {width}); "
            f"got {tuple(mask.shape)}"
        )
    visible = (~masked).sum(dim=1)
    count = int(visible[0])
    if not torch.all(visible == count):
        raise ValueError(
            f"all masks of a batch must leave the same number of patches visible, and these leave "
            f"{sorted(set(visible.tolist()))}"
        )
    return masked.float(), ratio_of(count, rows * columns)


def ratio_of(visible: int, num_patches: int) -> float:
    """Returns a mask ratio for which exactly `visible` of `num_patches` patches are visible.

    A strategy that shows whole rows or tubes passes it on: `num_visible(960, 0.8)` is 191, which splits a row.
    """
    # Half a patch is added, so that floating-point error does not change the truncation.
    return max(0.0, 1 - (visible + 0.5) / num_patches)


def shuffle(x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, int]:
    """Sorts the patches of each image by ascending noise. The first K patches are visible.

    Args:
        x: patches or tokens (B, N, D).
        noise: (B, N). Default: torch.rand. A forward pass samples no other random numbers, so that a seed results in
            the masks of the published code.

    Returns:
        ids_shuffle (B, N), and the number of visible patches K = int(N·(1 - mask_ratio)).

    Raises:
        ValueError: the ratio is outside [0, 1) or leaves no patch visible, or the noise has another shape.
    """
    B, N, _ = x.shape
    visible = num_visible(N, mask_ratio)
    if not 0 <= mask_ratio < 1 or visible == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves {visible} of {N} patches visible; it must be in [0, 1) and leave one"
        )
    if noise is None:
        noise = torch.rand(B, N, device=x.device)
    elif noise.shape != (B, N):
        raise ValueError(f"noise or mask must be given for {B} images of {N} patches; got {tuple(noise.shape)}")
    return torch.argsort(noise, dim=1, stable=True), visible


def check_masking(
    model: Any, mask: Tensor | None, patch_mask: Tensor, ids_restore: Tensor, latent: Any, context: Mapping[str, Any]
) -> None:
    """Checks that a model masks the patches of a given mask, and the patches without valid pixels.

    Args:
        model: its class may override `random_masking`.
        mask: the given mask, if any. The context has its noise.
        patch_mask: the mask of the model (B, N), 1 masked.
        ids_restore: (B, N), the index of each patch among the visible patches followed by the masked ones.
        latent: (B, T + K, D) of class tokens and visible patches. Without valid pixels, an override may return another.
        context: may contain `noise` (B, N), infinite for patches without valid pixels, and `valid`.

    Raises:
        ValueError: the model ignores the given mask.
        RuntimeError: a patch without valid pixels is visible. On a GPU, a later operation raises the error.
    """
    noise = context.get("noise")
    if noise is None:
        return
    if mask is not None and not torch.equal(patch_mask > 0, noise > 0):
        name = type(model).__name__
        raise ValueError(f"{name}.random_masking ignores the mask: call super().random_masking, which uses it")
    if "valid" in context:
        visible = model.patch_tokens(latent).shape[1]
        message = "random_masking leaves patches without valid pixels visible: keep their noise, which is infinite"
        torch._assert_async(((ids_restore >= visible) | noise.isfinite()).all(), message)


def block_mask(
    batch_size: int, grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Block-wise masks: large rectangles, as in BEiT (Bao et al. 2021, algorithm 1) -> bool (B, rows, columns).

    Blocks of at least 16 patches with aspect ratios from 3:10 to 10:3 are added until the mask ratio is reached. The
    last block masks only its first new patches, in row-major order, so that all images have the same number of visible
    patches.
    """
    rows, columns = grid_size
    num_masked = rows * columns - num_visible(math.prod(grid_size), mask_ratio)
    masks = torch.zeros(batch_size, rows, columns, dtype=torch.bool)
    for mask in masks:
        while (left := num_masked - int(mask.sum())) > 0:
            share, log_ratio, down, right = torch.rand(4, generator=generator).tolist()
            area = 16 + share * max(0, left - 16)
            ratio = math.exp((2 * log_ratio - 1) * math.log(10 / 3))
            height = min(rows, max(1, round(math.sqrt(area * ratio))))
            width = min(columns, max(1, round(math.sqrt(area / ratio))))
            top = int(down * (rows - height + 1))
            left_side = int(right * (columns - width + 1))
            block = torch.zeros_like(mask)
            block[top : top + height, left_side : left_side + width] = True
            mask.view(-1)[(block & ~mask).flatten().nonzero()[:left, 0]] = True
    return masks


def grid_mask(batch_size: int, grid_size: tuple[int, int], step: int = 2) -> Tensor:
    """Grid-wise masks: the first of every `step` x `step` patches is visible -> bool (B, rows, columns).

    The paper uses a step of 2.
    """
    mask = torch.ones(grid_size, dtype=torch.bool)
    mask[::step, ::step] = False
    return mask.expand(batch_size, -1, -1)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Returns the number of visible patches.

    The truncation includes floating-point error, as in the published code: 9 of 100 patches at a ratio of 0.9.
    """
    return int(num_patches * (1 - mask_ratio))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Selects tokens by index: (B, N, D) and (B, n) -> (B, n, D)."""
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def random_block_noise(grid_size: tuple[int, int], side: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise of random masks of blocks of side x side patches (Pixio, Yang et al. 2025) -> (N,).

    All patches of a block have the same noise, the rank of the block. The visible tokens are therefore in the order of
    their blocks, and row-major within a block. Blocks at the right and the bottom of the grid may be incomplete.
    """
    rows, columns = (math.ceil(length / side) for length in grid_size)
    # Ranks, because torch.rand may return equal numbers, with which two blocks could be visible in part.
    ranks = torch.rand(rows * columns, generator=generator).argsort().argsort().float().unflatten(0, (rows, columns))
    patches = ranks.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)
    return patches[: grid_size[0], : grid_size[1]].flatten()


def ratio_of_patches(block_noise: Tensor, mask_ratio: float) -> float:
    """Returns the mask ratio of patches for which int(blocks · (1 - mask_ratio)) blocks are visible.

    Args:
        block_noise: (N,), of `random_block_noise`.
        mask_ratio: fraction of masked blocks.
    """
    visible = num_visible(int(block_noise.max()) + 1, mask_ratio)
    return ratio_of(int((block_noise < visible).sum()), len(block_noise))


def sampler(
    masking: str,
    grid_size: tuple[int, int],
    mask_ratio: float,
    mask_block: int = 1,
    patch_size: tuple[int, int] = (16, 16),
    scores_visible: bool = False,
) -> Sampler:
    """Returns the masking strategy of training.

    Args:
        masking: a key of MASKING.
        grid_size: (rows, columns) of patches.
        mask_ratio: fraction of masked patches; must be GRID_RATIO for grid masking. With `mask_block`, fraction of
            masked blocks, of which int(blocks · (1 - mask_ratio)) are visible.
        mask_block: side of the blocks of random masking, in patches.
        patch_size: (rows, columns) of pixels in a patch, for the error message.
        scores_visible: the loss has visible patches, so that `mask_ratio` may be 0: then no patch is masked.

    Returns:
        A function that returns noise (N,) from PyTorch's default generator, and the mask ratio, both for
        `MaskedAutoencoderViT.forward`.

    Raises:
        ValueError: the strategy is unknown, the ratio masks all or none of the patches or blocks, the strategy is grid
            with another ratio than GRID_RATIO, or `mask_block` does not divide the grid or is not for this strategy.
    """
    if scores_visible and not mask_ratio:
        return partial(torch.rand, math.prod(grid_size)), mask_ratio
    check_ratio(math.prod(grid_size), mask_ratio)
    if mask_block > 1:
        if masking != "random":
            raise ValueError(f"mask_block={mask_block} is for masking=random")
        if any(length % mask_block for length in grid_size):
            sides = " x ".join(str(mask_block * side) for side in patch_size)
            raise ValueError(f"mask_block={mask_block}: the `input_size` is not a multiple of a block, {sides} pixels")
        num_blocks = math.prod(grid_size) // mask_block**2
        check_ratio(num_blocks, mask_ratio, "blocks")
        visible = num_visible(num_blocks, mask_ratio) * mask_block**2
        return partial(random_block_noise, grid_size, mask_block), ratio_of(visible, math.prod(grid_size))
    return find("masking", MASKING, masking).function(grid_size, mask_ratio)


def _random(grid_size: tuple[int, int], mask_ratio: float) -> Sampler:
    return partial(torch.rand, math.prod(grid_size)), mask_ratio


def _block(grid_size: tuple[int, int], mask_ratio: float) -> Sampler:
    return partial(_noise_of, partial(block_mask, 1, grid_size, mask_ratio), grid_size), mask_ratio


def _grid(grid_size: tuple[int, int], mask_ratio: float) -> Sampler:
    if mask_ratio != GRID_RATIO:
        raise ValueError(
            f"mask_ratio={mask_ratio:g}: masking=grid masks 3 of every 2x2 patches; give mask_ratio={GRID_RATIO}"
        )
    if min(grid_size) < 2:
        raise ValueError(f"masking=grid masks 3 of every 2x2 patches, and an image has {grid_size[0]} x {grid_size[1]}")
    mask = grid_mask(1, grid_size)
    return partial(_noise_of, partial(grid_mask, 1, grid_size), grid_size), noise_from_mask(mask, grid_size, (1, 1))[1]


# The strategies of --masking: function(grid_size, mask_ratio) -> Sampler
MASKING = {
    "random": Choice("", _random),
    "block": Choice("large rectangles as in BEiT", _block),
    "grid": Choice("three of every 2x2 patches", _grid),
}


def _noise_of(draw_mask: Callable[[], Tensor], grid_size: tuple[int, int]) -> Tensor:
    """Returns the noise (N,) of a mask: 0 at visible patches, and random ranks from 1 at masked ones.

    Random masked patches therefore replace visible ones without valid pixels. The ranks have a generator of their own,
    and leave the random numbers of the sample as they are.
    """
    noise = noise_from_mask(draw_mask(), grid_size, (1, 1))[0][0]
    ranks = torch.randperm(len(noise), generator=torch.Generator().manual_seed(torch.initial_seed() + 1))
    return noise * (1 + ranks)


def check_ratio(num_patches: int, mask_ratio: float, what: str = "patches") -> None:
    """Checks that there are visible and masked patches.

    Args:
        what: "patches", or "blocks" of them.

    Raises:
        ValueError: all or none of the patches would be masked.
    """
    visible = num_visible(num_patches, mask_ratio)
    if not 0 < visible < num_patches:
        raise ValueError(
            f"mask_ratio={mask_ratio:g} leaves {visible} of {num_patches} {what} visible: some must be visible, and "
            f"some masked"
        )


def require_random(noise: Tensor, method: str) -> None:
    """Checks that noise (B, N) orders the patches at random. The zeros and ones of a given mask do not.

    Args:
        method: the class that needs it, for the error.

    Raises:
        RuntimeError: it does not. On a GPU, a later operation raises the error, so that models can be compiled.
    """
    is_random = noise.masked_fill(noise.isinf(), 0).frac().any()  # infinite for patches without valid pixels
    torch._assert_async(is_random, f"{method}: give masking=random, mask_block=1, and no mask")
