"""Finds the weights of Vision Transformers in a checkpoint: in its entries, and below prefixes of their names.

A file may have several models, such as the trained weights and their average, or a student and a teacher. Each is named
by the path of its entry and its prefix: `model_ema`, `teacher.backbone`, `state_dict.net`, or "" if there is neither.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# In the order of preference. The published code writes `model`; timm reads its average first, and DINO the teacher.
PREFERRED = ("model", "state_dict_ema", "state_dict", "model_state_dict", "module", "teacher")
# Prefixes of torch.compile, of checkpointing, of FSDP, and of DistributedDataParallel or an average of PyTorch.
WRAPPERS = r"((_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.)+"
CLASS_TOKEN = "cls_token"  # of all models that are read
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


class Found(NamedTuple):
    """A model of a checkpoint."""

    name: str
    tensors: dict[str, Tensor]
    wrappers: list[str]  # prefixes of wrappers that were removed from the names
    unread: list[str]  # names of tensors in its entry that belong to no model


def some(names: Iterable[str], count: int = 3) -> str:
    """Returns the first names, for a message."""
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def models(state: Any, keeps_names: bool, path: tuple[str, ...] = ()) -> Iterator[Found]:
    """Yields all models in a nested state.

    Args:
        keeps_names: whether prefixes have a meaning, as in a model with modules of the user's code.
    """
    items = list(state.items() if isinstance(state, dict) else enumerate(state))
    direct = {key: value for key, value in items if isinstance(value, Tensor) and isinstance(key, str)}
    direct.pop(COUNTER, None)
    if direct:
        yield from _models_of(direct, keeps_names, path)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from models(value, keeps_names, (*path, str(key)))


def _models_of(direct: dict[str, Tensor], keeps_names: bool, path: tuple[str, ...]) -> Iterator[Found]:
    """Yields the models in a dict of tensors."""
    anywhere = f"^{WRAPPERS}" if keeps_names else rf"(?<![^.]){WRAPPERS}"
    tensors = {re.sub(anywhere, "", name): value for name, value in direct.items()}
    wrappers = sorted({match[0] for name in direct for match in re.finditer(anywhere, name)})
    if len(tensors) < len(direct):  # names with and without a wrapper are two models
        tensors, wrappers = direct, []
    prefixes = [prefix for prefix in _prefixes(tensors) if not (prefix and keeps_names)]
    unread = [name for name in tensors if not name.startswith(tuple(prefixes))]
    for prefix in prefixes:
        inner = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        names = [name for name in tensors if name.startswith(prefix) and not name.startswith(inner)]
        weights = {name.removeprefix(prefix): tensors[name] for name in names}
        yield Found(".".join([*path, prefix]).rstrip("."), weights, wrappers, unread)


def _prefixes(names: Mapping[str, Tensor]) -> list[str]:
    """Returns the prefixes of the models in a state dict, in the order of the names; "" is no prefix."""
    found = dict[str, None]()
    for name in names:
        if not re.fullmatch(rf"(.*\.)?{CLASS_TOKEN}", name):
            continue
        prefix = name.removesuffix(CLASS_TOKEN)
        prefix = re.sub(r"(?<![^.])(vit\.)?embeddings\.$", "", prefix)  # of transformers
        if f"{prefix}patch_embed.projection.weight" in names:  # of mmpretrain, whose decoder is in `neck.`
            prefix = re.sub(r"(?<![^.])backbone\.$", "", prefix)
        found[prefix] = None
    return list(found)


def choose(found: list[Found], name: str) -> Found | None:
    """Returns the model with a name, or whose name begins with it; of several, the first by `PREFERRED`, then by order.

    Without a name, all models are considered. None: there is none.
    """
    fitting = [model for model in found if not name or f"{model.name}.".startswith(f"{name}.")]
    return min(fitting, key=lambda model: _rank(model.name), default=None)


def _rank(name: str) -> list[int]:
    parts = name.split(".") if name else []
    return [PREFERRED.index(part) if part in PREFERRED else len(PREFERRED) for part in parts]
