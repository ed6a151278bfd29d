"""`python -m util.resize`: the command of `util.data.resize`."""

from util.cli import entry_point
from util.data.resize import get_args_parser, main

if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
