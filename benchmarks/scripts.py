"""Runs the scripts of this repository."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path("demo/data/fashion_mnist")
# Flags of main_pretrain.py in studies, which change one thing at a time. The recipe of the demo has what was found.
PRETRAIN = {
    "config": "recipes/pretrain_fashion_mnist.yaml", "crop": "random", "crop_scale": [0.6, 1.0], "lr": 1e-3,
    "norm_pix_loss": False, "uniformity": 0.0,
}  # fmt: skip
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


def run_python(*command: object, threads: int | None = None) -> None:
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
