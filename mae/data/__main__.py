"""`python -m mae.data`: the command of `mae.data.check`."""

from mae.cli import entry_point
from mae.data.check import get_args_parser, main

if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
