"""Jobs of a Slurm cluster, by submitit: what submitit_*.py submit, and what then runs, again after each requeue.

A job runs a copy of the code that is made when it is submitted, in the folder in which it was submitted. It goes on
from its newest state whenever Slurm starts it again: after the time limit, a preemption, or `scontrol requeue`.

PyTorch, whose import takes seconds, is imported after submitit has set its handlers of signals: without them a signal
would end the job for good.
"""

import argparse
import contextlib
import importlib
import io
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from util.cli.flags import positive_int
from util.interrupts import SIGNALS, Interrupted
from util.jobs import code_copy, slurm_settings, waiting

try:
    import submitit
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import FailedSubmissionError, JobPaths, UncompletedJobError
    from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment
except ImportError as error:
    raise SystemExit(f"{error}: jobs need submitit (pip install submitit)") from error

logger = logging.getLogger(__name__)

JOB_FOLDER = "the job's folder"  # default of --output_dir
SECONDS_TO_KILL = 600  # in which Slurm, after its signal, must have ended or requeued a job
REQUEUES = 100  # after time limits; submitit's 3 would end a long run on a partition of short jobs


class Failed(Exception):
    """A run failed, and its log says why."""


@dataclass(frozen=True)
class Job:
    """What a job runs in each of its processes.

    Args:
        main: module with `main` and `get_args_parser`.
        argv: its command line, in which `%j` is the job's number.
        folder: in which it was submitted, and relative paths begin.
        requeue: whether a signal puts it back into the queue; else it ends, with its state saved.
    """

    main: str
    argv: tuple[str, ...]
    folder: str
    requeue: bool = True

    def __call__(self, restarted: bool = False) -> None:
        job = submitit.JobEnvironment()
        _log_plainly()
        if job.cluster == "local":  # under Slurm, srun has started the process, and `util.dist` reads what that sets
            meeting = TorchDistributedEnvironment()
            meeting.master_addr = "127.0.0.1"  # a machine's own name may lead nowhere
            meeting.export(set_cuda_visible_devices=False, overwrite=True)
        if restarted:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # as torchrun sets it: the run resumes

        from util import dist
        from util.cli import entry_point

        sys.argv = [f"{self.main}.py", *(part.replace("%j", job.job_id) for part in self.argv)]
        parser, ours = get_args_parser(self.main)
        stopped_by: list[int] = []
        failed = lost = False

        def run(args: Namespace) -> None:
            nonlocal failed, lost
            for name in ours:
                delattr(args, name)
            try:
                os.chdir(self.folder)
                importlib.import_module(self.main).main(args)
            except Interrupted as error:
                stopped_by.append(error.signum)
            except Exception as error:
                failed, lost = True, isinstance(error, RuntimeError) and dist.lost_process(error) is not None
                raise

        try:
            entry_point.run(run, parser)
        except SystemExit as error:
            if not failed or job.cluster == "debug":
                raise
            # An exception, not an exit: whoever waits for the job then learns of it at once, from submitit's file.
            sys.excepthook = _without_traceback
            if lost and self.requeue and job.cluster == "slurm":
                # Of a process, srun ends all others at once. Of a node, Slurm requeues the job, unless it ends before.
                time.sleep(SECONDS_TO_KILL)
            raise Failed(f"{self.main}.py failed (exit code {error.code})") from error
        if stopped_by:
            _stop(job, stopped_by[0], self.requeue)
        for signum in filter(_is_submitits, SIGNALS):
            signal.signal(signum, signal.SIG_IGN)  # the work is done; while Python ends, it would kill again

    def checkpoint(self, restarted: bool = False) -> DelayedSubmission:
        """What runs after a requeue: the same, from its newest state."""
        return DelayedSubmission(self, restarted=True)

    __submitit_checkpoint__ = checkpoint


def _stop(job: submitit.JobEnvironment, signum: int, requeue: bool) -> None:
    """Ends a process whose state is saved, as the signal asks for.

    Under Slurm it waits for its end: a process that ended earlier would end the job before it is requeued.
    """
    handler = signal.getsignal(signum)
    if requeue and _is_submitits(signum):
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # scontrol inherits it, and survives the end of the job it requeues
        if job.global_rank == 0 and callable(handler):
            handler(signum, None)  # requeues and exits after the time limit's signal; of SIGTERM it takes a note
        if job.cluster == "slurm":
            time.sleep(SECONDS_TO_KILL)
    raise SystemExit(f"stopped by {signal.Signals(signum).name}, {waiting.SAVED}")


def _is_submitits(signum: int) -> bool:
    return isinstance(getattr(signal.getsignal(signum), "__self__", None), SignalHandler)


def _log_plainly() -> None:
    """Leaves submitit's lines to the run's log, where they would stand three times."""
    logging.getLogger("submitit").handlers.clear()


def _without_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if kind is not Failed:  # whose message is in the log
        sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------------------- submission


def run(main: str) -> None:
    """Reads the command line of `main` and of its job, and submits it."""
    from util.cli import entry_point

    parser, _ = get_args_parser(main)
    entry_point.run(partial(_submit, main, sys.argv[1:]), parser)


def get_args_parser(main: str) -> tuple[ArgumentParser, list[str]]:
    """The parser of a main with the flags of jobs, and the names of those."""
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
        group.add_argument(
            "--job_dir", default="", metavar="DIR",
            help="folder of the job's logs, and default of --output_dir; %%j is the job id (default: SHARED_DIR/%%j)",
        ),
        group.add_argument(
            "--shared_dir", default="", metavar="DIR",
            help="folder on a file system of all nodes, for code snapshots and job folders (default: the parent of "
            "--job_dir, else runs/jobs)",
        ),
        group.add_argument("--partition", metavar="NAME", help="Slurm partition (default: the cluster's)"),
        group.add_argument("--use_volta32", action="store_true", help="request 32 GB V100 GPUs (constraint volta32gb)"),
        group.add_argument("--comment", default="", metavar="TEXT", help="comment of the Slurm job"),
        group.add_argument(
            "--slurm", default=[], type=slurm_settings.setting, action="append", metavar="KEY=VALUE",
            help="any other option of sbatch or setting of submitit, such as account=lab; may be repeated; KEY=false "
            "removes an option",
        ),
        group.add_argument("--after", type=_job_number, metavar="JOB", help="start after this job has succeeded"),
        group.add_argument(
            "--cluster", default="slurm", choices=("slurm", "local", "debug"),
            help="slurm; local: processes on this machine; debug: this process",
        ),
        group.add_argument("--dry_run", action="store_true", help="print the sbatch script without submitting it"),
        group.add_argument("--wait", action="store_true", help="wait for the job; the exit code is 1 if it failed"),
    ]  # fmt: skip
    return parser, [flag.dest for flag in flags]


def _job_number(text: str) -> str:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the number of a job, got {text}")
    return text


class _Slurm(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # a dry run needs no Slurm

    def script(self) -> str:
        """What sbatch would be given."""
        return self._make_submission_file_text(self._submitit_command_str, "")


def _submit(main: str, argv: list[str], args: Namespace) -> None:
    """Submits a job and says how to follow it."""
    above = JobPaths.get_first_id_independent_folder(Path(args.job_dir).parent) if args.job_dir else "runs/jobs"
    shared = Path(args.shared_dir or above).expanduser().absolute()
    folder = Path(args.job_dir).expanduser().absolute() if args.job_dir else shared / "%j"
    outputs = [folder if d == JOB_FOLDER else Path(d).expanduser().absolute() for d in (args.output_dir, args.log_dir)]
    argv = [*argv, "--output_dir", str(outputs[0]), "--log_dir", str(outputs[1])]
    if args.nodes > 1 and args.cluster == "local":
        raise ValueError(f"--nodes {args.nodes}: --cluster local is this machine alone; give --nodes 1")
    if args.after and args.cluster != "slurm":
        raise ValueError(f"--after {args.after} waits for a job of Slurm, and --cluster {args.cluster} starts at once")
    for_slurm = [f"--{name}" for name in ("partition", "use_volta32", "comment", "slurm") if getattr(args, name)]
    if for_slurm and args.cluster != "slurm":
        logger.warning(f"no effect with --cluster {args.cluster}: {', '.join(for_slurm)}")
    executor = _executor(main, args, folder)
    job_of_run = partial(Job, main, folder=str(Path.cwd()), requeue=dict(args.slurm).get("requeue", True))
    if args.dry_run:
        print(executor.script() if isinstance(executor, _Slurm) else f"no script: --cluster is {args.cluster}")
    elif args.cluster == "debug":
        executor.submit(job_of_run(argv=tuple(argv))).results()
    elif args.cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError("there is no sbatch here: submit where Slurm is, or give --cluster local, or --dry_run")
    else:
        code, recipe = code_copy.make(shared / "code", args.config)
        argv += ["--config", str(recipe)] if recipe else []
        with contextlib.chdir(code), _environment_of_a_shell():  # Python finds modules in the folder it starts in
            job = _start(executor, job_of_run(argv=tuple(argv)))
        log, output_dir = job.task(0).paths.stdout, str(outputs[0]).replace("%j", job.job_id)
        waiting.print_instructions(args.cluster, job.job_id, log, output_dir)
        if args.wait:
            waiting.wait(job, args.cluster, log, output_dir, args.after)


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
    flags = {"partition": args.partition, "comment": args.comment}
    flags |= {"constraint": "volta32gb"} if args.use_volta32 else {}
    # A job whose forerunner failed is taken out of the queue, in which it would stay for ever.
    flags |= {"dependency": f"afterok:{args.after}", "kill_on_invalid_dep": "yes"} if args.after else {}
    defaults = {"job_name": main.replace("main", "mae"), "requeue": True, "max_num_timeout": REQUEUES}
    defaults |= {"gpus_per_node": gpus} if gpus else {}
    extra = slurm_settings.merge({key: value for key, value in flags.items() if value}, args.slurm, defaults)
    # A signal does nothing until submitit handles it: it would end Python, and so the job, before.
    python = extra.pop("python", shlex.quote(sys.executable))
    python = f'sh -c \'trap "" {submitit.JobEnvironment.USR_SIG}; exec "$@"\' sh {python}'
    slurm = _Slurm(folder, extra.pop("max_num_timeout", 0), python=python)
    # Without one process the others wait in vain. sbatch's cpus_per_task means nothing to srun since Slurm 22.05.
    extra["srun_args"] += ["--kill-on-bad-exit=1"]
    extra["srun_args"] += [f"--cpus-per-task={extra['cpus_per_task']}"] if "cpus_per_task" in extra else []
    own = {key: extra.pop(key) for key in (*slurm_settings.LISTS, "signal_delay_s") if key in extra}
    own |= {"wckey": extra.pop("wckey", None)} if "wckey" in dict(args.slurm) else {}  # submitit has a default
    slurm.update_parameters(
        time=args.timeout, nodes=args.nodes, ntasks_per_node=args.ngpus, stderr_to_stdout=True,
        additional_parameters=extra, **own,
    )  # fmt: skip
    return slurm


@contextlib.contextmanager
def _environment_of_a_shell() -> Iterator[None]:
    """Without what a launcher or a job around this process has set, but with what a user sets for Slurm."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("SBATCH_", "SLURM_CONF"))}
    with submitit.helpers.clean_env():
        os.environ.update(own)
        yield


def _start(executor: submitit.Executor, job: Job) -> submitit.Job:
    """Submits a job.

    Raises:
        ValueError: sbatch refuses it, as it says.
    """
    # A job of this machine takes no part in Ctrl-C: whoever waits for it stops it in order.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # on which submitit prints what it raises, too
            return executor.submit(job)
    except (UncompletedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).strip().splitlines()]
        raise ValueError(f"sbatch refuses the job: {'; '.join(lines)}") from error
    finally:
        signal.signal(signal.SIGINT, before)
