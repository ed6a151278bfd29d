"""Models of timm as frozen encoders: their weights and preprocessing, their tokens and pooled features.

`timm:NAME` is a model with the weights that timm publishes, `FILE#timm:NAME` one with the weights in a file.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mae.checkpoints.checkpoint import CheckpointError
from mae.position_tables import Size, to_pair
from mae.settings.choices import TIMM
from mae.suggestions import did_you_mean
from models_vit import Encoder, VisionTransformer

logger = logging.getLogger(__name__)

NETWORK = "net."  # before the names of its tensors


class TimmEncoder(VisionTransformer):
    """A model of timm with the interface of a frozen `VisionTransformer`, whose head is that of a probe.

    Its pooled features are those of timm: `forward_head(forward_features(images), pre_logits=True)`. The pixels of a
    map (B, D, h, w) are patch tokens.

    Args:
        name: name in timm.
        img_size: that of its weights.
        in_chans: channels c of the images. The colors of the model are c, c + 3, ... : the features are those of
            timm's `adapt_input_conv`.

    Raises:
        ValueError: timm does not have the model, it has no features, or `img_size` is not that of its weights.
    """

    net: Any  # the model of timm

    def __init__(self, name: str, img_size: Size, in_chans: int) -> None:
        import timm

        Encoder.__init__(self)  # the network takes the place of the parts of a VisionTransformer
        self.name, self.in_chans = name, in_chans
        self.global_pool, self.frozen, self.head_pools, self.num_classes = False, False, False, 0
        require_name(name)
        self.net = timm.create_model(name)
        self.net.reset_classifier(0)
        self.colors, *size = self.net.pretrained_cfg["input_size"]
        if to_pair(img_size) != tuple(size):
            raise ValueError(f"input_size={img_size}: {TIMM}{name} has {size[0]} x {size[1]} pixels; omit `input_size`")
        if in_chans != self.colors:
            logger.warning(f"{TIMM}{name} has weights for {self.colors} channels, which are adapted to {in_chans}")
        self.head: nn.Module = nn.Identity()
        with torch.no_grad():
            features = self.net.eval().forward_features(torch.zeros(1, self.colors, *size))
            try:
                self.widths = [self.net.forward_head(features, pre_logits=True).flatten(1).shape[1]]
            except (AttributeError, TypeError) as error:
                raise ValueError(f"{TIMM}{name}: timm has no pooled features of this model ({error})") from error
        # The tokens of several grids are a list. Without a number of prefix tokens, a class token is not told apart.
        own = dict(self.net.named_parameters(recurse=False))
        is_counted = hasattr(self.net, "num_prefix_tokens") or not any(key.startswith("cls_token") for key in own)
        is_grid = isinstance(features, Tensor) and features.ndim in (3, 4)
        self.has_tokens = is_grid and (features.ndim == 4 or is_counted)
        self.length, width = self._tokens(features).shape[1:] if self.has_tokens else (0, 0)
        self.widths.append(width)

    @property
    def embed_dim(self) -> int:  # type: ignore[override]
        """D, channels of the input of the head."""
        return self.widths[self.head_pools]

    @property
    def num_prefix_tokens(self) -> int:
        """T, the number of class tokens and registers. They precede the patch tokens."""
        return getattr(self.net, "num_prefix_tokens", 0)

    @property
    def num_patches(self) -> int:
        """N, the number of patch tokens."""
        return self.length - self.num_prefix_tokens

    def class_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T + N, D) -> the class token (B, D).

        Raises:
            ValueError: the model has none.
        """
        if getattr(self.net, "cls_token", None) is None:
            raise ValueError(f"pool=cls: {TIMM}{self.name} has no class token; give pool=avg, or omit `pool`")
        return tokens[:, 0]

    def get_intermediate_layers(
        self, imgs: Tensor, n: int | Sequence[int] = 1, norm: bool = True, return_attention: bool = False,
        **context: Any,
    ) -> Any:  # fmt: skip
        """Returns the tokens (B, T + N, D) of timm's `forward_features` for images (B, c, H, W).

        Raises:
            ValueError: the model has no tokens, or they are those of other layers.
        """
        if n != 1 or not norm or return_attention:
            raise ValueError(f"{TIMM}{self.name}: only the tokens of the last layer of models of timm are read")
        return [self._tokens(self.net.forward_features(self._to_colors(imgs)))]

    def forward_features(self, imgs: Tensor, **context: Any) -> Tensor:
        """Images (B, c, H, W) -> the input of the head: pooled features (B, D), or patch tokens (B, N, D)."""
        features = self.net.forward_features(self._to_colors(imgs))
        if self.head_pools:
            return self.patch_tokens(self._tokens(features))
        return self.net.forward_head(features, pre_logits=True).flatten(1)

    def _tokens(self, features: Any) -> Tensor:
        """Output of timm's `forward_features` -> tokens (B, T + N, D)."""
        if not self.has_tokens:
            raise ValueError(f"{TIMM}{self.name} has no tokens of one grid, but pooled features only")
        if features.ndim == 3:
            return features
        axis = 3 if getattr(self.net, "output_fmt", None) == "NHWC" else 1
        return features.movedim(axis, 3).flatten(1, 2)

    def _to_colors(self, imgs: Tensor) -> Tensor:
        """Images (B, c, H, W) -> images with the channels of the weights."""
        if self.in_chans == self.colors:
            return imgs
        if self.in_chans == 1:
            return imgs.expand(-1, self.colors, -1, -1)
        sums = [imgs[:, color :: self.colors].sum(dim=1) for color in range(self.colors)]
        return torch.stack(sums, dim=1) * (self.colors / self.in_chans)


def require_name(name: str) -> None:
    """Raises ValueError if timm does not have a model. A name of another kind may load files and code."""
    import timm  # takes more than a second

    if not timm.is_model(name):
        raise ValueError(f"{TIMM}{name}: timm has no such model{did_you_mean(name, timm.list_models())}")


def require_other(model: str) -> None:
    """Raises ValueError if a model that is trained, or built for a setting `model`, is one of timm."""
    if model.startswith(TIMM):
        raise ValueError(
            f"{model} is a frozen encoder, for nearest neighbors, probes and features, without `model`; "
            f"docs/migrating.md lists the files of timm that can be trained further"
        )


def load(name: str, tensors: Mapping[str, Tensor] | None, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a model, under the names of `TimmEncoder`, and its settings.

    Args:
        name: name in timm.
        tensors: its weights under timm's names. None: those that timm publishes. The classifier is not read.
        origin: of the tensors, for messages.

    Raises:
        ValueError: timm does not have the model.
        CheckpointError: its weights can't be downloaded, or the tensors are those of another model.
    """
    import timm

    require_name(name)
    try:
        model: Any = timm.create_model(name, pretrained=True) if tensors is None else _with_tensors(name, tensors)
    except Exception as error:  # of timm, of the Hugging Face Hub and of the network
        reason = " ".join(str(error).split())[:200]
        if tensors is not None:
            raise CheckpointError(f"{origin}: its tensors are not those of timm's {name}: {reason}") from error
        raise CheckpointError(
            f"{TIMM}{name}: its weights can't be downloaded: give a file, FILE#{TIMM}{name}, or in a comparison "
            f"timm_weights='{name}=FILE' ({reason})"
        ) from error
    model.reset_classifier(0)
    return {f"{NETWORK}{key}": tensor for key, tensor in model.state_dict().items()}, _settings_of(name, model)


def _with_tensors(name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Returns a model of timm with the tensors of a file. It may have no classifier, or one of other classes."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(tensors)})
    except RuntimeError:
        other: Any = timm.create_model(name)
        names = other.pretrained_cfg["classifier"]
        layers = [names] if isinstance(names, str) else names or []
        head = {key: value for key, value in other.state_dict().items() if key.rpartition(".")[0] in layers}
        overlay = {"state_dict": {**tensors, **head}}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


def _settings_of(name: str, model: Any) -> dict[str, Any]:
    """Returns the settings of a model and of its images."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    is_whole = config["crop_mode"] == "squash" and config["crop_pct"] == 1
    if config["crop_mode"] != "center" and not is_whole:
        logger.warning(f"{TIMM}{name}: its images are cropped by {config['crop_mode']} in timm, and their center here")
    if "quickgelu" not in name and any("quickgelu" in note for note in model.pretrained_cfg.get("notes") or ()):
        logger.warning(f"{TIMM}{name} was trained with QuickGELU: the model of timm for it has quickgelu in its name")
    return {
        "model": f"{TIMM}{name}", "nb_classes": 0, "num_cls_tokens": 1, "in_chans": channels,
        "input_size": size[0] if size[0] == size[1] else size, "mean": list(config["mean"]), "std": list(config["std"]),
        "crop": "none" if is_whole else "random", "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }  # fmt: skip
