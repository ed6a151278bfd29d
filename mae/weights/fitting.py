"""Loads weights into a model as far as they fit.

    weights = read("runs/a/checkpoint-99.pth")
    missing, unexpected, resized = fit(model, weights, (ENCODER,))

The caller decides which differences are errors: `mae.weights.loading` for each use of a file, and
`resume.restore_model` for a run that resumes.
"""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae import parallel
from mae.checkpoints.checkpoint import CheckpointError
from mae.position_tables import interpolate_pos_embed, sincos_table
from mae.sizes import Size, to_pair
from mae.weights import shapes
from mae.weights.candidates import some
from mae.weights.reading import Weights

logger = logging.getLogger(__name__)

PARTS = ("encoder", "decoder", "head")  # of a model
ENCODER, DECODER, HEAD = PARTS
TABLES = {"pos_embed", "decoder_pos_embed"}  # position tables of an autoencoder


class Fit(NamedTuple):
    """The names of the tensors that `fit` did not load, and of those that it changed.

    A tensor that has another shape in the file is both missing and unexpected.
    """

    missing: set[str]  # of the model; they keep their values
    unexpected: set[str]  # of the file
    resized: set[str]  # position tables for another patch grid, and a patch projection for other channels


def part_of(name: str) -> str:
    """Returns the part of a model to which a tensor belongs. The norms belong to the encoder."""
    if name.startswith("decoder_") or name == "mask_token":
        return DECODER
    return HEAD if name.startswith("head.") else ENCODER


def fit(
    model: Any, weights: Weights, parts: Collection[str] = PARTS, adapt_input: str | None = None, exact: bool = False
) -> Fit:
    """Loads the tensors of parts of a model whose names and shapes are those of the model.

    Position tables are interpolated to the patch grid of the model before. The caller decides which differences are
    errors; `require_fit` raises them.

    Args:
        parts: some of ENCODER, DECODER and HEAD. Tensors of other parts are ignored.
        adapt_input: treatment of the patch projection if the file has a different number of channels. None: it has
            another shape. "error"; "mean": each channel gets the mean of the channels of the file; "repeat": the
            channels of the file, repeated; "skip": the projection keeps its random weights. "mean" and "repeat" are
            scaled so that the sum over channels is unchanged.
        exact: do not change any tensor, to resume a run. The caller compares the settings.

    Raises:
        CheckpointError: the models differ in what the shapes do not show: the number of attention heads, or the grid
            or the kind of the positions; or the file has other channels.
    """
    ours = {name: tensor for name, tensor in model.state_dict().items() if part_of(name) in parts}
    tensors = {name: tensor for name, tensor in weights.tensors.items() if part_of(name) in parts}
    resized = set[str]()
    if not exact:
        if difference := _difference_of_heads(model, weights.settings):
            raise CheckpointError(f"{weights.origin} has {difference}")
        channels = [group[shapes.PATCHES].shape[1] for group in (tensors, ours) if shapes.PATCHES in group]
        if adapt_input and len(set(channels)) > 1:  # an encoder of the user's code may have no patch projection
            resized |= _adapt_input(weights, tensors, channels[1], adapt_input)
        resized |= _adapt_positions(model, weights, tensors)
    loaded = {name: tensors[name] for name in ours.keys() & tensors.keys() if tensors[name].shape == ours[name].shape}
    if parallel.is_sharded(model):
        loaded = {name: parallel.placed_as(tensor, ours[name]) for name, tensor in loaded.items()}
    model.load_state_dict(loaded, strict=False)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad} & ours.keys()
    if frozen := frozen - loaded.keys() - TABLES:
        logger.warning(f"{weights.origin} has no {some(frozen)}: they are frozen, with their initial values")
    return Fit(ours.keys() - loaded.keys(), tensors.keys() - loaded.keys(), resized)


def _difference_of_heads(model: Any, settings: Mapping[str, Any]) -> str:
    """Returns the number of attention heads that a file records, if the model has another; else ""."""
    for name, blocks in (("num_heads", "blocks"), ("decoder_num_heads", "decoder_blocks")):
        if settings.get(name) is not None and hasattr(model, blocks):
            heads = getattr(model, blocks)[0].attn.num_heads
            if heads != settings[name]:
                return f"{name} {settings[name]}, and the model has {heads}"
    return ""


def _adapt_input(weights: Weights, tensors: dict[str, Tensor], channels: int, how: str) -> set[str]:
    """Adapts the patch projection (D, c, p, p) to a number of channels, in place.

    Returns:
        The name of the projection if it has changed.
    """
    name = shapes.PATCHES
    projection = tensors[name]
    if how == "error":
        raise CheckpointError(
            f"{weights.origin} is for images of {projection.shape[1]} channels, the model for {channels}: give "
            f"adapt_input=mean, repeat or skip"
        )
    if how == "skip":
        del tensors[name], tensors["patch_embed.proj.bias"]
        return set()
    if how == "repeat" and channels % projection.shape[1]:
        logger.warning(
            f"adapt_input=repeat: {channels} channels are no multiple of the {projection.shape[1]} of "
            f"{weights.origin}, so that some of these count more than others"
        )
    taken = projection.mean(dim=1, keepdim=True) if how == "mean" else projection
    tensors[name] = taken[:, torch.arange(channels) % taken.shape[1]] * (projection.shape[1] / channels)
    return {name}


def _adapt_positions(model: Any, weights: Weights, tensors: dict[str, Tensor]) -> set[str]:
    """Interpolates position tables to the patch grid of the model, in place.

    Returns:
        The names of the tables that have changed.
    """
    ours = model.state_dict()
    names = [name for name in TABLES & tensors.keys() & ours.keys() if tensors[name].ndim == 3]
    before = {name: tensors[name] for name in names}
    if not before or weights.tensors["cls_token"].shape != ours["cls_token"].shape:  # the caller names other shapes
        return set()
    is_autoencoder = hasattr(model, "learned_pos_embed")
    if is_autoencoder and weights.learned_pos_embed and not model.learned_pos_embed:
        raise CheckpointError(f"{weights.origin} has learned positions: give learned_pos_embed=true")
    size = weights.settings.get("input_size")
    recorded = grid = _recorded_grid(size, {name: tensor.shape for name, tensor in weights.tensors.items()})
    if model.encoder_name and weights.settings.get("encoder") and size:  # the user's code determines its grid
        grid = model.patch_embed.grid_of(*to_pair(size))
    if is_autoencoder and not model.learned_pos_embed:
        return {name for name in before if _adapt_fixed_table(model, weights, tensors, name, grid)}
    if not is_autoencoder:
        table = before["pos_embed"]
        count = model.num_prefix_tokens
        expected = count + math.prod(recorded) if recorded else model.pos_embed.shape[1]
        if table.shape[1] != expected and (recorded or _lacks_class_positions(model, weights)):
            table = torch.cat([torch.zeros_like(table[:, :count]), table], dim=1)
            before["pos_embed"] = tensors["pos_embed"] = table
    if grid != model.patch_embed.grid_size:
        for name in before:
            interpolate_pos_embed(model, tensors, grid, name)
    return {name for name, table in before.items() if tensors[name] is not table}


def _recorded_grid(size: Size | None, shape_of: Mapping[str, torch.Size]) -> tuple[int, int] | None:
    """Returns the (rows, columns) of patches of the recorded image size, if the position table has this length.

    None: it has another, as of a file that was fine-tuned at another size; or the file does not record its image size.
    """
    if not size or not {"pos_embed", shapes.PATCHES} <= shape_of.keys():
        return None
    height, width = to_pair(size)
    p, q = shape_of[shapes.PATCHES][2:]
    grid = (height // p, width // q)
    length = shape_of["pos_embed"][1]
    return grid if math.prod(grid) in (length, length - shape_of["cls_token"][1]) else None


def _lacks_class_positions(model: Any, weights: Weights) -> bool:
    """Whether a position table of another length than that of the model has no positions of the class tokens.

    timm writes such tables with no_embed_class.

    Raises:
        CheckpointError: the table fits two grids. The file does not record its own.
    """
    length = weights.tensors["pos_embed"].shape[1]
    count = model.num_prefix_tokens
    has_square_of_rest = _is_square(length - count)
    if length != model.pos_embed.shape[1] - count:
        return _is_square(length) and not has_square_of_rest
    if has_square_of_rest and length > count:
        side = math.isqrt(length - count)
        rows, columns = model.patch_embed.grid_size
        raise CheckpointError(
            f"{weights.origin} records no input_size: its {length} positions are of {side} x {side} patches and class "
            f"tokens, or of {rows} x {columns} patches alone"
        )
    return True


def _adapt_fixed_table(
    model: Any, weights: Weights, tensors: dict[str, Tensor], name: str, grid: tuple[int, int] | None
) -> bool:
    """Adapts a table of fixed positions in place, and returns whether its grid was another.

    A table that does not fit its grid is removed: the model computes its own.
    """
    table = tensors[name]
    ours = model.state_dict()[name]
    grid = grid or _assumed_grid(table, ours.shape, model)
    length = ours.shape[1] if grid == model.grid_size else model.num_prefix_tokens + math.prod(grid)
    if table.shape == (1, length, ours.shape[2]) and min(grid) > 0:
        tensors[name] = model.resized(table.to(ours.dtype), model.grid_size, grid)
        return grid != model.grid_size
    logger.warning(f"{weights.origin}: its {name} {tuple(table.shape)} is not read, but computed")
    del tensors[name]
    return False


def _assumed_grid(table: Tensor, shape: torch.Size, model: Any) -> tuple[int, int]:
    """Returns the patch grid of a position table whose file records none: a square, as in published files.

    It is that of the model if there is no square, or if the table is the sine-cosine table of the model, of `shape`.
    """
    grid = model.grid_size
    count = model.num_prefix_tokens
    side = math.isqrt(max(table.shape[1] - count, 0))
    if side**2 != table.shape[1] - count or not side:
        return grid
    is_same = table.shape == shape and torch.allclose(table.float(), sincos_table(shape[2], grid, count), atol=1e-2)
    return grid if is_same else (side, side)


def _is_square(number: int) -> bool:
    return math.isqrt(max(number, 0)) ** 2 == number
