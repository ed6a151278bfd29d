"""A loss that keeps the features of a continued encoder near those of its start, against drift."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.context import OF_LIBRARY
from mae.fp32 import in_fp32
from mae.masking import take


class Preservation:
    """The distance between the features of the visible patches and those of the frozen start for the whole image.

    The start is not a module of the model: it is not trained, is always in evaluation mode, and checkpoints do not
    contain it.

    Args:
        start: a `MaskedAutoencoderViT` with the weights of the start.
        weight: of the loss.
        scale: (c, 1, 1). The start sees images · scale + shift, which are normalized by its own mean and std.
        shift: (c, 1, 1).
    """

    def __init__(self, start: Any, weight: float, scale: Tensor, shift: Tensor) -> None:
        self.start = start.requires_grad_(False).eval()
        self.weight = weight
        self.scale = scale
        self.shift = shift

    def __call__(self, latent: Tensor, imgs: Tensor, ids_restore: Tensor, **context: Any) -> Tensor:
        """Returns the weight times the loss, (). Arguments and errors as in `tokens_of_start`."""
        tokens = self.tokens_of_start(latent, imgs, ids_restore, **context)
        return self.weight * distance(
            self.start.class_features(latent), self.start.class_features(tokens),
            self.start.patch_tokens(latent), self.start.patch_tokens(tokens),
        )  # fmt: skip

    @torch.no_grad()
    def tokens_of_start(self, latent: Tensor, imgs: Tensor, ids_restore: Tensor, **context: Any) -> Tensor:
        """Returns the class tokens and visible patches of the start for the whole image, (B, T + K, D).

        Args:
            latent: those of the encoder, after the final norm.
            imgs: normalized images (B, c, H, W).
            ids_restore: (B, N), the index of each patch among the visible patches followed by the masked ones.
            context: the extra inputs of the images; others are ignored.

        Raises:
            ValueError: the latent of a subclass has another shape.
        """
        inputs = {name: value for name, value in context.items() if name not in OF_LIBRARY}
        tokens = self.start.get_intermediate_layers(imgs * self.scale + self.shift, **inputs)[0]
        patches = self.start.patch_tokens(tokens)
        num_prefix = tokens.shape[1] - patches.shape[1]
        visible = take(patches, ids_restore.argsort(dim=1)[:, : latent.shape[1] - num_prefix])
        tokens = torch.cat([tokens[:, :num_prefix], visible], dim=1)
        if patches.shape[1] != ids_restore.shape[1] or latent.shape != tokens.shape:
            raise ValueError(
                f"preserve={self.weight:g}: the latent of this class is {tuple(latent.shape)}, and that of the start "
                f"{tuple(tokens.shape)}"
            )
        return tokens


@in_fp32
def distance(class_token: Tensor, class_of_start: Tensor, patches: Tensor, patches_of_start: Tensor) -> Tensor:
    """Returns 1 - cosine: half of it for the class token (B, D), half for the mean over the patches (B, K, D)."""
    of_class = 1 - F.cosine_similarity(class_token, class_of_start, dim=-1)
    of_patches = 1 - F.cosine_similarity(patches, patches_of_start, dim=-1)
    return (of_class.mean() + of_patches.mean()) / 2


def frozen_copy(model: Any) -> Any:
    """Returns the encoder of a model as it is now. It shares the weights that are not trained, and has no decoder."""
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    start = copy.deepcopy(model, shared)
    for name in [name for name, _ in start.named_children() if name.startswith("decoder")]:
        setattr(start, name, None)
    start.decoder_pos_embed = None
    start.mask_token = None
    return start
