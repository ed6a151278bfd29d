"""Loads the weights of a file into models, and checks that they fit."""

import logging
import math
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae import parallel
from mae.checkpoints.checkpoint import CheckpointError
from mae.cli.advice import Remedy
from mae.positions import interpolate_pos_embed, sincos_table, to_pair
from mae.settings.choices import CLASSIFICATION
from mae.weights import model_zoo, shapes
from mae.weights.candidates import some
from mae.weights.reading import Weights, read

logger = logging.getLogger(__name__)

TABLES = {"pos_embed", "decoder_pos_embed"}  # position tables of an autoencoder
MODULES = {  # of models_mae.MaskedAutoencoderViT
    "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "mask_token", "decoder_pos_embed", "decoder_embed",
    "decoder_blocks", "decoder_norm", "decoder_pred",
}  # fmt: skip
ADDED_TO_BLOCK = re.compile(  # to models_vit.Block
    r"(decoder_)?blocks\.\d+\.(?!(norm[12]|attn\.(qkv|proj|q_norm|k_norm)|mlp\.fc[12])\.)"
)
OWN_MODULES = ("models_mae", "models_vit", "mae.inference.classes")  # a user's class may have the name of one of theirs


def init_mae(model: Any, file: Weights) -> None:
    """Loads the weights of a file into a `MaskedAutoencoderViT`: all of them, or the encoder only.

    Raises:
        CheckpointError: weights of the encoder are missing, or there are unexpected names or shapes; or the file has
            learned positions, and the model has fixed positions.
    """
    if file.kind in (model_zoo.CLASSIFIER, model_zoo.SEGMENTER):
        raise CheckpointError(
            f"{file.source} is a {file.kind}: give the weights of an autoencoder or of an encoder, such as those from "
            f"which it was trained"
        )
    own = {kind.__name__ for kind in type(model).__mro__ if kind.__module__ not in OWN_MODULES}
    name = file.settings.get("model_class")
    if name and re.split("[.:]", name)[-1] not in own:
        logger.warning(f"{file.source} was trained with the class {name}, and this model lacks its changes")
    ours, weights = model.state_dict(), _known(file, model)
    may_lack = _added(ours.keys() - weights.keys(), in_blocks=True)
    if may_lack:
        logger.warning(f"{file.source} has no {some(may_lack)}: they keep their initial values")
    _require_cls_tokens(file, model)
    if model.learned_pos_embed:
        for name in TABLES & weights.keys():
            interpolate_pos_embed(model, weights, _grid_of(file, model), name)
    elif file.learned_pos_embed:
        raise CheckpointError(f"{file.source} has learned positions", Remedy({"learned_pos_embed": True}))
    else:  # the model computes its tables, so a file may lack them, or have them in a different size
        may_lack |= TABLES
        for name in TABLES & weights.keys() & ours.keys():
            table, shape, own = weights.pop(name), ours[name].shape, model.grid_size
            grid = _grid_of(file, model) or _assumed_grid(table, shape, model)
            expected = shape if grid == own else (1, file.num_cls_tokens + math.prod(grid), shape[2])
            if table.shape == expected and min(grid) > 0:
                weights[name] = model.resized(table.to(ours[name].dtype), own, grid)
            else:
                logger.warning(f"{file.source}: its {name} {tuple(table.shape)} is not read, but computed")
    decoder = {name for name in ours if name.startswith("decoder_") or name == "mask_token"} - may_lack
    if ours.keys() - weights.keys() - may_lack == decoder:
        logger.warning(f"{file.source} contains an encoder only; the decoder starts from random weights")
        may_lack |= decoder
    _require(file, model, weights, may_lack)
    model.load_state_dict({k: parallel.placed_as(v, ours[k]) for k, v in weights.items()}, strict=False)
    logger.info(f"weights from {file.source}")


def load_encoder(
    model: Any,
    file: Weights,
    adapt_input: str = "error",
    classes: Sequence[str] | None = None,
    task: str = CLASSIFICATION,
    has_ids: bool = False,
) -> bool:
    """Loads an encoder into a classifier, and the head if the file has a head with the same classes.

    The position table is interpolated to the patch grid of the model.

    Args:
        model: a `models_vit.VisionTransformer`.
        adapt_input: treatment of the patch projection if the file has a different number of channels: "error"; "mean":
            each channel gets the mean of the channels of the file; "repeat": the channels of the file, repeated;
            "skip": the projection keeps its random weights. "mean" and "repeat" are scaled so that the sum over
            channels is unchanged.
        classes: the classes of the model. A head of other classes, or of other features, is not loaded. None: no head
            is loaded.
        task: the task of the model (--task). A head of a different task is not loaded.
        has_ids: the classes are integer ids, which count the outputs of a head without names.

    Returns:
        Whether the head was loaded.

    Raises:
        CheckpointError: weights are missing, or there are unexpected names or shapes.
    """
    ours = model.state_dict()
    pooled = "fc_norm.weight" in ours
    weights = {
        key: value
        for key, value in _known(file, model).items()
        if not key.startswith("decoder_") and key != "mask_token" and not (pooled and key.startswith("norm."))
    }
    head, own = ({key for key in tensors if key.startswith("head.")} for tensors in (weights, ours))
    names = file.settings.get("label_names") or ()  # of another library, perhaps in another language
    recorded = file.settings.get("classes") or (names if set(names) & set(classes or ()) else None)
    if has_ids and recorded is None:
        recorded = [str(number) for number in range(file.num_classes)]
    same = classes is not None and recorded in (None, list(classes))
    same = same and file.settings.get("task", CLASSIFICATION) == task
    same = same and pooled == ("fc_norm.weight" in file.tensors)
    fits = bool(head) and same and head == own and not _reshaped(weights, ours) & head
    if not fits:
        weights = {key: value for key, value in weights.items() if key not in head}
    _adapt_input(file, weights, model, adapt_input)
    _fit_positions(file, weights, model)
    may_lack = {"fc_norm.weight", "fc_norm.bias", *own}
    if model.encoder_name != file.settings.get("encoder"):  # weights that did not have this mix-in
        added = _added(ours.keys() - weights.keys() - may_lack, in_blocks=True)
        if added:
            logger.warning(f"{file.source} has no {some(added)}: they keep their initial values")
        may_lack |= added
    if adapt_input == "skip":
        may_lack |= {key for key in ours if key.startswith("patch_embed.")}
    _require(file, model, weights, may_lack)
    model.load_state_dict(weights, strict=False)
    of_head = ", including the head" if fits else ", without its head" if head else ""
    logger.info(f"weights from {file.source} ({file.kind}){of_head}")
    return fits


def read_classifier(name: Path | str, kind: str = model_zoo.CLASSIFIER) -> Weights:
    """Reads a file that must contain a classifier, or with the kind SEGMENTER a segmentation model.

    Raises:
        CheckpointError: as in `read`, or the file is of another kind or contains several heads.
    """
    file = read(name)
    _require_one_head(file)
    if file.kind != kind:
        article = "an" if file.kind.startswith("e") else "a"
        head, example = {
            model_zoo.CLASSIFIER: ("classification", "a fine-tuned file, such as mae_finetuned_vit_base"),
            model_zoo.SEGMENTER: ("segmentation", "a checkpoint of main_segment.py"),
        }[kind]
        raise CheckpointError(
            f"{name} contains {article} {file.kind}, which has no {head} head: train a head (--finetune), or give "
            f"{example}"
        )
    return file


def load_classifier(model: Any, file: Weights) -> None:
    """Loads all weights of a classifier. The position table is interpolated to the patch grid of the model.

    Raises:
        CheckpointError: the file has another architecture or several heads.
    """
    _require_one_head(file)
    weights = dict(file.tensors)
    patches = _fit_positions(file, weights, model)
    _require(file, model, weights)
    model.load_state_dict(weights)
    own = model.patch_embed.num_patches
    if own != patches and "input_size" not in file.settings:
        logger.warning(
            f"{file.source} is for images of {patches} patches, and these have {own}: "
            "positions are interpolated; give the input_size that it was trained with"
        )


def _fit_positions(file: Weights, weights: dict[str, Tensor], model: Any) -> int:
    """Interpolates the position table to the patch grid of the model, in place.

    Where the table has no positions of the class tokens (timm's no_embed_class), positions of zeros are added.

    Returns:
        The number of patches in the table of the file.

    Raises:
        CheckpointError: the table fits two grids, and the file does not record its own.
    """
    _require_cls_tokens(file, model)
    if "pos_embed" not in weights:  # of an encoder of the user's code
        return model.patch_embed.num_patches
    table, count = weights["pos_embed"], file.num_cls_tokens
    length, own = table.shape[1], model.pos_embed.shape[1]
    is_short = length == own - count or (length != own and _is_square(length) and not _is_square(length - count))
    if file.grid_size is not None:
        is_short = math.prod(file.grid_size) == length
    elif length == own - count and length > count and _is_square(length - count):
        side, (rows, columns) = math.isqrt(length - count), model.patch_embed.grid_size
        raise CheckpointError(
            f"{file.source} records no input_size: its {length} positions are of {side} x {side} patches and class "
            f"tokens, or of {rows} x {columns} patches alone; save it with its size: "
            "torch.save({'model': weights, 'args': {'input_size': [HEIGHT, WIDTH]}}, FILE)"
        )
    if is_short:
        weights["pos_embed"] = torch.cat([torch.zeros_like(table[:, :count]), table], dim=1)
    patches = weights["pos_embed"].shape[1] - count
    interpolate_pos_embed(model, weights, _grid_of(file, model))
    return patches


def _grid_of(file: Weights, model: Any) -> tuple[int, int] | None:
    """Returns the patch grid of the position table of a file. An encoder of the user's code determines its own."""
    if model.encoder_name and file.settings.get("encoder") and file.settings.get("input_size"):
        return model.patch_embed.grid_of(*to_pair(file.settings["input_size"]))
    return file.grid_size


def _assumed_grid(table: Tensor, shape: torch.Size, model: Any) -> tuple[int, int]:
    """Returns the patch grid of a position table whose file records none: a square, as in published files.

    It is that of the model if there is no square, or if the table is the sine-cosine table of the model, of `shape`.
    """
    own, count = model.grid_size, model.num_prefix_tokens
    side = math.isqrt(max(table.shape[1] - count, 0))
    if side**2 != table.shape[1] - count or not side:
        return own
    is_own = table.shape == shape and torch.allclose(table.float(), sincos_table(shape[2], own, count), atol=1e-2)
    return own if is_own else (side, side)


def _is_square(number: int) -> bool:
    return math.isqrt(max(number, 0)) ** 2 == number


def _require_one_head(file: Weights) -> None:
    if shapes.FIRST_OF_HEADS in file.tensors:
        raise CheckpointError(
            f"{file.source} has several heads; give probe.pth in the same folder, which has the best head"
        )


def _require_cls_tokens(file: Weights, model: Any) -> None:
    """Other numbers of tokens are errors before positions are interpolated."""
    _require(file, model, {"cls_token": file.tensors["cls_token"]}, model.state_dict().keys() - {"cls_token"})


def _adapt_input(file: Weights, weights: dict[str, Tensor], model: nn.Module, how: str) -> None:
    """Adapts the patch projection (D, c, p, p) to the number of channels of the model, in place."""
    name, ours = shapes.PATCHES, model.state_dict()
    if name not in ours or name not in weights:  # of an encoder of the user's code
        return
    theirs, shape = weights[name], ours[name].shape
    if theirs.shape[1] == shape[1]:
        return
    if how == "error":
        choices = (
            "choose {} (each channel starts from their mean), repeat (from their channels in turn) or skip (the patch "
            "projection starts from random weights)"
        )
        raise CheckpointError(
            f"{file.source} is for images of {theirs.shape[1]} channels, the model for {shape[1]}",
            Remedy({"adapt_input": "mean"}, choices),
        )
    if how == "skip":
        del weights[name], weights["patch_embed.proj.bias"]
        return
    source = theirs.mean(dim=1, keepdim=True) if how == "mean" else theirs
    weights[name] = source[:, torch.arange(shape[1]) % source.shape[1]] * (theirs.shape[1] / shape[1])


def _reshaped(weights: dict[str, Tensor], ours: dict[str, Tensor]) -> set[str]:
    return {name for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape}


def _added(names: Iterable[str], in_blocks: bool = False) -> set[str]:
    """Returns the names of the weights that the user's code adds to a model, and with `in_blocks` to its blocks."""
    return {
        name for name in names
        if name.partition(".")[0] not in MODULES or (in_blocks and ADDED_TO_BLOCK.match(name))
    }  # fmt: skip


def _known(file: Weights, model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a file without those that a subclass has added, and the model does not have."""
    name = file.settings.get("model_class")
    added = _added(file.tensors.keys() - model.state_dict().keys()) if name else set()
    dropped = {key for key in added if not key.startswith("decoder_")}
    if dropped:
        logger.warning(f"{file.source} was trained with the class {name}: {some(dropped)} are not loaded")
    return {key: value for key, value in file.tensors.items() if key not in added}


def _require(file: Weights, model: Any, weights: dict[str, Tensor], may_lack: Set[str] = frozenset()) -> None:
    """Raises CheckpointError, with names and a remedy, if weights are missing, unexpected or of another shape.

    The numbers of attention heads, which shapes do not show, must be those that the file records.
    """
    for name, blocks in (("num_heads", "blocks"), ("decoder_num_heads", "decoder_blocks")):
        if name in file.settings and hasattr(model, blocks):
            heads = getattr(model, blocks)[0].attn.num_heads
            if heads != file.settings[name]:
                raise CheckpointError(f"{file.source} has {name} {file.settings[name]}, and the model has {heads}")
    ours = model.state_dict()
    missing, unexpected = ours.keys() - weights.keys() - may_lack, weights.keys() - ours.keys()
    reshaped = _reshaped(weights, ours)
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
            differing = _differing(file, ours)
            if "fc_norm.weight" not in missing | unexpected:
                differing.pop("global_pool", None)
            if not any(name.startswith("head.") for name in missing | unexpected):
                differing.pop("head", None)
            raise CheckpointError(f"{file.source} ({file.kind}): {count} {problem} ({some(names)})", Remedy(differing))


def _differing(file: Weights, ours: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the settings of the model of a file that differ from those of our model, for a remedy."""
    theirs, expected = shapes.determined(file.tensors), shapes.determined(ours)
    # Positions are interpolated, and the data determine the number of classes.
    names = [name for name in theirs if name not in ("input_size", "nb_classes") and expected.get(name) is not None]
    different = {name: theirs[name] for name in names if theirs[name] not in (None, expected[name])}
    if (architecture := shapes.width_and_depth(file.tensors)) != shapes.width_and_depth(ours):
        row = model_zoo.TABLE.get(file.source)
        recorded = row.model if row else file.settings.get("model", "(of {1} blocks, {0} wide)".format(*architecture))
        model = f"{'mae_' * ('mask_token' in ours)}{str(recorded).removeprefix('mae_')}"
        different = {"model": model, **different}
    return different
