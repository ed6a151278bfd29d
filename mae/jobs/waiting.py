"""Instructions for following a submitted job, and `--wait`."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

SAVED = "the state is saved"  # the end of a job's log if a signal stopped it


def print_instructions(cluster: str, number: str, log: Path, output_dir: str) -> None:
    """Prints the commands that follow and cancel a job."""
    slurm = cluster == "slurm"
    print(
        f"job {number} is {'submitted' if slurm else 'started'}\n"
        f"  results  {output_dir}\n"
        f"  follow   tail -F {shlex.quote(str(log))}\n"
        f"  state    {'squeue --job' if slurm else 'ps'} {number}\n"
        f"  cancel   {'scancel' if slurm else 'kill'} {number}    (its state is saved)",
        flush=True,
    )


def wait(job: Any, cluster: str, log: Path, output_dir: str, after: str | None) -> None:
    """Waits for the end of a `submitit.Job`.

    Raises:
        ValueError: the job failed; the end of its log is printed.
        SystemExit: Ctrl-C was pressed: a local job is stopped, a Slurm job continues.
    """
    try:
        job.results()
    except KeyboardInterrupt:
        if cluster == "slurm":
            print(f"job {job.job_id} continues; scancel {job.job_id} stops it, and its state is saved", file=sys.stderr)
            raise SystemExit(130) from None
        _stop_local(job)
    except RuntimeError:  # UncompletedJobError of submitit; its text is a traceback, and the log has the error message
        pass
    else:
        print(f"job {job.job_id} succeeded")
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    if not lines:
        why = f": job {after} of --after has not succeeded" if after else ""
        raise ValueError(f"job {job.job_id} has not started (state {job.state}){why}")
    if SAVED in lines[-1]:
        print(
            f"job {job.job_id} was {lines[-1]}; to resume, add --resume auto --output_dir {shlex.quote(output_dir)} "
            f"to the command"
        )
        raise SystemExit(130)
    print("\n".join(lines[-20:]))
    state = f" (state {job.state})" if cluster == "slurm" else ""
    raise ValueError(f"job {job.job_id} failed{state}; the end of its log {log} is printed above")


def _stop_local(job: Any) -> None:
    """Stops a local job, and waits until its state is saved."""
    print(f"stopping job {job.job_id}; Ctrl-C again stops waiting for it", file=sys.stderr)
    try:
        while not job.done():
            os.kill(int(job.job_id), signal.SIGTERM)  # repeated: the processes ignore the signal while they start
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"job {job.job_id} may still run; kill {job.job_id} stops it", file=sys.stderr)
        raise SystemExit(130) from None
