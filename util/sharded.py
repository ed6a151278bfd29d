"""`python -m util.sharded`: the command of `mae.checkpoints.sharded`."""

from mae.checkpoints.sharded import get_args_parser, main
from mae.cli import entry_point

if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
