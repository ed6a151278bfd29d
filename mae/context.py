"""The context of a model's steps: the arguments that each step takes by name, and passes on.

It contains `noise`, `valid` and `grid_size` of the library, and the extra inputs of a dataset. A step takes an extra
input by a parameter of its name.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator

from torch import nn

# The steps that subclasses override, and the number of their published arguments.
STEPS = {
    "forward": 2, "tokenize": 1, "forward_encoder": 2, "random_masking": 2, "forward_decoder": 2, "forward_loss": 3,
    "decoder_positions": 1, "target": 1,
}  # fmt: skip
ENTRIES = ("noise", "valid", "grid_size")  # of the library
OF_LIBRARY = ("mask", *ENTRIES)  # arguments of the steps that are not extra inputs
# Parameters of the models' methods. No other entry of the context has one of these names (docs/method.md).
RESERVED = (
    *OF_LIBRARY, "self", "x", "imgs", "images", "mask_ratio", "latent", "ids_restore", "pred", "loss", "grid", "n",
    "norm", "return_attention", "pool", "topk", "batch_size", "channels_last",
)  # fmt: skip
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _overrides(kind: type, steps: Iterable[str]) -> Iterator[tuple[type, str, list[inspect.Parameter]]]:
    """Yields the methods of a class and its bases, base classes first: class, step, parameters after self."""
    for base in reversed(kind.__mro__):
        for step in steps:
            if step in vars(base) and base is not nn.Module:
                yield base, step, [*inspect.signature(vars(base)[step]).parameters.values()][1:]


def extra_inputs(kind: type, steps: Iterable[str] = STEPS) -> dict[str, bool]:
    """Returns the extra inputs that the steps of a model's class take by name, and whether they need them."""
    needed: dict[str, dict[str, bool]] = {}  # by name and step
    for _, step, parameters in _overrides(kind, steps):
        for parameter in parameters[STEPS[step] :]:
            if parameter.kind in NAMED and parameter.name not in OF_LIBRARY:
                needed.setdefault(parameter.name, {})[step] = parameter.default is parameter.empty
    return {name: any(of_steps.values()) for name, of_steps in needed.items()}


def needed_inputs(kind: type, steps: Iterable[str] = STEPS) -> tuple[str, ...]:
    """Returns the extra inputs without a default."""
    return tuple(name for name, is_needed in extra_inputs(kind, steps).items() if is_needed)


def require_free(kind: type, names: Iterable[str]) -> None:
    """Raises ValueError if an entry of the context has the name of a parameter of a model's methods."""
    for name in names:
        if name in RESERVED:
            raise ValueError(
                f"{kind.__name__}: rename the entry {name} of the context. The model has parameters of these names: "
                f"{', '.join(RESERVED)}"
            )


def check_names(kind: type, taken: Collection[str], needed: Collection[str], given: Collection[str]) -> None:
    """Checks the names of the extra inputs that a model gets. One that no step takes would have no effect.

    Raises:
        ValueError: no step of the model's class takes an extra input, one is missing, or as in `require_free`.
    """
    require_free(kind, given)
    for name in given:
        if name not in taken:
            others = ", ".join(sorted(taken)) or "none"
            raise ValueError(f"{kind.__name__} takes no extra input {name}: it takes {others}")
    for name in needed:
        if name not in given:
            raise ValueError(
                f"{kind.__name__} needs the extra input {name} of each image: give extras={name} with a list, or "
                f"return it from your dataset"
            )


def takes(kind: type, step: str, name: str) -> bool:
    """Whether a step of a model's class takes an argument by name; **context alone does not count."""
    return name in inspect.signature(getattr(kind, step)).parameters


def require_context(kind: type) -> None:
    """Checks that the overrides of a model's class take and pass on the context, as training requires.

    Raises:
        ValueError: an override has no parameter **context.
    """
    for base, step, parameters in _overrides(kind, STEPS):
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            names = ", ".join(["self", *(parameter.name for parameter in parameters), "**context"])
            raise ValueError(
                f"{base.__name__}.{step} lacks the context, such as the noise of the masks: write "
                f"def {step}({names}), and pass **context on to the steps that it calls"
            )
