"""Classes of the user's code that flags name: the encoder, and the masked autoencoder."""

from argparse import Namespace
from typing import Any

from util.cli import entry_point
from util.cli.user_code import import_object, name_of


def with_encoder(args: Namespace, encoder: type[Any] | None) -> tuple[Namespace, type[Any] | None]:
    """Imports the class of --encoder, or records the name of `encoder`.

    Args:
        args: the settings of the command, before a file adds its own: what a file names is not imported.

    Raises:
        ValueError: the class can't be imported.
    """
    if encoder is not None:
        return entry_point.changed(args, {"encoder": name_of(encoder)}), encoder
    return args, import_object("--encoder ", args.encoder) if args.encoder else None


def chosen_encoder(args: Namespace) -> dict[str, Any]:
    """Returns the arguments of `get_model` for --encoder and --encoder_args.

    Raises:
        ValueError: the class can't be imported.
    """
    encoder = {"encoder": import_object("--encoder ", args.encoder)} if args.encoder else {}
    return encoder | ({"encoder_args": args.encoder_args} if args.encoder_args else {})
