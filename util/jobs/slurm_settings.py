"""`--slurm KEY=VALUE`: settings of a Slurm job that have no flag.

A key is a long option of sbatch, with `_` or `-` between its words, or a setting of submitit. This module lists the
keys that are passed on, translated or rejected. The error message for a rejected key names its replacement.
"""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from util.cli.advice import did_you_mean

# Long options of sbatch in Slurm 20.11 to 25.05 for the resources and the execution of a job. `_sbatch_lists` finds
# options of other versions.
SBATCH = frozenset(
    """
    account acctg_freq batch bb bbf begin cluster_constraint clusters comment constraint container
    container_id contiguous core_spec cores_per_socket cpu_freq cpus_per_gpu cpus_per_task deadline delay_boot
    dependency distribution exclude exclusive export export_file extra extra_node_info get_user_env gid gpu_bind
    gpu_freq gpus gpus_per_node gpus_per_socket gpus_per_task gres gres_flags hint hold ignore_pbs input job_name
    kill_on_invalid_dep licenses mail_type mail_user mcs_label mem mem_bind mem_per_cpu mem_per_gpu mincpus network
    nice no_kill no_requeue nodefile nodelist ntasks_per_core ntasks_per_gpu ntasks_per_socket oom_kill_step overcommit
    oversubscribe partition power prefer priority profile propagate qos reboot requeue reservation resv_ports segment
    sockets_per_node spread_job stepmgr switches thread_spec threads_per_core time_min tmp tres_bind
    tres_per_task uid use_min_nodes wckey x11
    """.split()  # noqa: SIM905
)
LISTS = ("setup", "teardown", "srun_args")  # settings of submitit that may be repeated
NUMBERS = ("signal_delay_s", "max_num_timeout", "cpus_per_task", "mem_gb")
SUBMITIT = frozenset({*LISTS, "signal_delay_s", "max_num_timeout", "python", "mem_gb", "name"})
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
        argparse.ArgumentTypeError: the key is unknown or rejected, or the value is invalid.
    """
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as account=lab, got {text}")
    if key in REFUSED:
        remedy = re.sub(r"[A-Z]+$", value, REFUSED[key]) if value.isdecimal() else REFUSED[key]
        raise argparse.ArgumentTypeError(f"{key} cannot be set: {remedy}")
    if key not in SBATCH | SUBMITIT and not _sbatch_lists(key):
        near = did_you_mean(key, sorted(SBATCH | SUBMITIT | REFUSED.keys()))
        is_here = shutil.which("sbatch")
        source = "sbatch --help has" if is_here else "sbatch is not installed here, and its known options include"
        raise argparse.ArgumentTypeError(f"{source} no {key}{near}")
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


def _sbatch_lists(key: str) -> bool:
    """Whether the installed sbatch has the option, because it is a newer version or has a plug-in."""
    if not shutil.which("sbatch"):
        return False
    text = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, check=False).stdout
    return re.search(rf"--{re.escape(key.replace('_', '-'))}(?![\w-])", text) is not None


def merge(flags: Mapping[str, Any], settings: Iterable[tuple[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Merges all settings of a job by name; those of LISTS become lists. `false` removes an option, except `requeue`.

    Args:
        flags: settings of flags of the command line.
        settings: settings of --slurm from `setting`; they replace defaults.
        defaults: settings without a flag. Any setting about GPUs replaces the default number of GPUs.

    Raises:
        ValueError: a flag and --slurm set the same option.
    """
    settings = list(settings)
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
