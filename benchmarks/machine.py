"""The files in benchmarks/results: measurements with the settings, a folder per machine."""

import argparse
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from mae.cli import entry_point
from mae.files import atomic
from mae.settings import types
from mae.settings.choices import AMP_CHOICES
from mae.training.environment import commit, describe_gpu
from models_vit import SIZES

RESULTS = Path(__file__).parent / "results"
GPU_CHECK = "gpu_check"  # the file of gpu_check.py: several measurements


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """Returns a parser with the flags of all measurements."""
    result = entry_point.parser(description)
    result.add_argument(
        "--rounds", default=rounds, type=types.positive_int, metavar="N",
        help="repetitions; each measures every implementation once",
    )  # fmt: skip
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the JSON files (default: benchmarks/results/MACHINE)"
    )
    return result


def model_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags of measurements that compare implementations of a model."""
    result = parser(description)
    result.add_argument("--size", default="base_patch16", choices=SIZES, metavar="SIZE", help="a size of models_vit")
    result.add_argument("--batch_size", default=16, type=types.positive_int, metavar="N", help="batch size")
    result.add_argument("--amp", default="bf16", choices=AMP_CHOICES, help="precision; off is fp32")
    result.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    result.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="implementations, such as ours or 'ours compiled'"
    )
    return result


def describe(device: torch.device) -> dict[str, Any]:
    """Describes the hardware, the versions and the commit."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "gpu_versions": describe_gpu(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
    }


def processor() -> str:
    """Returns the name of the processor and its generation, such as "AMD EPYC, Zen 4" or "Intel Xeon, AMX".

    Generations differ in speed, and a virtual machine hides the model.
    """
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|flags)\s*: (.*)$", text, re.MULTILINE))
    name = facts.get("model name", platform.machine()).replace("(R)", "").removesuffix(" Processor")
    units = facts.get("flags", "").split()
    if name.startswith("AMD") and "avx512_bf16" in units:
        return name + (", Zen 5" if facts["cpu family"] == "26" else ", Zen 4")
    return f"{name}, AMX" if "amx_bf16" in units else name


def write(
    name: str, device: torch.device, settings: dict[str, Any], results: dict[str, Any], folder: Path | None
) -> None:
    """Writes NAME.json. The default of `folder` is the folder of the GPU, or of the processor, in `RESULTS`."""
    settings = {key: value for key, value in settings.items() if key not in ("out", "name")}
    machine = describe(device)
    folder = folder or RESULTS / re.sub(r"\W+", "_", str(machine["gpu"] or machine["processor"]).lower())
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "settings": settings, **results}
    atomic.write_text(folder / f"{name}.json", json.dumps(record, indent=1, default=str) + "\n")
