"""Heads of probes: linear (appendix A.1) and attentive (Psomas et al. 2025). A new one is a function and an entry."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from mae.registry import find
from mae.settings import ModelSpec
from mae.settings.choices import BOTH, NUM_QUERIES
from models_vit import VisionTransformer, attention_weights, init_classifier


class AttentivePool(nn.Module):
    """Learned queries pool the tokens of a frozen encoder: (B, N, D) -> (B, D). Efficient probing (Psomas et al. 2025).

    The keys are the tokens. Query i pools the channels [i·D/Q, (i + 1)·D/Q) of the values.

    Args:
        dim: D, channels of a token.
        num_queries: Q, a divisor of D.

    Raises:
        ValueError: `num_queries` does not divide `dim`.
    """

    def __init__(self, dim: int, num_queries: int) -> None:
        super().__init__()
        if dim % num_queries:
            raise ValueError(f"num_queries={num_queries} does not divide the {dim} channels of a token")
        self.queries = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.value = nn.Linear(dim, dim, bias=False)

    def maps(self, tokens: Tensor) -> Tensor:
        """Attention weights of the queries over the tokens: (B, N, D) -> (B, Q, N); they sum to 1 for each query."""
        return attention_weights(self.queries, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        # Pooling and projection are linear, so their order is free. Values of all tokens, (B, N, D) for each of several
        # heads, would take N / Q times the memory of the pooled tokens (B, Q, D), and more operations.
        pooled = self.maps(tokens) @ tokens
        slices = self.value.weight.unflatten(0, (len(self.queries), -1))  # (Q, D/Q, D)
        return torch.einsum("bqd,qcd->bqc", pooled, slices).flatten(1)


class ParallelHeads(nn.ModuleList):
    """Several heads on the same features (B, D) or tokens (B, N, D) -> logits (heads, B, classes)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self])


def probe_head(embed_dim: int, num_classes: int) -> nn.Sequential:
    """Returns the head of a linear probe: batch norm without affine parameters, then a linear layer (appendix A.1)."""
    norm = nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6)
    return nn.Sequential(norm, init_classifier(nn.Linear(embed_dim, num_classes)))


def attentive_head(embed_dim: int, num_classes: int, num_queries: int) -> nn.Sequential:
    """Returns the head of an attentive probe: the pooling of the tokens before the head of a linear probe.

    Its tensors have the names of a linear probe, and `pool.queries` and `pool.value.weight`.

    Raises:
        ValueError: `num_queries` does not divide `embed_dim`.
    """
    pool = AttentivePool(embed_dim, num_queries)
    return nn.Sequential(OrderedDict([("pool", pool), *probe_head(embed_dim, num_classes).named_children()]))


def _linear(embed_dim: int, spec: ModelSpec) -> nn.Module:
    return probe_head(embed_dim, spec.nb_classes or 0)


def _attentive(embed_dim: int, spec: ModelSpec) -> nn.Module:
    return attentive_head(embed_dim, spec.nb_classes or 0, spec.num_queries or NUM_QUERIES)


class Probe(NamedTuple):
    """An entry of PROBES."""

    help: str
    # The channels of its input -> the head, whose last layer has the name `1`: its weight has a row for each class.
    function: Callable[[int, ModelSpec], nn.Module]
    pools: bool = False  # its input is the patch tokens (B, N, D), not the pooled features (B, D)
    tensor: str = ""  # a tensor that only it has. Without such a tensor, a file that records no probe has a linear one
    counts: str = ""  # the setting that is the length of this tensor


LINEAR = "linear"
PROBES = {
    LINEAR: Probe("a linear layer on the pooled features", _linear),
    "attentive": Probe(
        "learned queries pool the patch tokens for the linear layer (efficient probing, Psomas et al. 2025)",
        _attentive, pools=True, tensor="head.pool.queries", counts="num_queries",
    ),
}  # fmt: skip


def pools_tokens(probe: Any) -> bool:
    """Whether a recorded probe pools the patch tokens."""
    return probe in PROBES and PROBES[probe].pools


def determined(sizes: Mapping[str, Size]) -> dict[str, Any]:
    """Returns the settings of a probe that names and shapes of its tensors determine."""
    for name, probe in PROBES.items():
        if probe.tensor in sizes:
            return {"probe": name, **({probe.counts: sizes[probe.tensor][0]} if probe.counts else {})}
    return {"probe": LINEAR}


def set_probe_head(model: VisionTransformer, spec: ModelSpec) -> None:
    """Replaces the head of a classifier by the head of a probe (`probe`, `num_queries`, `nb_classes`).

    Raises:
        ValueError: `num_queries` does not divide the width, the model has no norm of tokens, or the probe is unknown or
            has its own pooling, and `pool` is given.
    """
    name = spec.probe if isinstance(spec.probe, str) else LINEAR  # True: linear, of an earlier version
    probe = find("probe", PROBES, name)
    if probe.pools and spec.pool:
        raise ValueError(f"probe={name} pools the patch tokens itself: omit `pool`")
    model.head_pools = probe.pools
    model.pools_both = spec.pool == BOTH
    if probe.pools and model.global_pool:
        raise ValueError(
            f"probe={name} pools patch tokens after the norm of the encoder, which a classifier with `global_pool` "
            f"does not have"
        )
    model.head = probe.function(model.embed_dim * (1 + model.pools_both), spec)
