"""`--slurm KEY=VALUE`: settings of a Slurm job that have no flag.

A key is a long option of sbatch, with `_` or `-` between its words, or a setting of submitit. This module translates
some and rejects those that have a flag; the error message names it. sbatch rejects unknown options.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

LISTS = ("setup", "teardown", "srun_args")  # settings of submitit that may be repeated
NUMBERS = ("signal_delay_s", "max_num_timeout", "cpus_per_task", "mem_gb")
REFUSED = {
    "time": "give --timeout MINUTES",
    "timeout_min": "give --timeout MINUTES",
    "nodes": "give --nodes N",
    "ntasks_per_node": "give --ngpus N",
    "tasks_per_node": "give --ngpus N",
    "ntasks": "give --nodes N and --ngpus N; it is their product",
    "num_gpus": "give --slurm gpus_per_node=N",
    "signal": "give --slurm signal_delay_s=SECONDS to set the time of the signal before the time limit",
    "output": "give --job_dir DIR for the logs",
    "error": "give --job_dir DIR for the logs",
    "open_mode": "logs are always appended to",
    "stderr_to_stdout": "each process has one log for both",
    "wait": "give --wait",
    "test_only": "give --dry_run",
    "array": "a job is one run; submit a job for each run",
    "array_parallelism": "a job is one run; submit a job for each run",
    "map_count": "a job is one run; submit a job for each run",
    "use_srun": "srun starts the processes of each job, and passes signals on to them",
    "chdir": "a job runs in the folder in which it is submitted",
    "wrap": "submitit writes the script; --slurm setup='COMMAND' runs a command before it",
    "parsable": "the job id is read from the output of sbatch",
    "quiet": "the job id is read from the output of sbatch",
}  # fmt: skip


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
        remedy = re.sub(r"[A-Z]+$", value, REFUSED[key]) if value.isdecimal() else REFUSED[key]
        raise argparse.ArgumentTypeError(f"{key} cannot be set: {remedy}")
    if key in LISTS:
        return key, value
    if key in NUMBERS and value != "false" and not re.fullmatch(r"\d+(\.\d+)?" if key == "mem_gb" else r"\d+", value):
        raise argparse.ArgumentTypeError(f"{key} must be a number, got {value or 'nothing'}")
    read = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
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
            raise ValueError(f"--slurm {key}={value}: another flag sets {key}={flags[key]}; give only one of them")
        if key in LISTS:
            merged[key].append(value)
        else:
            merged[key] = value
    if merged.get("requeue") is False:
        merged["no_requeue"] = True
    return {key: value for key, value in merged.items() if value is not False}
