"""What a run was started with: a line of environment.jsonl in its directory for each start."""

import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mae import parallel
from mae.files import results
from mae.settings.run import fits

logger = logging.getLogger(__name__)

FILE = "environment.jsonl"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def commit() -> str | None:
    """Returns the commit of this code, with "+changes" if files differ from it.

    None without git, and if the code comes neither from a clone nor from a git address.
    """
    folder = Path(__file__).resolve().parents[2]  # an editable install has links
    if not (folder / ".git").exists():  # it may be installed below another repository
        return _installed_commit(folder)
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            cwd=folder, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _installed_commit(folder: Path) -> str | None:
    """Returns the commit of the git address from which pip or uv installed this code (PEP 610)."""
    for file in folder.glob("masked_autoencoders-*.dist-info/direct_url.json"):
        commit = json.loads(file.read_text(encoding="utf-8")).get("vcs_info", {}).get("commit_id")
        return commit and str(commit)[:12]
    return None


def describe(device: torch.device) -> dict[str, Any]:
    """Returns the command line, versions, commit, device and processes of this program, as plain values."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "python": platform.python_version(),
        # None: Pillow may be installed under the name of a fork.
        **{name: next((one.version for one in metadata.distributions(name=name)), None) for name in PACKAGES},
        **(describe_gpu(device) if device.type == "cuda" else {"device": f"{device} ({platform.machine()})"}),
        "processes": parallel.world_size(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Returns the name of a GPU, and the versions of its driver and libraries, as plain values."""
    driver = Path("/proc/driver/nvidia/version")
    triton = next((one.version for one in metadata.distributions(name="triton")), None)
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "triton": triton,
    }


def record(output_dir: Path, device: torch.device, settings: Mapping[str, Any]) -> None:
    """Appends a line about this start to environment.jsonl in a run directory, and logs where it is.

    Args:
        settings: the settings of the run, plain values. Checkpoints have the names of the classes, too.
    """
    path = output_dir / FILE
    recorded = {name: settings[name] for name in sorted(settings) if name != "classes"}
    results.add_line(path, json.dumps({**describe(device), "settings": recorded}))
    logger.info(f"settings and versions: {path}")


def read(output_dir: Path) -> list[dict[str, Any]]:
    """Returns the entries about each start of a run: those of `describe`, and its `settings`.

    Raises:
        ValueError: no start has a complete line.
        OSError: the directory is none of a run.
    """
    path = output_dir / FILE
    starts = results.read_lines(path)
    if not starts:
        raise ValueError(f"{path} has no complete line: resume the run, which adds one")
    return starts


def read_last(output_dir: Path) -> dict[str, Any]:
    """Returns the entries about the last start of a run, as `read`.

    Raises:
        ValueError: as in `read`, or a setting is of another type. Settings become arguments of commands.
        OSError: as in `read`.
    """
    start = read(output_dir)[-1]
    for name, value in start["settings"].items():
        if value is not None and not fits(name, value):
            raise ValueError(f"{output_dir / FILE}: its recorded {name}, {str(value)[:80]}, is invalid")
    return start
