"""Implementations that are compared with ours: transformers' and timm's models, and a plain one of timm's blocks."""

from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from models_mae import DECODERS
from models_vit import LAYER_NORM, SIZES


def image_side(size: str) -> int:
    """Image side of a model size, in pixels."""
    return SIZES[size].get("img_size", 224)


def mlp_ratio(size: str) -> float:
    """MLP ratio of the encoder of a model size. That of the decoders is 4."""
    return SIZES[size].get("mlp_ratio", 4)


class PlainMAE(nn.Module):
    """The masked autoencoder of He et al. 2021, figure 1, from timm's blocks, without optimizations for speed."""

    def __init__(self, size: str) -> None:
        super().__init__()
        width, depth, heads = (SIZES[size][key] for key in ("embed_dim", "depth", "num_heads"))
        narrow, decoder_depth, decoder_heads = (
            DECODERS[size][f"decoder_{key}"] for key in ("embed_dim", "depth", "num_heads")
        )
        norm: Any = LAYER_NORM
        self.patch = SIZES[size]["patch_size"]
        self.embed = PatchEmbed(image_side(size), self.patch, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, self.embed.num_patches + 1, width), requires_grad=False)
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio(size), qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(width)
        self.decoder_embed = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder_positions = nn.Parameter(torch.randn(1, self.embed.num_patches + 1, narrow), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(narrow, decoder_heads, 4, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm(narrow)
        self.decoder_pred = nn.Linear(narrow, self.patch**2 * 3)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Images (B, 3, H, W) -> (the loss,), as the others return it first."""
        tokens = self.embed(images) + self.positions[:, 1:]
        count, length, width = tokens.shape
        order = torch.rand(count, length, device=images.device).argsort(dim=1)
        back = order.argsort(dim=1)
        num_visible = length // 4
        visible = torch.gather(tokens, 1, order[:, :num_visible, None].repeat(1, 1, width))
        first = (self.cls_token + self.positions[:, :1]).expand(count, -1, -1)
        latent = self.decoder_embed(self.norm(self.blocks(torch.cat([first, visible], dim=1))))

        mask_tokens = self.mask_token.repeat(count, length - num_visible, 1).to(latent.dtype)
        patches = torch.cat([latent[:, 1:], mask_tokens], dim=1)
        patches = torch.gather(patches, 1, back[:, :, None].repeat(1, 1, latent.shape[2]))
        x = torch.cat([latent[:, :1], patches], dim=1) + self.decoder_positions
        predicted = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

        side = images.shape[2] // self.patch
        target = images.reshape(count, 3, side, self.patch, side, self.patch).permute(0, 2, 4, 3, 5, 1).flatten(3)
        error = (predicted - target.flatten(1, 2)).square().mean(dim=-1)
        masked = (back >= num_visible).float()
        return ((error * masked).sum() / masked.sum(),)


def encoder_config(size: str) -> dict[str, Any]:
    """transformers' settings of an encoder in one of our sizes."""
    width, depth, heads = (SIZES[size][key] for key in ("embed_dim", "depth", "num_heads"))
    return {
        "image_size": image_side(size), "patch_size": SIZES[size]["patch_size"], "hidden_size": width,
        "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": round(mlp_ratio(size) * width),
    }  # fmt: skip


def transformers_mae(size: str, **depths: int) -> nn.Module:
    """transformers' ViTMAEForPreTraining in one of our sizes; the first entry of its output is the loss.

    Args:
        depths: `depth` and `decoder_depth`, if they differ from those of the size.
    """
    width, depth, heads = (DECODERS[size][f"decoder_{key}"] for key in ("embed_dim", "depth", "num_heads"))
    encoder = encoder_config(size)
    config = ViTMAEConfig(
        **{**encoder, "num_hidden_layers": depths.get("depth", encoder["num_hidden_layers"])},
        decoder_hidden_size=width, decoder_num_hidden_layers=depths.get("decoder_depth", depth),
        decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def compile_blocks(model: nn.Module) -> None:
    """Compiles each block, as `compile_model` does in ours. The graph of a whole model takes minutes."""
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)


def transformers_encoder(size: str) -> nn.Module:
    """transformers' ViTModel in one of our sizes."""
    return ViTModel(ViTConfig(**encoder_config(size)), add_pooling_layer=False)


def timm_classifier(size: str) -> nn.Module:
    """timm's Vision Transformer in one of our sizes, with global average pooling, as in our fine-tuning."""
    return timm.models.VisionTransformer(
        num_classes=1000, global_pool="avg", drop_path_rate=0.1, **{**SIZES[size], "img_size": image_side(size)}
    )
