"""`python -m mae.data`: the command of `mae.recommend.check`."""

from mae.cli import entry_point
from mae.recommend import check_flags
from mae.registry import lazily

if __name__ == "__main__":
    entry_point.run(lazily("mae.recommend.check", "main"), check_flags.get_args_parser(), check_flags.checked)
