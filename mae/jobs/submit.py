"""Jobs of a Slurm cluster through submitit: the flags, the submission, and the code that runs in the job.

A job runs a snapshot of the code from the time of its submission, in the folder of the submission. It resumes from its
newest checkpoint when Slurm starts it again: after the time limit, a preemption, or `scontrol requeue`.

PyTorch takes seconds to import. It is imported after submitit has installed its signal handlers. Before that, a signal
would end the job without a requeue.
"""

import contextlib
import importlib
import io
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import FailedSubmissionError, JobPaths, UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from mae.cli.flags import not_in_recipes
from mae.interrupts import SIGNALS, Interrupted
from mae.jobs import code_copy, slurm_settings
from mae.settings.types import job_id, positive_int

logger = logging.getLogger(__name__)

JOB_FOLDER = "the job's folder"  # default of --output_dir
SECONDS_TO_KILL = 600  # seconds after a signal in which Slurm ends or requeues a job
REQUEUES = 100  # after time limits; submitit's default of 3 would end a long run on a partition for short jobs


class Failed(Exception):
    """A run failed; its log has the error message."""


@dataclass(frozen=True)
class Job:
    """The function that each process of a job calls.

    Args:
        main: name of the script's module, with `main` and `get_args_parser`.
        argv: command line of the script; `%j` is replaced by the job id.
        folder: working directory: the folder of the submission.
        requeue: whether the job is requeued after a signal; otherwise it ends after its state is saved.
    """

    main: str
    argv: tuple[str, ...]
    folder: str
    requeue: bool = True

    def __call__(self, restarted: bool = False) -> None:
        job = submitit.JobEnvironment()
        logging.getLogger("submitit").handlers.clear()  # the log of the run would have each line three times
        if job.cluster == "local":  # under Slurm, `mae.parallel` reads the environment of srun
            environment = TorchDistributedEnvironment()
            environment.master_addr = "127.0.0.1"  # the host name may not be resolvable
            environment.export(set_cuda_visible_devices=False, overwrite=True)
        from mae import parallel
        from mae.cli import entry_point
        from mae.settings import Run

        restarted = restarted or (job.cluster == "slurm" and parallel.is_requeued())
        sys.argv = [f"{self.main}.py", *(part.replace("%j", job.job_id) for part in self.argv)]
        parser, ours = get_args_parser(self.main)
        stopped_by: list[int] = []
        failed = lost = False

        def settings_of(args: Namespace, explicit: frozenset[str]) -> Run:
            if restarted and not vars(args).get("eval"):
                file = Path(self.folder, args.resume) if args.resume not in ("", "auto") else None
                args.resume = _resume_of_restart(Path(args.output_dir), file)
            return Run.of({name: value for name, value in vars(args).items() if name not in ours}, explicit)

        def call_main(settings: Run) -> None:
            nonlocal failed, lost
            try:
                os.chdir(self.folder)
                importlib.import_module(self.main).main(settings)
            except Interrupted as error:
                if isinstance(error.__cause__, RuntimeError) and parallel.lost_process(error.__cause__):
                    failed = lost = True  # srun ends the job because of another process: it must not come back
                    raise
                stopped_by.append(error.signum)
            except Exception as error:
                failed = True
                lost = isinstance(error, RuntimeError) and parallel.lost_process(error) is not None
                raise

        try:
            entry_point.run(call_main, parser, settings_of)
        except SystemExit as error:
            if not failed or job.cluster == "debug":
                raise
            # submitit writes an exception to its result file at once, so that --wait reports the failure.
            sys.excepthook = _without_traceback
            if lost and self.requeue and job.cluster == "slurm":
                # If a process died, srun ends the others now. If a node failed, Slurm requeues the running job.
                time.sleep(SECONDS_TO_KILL)
            raise Failed(f"{self.main}.py failed (exit code {error.code})") from error
        if stopped_by:
            stop_job(job, stopped_by[0], self.requeue)
        for signum in filter(is_submitits, SIGNALS):
            signal.signal(signum, signal.SIG_IGN)  # the run is complete: no handler may requeue it while Python exits

    def checkpoint(self, restarted: bool = False) -> DelayedSubmission:
        """Returns the submission after a requeue: the same job, which resumes from its newest checkpoint."""
        return DelayedSubmission(self, restarted=True)

    __submitit_checkpoint__ = checkpoint


def _resume_of_restart(output_dir: Path, resume: Path | None) -> str:
    """Returns `--resume` of a requeued job: auto, or FILE of another directory, which is resumed from only once."""
    return "auto" if resume is None or resume.resolve().parent == output_dir.resolve() else str(resume)


def stop_job(job: submitit.JobEnvironment, signum: int, requeue: bool) -> None:
    """Ends or requeues a job after a signal, when its state is saved. Called by all of its processes.

    Under Slurm, rank 0 requeues the job if it still runs: before its time limit or its preemption, and after
    `scancel --signal`. Otherwise, Slurm has ended or requeued it. The other processes wait until srun ends them.
    """
    if requeue and is_submitits(signum):
        requeues = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        handler = signal.getsignal(requeues)
        # scontrol inherits this setting, and survives the end of the job that it requeues.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if job.global_rank == 0 and (_is_running(job) if job.cluster == "slurm" else signum == requeues):
            assert callable(handler)
            handler(signum, None)  # requeues the job, and exits
        if job.global_rank != 0 and job.cluster == "slurm":
            time.sleep(SECONDS_TO_KILL)
    raise SystemExit(f"stopped by {signal.Signals(signum).name}, the state is saved")


def _is_running(job: submitit.JobEnvironment) -> bool:
    """Returns whether Slurm has neither ended nor requeued a job: `scontrol requeue` would restart a canceled one.

    Slurm changes the state before it sends the signal. If it does not answer, this asks again.
    """
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job.job_id}"]
    ends = time.monotonic() + SECONDS_TO_KILL
    while time.monotonic() < ends:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip() in ("RUNNING", "SIGNALING")  # the latter while SIGSTOP or SIGCONT is on its way
        logger.warning(f"squeue: {done.stderr.strip()}")
        time.sleep(10)
    return False


def is_submitits(signum: int) -> bool:
    return isinstance(getattr(signal.getsignal(signum), "__self__", None), SignalHandler)


def _without_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if kind is not Failed:  # its message is in the log
        sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------------------- submission


def submit_script(main: str) -> None:
    """Entry point of submitit_*.py: parses the flags of the script and of the job, and submits the job."""
    from mae.cli import entry_point

    parser, _ = get_args_parser(main)
    entry_point.run(partial(_submit, main, sys.argv[1:]), parser)


def get_args_parser(main: str) -> tuple[ArgumentParser, list[str]]:
    """Returns the parser of a script with the flags of jobs, and the names of the flags of jobs."""
    parser: ArgumentParser = importlib.import_module(main).get_args_parser()
    parser.set_defaults(output_dir=JOB_FOLDER)
    group = parser.add_argument_group("job")
    flags = [
        group.add_argument("--ngpus", default=8, type=positive_int, metavar="N", help="GPUs (processes) per node"),
        group.add_argument("--nodes", default=2, type=positive_int, metavar="N", help="number of nodes"),
        group.add_argument(
            "--timeout", default=4320, type=positive_int, metavar="MIN",
            help="time limit in minutes; the job is then requeued and resumes",
        ),
        # Recipes set neither commands nor folders of code that the job runs.
        not_in_recipes(group.add_argument(
            "--job_dir", default="", metavar="DIR",
            help="folder of the job's logs, and default of --output_dir; %%j is the job id (default: SHARED_DIR/%%j)",
        )),
        not_in_recipes(group.add_argument(
            "--shared_dir", default="", metavar="DIR",
            help="folder on a file system of all nodes, for code snapshots and job folders (default: the parent of "
            "--job_dir, else runs/jobs)",
        )),
        group.add_argument("--partition", metavar="NAME", help="Slurm partition (default: the cluster's)"),
        group.add_argument("--use_volta32", action="store_true", help="request 32 GB V100 GPUs (constraint volta32gb)"),
        group.add_argument("--comment", default="", metavar="TEXT", help="comment of the Slurm job"),
        not_in_recipes(group.add_argument(
            "--slurm", default=[], type=slurm_settings.setting, action="append", metavar="KEY=VALUE",
            help="any other option of sbatch or setting of submitit, such as account=lab; may be repeated; KEY=false "
            "removes an option",
        )),
        group.add_argument("--after", type=job_id, metavar="JOB", help="start after this job has succeeded"),
        group.add_argument(
            "--cluster", default="slurm", choices=("slurm", "local", "debug"),
            help="slurm; local: processes on this machine; debug: this process",
        ),
        group.add_argument("--dry_run", action="store_true", help="print the sbatch script without submitting it"),
        group.add_argument("--wait", action="store_true", help="wait for the job; the exit code is 1 if it fails"),
    ]  # fmt: skip
    return parser, [flag.dest for flag in flags]


class Executor(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # a dry run needs no Slurm

    def script(self) -> str:
        """Returns the text of the sbatch script."""
        return self._make_submission_file_text(self._submitit_command_str, "")


def _submit(main: str, argv: list[str], args: Namespace) -> None:
    """Submits a job, and prints the commands that follow it."""
    above = JobPaths.get_first_id_independent_folder(Path(args.job_dir).parent) if args.job_dir else "runs/jobs"
    shared = Path(args.shared_dir or above).expanduser().absolute()
    folder = Path(args.job_dir).expanduser().absolute() if args.job_dir else shared / "%j"
    outputs = [folder if d == JOB_FOLDER else Path(d).expanduser().absolute() for d in (args.output_dir, args.log_dir)]
    argv = [*argv, "--output_dir", str(outputs[0]), "--log_dir", str(outputs[1])]
    if args.nodes > 1 and args.cluster == "local":
        raise ValueError(f"nodes={args.nodes}: cluster=local uses one machine; give nodes=1")
    if args.after and args.cluster != "slurm":
        raise ValueError(f"after={args.after} requires cluster=slurm")
    for_slurm = [f"`{name}`" for name in ("partition", "use_volta32", "comment", "slurm") if getattr(args, name)]
    if for_slurm and args.cluster != "slurm":
        logger.warning(f"no effect with cluster={args.cluster}: {', '.join(for_slurm)}")
    executor = _executor(main, args, folder)
    job_of_run = partial(Job, main, folder=str(Path.cwd()), requeue=dict(args.slurm).get("requeue", True))
    if args.dry_run:
        print(executor.script() if isinstance(executor, Executor) else f"cluster={args.cluster} has no sbatch script")
    elif args.cluster == "debug":
        executor.submit(job_of_run(argv=tuple(argv))).results()
    elif args.cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError("cluster=slurm: there is no sbatch on this machine")
    else:
        code, recipe = code_copy.make(shared / "code", args.config)
        argv += ["--config", str(recipe)] if recipe else []
        with contextlib.chdir(code), _environment_of_a_shell():  # Python imports modules from its working directory
            job = _start(executor, job_of_run(argv=tuple(argv)))
        log = job.task(0).paths.stdout
        output_dir = str(outputs[0]).replace("%j", job.job_id)
        print_instructions(args.cluster, job.job_id, log, output_dir)
        if args.wait:
            job.results()
            print(f"job {job.job_id} succeeded")


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


def _executor(main: str, args: Namespace, folder: Path) -> submitit.Executor:
    if args.cluster == "debug":
        return submitit.DebugExecutor(folder)
    gpus = 0 if args.device == "cpu" else args.ngpus
    if args.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=REQUEUES)
        local.update_parameters(
            timeout_min=args.timeout, tasks_per_node=args.ngpus, gpus_per_node=gpus, stderr_to_stdout=True
        )
        return local
    flags = {
        "partition": args.partition, "comment": args.comment, "constraint": args.use_volta32 and "volta32gb",
        "dependency": args.after and f"afterok:{args.after}",
        # If the previous job fails, Slurm removes this job; by default it would stay in the queue for ever.
        "kill_on_invalid_dep": args.after and "yes",
    }  # fmt: skip
    defaults = {
        "job_name": main.replace("main", "mae"), "requeue": True, "max_num_timeout": REQUEUES,
        "gpus_per_node": gpus or False,
    }  # fmt: skip
    extra = slurm_settings.merge({key: value for key, value in flags.items() if value}, args.slurm, defaults)
    # The signal is ignored until submitit installs its handler; otherwise it would end Python, and the job.
    python = extra.pop("python", shlex.quote(sys.executable))
    python = f'sh -c \'trap "" {submitit.JobEnvironment.USR_SIG}; exec "$@"\' sh {python}'
    slurm = Executor(folder, extra.pop("max_num_timeout", 0), python=python)
    # If one process fails, the others would wait for ever. Since Slurm 22.05, srun ignores sbatch's cpus_per_task.
    extra["srun_args"] += ["--kill-on-bad-exit=1"]
    extra["srun_args"] += [f"--cpus-per-task={extra['cpus_per_task']}"] if "cpus_per_task" in extra else []
    options = {key: extra.pop(key) for key in (*slurm_settings.LISTS, "signal_delay_s") if key in extra}
    options |= {"wckey": extra.pop("wckey", None)} if "wckey" in dict(args.slurm) else {}  # submitit has a default
    slurm.update_parameters(
        time=args.timeout, nodes=args.nodes, ntasks_per_node=args.ngpus, stderr_to_stdout=True,
        additional_parameters=extra, **options,
    )  # fmt: skip
    return slurm


@contextlib.contextmanager
def _environment_of_a_shell() -> Iterator[None]:
    """Removes the variables of an enclosing launcher or job from the environment, but not the user's Slurm settings."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("SBATCH_", "SLURM_CONF"))}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _start(executor: submitit.Executor, job: Job) -> submitit.Job:
    """Submits a job.

    Raises:
        ValueError: sbatch rejects the job; the message is that of sbatch.
    """
    # A local job inherits this setting: it continues after Ctrl-C during --wait.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints the error that it raises
            return executor.submit(job)
    except (UncompletedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).strip().splitlines()]
        raise ValueError(f"sbatch rejects the job: {'; '.join(lines)}") from error
    finally:
        signal.signal(signal.SIGINT, before)
