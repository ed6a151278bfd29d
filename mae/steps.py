"""What the overrides of a model's steps take: arguments that published code lacks, and extra inputs of images."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

PASSED = ("noise", "valid")  # arguments of the steps that are no extra inputs


class Steps:
    """The base of a model whose steps are methods that subclasses override.

    Attributes:
        arguments: arguments that the steps of the published code do not have, and the methods that pass them on.
        own_parameters: the steps that extra inputs reach, and their first parameters, which may have other names.
        used_steps: the steps that the model calls.
        lacking: those of `arguments` that a subclass does not pass on, with its first method without the argument.
        extras: for each of `own_parameters`, the extra inputs that overrides take by name, and whether they need them.
    """

    arguments: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    own_parameters: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    used_steps: ClassVar[Collection[str]] = ()
    lacking: ClassVar[dict[str, str]] = {}
    extras: ClassVar[dict[str, dict[str, bool]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.lacking = {
            argument: lacks[0]
            for argument, steps in cls.arguments.items()
            if (lacks := [step for step in steps if not _accepts(getattr(cls, step), argument)])
        }
        cls.extras = {step: {} for step in cls.own_parameters}
        for kind in reversed(cls.__mro__):
            for step in cls.extras.keys() & vars(kind).keys():
                cls.extras[step] |= _further(vars(kind)[step], len(cls.own_parameters[step]), PASSED)

    def lack_of(self, argument: str) -> str:
        """Returns a message about one of `arguments` that an override does not accept; "" if all do."""
        step = self.lacking.get(argument)
        message = f"{type(self).__name__}.{step} has no argument {argument}: add {argument}=None, and pass it on"
        return message if step else ""

    def extras_of(self, step: str, extras: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the extra inputs that a step takes."""
        return {name: value for name, value in extras.items() if name in self.extras[step]}

    def extras_taken(self, steps: Collection[str] | None = None, needed: bool = False) -> set[str]:
        """Returns the extra inputs that steps take; with `needed`, those without a default. Default: `used_steps`."""
        used = self.used_steps if steps is None else steps
        return {name for step in used for name, is_needed in self.extras[step].items() if is_needed or not needed}

    def check_extras(self, names: Collection[str], steps: Collection[str] | None = None) -> None:
        """Raises ValueError if no step takes one of these extra inputs, or one of `steps` needs another one."""
        known = self.extras_taken(self.extras)
        if unknown := sorted(set(names) - known):
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise ValueError(
                f"{type(self).__name__} takes no extra input {unknown[0]}: {takes}; omit it, or give a class of "
                f"--encoder or --model_class with a parameter of this name"
            )
        if missing := sorted(self.extras_taken(steps, needed=True) - set(names)):
            name = missing[0]
            raise ValueError(
                f"{type(self).__name__} needs the extra input {name} of each image: give --extras {name} with a list, "
                f"or return it from your dataset; in Python, model.predict(images, {name}=...)"
            )


def _accepts(step: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(step).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _further(step: Callable[..., Any], count: int, known: Collection[str]) -> dict[str, bool]:
    """Returns the parameters of a step after the first `count` that are not known, and whether they have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(step).parameters.values())[1 + count :]  # after self
    return {p.name: p.default is p.empty for p in parameters if p.kind in kinds and p.name not in known}
