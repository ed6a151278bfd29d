"""Errors with remedies."""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from mae.settings.arguments import arguments


class Remedy(NamedTuple):
    """A remedy for an error, such as `give --in_chans 1 --cls_token and omit --unfreeze_blocks`.

    Args:
        settings: values by the names of their flags. None: the flag must be omitted.
        text: a sentence, with `{}` in place of the flags that are given.
    """

    settings: Mapping[str, Any]
    text: str = "give {}"

    def __str__(self) -> str:
        omitted = " ".join(f"--{name}" for name, value in self.settings.items() if value is None)
        words = " ".join(arguments(self.settings))
        given = [self.text.replace("{}", words)] if words or "{}" not in self.text else []
        return " and ".join(given + [f"omit {omitted}"] * bool(omitted))


class AdvisedError(ValueError):
    """An error with remedies.

    The code that raises the error does not depend on the script: `entry_point.run` prints only the remedies whose flags
    the script has.

    Args:
        message: what is wrong.
        remedies: in the order of preference. Those without settings are left out.
        about: the wrong settings, by the names of their flags. The message begins with them.
    """

    def __init__(self, message: str, *remedies: Remedy, about: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, *remedies)
        self.message, self.about = message, about or {}
        self.remedies = [remedy for remedy in remedies if str(remedy)]

    def __str__(self) -> str:
        return self.describe(self.settings())

    def settings(self) -> set[str]:
        """Returns the names of all settings of the error."""
        return {*self.about, *(name for remedy in self.remedies for name in remedy.settings)}

    def describe(self, known: Container[str], names: Mapping[str, str] | None = None) -> str:
        """Returns the message in one line.

        Args:
            known: names of the flags that a remedy may have.
            names: positional arguments, by the names of the flags that they replace.
        """
        about = " ".join(f"{(names or {}).get(name, '--' + name)} {value}" for name, value in self.about.items())
        remedies = [str(one) for one in self.remedies if all(name in known for name in one.settings)]
        return f"{about}: " * bool(about) + self.message + f": {'; or '.join(remedies)}" * bool(remedies)
