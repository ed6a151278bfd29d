"""`python -m mae.recommend`: the command of `mae.start`."""

from mae.cli import entry_point
from mae.recommend import start_flags
from mae.registry import lazily

if __name__ == "__main__":
    entry_point.run(lazily("mae.start", "main"), start_flags.get_args_parser(), start_flags.checked)
