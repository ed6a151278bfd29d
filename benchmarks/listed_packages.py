"""The packages that gpu_check.py and gpu_lab.py may import, and a hook that hides others: `--listed_packages`.

With the hook, a machine with more packages is like a machine that has only these and what they require.
"""

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

LISTED = (
    "torch", "torchvision", "timm", "transformers", "numpy", "pillow", "scikit-learn", "tensorboard", "pyyaml",
    "safetensors", "tqdm", "matplotlib", "tifffile", "h5py", "pytest",
)  # fmt: skip

HOOK = '''"""Hides packages from `import`, as if they were not installed."""

import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden}


class Listed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Listed
'''


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names: Iterable[str]) -> set[str]:
    """Returns the normalized names of packages and of all that they require, without their extras."""
    found: set[str] = set()
    queue = [_normalized(name) for name in names]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # required on other systems only
            continue
        queue += [_normalized(re.split(r"[^\w.-]", line)[0]) for line in requirements if "extra ==" not in line]
    return found


def hidden_modules() -> list[str]:
    """Returns the names of the installed top-level modules that belong neither to a listed package nor to this one."""
    kept = {"masked-autoencoders", *with_requirements(LISTED)}
    installed = metadata.packages_distributions()
    return sorted(name for name, owners in installed.items() if not kept & set(map(_normalized, owners)))


def write_hook(folder: Path) -> None:
    """Writes sitecustomize.py, which Python imports at its start if the folder is in PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(HOOK.format(hidden=hidden_modules()))
