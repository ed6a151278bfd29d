"""`--slurm KEY=VALUE`: settings of a Slurm job that have no flag.

A key is a long option of sbatch, with `_` or `-` between its words, or a setting of submitit. It replaces what submitit
sets. sbatch rejects unknown options.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

LISTS = ("setup", "teardown", "srun_args")  # settings of submitit that may be repeated
NUMBERS = ("signal_delay_s", "max_num_timeout", "cpus_per_task", "mem_gb")
# They would silently run other code, the run several times, or a job that is not requeued after its time limit.
REFUSED = ("array", "chdir", "signal")


def setting(text: str) -> tuple[str, Any]:
    """Parses KEY=VALUE to sbatch's name of the key and a value, which becomes an int or a bool if possible.

    Raises:
        argparse.ArgumentTypeError: the key is rejected, or the value is invalid.
    """
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as account=lab, got {text}")
    if key in REFUSED:
        raise argparse.ArgumentTypeError(f"{key} cannot be set: a job is one run, which its signal requeues")
    if key in LISTS:
        return key, value
    if key in NUMBERS and value != "false" and not re.fullmatch(r"\d+(\.\d+)?" if key == "mem_gb" else r"\d+", value):
        raise argparse.ArgumentTypeError(f"{key} must be a number, got {value or 'nothing'}")
    is_number = value.isdecimal() and str(int(value)) == value  # the account 00123 keeps its zeros
    read = {"true": True, "false": False}.get(value, int(value) if is_number else value)
    if key == "mem_gb":
        return "mem", read and (f"{read}GB" if isinstance(read, int) else f"{int(1024 * float(value))}MB")
    if key == "no_requeue":
        return "requeue", read is False
    return {"name": "job_name"}.get(key, key), read


def merge(flags: Mapping[str, Any], settings: Sequence[tuple[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Merges all settings of a job by name; LISTS become lists. `false` removes an option, except `requeue`.

    Args:
        flags: settings of flags of the command line.
        settings: settings of --slurm from `setting`; they replace defaults.
        defaults: settings without a flag. Any setting about GPUs replaces the default number of GPUs.

    Raises:
        ValueError: a flag and --slurm set the same option.
    """
    about_gpus = any(k.startswith("gpus") or (k in ("gres", "tres_per_task") and "gpu" in str(v)) for k, v in settings)
    merged = {key: value for key, value in defaults.items() if key != "gpus_per_node" or not about_gpus}
    merged |= {**flags, **{key: [] for key in LISTS}}
    for key, value in settings:
        if key in flags:
            raise ValueError(f"slurm=[{key}={value}]: another flag sets {key}={flags[key]}; give only one of them")
        if key in LISTS:
            merged[key].append(value)
        else:
            merged[key] = value
    if merged.get("requeue") is False:
        merged["no_requeue"] = True
    return {key: value for key, value in merged.items() if value is not False}
