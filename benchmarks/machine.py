"""The files in benchmarks/results: measurements with the settings, a folder per machine."""

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable
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
OUT_HELP = "folder of the JSON files (default: benchmarks/results/MACHINE)"


def model_parser(description: str, amp: Iterable[str] = AMP_CHOICES) -> argparse.ArgumentParser:
    """Returns a parser with the flags of measurements of a model; `amp` are the choices of --amp."""
    parser = entry_point.parser(description)
    parser.add_argument("--size", default="base_patch16", choices=SIZES, metavar="SIZE", help="a size of models_vit")
    parser.add_argument("--batch_size", default=16, type=types.positive_int, metavar="N", help="batch size")
    parser.add_argument("--amp", default="bf16", choices=amp, help="precision; off is fp32")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help=OUT_HELP)
    return parser


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of measurements that compare implementations."""
    parser.add_argument(
        "--rounds", default=5, type=types.positive_int, metavar="N",
        help="repetitions; each measures every implementation once",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="implementations, such as ours or 'ours compiled'"
    )


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
    return name + ", AMX" * ("amx_bf16" in units)


def write(
    name: str, device: torch.device, settings: dict[str, Any], results: dict[str, Any], folder: Path | None
) -> None:
    """Writes NAME.json. The default of `folder` is the machine's folder in `RESULTS`."""
    settings = {key: value for key, value in settings.items() if key not in ("out", "name")}
    record = {"machine": describe(device), "settings": settings, **results}
    folder = folder or RESULTS / re.sub(r"\W+", "_", title(record).lower())
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / f"{name}.json", json.dumps(record, indent=1, default=str) + "\n")


def title(record: dict[str, Any]) -> str:
    """Returns the name of the hardware of a measurement: the GPU's, or the processor's."""
    return str(record["machine"]["gpu"] or record["machine"]["processor"])
