"""Runs the scripts of this repository."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mae.data import jpeg
from mae.training import log

ROOT = Path(__file__).parents[1]


def run(*command: object, threads: int | None = None) -> None:
    """Prints and runs a command of Python in the repository.

    Args:
        command: a script, or -m and a module; then its arguments.
        threads: threads of each process (default: PyTorch's).

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    words = list(map(str, command))
    print("$", shlex.join(["python", *words]), flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)


def require_images(folder: Path) -> None:
    """Raises ValueError if a folder of --data_path has no training images."""
    if not (ROOT / folder / "train").is_dir():
        raise ValueError(
            f"--data_path {folder} has no folder train: python demo/unpack_data.py writes the embedded images"
        )


def has_fast_jpeg() -> bool:
    """Whether --fast_jpeg works here: its decoder is installed."""
    try:
        jpeg.decoder()
    except (ImportError, RuntimeError, OSError):  # not installed, or not for this PyTorch
        return False
    return True


def pretrain(folder: Path, out: Path, *flags: object) -> list[dict[str, Any]]:
    """Runs main_pretrain.py on a folder of images, with --fast_jpeg if it works; returns the lines of its log.txt."""
    fast = ["--fast_jpeg"] if has_fast_jpeg() else []
    run("main_pretrain.py", "--data_path", folder, "--output_dir", out, "--vis_every", 0, *fast, *flags)
    return log.read(out)
