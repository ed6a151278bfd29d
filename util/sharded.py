"""`python -m util.sharded`: the command of `util.checkpoints.sharded`."""

from util.checkpoints.sharded import get_args_parser, main
from util.cli import entry_point

if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
