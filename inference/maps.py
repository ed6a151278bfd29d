"""Maps of an encoder: attention of the class token, features of patches, their principal components."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from inference.model import Images, Model


@torch.inference_mode()
def attention(model: Model, images: Images, block: int = -1) -> Tensor:
    """How much the class token takes from each patch.

    Args:
        images: as `ModelMixin.prepare` takes them.
        block: of the encoder; the last by default.

    Returns:
        (B, heads, rows, columns) of the patch grid; of each head, the class token's own share is missing from 1.
    """
    x = model.prepare(images)
    depth = len(model.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block {block}: the encoder has {depth}")
    tokens = model.embed(x)
    blocks: Any = model.blocks
    for earlier in blocks[: block % depth]:
        tokens = earlier(tokens)
    chosen = blocks[block]
    maps = chosen.attn.maps(chosen.norm1(tokens))
    return maps[:, :, 0, 1:].unflatten(2, model.patch_embed.grid_of(*x.shape[2:])).cpu()


@torch.no_grad()  # and not inference mode: heads are trained on what comes out
def dense(model: Model, images: Images, layers: int = 4) -> Tensor:
    """Features of every patch, for dense tasks: what the last blocks make of it, one behind the other.

    They are normalised by the encoder's last LayerNorm, where it has one: classifiers that pool patches have none.

    Args:
        images: as `ModelMixin.prepare` takes them; of any size if they are float, the model's input.
        layers: so many of the last blocks.

    Returns:
        (B, layers * D, rows, columns) of the patch grid.

    Raises:
        ValueError: there are not so many blocks.
    """
    if not 1 <= layers <= len(model.blocks):
        raise ValueError(f"layers={layers}: the encoder has {len(model.blocks)} blocks")
    x = model.prepare(images)
    tokens = torch.cat(model.get_intermediate_layers(x, n=layers), dim=2)[:, 1:]
    return tokens.float().transpose(1, 2).unflatten(2, model.patch_embed.grid_of(*x.shape[2:])).cpu()


@torch.inference_mode()
def components(model: Model, images: Images) -> Tensor:
    """The first three principal components of the patches' features, as colours: patches alike look alike.

    The components are those of all images together.

    Returns:
        (B, rows, columns, 3) in 0 to 1.
    """
    x = model.prepare(images)
    tokens = model.extract_feat(x, "tokens")[:, 1:].float().cpu().flatten(0, 1)
    centred = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    # Signs are arbitrary: each direction is turned so that its largest entry is positive.
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    components = centred @ (directions * signs)[:3].T
    low, high = components.quantile(0.01, dim=0), components.quantile(0.99, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    rows, columns = model.patch_embed.grid_of(*x.shape[2:])
    return colours.view(len(x), rows, columns, 3)


def overlay(model: Model, image: Tensor, weights: Tensor | None = None) -> Image.Image:
    """A picture that is bright where weights are high; without weights as it is.

    Args:
        image: the model's input (c, H, W), as `prepare` makes it.
        weights: (rows, columns) of its patches, at least 0.
    """
    pixels = model.normalize.inverse(image.to(model.normalize.mean)).cpu()
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    if weights is not None:
        relative = nn.functional.interpolate((weights / weights.max())[None, None], pixels.shape[1:], mode="nearest")
        pixels = pixels * (0.15 + 0.85 * relative[0])
    return Image.fromarray((255 * pixels.permute(1, 2, 0).numpy()).round().astype(np.uint8))
