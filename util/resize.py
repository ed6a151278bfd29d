"""`python -m util.resize`: the command of `mae.data.resize`."""

from mae.cli import entry_point
from mae.data.resize import get_args_parser, main

if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
