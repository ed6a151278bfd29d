"""Jobs of a Slurm cluster, by submitit: what submitit_*.py submit, and what then runs, again after each requeue.

A job runs a copy of the code that is made when it is submitted, in the folder in which it was submitted. It goes on
from its newest state whenever Slurm starts it again: after the time limit, a preemption, or `scontrol requeue`.

PyTorch, whose import takes seconds, is imported after submitit has set its handlers of signals: without them a signal
would end the job for good.
"""

import argparse
import contextlib
import importlib
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

from util import code_copy
from util.flags import positive_int
from util.interrupts import SIGNALS, Interrupted

try:
    import submitit
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import FailedSubmissionError, JobPaths, UncompletedJobError
    from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment
except ImportError as error:
    raise SystemExit(f"{error}: jobs need submitit (pip install submitit)") from error

JOB_FOLDER = "the job's folder"  # default of --output_dir
SECONDS_TO_KILL = 600  # in which Slurm, after its signal, must have ended or requeued a job
REQUEUES = 100  # after time limits; submitit's 3 would end a long run on a partition of short jobs
LISTS = ("setup", "teardown", "srun_args")  # settings of submitit that may be given several times


class Failed(Exception):
    """A run failed, and its log says why."""


@dataclass(frozen=True)
class Job:
    """What a job runs in each of its processes.

    Args:
        main: module with `main` and `get_args_parser`.
        argv: its command line, in which `%j` is the job's number.
        folder: in which it was submitted, and relative paths begin.
    """

    main: str
    argv: tuple[str, ...]
    folder: str

    def __call__(self, restarted: bool = False) -> None:
        job = submitit.JobEnvironment()
        _log_plainly()
        if job.cluster == "local":  # under Slurm, srun has started the process, and `util.dist` knows what that sets
            meeting = TorchDistributedEnvironment()
            meeting.master_addr = "127.0.0.1"  # a machine's own name may lead nowhere
            meeting.export(set_cuda_visible_devices=False, overwrite=True)
        if restarted:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # as torchrun tells it: the run is to go on

        from util import cli

        sys.argv = [f"{self.main}.py", *(part.replace("%j", job.job_id) for part in self.argv)]
        parser, ours = get_args_parser(self.main)
        stopped_by: list[int] = []
        failed = False

        def run(args: Namespace) -> None:
            nonlocal failed
            for name in ours:
                delattr(args, name)
            try:
                os.chdir(self.folder)
                importlib.import_module(self.main).main(args)
            except Interrupted as error:
                stopped_by.append(error.signum)
            except Exception:
                failed = True
                raise

        try:
            cli.run(run, parser)
        except SystemExit as error:
            if not failed or job.cluster == "debug":
                raise
            # An exception, not an exit: whoever waits for the job then learns of it at once, from submitit's file.
            sys.excepthook = _without_traceback
            raise Failed(f"{self.main}.py failed (exit code {error.code})") from error
        if stopped_by:
            _stop(job, stopped_by[0])
        for signum in filter(_is_submitits, SIGNALS):
            signal.signal(signum, signal.SIG_IGN)  # the work is done; while Python ends, it would kill again

    def checkpoint(self, restarted: bool = False) -> DelayedSubmission:
        """What runs after a requeue: the same, from its newest state."""
        return DelayedSubmission(self, restarted=True)

    __submitit_checkpoint__ = checkpoint


def _stop(job: submitit.JobEnvironment, signum: int) -> None:
    """Ends a process whose state is saved, as the signal asks for.

    Under Slurm it waits for its end: a process that ended earlier would end the job before it is requeued.
    """
    handler = signal.getsignal(signum)
    if _is_submitits(signum):
        if job.global_rank == 0 and callable(handler):
            handler(signum, None)  # requeues and exits after the time limit's signal; of SIGTERM it takes a note
        if job.cluster == "slurm":
            time.sleep(SECONDS_TO_KILL)
    raise SystemExit(f"stopped by {signal.Signals(signum).name}, the state is saved; the same command with "
                     f"--resume auto and its --output_dir goes on")  # fmt: skip


def _is_submitits(signum: int) -> bool:
    return isinstance(getattr(signal.getsignal(signum), "__self__", None), SignalHandler)


def _log_plainly() -> None:
    """Leaves submitit's lines to the run's log, where they would stand three times."""
    logging.getLogger("submitit").handlers.clear()


def _without_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if kind is not Failed:  # of which the sentence is in the log
        sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------------------- submission


def run(main: str) -> None:
    """Reads the command line of `main` and of its job, and submits it."""
    from util import cli

    parser, _ = get_args_parser(main)
    cli.run(partial(_submit, main, sys.argv[1:]), parser)


def get_args_parser(main: str) -> tuple[ArgumentParser, list[str]]:
    """The parser of a main with the flags of jobs, and the names of those."""
    parser: ArgumentParser = importlib.import_module(main).get_args_parser()
    parser.set_defaults(output_dir=JOB_FOLDER)
    group = parser.add_argument_group("job")
    flags = [
        group.add_argument("--ngpus", default=8, type=positive_int, metavar="N", help="GPUs, and processes, of a node"),
        group.add_argument("--nodes", default=2, type=positive_int, metavar="N", help="nodes of the job"),
        group.add_argument("--timeout", default=4320, type=positive_int, metavar="MIN", help="minutes until a requeue"),
        group.add_argument(
            "--job_dir", default="", metavar="DIR",
            help="folder of the logs, and --output_dir by default; %%j is the job's number",
        ),
        group.add_argument(
            "--shared_dir", default="", metavar="DIR",
            help="folder that all nodes see, for copies of the code and folders of jobs; parent of --job_dir or "
            "runs/jobs by default",
        ),
        group.add_argument("--partition", metavar="NAME", help="where to queue; None is the cluster's default"),
        group.add_argument("--use_volta32", action="store_true", help="ask for V100 of 32 GB (constraint volta32gb)"),
        group.add_argument("--comment", default="", help="told to the scheduler"),
        group.add_argument(
            "--slurm", default=[], type=_setting, action="append", metavar="KEY=VALUE",
            help="any other setting of submitit or sbatch: account=lab, cpus_per_task=12; may be given several times",
        ),
        group.add_argument("--after", type=_job_number, metavar="JOB", help="start once this job has succeeded"),
        group.add_argument(
            "--cluster", default="slurm", choices=("slurm", "local", "debug"),
            help="local: processes of this machine; debug: this process",
        ),
        group.add_argument("--dry_run", action="store_true", help="print the script for sbatch, and submit nothing"),
        group.add_argument("--wait", action="store_true", help="wait for the job, and end with 1 if it failed"),
    ]  # fmt: skip
    return parser, [flag.dest for flag in flags]


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as account=lab, got {text}")
    known = {"true": True, "false": False}
    return key.replace("-", "_"), known.get(value, int(value) if value.isdecimal() else value)


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
    executor = _executor(main, args, folder)
    here = str(Path.cwd())
    if args.dry_run:
        print(executor.script() if isinstance(executor, _Slurm) else f"no script: --cluster is {args.cluster}")
    elif args.cluster == "debug":
        executor.submit(Job(main, tuple(argv), here)).results()
    elif args.cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError("there is no sbatch here: submit where Slurm is, or give --cluster local, or --dry_run")
    else:
        code, recipe = code_copy.make(shared / "code", args.config)
        argv += ["--config", str(recipe)] if recipe else []
        with contextlib.chdir(code), _environment_of_a_shell():  # Python finds modules in the folder it starts in
            try:
                job = executor.submit(Job(main, tuple(argv), here))
            except (UncompletedJobError, FailedSubmissionError) as error:
                raise ValueError(f"sbatch refuses the job: {str(error).strip()}") from error
        log = job.task(0).paths.stdout
        _tell(args.cluster, job.job_id, log, str(outputs[0]).replace("%j", job.job_id))
        if args.wait:
            _wait(job, log)


def _executor(main: str, args: Namespace, folder: Path) -> submitit.Executor:
    if args.cluster == "debug":
        return submitit.DebugExecutor(folder)
    gpus = 0 if args.device == "cpu" else args.ngpus
    common = {"stderr_to_stdout": True, "tasks_per_node": args.ngpus, "nodes": args.nodes}
    if args.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=REQUEUES)
        local.update_parameters(**common, timeout_min=args.timeout, gpus_per_node=gpus)
        return local
    given: dict[str, Any] = {"name": main.replace("main", "mae"), "timeout_min": args.timeout}
    own_gpus = {"gpus_per_node", "gpus_per_task", "gpus", "gres"} & {key for key, _ in args.slurm}
    if gpus and not own_gpus:
        given["gpus_per_node"] = gpus
    given |= {"partition": args.partition} if args.partition else {}
    given |= {"comment": args.comment} if args.comment else {}
    given |= {"constraint": "volta32gb"} if args.use_volta32 else {}
    # A job whose forerunner failed is taken out of the queue, in which it would stay for ever.
    given |= {"dependency": f"afterok:{args.after}", "kill_on_invalid_dep": "yes"} if args.after else {}
    given = {key: value for key, value in [*given.items(), *args.slurm] if key not in LISTS and value is not False}
    given |= {key: [str(v) for k, v in args.slurm if k == key] for key in LISTS}
    # A signal does nothing until submitit handles it: it would end Python, and so the job, before.
    python = given.pop("python", shlex.quote(sys.executable))
    python = f'sh -c \'trap "" {submitit.JobEnvironment.USR_SIG}; exec "$@"\' sh {python}'
    slurm = _Slurm(folder, given.pop("max_num_timeout", REQUEUES), python=python)
    # Without one process the others wait in vain. sbatch's cpus_per_task means nothing to srun since Slurm 22.05.
    given["srun_args"] += ["--kill-on-bad-exit=1"]
    given["srun_args"] += [f"--cpus-per-task={given['cpus_per_task']}"] if "cpus_per_task" in given else []
    generic, known = slurm._equivalence_dict(), slurm._valid_parameters()
    renamed = slurm._convert_parameters(common | {key: given.pop(key) for key in generic if key in given})
    others = {key: value for key, value in given.items() if key not in known}
    slurm.update_parameters(
        **renamed, **{key: value for key, value in given.items() if key in known},
        additional_parameters={"requeue": True} | others,
    )  # fmt: skip
    return slurm


@contextlib.contextmanager
def _environment_of_a_shell() -> Iterator[None]:
    """Without what a launcher or a job around this process has set, but with what a user sets for Slurm."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("SBATCH_", "SLURM_CONF"))}
    with submitit.helpers.clean_env():
        os.environ.update(own)
        yield


def _tell(cluster: str, number: str, log: Path, output_dir: str) -> None:
    slurm = cluster == "slurm"
    print(
        f"job {number} is {'submitted' if slurm else 'started'}\n"
        f"  results  {output_dir}\n"
        f"  follow   tail -F {log}\n"
        f"  state    {'squeue --job' if slurm else 'ps'} {number}\n"
        f"  cancel   {'scancel' if slurm else 'kill'} {number}    (its state is saved)",
        flush=True,
    )


def _wait(job: submitit.Job, log: Path) -> None:
    """Waits for the end of a job.

    Raises:
        ValueError: it failed; the end of its log is shown.
    """
    job.wait()
    if job.exception() is None:
        print(f"job {job.job_id} succeeded")
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    print("\n".join(lines[-20:]))
    raise ValueError(f"job {job.job_id} failed (state {job.state}), and above is the end of its log, {log}")
