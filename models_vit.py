"""The Vision Transformer: the blocks of all models, and the classifier for fine-tuning and probing.

    >>> import torch, models_vit
    >>> model = models_vit.vit_mini_patch4(num_classes=10, in_chans=1, global_pool=True)
    >>> model(torch.rand(2, 1, 32, 32)).shape
    torch.Size([2, 10])

Letters in shapes: B images, c channels, H x W pixels, p pixels along the side of a patch, N patches, T class
tokens, L = T + N tokens, D channels of a token, h heads. Parameters have the names of the published checkpoints.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae.context import check_names, extra_inputs, needed_inputs
from mae.position_tables import resize_pos_embed
from mae.sizes import Size, to_pair

NormLayer = Callable[[int], nn.Module]
LastLayer = TypeVar("LastLayer", nn.Linear, nn.Conv2d)
Model = TypeVar("Model", bound=nn.Module)


class LayerNorm(nn.LayerNorm):
    """Layer norm of inputs that are converted to the type of its weights: fp32 under autocast.

    Autocast does so on CUDA. On a CPU, it leaves an input in bf16, and the backward pass of PyTorch's kernel then sums
    the gradients of the weights over all tokens in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


# eps of the published models. The default of PyTorch is 1e-5, and the ViT of transformers has 1e-12.
LAYER_NORM: NormLayer = partial(LayerNorm, eps=1e-6)
RMS_NORM: NormLayer = partial(nn.RMSNorm, eps=1e-6)

# The sizes of models. A size has a constructor at the end of this file, and one at the end of models_mae.py.
# base, large and huge: He et al. 2021; giant: ViT-g of Zhai et al. 2021; tiny and small: the usual sizes; mini: for
# images of about 32 pixels; huge_patch16 and 1b: Yang et al. 2025 (Pixio).
SIZES: dict[str, dict[str, Any]] = {
    "mini_patch4": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "tiny_patch16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "small_patch16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "huge_patch16": {"patch_size": 16, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "1b_patch16": {"patch_size": 16, "embed_dim": 1536, "depth": 48, "num_heads": 24},
    "giant_patch14": {"patch_size": 14, "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408},
}

ABOVE_BLOCKS = ("norm.", "fc_norm.", "head.", "mask_token", "decoder_")  # beginnings of names of parameters
SHORT_SEQUENCE = 64  # tokens up to which matrix products train faster than the fused kernel (CPU, fp32)


class PatchEmbed(nn.Module):
    """Splits images into patches and embeds each patch: (B, c, H, W) -> (B, N, D), patches in row-major order."""

    def __init__(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = to_pair(img_size)
        self.patch_size = to_pair(patch_size)
        self.in_chans = in_chans
        self.grid_size = self.grid_of(*self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of patches in an image of height x width pixels.

        Raises:
            ValueError: the sides of the image are not multiples of the patch size.
        """
        rows, columns = self.patch_size
        if height % rows or width % columns or not height or not width:
            raise ValueError(
                f"images of {height}x{width} pixels can't be split into patches of {rows}x{columns}: "
                f"choose an input_size whose sides are multiples of patch_size"
            )
        return height // rows, width // columns

    def forward(self, imgs: Tensor) -> Tensor:
        rows, columns = self.grid_of(*imgs.shape[-2:])
        if not imgs.is_cuda:  # one memory format: on some processors, a convolution of another rounds differently
            return self.proj(imgs.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        # On a GPU, one matrix product takes less time than cuDNN's convolution.
        p, q = self.patch_size
        patches = imgs.unflatten(3, (columns, q)).unflatten(2, (rows, p)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, L, D).

    Args:
        qk_norm: norm of the queries and keys of each head: "layer" or "rms" (ViT-22B, Dehghani et al. 2023, section 2).
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, qk_norm: str | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        norms: dict[str | None, NormLayer] = {None: nn.Identity, "layer": LAYER_NORM, "rms": RMS_NORM}
        norm = norms[qk_norm]
        self.q_norm = norm(dim // num_heads)
        self.k_norm = norm(dim // num_heads)

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.proj(attend(*self.split(x, *inputs)).transpose(1, 2).flatten(2))

    def maps(self, x: Tensor, *inputs: Any) -> Tensor:
        """Attention weights of each token (row) over all tokens: (B, L, D) -> (B, h, L, L); rows sum to 1."""
        q, k, _ = self.split(x, *inputs)
        return attention_weights(q, k)

    def split(self, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        """Returns queries, keys and values (B, h, L, D/h) of tokens (B, L, D). `inputs`: of the block."""
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v  # the norms of autocast return fp32


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of (B, h, L, d) each.

    On a CPU, the backward pass of the fused kernel is slow for the short sequences of a ViT. In bf16, matrix products
    take a half to a fifth of its time. In fp32, they are faster up to SHORT_SEQUENCE tokens. Without gradients, the
    fused kernel is as fast with 50 tokens, and faster with 197 (`python benchmarks/train_step.py --task attention`).
    A trace has the fused kernel, because torch.jit.trace compares traces with and without gradients.
    """
    is_short = q.dtype == torch.bfloat16 or k.shape[-2] <= SHORT_SEQUENCE
    if q.requires_grad and q.device.type == "cpu" and is_short and not torch.jit.is_tracing():
        return attention_weights(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), of (B, h, L, d) each -> (B, h, L, L)."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def init_classifier(layer: LastLayer) -> LastLayer:
    """Initializes the last layer of a probe or of segmentation (weights: std .01, biases: 0), and returns it."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def init_linear(model: nn.Module, init: Callable[[Tensor], Any]) -> None:
    """Initializes the weights of the linear layers of a model by `init`, and their biases with 0.

    A layer of zeros keeps them: the start of an adapter, which its constructor has set. Models on the meta device, and
    those that --fsdp has sharded, have no such layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and (
            module.weight.is_meta or hasattr(module.weight, "to_local") or module.weight.any()
        ):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU (erf) between them, applied to each token."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops a residual branch of each sample with probability `p`.

    The other branches are divided by 1 - p. (B, ...) -> (B, ...)
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob = p

    @property
    def drop_prob(self) -> float:
        """The rate, which may change in training."""
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, p: float) -> None:
        self._drop_prob = p
        self._keep_prob = torch.tensor(1 - p, device="cpu")  # an input of the graph, which all blocks share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (len(x), *(1,) * (x.ndim - 1))
        if torch.compiler.is_compiling():  # the number would be a constant of the graph
            mask = torch.rand(shape, device=x.device) < self._keep_prob
            return x * (mask / self._keep_prob).to(x.dtype)
        mask = x.new_empty(shape).bernoulli_(1 - self.drop_prob)
        return x * mask.div_(1 - self.drop_prob)


class Block(nn.Module):
    """A pre-norm transformer block: (B, L, D) -> (B, L, D). The attention has the `Encoder.block_inputs`.

    Attributes:
        attention: class of the attention, with the arguments of `Attention`.
        grad_checkpointing: in training, store the input only, and recompute the activations in the backward pass.
    """

    attention: ClassVar[type[Attention]] = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: NormLayer = LAYER_NORM,
        drop_path: float = 0.0,
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.norm1 = norm_layer(dim)
        self.attn = self.attention(dim, num_heads, qkv_bias, qk_norm)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, *inputs, use_reentrant=False)
        return self.compute(x, *inputs)

    def compute(self, x: Tensor, *inputs: Any) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *inputs))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets the evaluation mode of a model. Afterwards, each of its modules has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Returns the drop path rate of each block: linear from 0 at the first block to `last` at the last one."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """Returns the layer of a parameter: 0: embeddings; i + 1: block i; `num_layers` (depth + 1): all others."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    return 0 if first in ("cls_token", "pos_embed", "patch_embed") else num_layers


class Encoder(nn.Module):
    """The encoder of autoencoder, classifier and segmenter: how an image becomes tokens, and their blocks.

    An idea about the encoder is written once, in a subclass of this class: a mix-in, which `combined` puts in front of
    each of these models. It overrides `tokenize`, `positions` or `make_patch_embed`, or sets `block`. The parameters of
    its constructor are keyword-only, and the constructor passes all others on.

    Attributes:
        block: class of the blocks of encoder and decoder, with the arguments of `Block`.
        encoder_name: `module:Class` of the mix-in; None without one.
        extra_inputs: the extra inputs that the steps take by name.
        needed_inputs: those without a default in `tokenize`.
        adapters: ends of the names of the parameters that adapt a frozen encoder. They are trained in all blocks, and
            exports merge them: a module with adapters has the method `merged`, which returns its weight.
    """

    block: ClassVar[Callable[..., nn.Module]] = Block
    encoder_name: ClassVar[str | None] = None
    extra_inputs: ClassVar[frozenset[str]] = frozenset()
    needed_inputs: ClassVar[tuple[str, ...]] = ()
    adapters: tuple[str, ...] = ()

    blocks: nn.ModuleList
    norm: nn.Module
    patch_embed: PatchEmbed
    pos_embed: nn.Parameter  # (1, T + N, D)
    cls_token: nn.Parameter  # (1, T, D)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.extra_inputs = frozenset(extra_inputs(cls))
        cls.needed_inputs = needed_inputs(cls, ["tokenize"])

    @property
    def num_prefix_tokens(self) -> int:
        """T, the number of class tokens. They precede the patch tokens."""
        return self.cls_token.shape[1]

    @property
    def num_patches(self) -> int:
        """N, the number of patches of an image of `img_size`."""
        return self.patch_embed.num_patches

    def class_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T + N, D) -> the class token (B, D), or the mean of several class tokens."""
        return tokens[:, : self.num_prefix_tokens].mean(dim=1)

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T + N, D) -> patch tokens (B, N, D)."""
        return tokens[:, self.num_prefix_tokens :]

    def class_and_patch_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T + N, D) -> class token and mean of the patch tokens, each of unit length (B, 2 D)."""
        parts = (self.class_features(tokens), self.patch_tokens(tokens).mean(dim=1))
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    def patch_maps(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Patch tokens (B, N, D) of images (B, c, H, W) -> maps of the image (B, D, h, w).

        An encoder with several tokens per patch overrides it, and returns their mean.
        """
        rows, columns = (side // p for side, p in zip((height, width), self.patch_embed.patch_size, strict=True))
        return patches.transpose(1, 2).unflatten(2, (rows, columns))

    def make_patch_embed(self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int) -> PatchEmbed:
        """Returns the module that splits images into patches: it has the attributes and `grid_of` of `PatchEmbed`."""
        return PatchEmbed(img_size, patch_size, in_chans, embed_dim)

    def make_blocks(
        self, block: Callable[..., nn.Module] | None, dim: int, num_heads: int, mlp_ratio: float,
        norm_layer: NormLayer, rates: Sequence[float], qkv_bias: bool = True,
    ) -> nn.ModuleList:  # fmt: skip
        """Returns a block for each drop path rate. `block`: their class (default: the class of the model's blocks)."""
        make = partial(
            block or type(self).block, dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer
        )
        return nn.ModuleList([make(drop_path=rate) for rate in rates])

    def tokenize(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> patch tokens with their positions (B, N, D), without class tokens.

        An override has a parameter for each extra input that it takes, and passes the other context on.
        """
        return self.patch_embed(imgs) + self.patch_tokens(self.positions(self.patch_embed.grid_of(*imgs.shape[-2:])))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Returns the positions of class tokens and patches (1, T + N, D) for a grid of (rows, columns) patches."""
        return self.resize_table(self.pos_embed, self.patch_embed.grid_size, grid)

    def resize_table(self, table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        """Interpolates a position table (1, T + N, D) to another grid, in the model and when it loads a file."""
        return resize_pos_embed(table, old_grid, new_grid)

    def block_inputs(
        self, grid: tuple[int, int], ids_restore: Tensor | None = None, num_visible: int | None = None
    ) -> tuple[Any, ...]:
        """Returns further inputs of the blocks of the encoder, such as rotary positions. Default: none.

        Args:
            grid: (rows, columns) of patches.
            ids_restore: (B, N), the index of each patch among K visible patches followed by the masked ones. None: no
                patch is masked.
            num_visible: K.
        """
        return ()

    def with_class_tokens(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, N, D) of a grid, or some of them -> tokens (B, T + N, D): class tokens in front."""
        tokens = self.cls_token + self.positions(grid)[:, : self.num_prefix_tokens]
        return torch.cat([tokens.expand(patches.shape[0], -1, -1), patches], dim=1)

    def all_tokens(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The result of `with_class_tokens`.

        Raises:
            ValueError: an override adds or removes tokens. Other methods would take some of them for patches.
        """
        tokens = self.with_class_tokens(patches, grid)
        expected = self.num_prefix_tokens + patches.shape[1]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"{type(self).__name__}.with_class_tokens returns {tokens.shape[1]} tokens, and {expected} are "
                f"expected, {self.num_prefix_tokens} before the patches: override num_prefix_tokens, too"
            )
        return tokens

    def check_extra_inputs(self, names: Collection[str], needed: Collection[str] | None = None) -> None:
        """Checks the names of extra inputs, as `check_names`. `needed`: must be given (default: `needed_inputs`)."""
        check_names(type(self), self.extra_inputs, self.needed_inputs if needed is None else needed, names)

    def embed(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> tokens with their positions (B, T + N, D), class tokens first.

        Raises:
            ValueError: as in `check_names`.
        """
        self.check_extra_inputs(context)
        patches = self.tokenize(imgs, **context)
        return self.all_tokens(patches, self.patch_embed.grid_of(*imgs.shape[-2:]))

    def layer_id(self, name: str) -> int:
        """Returns the layer of a parameter in layer-wise learning-rate decay: 0: embeddings, and parameters that a
        mix-in adds; i + 1: block i; depth + 1: norms and head, decoder and mask token.
        """
        has_layer = name.startswith(("blocks.", *ABOVE_BLOCKS))
        return get_layer_id_for_vit(name, len(self.blocks) + 1) if has_layer else 0

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters without weight decay in fine-tuning, in addition to 1-D ones, as in timm."""
        return {"pos_embed", "cls_token"}

    def get_intermediate_layers(
        self, imgs: Tensor, n: int | Sequence[int] = 1, norm: bool = True, return_attention: bool = False,
        **context: Any,
    ) -> Any:  # fmt: skip
        """Returns the outputs of the last `n` blocks for images (B, c, H, W), in the order of the blocks.

        Args:
            n: number of blocks, or the indices of the blocks; -1 is the last block.
            norm: apply the final norm of the encoder. A classifier with `global_pool` has no such norm for tokens.
            return_attention: also return the attention weights of these blocks, (B, h, T + N, T + N) each.

        Returns:
            A list of tokens (B, T + N, D), class tokens first; with `return_attention`, also the list of weights.

        Raises:
            ValueError: there is no block with one of the indices.
            AttributeError: a block of another class has no attention weights.
        """
        depth = len(self.blocks)
        indices = range(max(0, depth - n), depth) if isinstance(n, int) else n
        if missing := [index for index in indices if not -depth <= index < depth]:
            raise ValueError(f"there is no block {missing[0]}: the indices of the {depth} blocks are 0 to {depth - 1}")
        chosen = {index % depth for index in indices}
        x = self.embed(imgs, **context)
        inputs = self.block_inputs(self.patch_embed.grid_of(*imgs.shape[-2:]))
        normalize = self.norm if norm and hasattr(self, "norm") else nn.Identity()
        layers = []
        maps = []
        block: Any
        for number, block in enumerate(self.blocks):
            is_returned = number in chosen
            if is_returned and return_attention:
                maps.append(block.attn.maps(block.norm1(x), *inputs))
            x = block(x, *inputs)
            if is_returned:
                layers.append(normalize(x))
        return (layers, maps) if return_attention else layers

    def get_intermediate_maps(self, imgs: Tensor, n: int | Sequence[int], **context: Any) -> list[Tensor]:
        """Returns the outputs of blocks before the final norm as maps (B, D, h, w). `n`: as above."""
        layers = self.get_intermediate_layers(imgs, n, norm=False, **context)
        return [self.patch_maps(self.patch_tokens(tokens), *imgs.shape[2:]) for tokens in layers]


class VisionTransformer(Encoder):
    """The classifier: the encoder of the MAE on all patches, with learned positions and a linear head.

    The input may have another size than `img_size`: the position table is then interpolated to its patch grid.

    Args:
        drop_path_rate: stochastic depth rate of the last block; it increases linearly from 0 at the first block.
        global_pool: classify the mean of the patch tokens, normalized after pooling (`fc_norm`), as in published
            fine-tuning; otherwise the normalized class token (`norm`), or the mean of several.
        num_cls_tokens: T, the number of class tokens.
        block: class of the blocks, or a `partial` of it. Default: `Encoder.block`.

    Attributes:
        head_pools: the head pools the patch tokens (B, N, D) itself. Its input is the normalized tokens.
        pools_both: the input of the head is `class_and_patch_features` of the normalized tokens. It needs `norm`.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: NormLayer = LAYER_NORM,
        drop_path_rate: float = 0.0,
        global_pool: bool = False,
        num_cls_tokens: int = 1,
        block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.global_pool = global_pool
        self.frozen = False
        self.head_pools = False
        self.pools_both = False
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.patch_embed = self.make_patch_embed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_cls_tokens + self.patch_embed.num_patches, embed_dim))
        self.blocks = self.make_blocks(
            block, embed_dim, num_heads, mlp_ratio, norm_layer, drop_path_rates(drop_path_rate, depth), qkv_bias
        )
        # The order of registration matches published optimizer states: norm before the head, fc_norm after it.
        if not global_pool:
            self.norm = norm_layer(embed_dim)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if global_pool:
            self.fc_norm = norm_layer(embed_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initializes linear weights, class token and positions (normal, std .02); biases are zero. Linear layers of
        zeros, such as those of adapters, keep them.

        The published truncation at ±2 is 100 standard deviations away, so this is the same distribution. timm's
        `trunc_normal_` sets about one weight in 2^24 to -2.
        """
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)
        init_linear(self, partial(nn.init.normal_, std=0.02))

    def freeze(self) -> None:
        """Freezes everything except the head: no gradients, and always in evaluation mode."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.frozen = True

    def train(self, mode: bool = True) -> "VisionTransformer":
        """Sets the training mode. Frozen modules stay in evaluation mode."""
        super().train(mode and not self.frozen)
        self.head.train(mode)
        self.training = mode
        return self

    def forward_features(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> the input of the head: features (B, D) or (B, 2 D), or its tokens (B, N, D)."""
        x = self.embed(imgs, **context)
        inputs = self.block_inputs(self.patch_embed.grid_of(*imgs.shape[-2:]))
        for block in self.blocks:
            x = block(x, *inputs)
        if self.global_pool:
            return self.fc_norm(self.patch_tokens(x).mean(dim=1))
        x = self.norm(x)
        if self.pools_both:
            return self.class_and_patch_features(x)
        return self.patch_tokens(x) if self.head_pools else self.class_features(x)

    def forward(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> logits (B, num_classes)."""
        return self.head(self.forward_features(imgs, **context))


def named_constructor(model_class: Callable[..., Model], name: str, shape: Mapping[str, Any]) -> Callable[..., Model]:
    """Returns a function that builds a model of a shape. Its arguments override the shape."""

    def build(**arguments: Any) -> Model:
        return model_class(**{**shape, **arguments})

    parts = ["{embed_dim} wide, {depth} deep, {num_heads} heads"]
    if "decoder_depth" in shape:
        parts.append("decoder {decoder_embed_dim} wide, {decoder_depth} deep")
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{'; '.join(parts).format(**shape)}; arguments override these."
    return build


# The choices of --model: a constructor for each of SIZES, also of a size that you add.
MODELS = {f"vit_{size}": named_constructor(VisionTransformer, f"vit_{size}", shape) for size, shape in SIZES.items()}
vit_mini_patch4 = MODELS["vit_mini_patch4"]
vit_tiny_patch16 = MODELS["vit_tiny_patch16"]
vit_small_patch16 = MODELS["vit_small_patch16"]
vit_base_patch16 = MODELS["vit_base_patch16"]
vit_large_patch16 = MODELS["vit_large_patch16"]
vit_huge_patch14 = MODELS["vit_huge_patch14"]
vit_huge_patch16 = MODELS["vit_huge_patch16"]
vit_1b_patch16 = MODELS["vit_1b_patch16"]
vit_giant_patch14 = MODELS["vit_giant_patch14"]
