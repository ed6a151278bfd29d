"""Classes and functions of the user's code that flags name: encoder, masked autoencoder, optimizer."""

from argparse import Namespace
from typing import Any

from util.cli import entry_point
from util.cli.user_code import import_object, name_of


def with_own(args: Namespace, flag: str, given: Any) -> tuple[Namespace, Any]:
    """Imports the object that a flag names, or records the name of `given`.

    Args:
        args: the settings of the command, before a file adds its own: what a file names is not imported.
        flag: its name, such as encoder.

    Raises:
        ValueError: it can't be imported.
    """
    if given is not None:
        return entry_point.changed(args, {flag: name_of(given)}), given
    name = getattr(args, flag)
    return args, import_object(f"--{flag} ", name) if name else None
