"""Converts the checkpoint of a sharded run, a folder, to a plain checkpoint.

python -m mae.checkpoints.sharded runs/giant/checkpoint-799 giant.pth
"""

import argparse
from pathlib import Path

from mae.checkpoints import checkpoint, sharded_state
from mae.cli import entry_point, flags


def main(args: argparse.Namespace) -> None:
    """Converts a sharded checkpoint to a plain one."""
    checkpoint.write(sharded_state.gather(args.folder), args.file)
    print(f"{args.file}: give it as `resume`, or as `init_from` or `finetune` to start from its weights")


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Converts a sharded checkpoint to a checkpoint file.")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="sharded checkpoint, such as runs/giant/checkpoint-799"
    )
    parser.add_argument("file", type=flags.new_file(), metavar="FILE", help="output file, such as giant.pth")
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
