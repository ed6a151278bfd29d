"""`python -m mae.data`: the command of `mae.recommend.check`."""

from mae.cli import entry_point
from mae.recommend.check import get_args_parser, main

if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
