"""A script that another program runs in its own process, with settings by name."""

import gc
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mae import errors, parallel
from mae.cli import entry_point
from mae.settings import Run
from mae.settings.arguments import arguments


class Script:
    """A script such as main_finetune.py.

    Args:
        module: has `get_args_parser`, and the function.
        function: name of the function of the settings that is called.
    """

    def __init__(self, module: ModuleType, function: str = "main") -> None:
        self.module = module
        self.function = function
        self.name = module.__name__

    def settings(self, given: Mapping[str, Any]) -> Run:
        """Returns the settings of a run.

        Raises:
            SystemExit: the script refuses them; its message is printed.
        """
        return entry_point.parse(self.module.get_args_parser(), arguments(given))

    def call_main(self, given: Mapping[str, Any], output: Path, **options: Any) -> Any:
        """Calls the function with settings, and returns its result. It appends what it prints to a file.

        Args:
            given: the settings.
            options: its further arguments.

        Raises:
            ValueError: the script has failed.
        """
        with output.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file):
            try:
                return getattr(self.module, self.function)(self.settings(given), **options)
            except (ValueError, OSError, ArithmeticError) as error:
                if not errors.is_on_purpose(error, given.values()):
                    raise
                raise ValueError(f"{errors.message(error)} (the output is in {output})") from error
            finally:  # leave no state to the next run; each `main` seeds PyTorch
                parallel.teardown()
                gc.collect()
                if "torch._dynamo" in sys.modules:  # importing it takes seconds
                    torch.compiler.reset()
