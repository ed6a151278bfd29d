"""The rule that says how an encoder is pooled: how its tokens become one vector, where nothing chooses it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mae.probes import pools_tokens
from mae.settings.choices import BOTH, CLASS_TOKEN, PATCHES, TIMM

OF_PROBE = "probe"
OF_TIMM = "timm"
TITLES = {
    CLASS_TOKEN: "class token", PATCHES: "mean of the patches", BOTH: "class token and mean of the patches",
    OF_PROBE: "pooling of the probe", OF_TIMM: "pooling of timm",
}  # fmt: skip


class Pooling(NamedTuple):
    """How the tokens of an image become its features."""

    name: str  # a key of TITLES
    reason: str  # "" if the file does not tell, and the pooling is the published one

    def __str__(self) -> str:
        """Returns the pooling and its reason, for a log or a page."""
        return f"{TITLES[self.name]} ({self.reason or 'the published default; the file does not tell'})"


def pooling_of(settings: Mapping[str, Any], trained_by: str = "") -> Pooling:
    """Returns the pooling of an encoder, by what it was trained for.

    Args:
        settings: of the model and of its training, by the names of the flags.
        trained_by: the method whose loss trained the class token, if the format of the file tells it.
    """
    has_head = bool(settings.get("nb_classes"))
    if has_head and pools_tokens(settings.get("probe")):
        return Pooling(OF_PROBE, "its head records it")
    if str(settings.get("model")).startswith(TIMM):
        return Pooling(OF_TIMM, "a model of timm")
    if pool := settings.get("pool"):
        return Pooling(pool, "the file records it")
    if settings.get("global_pool"):
        return Pooling(PATCHES, "the classifier records it")
    if has_head:
        return Pooling(CLASS_TOKEN, "the classifier records it")
    if trained_by:
        return Pooling(CLASS_TOKEN, f"{trained_by} trains it")
    if settings.get("uniformity"):
        return Pooling(BOTH, f"uniformity={settings['uniformity']:g} trains the class token")
    return Pooling(CLASS_TOKEN, "")


def pooled(model: Any, tokens: Tensor, name: str) -> Tensor:
    """Pools the tokens (B, T + N, D) of a `models_vit.Encoder`: (B, D), or (B, 2 D) for BOTH.

    Args:
        name: CLASS_TOKEN, PATCHES or BOTH.
    """
    if name == BOTH:
        return model.class_and_patch_features(tokens)
    return model.class_features(tokens) if name == CLASS_TOKEN else model.patch_tokens(tokens).mean(dim=1)
