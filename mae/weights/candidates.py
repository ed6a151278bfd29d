"""Finds the weights of Vision Transformers in a checkpoint: in its entries, and below prefixes of their names.

A file may have several models, such as the trained weights and their average, or a student and a teacher. Each is named
by the path of its entry and its prefix: `model_ema`, `teacher.backbone`, `state_dict.net`, or "" if there is neither.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from mae.checkpoints.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

USUAL = ("", "model", "state_dict")  # names of the weights in published files
# In the order of preference. The published code writes `model`; timm reads its average first, and DINO the teacher.
PREFERRED = ("model", "state_dict_ema", "state_dict", "model_state_dict", "module", "teacher")
# Prefixes of torch.compile, of checkpointing, of FSDP, and of DistributedDataParallel or an average of PyTorch.
WRAPPERS = r"((_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.)+"
CLASS_TOKEN = "cls_token"  # of all models that are read
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel

PrefixOf = Callable[[str, Collection[str]], str]  # prefix of a class token, names of all tensors -> that of its model


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


@cache  # some scripts read a file twice
def warn_once(message: str) -> None:
    """Logs a warning, unless it was logged before."""
    logger.warning(message)


def weights_of(
    content: dict[str, Any], origin: str, name: str, keeps_names: bool, prefix_of: PrefixOf
) -> dict[str, Tensor]:
    """Returns the weights of a model in the content of a file. Lines name other models and what is not read.

    Args:
        origin: path of the file, for messages.
        name: name of the model, or its beginning; "" for any. Of several, the first by `PREFERRED`.
        keeps_names: whether prefixes have a meaning, as in a model with modules of the user's code.
        prefix_of: returns the prefix of a model, for that of its class token and the names of all tensors.

    Raises:
        CheckpointError: no model has the name.
    """
    found = list(models(content, keeps_names, prefix_of))
    names = [model.name for model in found]
    fitting = [model for model in found if not name or f"{model.name}.".startswith(f"{name}.")]
    model = min(fitting, key=lambda model: _rank(model.name), default=None)
    if model is None and name:
        raise CheckpointError(
            f"{origin} has no weights named {name}; it has {', '.join(filter(None, names)) or 'none'}"
        )
    if model is None:  # `reading.read` names what is missing
        return tensors_of(content)
    if model.wrappers or model.name not in USUAL:
        without = f", without {', '.join(model.wrappers)} in their names" if model.wrappers else ""
        logger.info(f"{origin}: its weights {model.name or 'at the top'} are read{without}")
    others = [f"{origin}#{other}" for other in names if other != model.name]
    if others and not name:
        warn_once(
            f"{origin} has several models; {model.name or 'that at the top'} is read. For another, give "
            f"{' or '.join(others)}"
        )
    if model.unread:
        count = f"{len(model.unread)} tensors beside {model.name}"
        warn_once(f"{origin}: {count} are not read ({some(model.unread)})")
    return model.tensors


def tensors_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of the preferred entry of a file, or those at its top."""
    inner = next((content[key] for key in PREFERRED if isinstance(content.get(key), dict)), content)
    return {key: t for key, t in inner.items() if isinstance(key, str) and isinstance(t, Tensor)}


def models(state: Any, keeps_names: bool, prefix_of: PrefixOf, path: tuple[str, ...] = ()) -> Iterator[Found]:
    """Yields all models in a nested state: those in its tensors, then those in its entries.

    Args:
        keeps_names, prefix_of: as in `weights_of`.
    """
    items = list(state.items() if isinstance(state, dict) else enumerate(state))
    direct = {key: value for key, value in items if isinstance(value, Tensor) and isinstance(key, str)}
    direct.pop(COUNTER, None)
    anywhere = f"^{WRAPPERS}" if keeps_names else rf"(?<![^.]){WRAPPERS}"
    tensors = {re.sub(anywhere, "", name): value for name, value in direct.items()}
    wrappers = sorted({match[0] for name in direct for match in re.finditer(anywhere, name)})
    if len(tensors) < len(direct):  # names with and without a wrapper are two models
        tensors = direct
        wrappers = []
    prefixes = [prefix for prefix in _prefixes(tensors.keys(), prefix_of) if not (prefix and keeps_names)]
    unread = [name for name in tensors if not name.startswith(tuple(prefixes))]
    for prefix in prefixes:
        inner = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        names = [name for name in tensors if name.startswith(prefix) and not name.startswith(inner)]
        weights = {name.removeprefix(prefix): tensors[name] for name in names}
        yield Found(".".join([*path, prefix]).rstrip("."), weights, wrappers, unread)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from models(value, keeps_names, prefix_of, (*path, str(key)))


def _prefixes(names: Collection[str], prefix_of: PrefixOf) -> list[str]:
    """Returns the prefixes of the models in a state dict, in the order of the names; "" is no prefix."""
    tokens = [name for name in names if re.fullmatch(rf"(.*\.)?{CLASS_TOKEN}", name)]
    return list(dict.fromkeys(prefix_of(name.removesuffix(CLASS_TOKEN), names) for name in tokens))


def _rank(name: str) -> list[int]:
    parts = name.split(".") if name else []
    return [PREFERRED.index(part) if part in PREFERRED else len(PREFERRED) for part in parts]
