"""The library of the scripts and engines: one package per subject.

This module runs before any import of a package that may be missing. Outside of its environment, it raises an
ImportError whose message names the remedy. If a program does not catch it, such as the scripts, it ends with this line.
The syntax is valid in every Python 3.
"""

import os
import sys
from importlib.util import find_spec

PACKAGES = ("torch", "torchvision", "timm", "numpy", "PIL", "tifffile", "yaml", "safetensors", "tensorboard", "tqdm",
            "matplotlib", "huggingface_hub")  # fmt: skip


def _require_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    old = sys.version_info < (3, 11)
    if not (missing or old):
        return
    root = os.path.relpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    venv = os.path.join(root, ".venv")
    activate = "source " + os.path.join(venv, "bin", "activate")
    if os.path.exists(os.path.join(venv, "bin")) and os.path.realpath(venv) != os.path.realpath(sys.prefix):
        remedy = activate
    elif old:
        remedy = "./run demo, which finds a newer Python and creates .venv"
    elif sys.prefix != sys.base_prefix:
        remedy = "pip install " + root
    else:
        remedy = f"python3 -m venv {venv} && {activate} && pip install {root}"
    lack = "is older than Python 3.11" if old else "lacks " + ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
    script = os.path.basename(sys.argv[0]).replace("-m", "python -m")
    error = ImportError(f"{script}: error: {sys.executable} {lack}; type: {remedy}")
    report = sys.excepthook
    sys.excepthook = lambda kind, value, trace: (
        print(value, file=sys.stderr) if value is error else report(kind, value, trace)
    )
    raise error


_require_packages()
