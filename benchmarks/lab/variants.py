"""Ways to compute the same masked autoencoder. Their parameters have the names and shapes of the model's.

A variant is EXACT if only the order of sums and the place of a rounding differ, and ROUNDS if a tensor has fewer bits.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models_vit
from benchmarks.lab import ops
from models_mae import DECODERS, MaskedAutoencoderViT
from models_vit import LAYER_NORM, SIZES, Attention, Block, Mlp

EPS: Any = LAYER_NORM(1).eps  # of the published models
EXACT = "exact"
ROUNDS = "rounds"


class Pending(NamedTuple):
    """A stream of tokens (B, L, D), and a branch (B, L, D) that is not added to it yet."""

    stream: Tensor
    branch: Tensor
    bias: Tensor | None = None  # (D,), which the branch lacks


class PackedAttention(Attention):
    """Attention by one kernel for packed queries, keys and values; by PyTorch's, where it does not fit."""

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.proj(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """Tokens -> mixed values (B, L, D), the input of the last linear layer."""
        qkv = self.qkv(x)
        if ops.is_supported(qkv, self.num_heads):
            return ops.attention(qkv, self.num_heads)
        return mix_by_pytorch(qkv, self.num_heads)


class PlainAttention(Attention):
    """The attention of the model, with the method `mix` of `PackedAttention`."""

    def mix(self, x: Tensor) -> Tensor:
        return mix_by_pytorch(self.qkv(x), self.num_heads)


def mix_by_pytorch(qkv: Tensor, heads: int) -> Tensor:
    """As `ops.attention`, by `models_vit.attend`."""
    parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return models_vit.attend(*parts).transpose(1, 2).flatten(2)


def activated(mlp: Mlp, x: Tensor) -> Tensor:
    """The output of GELU in an MLP. The gradient of the bias before it is summed in the kernel of its backward pass."""
    return ops.BiasGelu.apply(F.linear(x, mlp.fc1.weight), mlp.fc1.bias)


class Norm(models_vit.LayerNorm):
    """The norm of the model. It also takes a branch that is still to be added."""

    def forward(self, x: Tensor | Pending) -> Tensor:
        return self.add(x)[1]

    def add(self, x: Tensor | Pending) -> tuple[Tensor, Tensor]:
        """Returns the sum of stream and branch, and its norm."""
        total = x if isinstance(x, Tensor) else x.stream + x.branch
        return total, super().forward(total)


class FusedNorm(Norm):
    """The backward pass is one kernel: the sum of both gradients of the stream, and the gradients of all biases."""

    def add(self, x: Tensor | Pending) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor):
            return super().add(x)
        return ops.AddNorm.apply(*x, self.weight, self.bias, self.eps)


class PackedBlock(Block):
    """The block of the model with `PackedAttention`."""

    attention = PackedAttention


class GeluBlock(Block):
    """The block of the model with `activated`."""

    mlp: Mlp

    def compute(self, x: Tensor, *inputs: Any) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(activated(self.mlp, self.norm2(x)))


class CarryBlock(Block):
    """A block returns its last branch without adding it: the next block adds it, in the kernel of its first norm."""

    norm1: Norm
    norm2: Norm

    def compute(self, x: Tensor | Pending, *inputs: Any) -> Pending:  # type: ignore[override]
        stream, normed = self.norm1.add(x)
        stream, normed = self.norm2.add(Pending(stream, self.attn(normed)))
        return Pending(stream, self.mlp(normed))


class FusedBlock(Block):
    """Carries its last branch, and sums the gradients of all biases in the kernels of GELU and LayerNorm."""

    attention: ClassVar[type[PlainAttention | PackedAttention]] = PlainAttention
    attn: PlainAttention | PackedAttention
    mlp: Mlp
    norm1: FusedNorm
    norm2: FusedNorm

    def compute(self, x: Tensor | Pending, *inputs: Any) -> Pending:  # type: ignore[override]
        stream, normed = self.norm1.add(x)
        branch = F.linear(self.attn.mix(normed), self.attn.proj.weight)
        stream, normed = self.norm2.add(Pending(stream, branch, self.attn.proj.bias))
        return Pending(stream, F.linear(activated(self.mlp, normed), self.mlp.fc2.weight), self.mlp.fc2.bias)


class ExactBlock(FusedBlock):
    """All that is exact."""

    attention = PackedAttention


class BF16Encoder(MaskedAutoencoderViT):
    """The stream of the encoder has the dtype of the matrix products. That of the decoder stays in fp32."""

    def all_tokens(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = super().all_tokens(patches, grid)
        kind = patches.device.type
        return tokens.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens


class Variant(NamedTuple):
    """The classes of a model."""

    kind: str  # EXACT or ROUNDS
    block: Callable[..., nn.Module] = Block
    norm: type[models_vit.LayerNorm] = models_vit.LayerNorm
    model: type[MaskedAutoencoderViT] = MaskedAutoencoderViT

    def build(self, **arguments: Any) -> MaskedAutoencoderViT:
        """Returns a model; the arguments are those of `MaskedAutoencoderViT`."""
        return self.model(block=self.block, norm_layer=self.norm_layer, **arguments)

    def norm_layer(self, dim: int) -> models_vit.LayerNorm:
        """Returns the norm of a block, whose width is `dim`."""
        return self.norm(dim, eps=EPS)


VARIANTS: Mapping[str, Variant] = {
    "main": Variant(EXACT),  # the model as it is
    "packed": Variant(EXACT, PackedBlock),
    "carry": Variant(EXACT, CarryBlock, Norm),
    "gelu": Variant(EXACT, GeluBlock),
    "fused": Variant(EXACT, FusedBlock, FusedNorm),
    "exact": Variant(EXACT, ExactBlock, FusedNorm),
    "bf16-encoder": Variant(ROUNDS, model=BF16Encoder),
    "all": Variant(ROUNDS, ExactBlock, FusedNorm, BF16Encoder),
}


def of_size(name: str, size: str, **arguments: Any) -> MaskedAutoencoderViT:
    """Returns a variant of a model size of the library."""
    return VARIANTS[name].build(**{**SIZES[size], **DECODERS[size], "norm_pix_loss": True, **arguments})
