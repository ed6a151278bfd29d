"""The masked autoencoder of He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377).

    >>> import torch, models_mae
    >>> model = models_mae.mae_vit_mini_patch4(in_chans=1)
    >>> loss, pred, mask = model(torch.rand(2, 1, 32, 32))
    >>> pred.shape, mask.shape
    (torch.Size([2, 64, 16]), torch.Size([2, 64]))

Letters in shapes: B images, c channels, H x W pixels, p pixels along the side of a patch, N patches, K visible
patches, T class tokens, D channels of an encoder token, E channels of a decoder token, P predicted values per patch.
Parameters have the names of the published checkpoints.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mae import valid_pixels
from mae.context import ENTRIES, require_free, takes
from mae.fp32 import in_fp32
from mae.masking import check_masking, noise_from_mask, shuffle, take
from mae.position_tables import sincos_or, sincos_table
from mae.reconstruction import Reconstruction, reconstruction_of
from mae.sizes import Size
from mae.uniformity import uniformity
from models_vit import (
    LAYER_NORM,
    SIZES,
    Encoder,
    NormLayer,
    drop_path_rates,
    evaluation_mode,
    init_linear,
    named_constructor,
)


def decoder_for(embed_dim: int, depth: int) -> dict[str, Any]:
    """Returns the size of the decoder of an encoder: 8 blocks of 512 channels (He et al. 2021, table 1).

    An encoder that is narrower than ViT-B has a decoder of half its width and a third of its depth, which is smaller
    than the encoder.
    """
    if embed_dim >= SIZES["base_patch16"]["embed_dim"]:
        return {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16, "decoder_mlp_ratio": 4.0}
    heads = max(1, embed_dim // 64)  # of 32 channels, as in the published decoder
    return {"decoder_embed_dim": 32 * heads, "decoder_depth": max(1, depth // 3), "decoder_num_heads": heads}


DECODERS: dict[str, dict[str, Any]] = {
    **{size: decoder_for(entry["embed_dim"], entry["depth"]) for size, entry in SIZES.items()},
    "tiny_patch16": {"decoder_embed_dim": 192, "decoder_depth": 4, "decoder_num_heads": 3},
    "small_patch16": {"decoder_embed_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8},
}

DECODER_SUFFIX = "_dec512d8b"  # suffix of model aliases in the published code
# The arguments of Yang et al. 2025, "In Pursuit of Pixel Supervision" (arXiv 2512.15715).
PIXIO = {"img_size": 256, "num_cls_tokens": 8, "learned_pos_embed": True, "decoder_depth": 32}
TARGET_EPS = 1e-6  # added to the variance of a target patch before normalization


def size_of(model: str) -> str:
    """Returns the key of `models_vit.SIZES` in the name of a model. Unknown names result in another text."""
    return model.removeprefix("mae_").removeprefix("vit_").removesuffix(DECODER_SUFFIX)


class MaskedAutoencoderViT(Encoder):
    """Asymmetric encoder-decoder (He et al. 2021, section 3).

    A ViT encodes the visible patches. A smaller transformer reconstructs the masked patches. The input may have another
    size than `img_size`: the fixed position tables are then computed for its patch grid, and others interpolated.

    Args:
        norm_pix_loss: normalize each target patch by its mean and variance (section 3, "Reconstruction target").
        uniformity: in training, weight of a second loss of the class tokens, the `uniformity` of the images in a batch.
            0: none.
        decoder_mlp_ratio: MLP ratio of the decoder. Default: `mlp_ratio`.
        num_cls_tokens: T, the number of class tokens. The decoder receives all of them and predicts patches only.
        learned_pos_embed: learn the positions of encoder and decoder, instead of the fixed sine-cosine tables.
        drop_path_rate: stochastic depth rate of the last block of the encoder; it increases linearly from 0 at the
            first block.
        block: class of the blocks of encoder and decoder, or a `partial` of it. Default: `Encoder.block`.

    Attributes:
        target_dim: width P of the predictions and of `target`; None for the p·p·c pixels of a patch. A constructor may
            set it before it calls that of this class.
        preserve: another loss of the encoder in training, called with the latent, the images, ids_restore and the
            context, such as a `mae.preservation.Preservation`. None: none.
        scores_visible: `forward_loss` also scores visible patches, so that a training may have a mask ratio of 0.
    """

    target_dim: int | None = None
    preserve: Callable[..., Tensor] | None = None
    scores_visible = False

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = LAYER_NORM,
        norm_pix_loss: bool = False,
        uniformity: float = 0.0,
        decoder_mlp_ratio: float | None = None,
        num_cls_tokens: int = 1,
        learned_pos_embed: bool = False,
        drop_path_rate: float = 0.0,
        block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.learned_pos_embed = learned_pos_embed
        self.target_takes_valid = takes(type(self), "target", "valid")
        self.norm_pix_loss = norm_pix_loss
        self.uniformity = uniformity
        self.in_chans = in_chans
        self.patch_embed = self.make_patch_embed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim))
        self.pos_embed = self._position_table(embed_dim)
        self.blocks = self.make_blocks(
            block, embed_dim, num_heads, mlp_ratio, norm_layer, drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)

        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = self._position_table(decoder_embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = self.make_blocks(
            block, decoder_embed_dim, decoder_num_heads, decoder_mlp_ratio or mlp_ratio, norm_layer,
            drop_path_rates(0, decoder_depth),
        )  # fmt: skip
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.target_dim or self.values_per_patch)
        self.initialize_weights()

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image of `img_size`."""
        return self.patch_embed.grid_size

    @property
    def values_per_patch(self) -> int:
        """p·p·c, the number of values of a patch."""
        picture = torch.empty(1, self.in_chans, *self.patch_embed.img_size, device="meta")
        return self.patchify(picture).shape[-1]

    @property
    def predicts_pixels(self) -> bool:
        """Whether the target is pixels, as `reconstruct` requires."""
        is_patch = getattr(self.decoder_pred, "out_features", None) == self.values_per_patch
        return is_patch and self.target_dim is None and type(self).target is MaskedAutoencoderViT.target

    def initialize_weights(self) -> None:
        """Initializes linear layers and the patch projection (Xavier uniform), biases (0), tokens and learned positions
        (std .02). Linear layers of zeros, such as those of adapters, keep them.
        """
        init_linear(self, nn.init.xavier_uniform_)
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.learned_pos_embed:
            nn.init.normal_(self.pos_embed, std=0.02)
            nn.init.normal_(self.decoder_pos_embed, std=0.02)

    # ------------------------------------------------------------------------------------- patches and pixels

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, N, p·p·c): patches in row-major order; within a patch (row, column, channel)."""
        rows, columns = self.patch_embed.grid_of(*imgs.shape[-2:])
        p, q = self.patch_embed.patch_size
        x = imgs.reshape(imgs.shape[0], imgs.shape[1], rows, p, columns, q)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The inverse of `patchify`: (B, N, p·p·c) -> (B, c, H, W).

        Args:
            grid_size: (rows, columns) of patches. Default: that of `img_size`.
        """
        rows, columns = grid_size or self.grid_size
        p, q = self.patch_embed.patch_size
        x = x.reshape(x.shape[0], rows, columns, p, q, -1)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    # --------------------------------------------------------------------------- the paper's three steps (figure 1)
    # Training, evaluation and visualization call these. Edit them here, or override them in a subclass.
    # The context is that of `prepare_masking`. A step names what it uses, and passes all on.

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Selects the int(N·(1 - mask_ratio)) tokens with the smallest noise (section 3, "Masking").

        An override passes `noise` on, or its own, which is infinite where `noise` is: for patches without valid pixels.

        Args:
            x: tokens (B, N, D).
            mask_ratio: fraction of masked patches.
            noise: (B, N). Default: torch.rand.

        Returns:
            The visible tokens (B, K, D) in ascending order of noise; the mask (B, N), 0 visible and 1 masked;
            ids_restore (B, N), the index of each patch among the visible tokens followed by the masked ones.

        Raises:
            ValueError: as in `mae.masking.shuffle`.
        """
        ids_shuffle, num_visible = shuffle(x, mask_ratio, noise)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = (ids_restore >= num_visible).to(torch.float32)
        return take(x, ids_shuffle[:, :num_visible]), mask, ids_restore

    def forward_encoder(self, imgs: Tensor, mask_ratio: float, **context: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> latent (B, T + K, D) of class tokens and visible patches, mask and ids_restore (B, N)."""
        x = self.tokenize(imgs, **context)
        x, mask, ids_restore = self.random_masking(x, mask_ratio, **context)
        grid = self.patch_embed.grid_of(*imgs.shape[-2:])
        inputs = self.block_inputs(grid, ids_restore, x.shape[1])
        x = self.all_tokens(x, grid)
        for block in self.blocks:
            x = block(x, *inputs)
        return self.norm(x), mask, ids_restore

    def forward_decoder(
        self, latent: Tensor, ids_restore: Tensor, grid_size: tuple[int, int] | None = None, **context: Any
    ) -> Tensor:
        """Latent (B, T + K, D) -> predictions for all patches (B, N, P), in image order.

        Args:
            grid_size: (rows, columns) of patches. Default: that of `img_size`.
        """
        x = self.decoder_embed(latent)
        cls_tokens = x[:, : self.num_prefix_tokens]
        visible = self.patch_tokens(x)
        num_masked = ids_restore.shape[1] - visible.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], num_masked, -1)
        patches = take(torch.cat([visible, mask_tokens], dim=1), ids_restore)
        x = torch.cat([cls_tokens, patches], dim=1) + self.decoder_positions(grid_size or self.grid_size, **context)
        for block in self.decoder_blocks:
            x = block(x)
        return self.patch_tokens(self.decoder_pred(self.decoder_norm(x)))

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, **context: Any) -> Tensor:
        """Mean squared error over the masked patches (section 3, "Reconstruction target"); 0 if none is masked.

        An override may return a dict of terms (), whose sum is trained. log.txt has each as train_NAME.

        With invalid pixels, the error of a patch is the mean over its valid pixels. Patches without valid pixels have
        no loss. Each image has the same weight, so that the loss does not depend on the split of a batch.

        Args:
            context: may contain `valid`, the valid pixels, bool (B, H, W). Default: all.

        Raises:
            ValueError: the target has another shape than `pred`; the difference would be broadcast.
        """
        target = self.target(imgs, **context)
        if target.shape != pred.shape:
            raise ValueError(
                f"the target is {tuple(target.shape)} and the prediction {tuple(pred.shape)}: both must be (B, N, "
                f"target_dim), and target_dim of {type(self).__name__} is {self.target_dim}"
            )
        if (valid := context.get("valid")) is None:
            loss = (pred - target).square().mean(dim=-1)  # (B, N)
            return (loss * mask).sum() / mask.sum().clamp(min=1)
        weight = self._valid_values(valid, imgs)
        if self.target_dim is not None:  # features of patches
            weight = weight.any(dim=-1, keepdim=True).expand_as(pred)
        return valid_pixels.mean_squared_error(pred - target, weight, mask)

    def target(self, imgs: Tensor, *, valid: Tensor | None = None, **context: Any) -> Tensor:
        """The target of the decoder: images (B, c, H, W) -> (B, N, P), normalized per patch with `norm_pix_loss`.

        An override may return other features of the patches. The attribute `target_dim` sets their width.

        Args:
            valid: valid pixels, bool (B, H, W), whose statistics normalize a patch. Default: all.
        """
        patches = self.patchify(imgs)
        if not self.norm_pix_loss:
            return patches
        mean, std = self.patch_statistics(patches, imgs, valid)
        return (patches - mean) / std

    def _valid_values(self, valid: Tensor, imgs: Tensor) -> Tensor:
        """Valid pixels (B, H, W) of images (B, c, H, W) -> the weight of each value, bool (B, N, p·p·c)."""
        return self.patchify(valid_pixels.like_images(valid, imgs))

    def patch_statistics(self, patches: Tensor, imgs: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of each patch (B, N, 1). The variance is unbiased, as published.

        Args:
            patches: (B, N, p·p·c), of images (B, c, H, W).
            valid: the pixels that count, bool (B, H, W). Default: all.
        """
        if valid is not None:
            return valid_pixels.patch_statistics(patches, self._valid_values(valid, imgs), TARGET_EPS)
        return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + TARGET_EPS).sqrt()

    # -------------------------------------------------------------------------------------------- training and use

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, *, mask: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, c, H, W) -> loss (), predictions (B, N, P), mask (B, N).

        Args:
            mask_ratio: fraction of masked patches.
            mask: as in `prepare_masking`.
            context: `noise` and `valid`, as in `prepare_masking`, and the extra inputs of the images by name.

        Raises:
            ValueError: as in `prepare_masking` and `require_free`, or an override of `random_masking` ignores the mask.
            RuntimeError: as in `prepare_masking`, or patches without valid pixels are visible.
        """
        imgs, mask_ratio, context = self.prepare_masking(imgs, mask_ratio, mask, **context)
        require_free(type(self), context.keys() - ENTRIES)
        latent, patch_mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **context)
        pred = self.forward_decoder(latent, ids_restore, **context)
        loss = in_fp32(self.forward_loss)(imgs, pred, patch_mask, **context)
        check_masking(self, mask, patch_mask, ids_restore, latent, context)
        return self.with_terms(loss, latent, imgs, ids_restore, **context), pred, patch_mask

    def prepare_masking(
        self, imgs: Tensor, mask_ratio: float, mask: Tensor | None = None, noise: Tensor | None = None,
        valid: Tensor | None = None, **context: Any,
    ) -> tuple[Tensor, float, dict[str, Any]]:  # fmt: skip
        """Returns the images, the mask ratio and the context of the steps.

        The context contains `noise`, `valid` and the `grid_size` of images of another size than `img_size`, as far as
        they are given, and the extra inputs. It is empty for images of `img_size` alone.

        Args:
            imgs: (B, c, H, W).
            mask_ratio: fraction of masked patches.
            mask: patches to mask (1 or True), as (B, N), (B, rows, columns) or per pixel (B, H, W); a patch with a
                masked pixel is masked. It overrides `mask_ratio`. All images must have the same number of visible
                patches.
            noise: (B, N); the patches with the smallest noise are visible. Default: torch.rand.
            valid: valid pixels, bool (B, H, W). Other pixels are 0, the mean, at the input. They have no loss, and
                patches without valid pixels are masked. Each image needs as many other patches as are visible.
                Default: all.

        Raises:
            ValueError: the sides of the images are not multiples of the patch size; mask or valid is invalid; or as
                in `check_names`.
            RuntimeError: an image has too few patches with valid pixels.
        """
        self.check_extra_inputs(context)
        grid = self.patch_embed.grid_of(*imgs.shape[-2:])
        if mask is not None:
            noise, mask_ratio = noise_from_mask(mask.to(imgs.device), grid, self.patch_embed.patch_size)
        if valid is not None:
            if not self.target_takes_valid:
                raise ValueError(f"{type(self).__name__}.target would take invalid pixels for the mean: add valid=None")
            weight = self._valid_values(valid, imgs)
            imgs, noise = valid_pixels.exclude(imgs, valid, weight, noise, mask_ratio, is_mask=mask is not None)
        grid_size = None if grid == self.grid_size else grid
        return imgs, mask_ratio, _given(noise=noise, valid=valid, grid_size=grid_size) | context

    def with_terms(self, loss: Any, latent: Tensor, imgs: Tensor, ids_restore: Tensor, **context: Any) -> Any:
        """Adds the losses of the encoder in training: the result of `forward_loss` -> the same, or a dict of terms."""
        if not self.training or not (self.uniformity or self.preserve):
            return loss
        terms = dict(loss) if isinstance(loss, dict) else {"pixels" if self.target_dim is None else "target": loss}
        if self.uniformity:
            terms["uniformity"] = self.uniformity * uniformity(self.class_features(latent))
        if self.preserve:
            terms["preserve"] = self.preserve(latent, imgs, ids_restore, **context)
        return terms

    def forward_features(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images -> normalized encoder tokens (B, T + N, D), class tokens first. No patch is masked."""
        return self.get_intermediate_layers(imgs, **context)[0]

    @torch.no_grad()
    def reconstruct(self, imgs: Tensor, mask_ratio: float = 0.75, **context: Any) -> Reconstruction:
        """Masks patches of images (B, c, H, W) and reconstructs them in evaluation mode.

        The arguments are those of `forward`, also `mask`.

        A model trained with `norm_pix_loss` predicts normalized patches. They are scaled by the mean and standard
        deviation of each ORIGINAL patch, so that these images look better than the prediction of the model alone.

        Raises:
            ValueError: as in `forward`, the model does not predict pixels, or an override of `random_masking` ignores
                the mask.
        """
        if not self.predicts_pixels:
            raise ValueError(f"{type(self).__name__} does not predict pixels, so it can't reconstruct images")
        context = _given(**context)
        with evaluation_mode(self):
            _, pred, patch_mask = self.forward(imgs, mask_ratio, **context)[:3]
        return reconstruction_of(self, imgs, pred, patch_mask, context.get("valid"))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        return self.resized(self.pos_embed, grid, self.grid_size)

    def decoder_positions(self, grid: tuple[int, int], **context: Any) -> Tensor:
        """Returns the positions of the decoder for (rows, columns): (1, T + N, E), or (B, T + N, E) in an override."""
        return self.resized(self.decoder_pos_embed, grid, self.grid_size)

    def resized(self, table: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        """Returns the position table for `grid`: sine-cosine tables are computed, other tables are interpolated."""
        resized = self.resize_table(table, old_grid, grid)
        if self.learned_pos_embed or grid == old_grid:
            return resized
        return sincos_or(resized, table, old_grid, grid, self.num_prefix_tokens)

    def _position_table(self, dim: int) -> nn.Parameter:
        """Returns the positions (1, T + N, dim) for images of `img_size`."""
        if self.learned_pos_embed:
            return nn.Parameter(torch.zeros(1, self.num_prefix_tokens + self.num_patches, dim))
        # Fixed tables, but parameters: the published checkpoints contain them under these names.
        return nn.Parameter(sincos_table(dim, self.grid_size, self.num_prefix_tokens).clone(), requires_grad=False)


def _given(**options: Any) -> dict[str, Any]:
    """Returns the arguments that are not None. An empty context passes nothing to overrides of published signatures."""
    return {name: value for name, value in options.items() if value is not None}


def _constructor(name: str, **defaults: Any) -> Callable[..., MaskedAutoencoderViT]:
    size = name.partition("_vit_")[2]
    return named_constructor(MaskedAutoencoderViT, name, {**SIZES[size], **DECODERS[size], **defaults})


# The choices of --model: a constructor for each of SIZES, also of a size that you add.
MODELS = {f"mae_vit_{size}": _constructor(f"mae_vit_{size}") for size in SIZES}
mae_vit_mini_patch4 = MODELS["mae_vit_mini_patch4"]
mae_vit_tiny_patch16 = MODELS["mae_vit_tiny_patch16"]
mae_vit_small_patch16 = MODELS["mae_vit_small_patch16"]
mae_vit_base_patch16 = MODELS["mae_vit_base_patch16"]
mae_vit_large_patch16 = MODELS["mae_vit_large_patch16"]
mae_vit_huge_patch14 = MODELS["mae_vit_huge_patch14"]
mae_vit_huge_patch16 = MODELS["mae_vit_huge_patch16"]
mae_vit_1b_patch16 = MODELS["mae_vit_1b_patch16"]
mae_vit_giant_patch14 = MODELS["mae_vit_giant_patch14"]
# The names of the published code.
mae_vit_base_patch16_dec512d8b = MODELS["mae_vit_base_patch16_dec512d8b"] = mae_vit_base_patch16
mae_vit_large_patch16_dec512d8b = MODELS["mae_vit_large_patch16_dec512d8b"] = mae_vit_large_patch16
mae_vit_huge_patch14_dec512d8b = MODELS["mae_vit_huge_patch14_dec512d8b"] = mae_vit_huge_patch14
# Their flags are in recipes/pretrain_pixio_*.yaml.
pixio_vit_base_patch16 = _constructor("pixio_vit_base_patch16", **PIXIO)
pixio_vit_large_patch16 = _constructor("pixio_vit_large_patch16", **PIXIO)
pixio_vit_huge_patch16 = _constructor("pixio_vit_huge_patch16", **PIXIO)
pixio_vit_1b_patch16 = _constructor("pixio_vit_1b_patch16", **PIXIO)
