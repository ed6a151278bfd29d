"""Maps of an encoder: attention of the class token or of a probe, features of patches, their principal components."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mae.inference.classes import NOT_IN_FEATURES
from mae.inference.model import Images, Model, to_bytes, to_rgb


@torch.inference_mode()
def attention(model: Model, images: Images, block: int = -1) -> Tensor:
    """Returns the attention weights of the class token over the patches.

    Of several class tokens, the weights are pooled as `class_features` pools the tokens: their mean, or those of the
    first one beside registers.

    Args:
        images: as in `ModelMixin.prepare`.
        block: index of the block of the encoder. Default: the last block.

    Returns:
        (B, heads, rows, columns) of the patch grid. The weights of a head sum to 1 together with the weights of the
        class tokens and registers, which are omitted.

    Raises:
        ValueError: the encoder has no such block.
    """
    x = model.prepare(images)
    T = model.num_prefix_tokens
    with model.evaluating(*NOT_IN_FEATURES):
        _, (maps,) = model.get_intermediate_layers(x, [block], norm=False, return_attention=True)
    rows = maps[:, :, :T, T:]
    weights = model.class_features(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    return _weights_of_patches(model, weights, x)


@torch.inference_mode()
def query_attention(model: Model, images: Images) -> Tensor:
    """Returns the attention weights of the queries of an attentive probe over the patches.

    Args:
        images: as in `ModelMixin.prepare`.

    Returns:
        (B, Q, rows, columns) of the patch grid. The weights of a query sum to 1.

    Raises:
        AttributeError: the model has no attentive probe.
    """
    x = model.prepare(images)
    head: Any = model.head
    with model.evaluating():
        return _weights_of_patches(model, head.pool.maps(model.forward_features(x)), x)


def _weights_of_patches(model: Model, weights: Tensor, x: Tensor) -> Tensor:
    """Weights of the tokens (B, heads, N) -> weights of the patches (B, heads, rows, columns), with the same sum."""
    maps = model.patch_maps(weights.transpose(1, 2), *x.shape[2:])
    return (maps * (weights.shape[2] / maps[0, 0].numel())).cpu()


@torch.no_grad()  # not inference mode: heads are trained on the features
def dense(model: Model, images: Images, layers: int = 4) -> Tensor:
    """Returns features of every patch for dense tasks: the concatenated outputs of the last blocks.

    The final LayerNorm of the encoder normalizes them. Classifiers that pool patches have no such norm. The position
    table is interpolated to the patch grid; the fixed table of an autoencoder is computed for it.

    Args:
        images: as in `ModelMixin.prepare`. Float tensors, the input of the model, may have any size. A side that is no
            multiple of the patch size is scaled to the nearest multiple, so that the features cover the complete image.
        layers: number of blocks.

    Returns:
        (B, layers * D, rows, columns) of the patch grid, fp32 on the host.

    Raises:
        ValueError: the encoder has fewer blocks.
    """
    if not 1 <= layers <= len(model.blocks):
        raise ValueError(f"layers={layers}: the encoder has {len(model.blocks)} blocks; give 1 to {len(model.blocks)}")
    x = model.prepare(images)
    sides = [max(1, round(side / p)) * p for side, p in zip(x.shape[2:], model.patch_embed.patch_size, strict=True)]
    if sides != list(x.shape[2:]):
        x = nn.functional.interpolate(x, sides, mode="bicubic", antialias=True)
    with model.evaluating(*NOT_IN_FEATURES):
        tokens = model.patch_tokens(torch.cat(model.get_intermediate_layers(x, n=layers), dim=2))
    return model.patch_maps(tokens.float(), *x.shape[2:]).cpu()


@torch.inference_mode()
def components(model: Model, images: Images, remove_position_mean: bool = False) -> Tensor:
    """Returns the first three principal components of the features of patches, as colors.

    Similar patches have similar colors. The components are computed from all images together.

    Args:
        images: as in `ModelMixin.prepare`.
        remove_position_mean: at each position of the patch grid, subtract the mean over the images. The features of
            small models encode mostly the position, which is then what the first components show.

    Returns:
        (B, rows, columns, 3) of the patch grid, in 0 to 1.

    Raises:
        ValueError: `remove_position_mean` with a single image, whose features are the mean.
    """
    x = model.prepare(images)
    if remove_position_mean and len(x) == 1:
        raise ValueError("remove_position_mean=True: the mean of a single image is the image; give several images")
    maps = model.patch_maps(model.patch_tokens(model.extract_feat(x, "tokens")).float(), *x.shape[2:]).cpu()
    tokens = maps.flatten(2).transpose(1, 2)
    centered = (tokens - tokens.mean(dim=0 if remove_position_mean else (0, 1))).flatten(0, 1)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)
    # Signs are arbitrary. Each direction is flipped so that its entry with the largest magnitude is positive.
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    components = centered @ (directions * signs)[:3].T
    low = components.quantile(0.01, dim=0)
    high = components.quantile(0.99, dim=0)
    colors = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.view(len(x), *maps.shape[2:], 3)


def overlay(model: Model, image: Tensor, weights: Tensor | None = None) -> Image.Image:
    """Returns a picture that is bright at patches with high weights, or the unchanged picture without weights.

    Args:
        image: input of the model (c, H, W), as `prepare` returns it.
        weights: (rows, columns) of the patch grid, at least 0.
    """
    pixels = to_rgb(model, image)
    if weights is not None:
        relative = nn.functional.interpolate((weights / weights.max())[None, None], pixels.shape[1:], mode="nearest")
        pixels = pixels * (0.15 + 0.85 * relative[0])
    return Image.fromarray(to_bytes(pixels))
