"""Training jobs on a real Slurm cluster that is started on this machine: ./run test-slurm (root; Debian or Ubuntu).

    python tests/slurm/cases.py                # all cases
    python tests/slurm/cases.py limit requeue

Every case submits jobs of two nodes with submitit_*.py, on the embedded images and the CPU, and disturbs them. A
pre-training job passes if it ends with exit code 0, logs each epoch once, and has the losses of an undisturbed run in
one process without Slurm. With two processes, its weights must also be bit-equal to those of an undisturbed run in two
processes.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conftest import ROOT, torchrun  # noqa: E402
from mains import lines, wait_until  # noqa: E402

from mae.checkpoints import checkpoint  # noqa: E402

EPOCHS, IMAGES, BATCH = 20, 640, 32
UPDATES = EPOCHS * IMAGES // BATCH
SECONDS = 900  # timeout of every wait, on a machine that has other work
# Uniformity is that of the batch of a process, and the runs are compared with a run in one process.
FLAGS = ["--config", "recipes/pretrain_fashion_mnist.yaml", "--uniformity", 0, "--epochs", EPOCHS, "--warmup_epochs", 1,
         "--amp", "off", "--num_workers", 0, "--save_every", EPOCHS, "--vis_every", 0]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# Prints the device of a task, on a machine without GPUs.
DEVICE = """
import os
import torch
from mae import parallel
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
parallel.translate_srun()
try:
    print(parallel.choose_device("cuda"))
except ValueError as error:
    assert "start fewer processes" in str(error)
    print("2 processes, 1 GPU")
"""


@dataclass
class Row:
    """A line of the table."""

    case: str
    state: str  # Slurm's final state of the job
    passed: bool
    starts: int = 1
    before: int | None = None  # updates that were saved at the last stop
    difference: float | None = None  # relative difference of the losses
    equal: bool | None = None  # whether the final weights are bit-equal to those of an undisturbed run

    def __str__(self) -> str:
        updates = " | " if self.before is None else f"{self.before} | {UPDATES - self.before}"
        difference = "" if self.difference is None else f"{self.difference:.0e}"
        weights = "" if self.equal is None else "equal" if self.equal else "differ"
        passed = "yes" if self.passed else "**no**"
        return f"| {self.case} | {self.state} | {self.starts} | {updates} | {difference} | {weights} | {passed} |"


class Cluster:
    """A context manager that runs Slurm's daemons, with their state in one folder."""

    def __init__(self, state: Path, *options: object) -> None:
        self.state, self.options = state, [str(option) for option in options]
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(state / "etc/slurm.conf")}

    def __enter__(self) -> "Cluster":
        command = [HERE / "slurm-up", *self.options, self.state]
        up = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if up.returncode:
            self.__exit__()
            raise OSError(up.stderr.strip() or up.stdout.strip())
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([HERE / "slurm-down", "--purge", self.state], stdout=subprocess.DEVNULL)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Runs a command in the environment of the cluster."""
        argv = [str(part) for part in command]
        return subprocess.run(argv, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)

    def call(self, *command: object) -> str:
        """Runs a command that must succeed; returns its output."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def field(self, job: str, key: str) -> str:
        """A field of `scontrol show job`."""
        return re.findall(rf"{key}=(\S+)", self.call("scontrol", "show", "job", job))[0]

    def end_of(self, job: str) -> str:
        """Waits until a job has ended and is not requeued; returns Slurm's state."""
        states = ["", ""]

        def ended() -> bool:
            states.append(self.field(job, "JobState"))
            return states[-1] in ENDED and len(set(states[-3:])) == 1

        wait_until(ended, seconds=SECONDS, pause=0.5)
        return states[-1]


class Job:
    """A job of two nodes with `tasks` processes each, in its own shared folder."""

    def __init__(
        self, cluster: Cluster, shared: Path, *flags: object, tasks: int = 1, script: str = "submitit_pretrain.py"
    ) -> None:
        self.cluster, self.shared, self.processes = cluster, shared, 2 * tasks
        output = cluster.call(
            sys.executable, script, "--nodes", 2, "--ngpus", tasks, "--batch_size", BATCH // (2 * tasks),
            "--shared_dir", shared, "--device", "cpu", *flags,
        )  # fmt: skip
        self.number = re.findall(r"^job (\d+) is submitted", output)[0]
        self.out = shared / self.number
        self.log = self.out / f"{self.number}_0_log.out"

    def text(self) -> str:
        """The log of rank 0."""
        return self.log.read_text() if self.log.exists() else ""

    def starts(self) -> int:
        """How often Slurm has started the job."""
        return self.text().count("Starting with JobEnvironment")

    def train(self, epochs: int = 2) -> "Job":
        """Waits until the job has trained `epochs` epochs."""
        log = self.out / "log.txt"
        wait_until(lambda: log.exists() and len(lines(self.out)) >= epochs, seconds=SECONDS, pause=0.5)
        return self

    def finish(self) -> str:
        """Waits for the end of the job; returns Slurm's state."""
        return self.cluster.end_of(self.number)

    def process(self, rank: int) -> int:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = f"submitit.core._submit\0{self.shared}/" in (folder / "cmdline").read_text()
                if ours and f"\0SLURM_PROCID={rank}\0" in (folder / "environ").read_text():
                    return int(folder.name)
        raise AssertionError(f"there is no process of rank {rank}")


class Cases:
    """The cases. Each method returns lines of the table.

    Args:
        work: folder of data and runs.
        signals: a cluster of six nodes that sends a job its `--signal` before preemption.
        bare: a cluster of two nodes that preempts with SIGTERM.
    """

    def __init__(self, work: Path, signals: Cluster, bare: Cluster) -> None:
        self.work, self.signals, self.bare = work, signals, bare
        self.data = work / "data"
        for split, count in (("train", IMAGES), ("val", 200)):
            images = sorted((ROOT / "demo/data/fashion_mnist" / split).glob("*/*.png"))
            for image in images[:: len(images) // count][:count]:
                folder = self.data / split / image.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, folder)
        self.flags = [*FLAGS, "--data_path", self.data]
        self.single, self.pair = work / "single", work / "pair"
        self.undisturbed = []  # without Slurm
        for launcher, out, batch in (([sys.executable], self.single, BATCH), (torchrun(2), self.pair, BATCH // 2)):
            command = [*launcher, "main_pretrain.py", *self.flags, "--batch_size", batch, "--output_dir", out,
                       "--device", "cpu"]  # fmt: skip
            run = subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
            self.undisturbed.append(run)

    def wait_for_undisturbed(self) -> None:
        assert [run.wait(SECONDS) for run in self.undisturbed] == [0, 0]

    def pretrain(self, name: str, *flags: object, nodes: str = "n[3-4]", tasks: int = 1) -> Job:
        """Submits a pre-training job. Jobs on nodes 1 and 2 can be preempted."""
        return Job(self.signals, self.work / name, *self.flags, "--slurm", f"nodelist={nodes}", *flags, tasks=tasks)

    def row(self, case: str, job: Job, stopped: bool) -> Row:
        """The result of a job, which the case stops at least once if `stopped`."""
        state = job.finish()
        self.wait_for_undisturbed()
        difference = self.difference(job.out)
        once = [line["epoch"] for line in lines(job.out)] == list(range(EPOCHS))
        starts, before = job.starts(), None
        with contextlib.suppress(checkpoint.CheckpointError):  # the job was not stopped
            saved = checkpoint.read(job.out / "checkpoint-last.pth")["progress"]
            before = (saved["epoch"] * IMAGES + saved["images_done"]) // BATCH
        as_expected = (starts > 1 and bool(before)) if stopped else starts == 1
        equal = None
        if job.processes == 2:
            last = f"checkpoint-{EPOCHS - 1}.pth"
            ours, theirs = (checkpoint.read(out / last)["model"] for out in (job.out, self.pair))
            equal = checkpoint.compute_digest(ours) == checkpoint.compute_digest(theirs)
        passed = state == "COMPLETED" and once and difference <= 1e-5 and as_expected and equal is not False
        return self.checked(Row(case, state, passed, starts, before, difference, equal), job)

    @staticmethod
    def checked(row: Row, job: Job) -> Row:
        """Prints the end of a job's log if the job did not pass."""
        if not row.passed:
            print(f"{row.case}: the log of job {job.number} ends with\n{job.text()[-3000:]}", file=sys.stderr)
        return row

    def difference(self, out: Path) -> float:
        """The largest relative difference of the losses from those of the run in one process."""
        losses = [[line["train_loss"] for line in lines(folder)] for folder in (out, self.single)]
        return max(abs(a - b) / b for a, b in zip(*losses, strict=False))

    def srun(self) -> list[Row]:
        """srun starts the processes, without submitit."""
        out = self.work / "srun"
        self.signals.call("srun", "--nodes=2", "--ntasks-per-node=1", "--nodelist=n[3-4]", sys.executable,
                          "main_pretrain.py", *self.flags, "--batch_size", BATCH // 2, "--output_dir", out,
                          "--device", "cpu")  # fmt: skip
        self.wait_for_undisturbed()
        passed = len(lines(out)) == EPOCHS and self.difference(out) <= 1e-5
        return [Row("srun, 2 nodes", "COMPLETED", passed, difference=self.difference(out))]

    def limit(self) -> list[Row]:
        """Time limit: the job is paused until Slurm sends the signal, half a minute to a minute after the start."""
        job = self.pretrain("limit", "--timeout", 2, "--slurm", "signal_delay_s=60").train()
        self.signals.call("scancel", "--signal=STOP", job.number)
        time.sleep(60)
        self.signals.call("scancel", "--signal=CONT", job.number)
        return [self.row("time limit", job, stopped=True)]

    def preempt(self) -> list[Row]:
        """Three preemptions by jobs of higher priority, on a cluster that sends jobs their `--signal` first."""
        job = self.pretrain("preempt", nodes="n[1-2]")
        for epochs in (1, 7, 13):  # a preempted job trains on for some epochs until it stops
            job.train(epochs)
            self._preempt(self.signals)
        row = self.row("three preemptions, with the signal of submitit", job, stopped=True)
        row.passed &= row.starts == 4
        return [row]

    def preempt_bare(self) -> list[Row]:
        """A preemption on a cluster with Slurm's default: SIGTERM, and SIGKILL a minute later."""
        job = Job(self.bare, self.work / "bare", *self.flags).train()
        self._preempt(self.bare)
        return [self.row("preemption, with SIGTERM only", job, stopped=True)]

    def _preempt(self, cluster: Cluster) -> None:
        cluster.call("sbatch", "--partition=high", "--nodelist=n[1-2]", "--nodes=2", "--exclusive",
                     "--output=/dev/null", "--wrap=sleep 2")  # fmt: skip

    def _disturb(self, name: str, case: str, *command: object, flags: Sequence[object] = ()) -> list[Row]:
        """A job that a command of Slurm stops."""
        job = self.pretrain(name, *flags).train()
        self.signals.call(*command, job.number)
        return [self.row(case, job, stopped=True)]

    def requeue(self) -> list[Row]:
        return self._disturb("requeue", "scontrol requeue", "scontrol", "requeue")

    def term(self) -> list[Row]:
        """Slurm neither ends nor requeues the job, which requeues itself."""
        return self._disturb("term", "scancel --signal=TERM", "scancel", "--signal=TERM")

    def workers(self) -> list[Row]:
        """`scontrol requeue` with the default number of worker processes, which receive SIGTERM too."""
        case = "SIGTERM to all processes, with worker processes"
        return self._disturb("workers", case, "scontrol", "requeue", flags=("--num_workers", 10))

    def cancel(self) -> list[Row]:
        """`scancel`: the job saves its state, exits before Slurm kills it, and is not requeued."""
        job = self.pretrain("cancel").train()
        self.signals.call("scancel", job.number)
        states = [job.finish()]
        time.sleep(10)  # a requeued job starts after 5 seconds
        states.append(job.finish())
        exited = "\nstopped by SIGTERM, the state is saved\n" in job.text()  # a killed process does not print it
        saved = (job.out / "checkpoint-last.pth").exists()
        passed = states == ["CANCELLED"] * 2 and job.starts() == 1 and exited and saved
        return [self.checked(Row("scancel", states[1], passed, job.starts()), job)]

    def node(self) -> list[Row]:
        """A node fails with all of its processes, and returns."""
        job = self.pretrain("node", nodes="n[5-6]").train()
        task = job.process(1)
        step = int(re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{task}/status").read_text())[0])
        assert "slurmstepd" in Path(f"/proc/{step}/cmdline").read_text()
        for process in (step, task):
            os.kill(process, signal.SIGKILL)
        self.signals.call("scontrol", "update", "nodename=n6", "state=down", "reason=died")
        wait_until(lambda: self.signals.field(job.number, "JobState") == "PENDING", seconds=SECONDS, pause=0.5)
        # This fails if the daemon has reported already.
        self.signals.run("scontrol", "update", "nodename=n6", "state=resume")
        return [self.row("node failure", job, stopped=True)]

    def gpus(self) -> list[Row]:
        """One GPU per task: sbatch accepts the script, and each process uses the GPU that Slurm assigns to it."""
        command = [sys.executable, "submitit_pretrain.py", "--dry_run", "--ngpus", 2, "--slurm", "gpus_per_task=1"]
        script = self.work / "gpus.sh"
        script.write_text(self.signals.call(*command))
        accepted = self.signals.run("sbatch", "--test-only", script)
        passed = accepted.returncode == 0 and "#SBATCH --gpus-per-task=1\n" in script.read_text()
        for flag, devices in (
            ("--gpus-per-task=1", ["cuda:0", "cuda:0"]),
            ("--gpus-per-node=2", ["cuda:0", "cuda:1"]),
            ("--gpus-per-node=1", ["2 processes, 1 GPU", "cuda:0"]),
        ):
            step = ["srun", "--nodes=1", "--ntasks-per-node=2", "--immediate=60", flag]
            passed &= sorted(self.signals.call(*step, sys.executable, "-c", DEVICE).splitlines()) == devices
        return [Row("--slurm gpus_per_task=1 (dry run)", "", passed, starts=0)]

    def nodes(self) -> list[Row]:
        """An undisturbed job, and a fine-tuning job that starts from its result (`--after`)."""
        job = self.pretrain("nodes")
        after = Job(
            self.signals, self.work / "after", "--config", "recipes/finetune_fashion_mnist.yaml", "--data_path",
            self.data, "--epochs", 2, "--warmup_epochs", 1, "--num_workers", 0, "--train_per_class", 16, "--finetune",
            job.out / f"checkpoint-{EPOCHS - 1}.pth", "--after", job.number, "--slurm", "nodelist=n[3-4]",
            script="submitit_finetune.py",
        )  # fmt: skip
        pretrained, state = self.row("2 nodes, 1 process per node", job, stopped=False), after.finish()
        waited = self.signals.field(after.number, "StartTime") >= self.signals.field(job.number, "EndTime")
        passed = waited and state == "COMPLETED" and "test_acc1" in lines(after.out)[-1]
        return [pretrained, Row("fine-tuning with --after", state, passed)]

    def tasks(self) -> list[Row]:
        return [self.row("2 nodes, 2 processes per node", self.pretrain("tasks", tasks=2), stopped=False)]

    def crash(self) -> list[Row]:
        """A wrong flag: the job fails, `--wait` fails, and the log has the error message."""
        command = [sys.executable, "submitit_pretrain.py", *self.flags, "--device", "cpu", "--nodes", 2, "--ngpus", 1,
                   "--shared_dir", self.work / "crash", "--wait"]  # fmt: skip
        done = self.signals.run(*command, "--data_path", "/nowhere")
        number = re.findall(r"^job (\d+) ", done.stdout)[0]
        state = self.signals.end_of(number)  # --wait returns a little earlier
        log = self.work / "crash" / number / f"{number}_0_log.out"
        failed = "main_pretrain.py: error: data_path=/nowhere: " in log.read_text() and done.returncode == 1
        after = self.signals.run(*command, "--after", number)
        waited = after.returncode == 1 and "CANCELLED" in after.stderr  # submitit's error
        if not waited:
            print(after.stdout, after.stderr, file=sys.stderr)
        return [
            Row("error in the job", state, failed and state == "FAILED"),
            Row("--after a failed job", "CANCELLED", waited, starts=0),
        ]

    def killed(self) -> list[Row]:
        """The system kills a process, for example because memory is full: the others end before --dist_timeout."""
        job = self.pretrain("killed").train()
        os.kill(job.process(1), signal.SIGKILL)
        killed = time.monotonic()
        state = job.finish()
        return [Row("process killed", state, state == "FAILED" and time.monotonic() - killed < 90)]


# The cases with the longest waits come first.
CASES = ("limit", "preempt_bare", "preempt", "node", "requeue", "term", "cancel", "workers", "nodes", "tasks", "srun",
         "crash", "killed", "gpus")  # fmt: skip


def run_all(names: Sequence[str], work: Path) -> int:
    """Prints the table; returns the number of failed cases."""
    signals = Cluster(work / "a", "-n", 6, "-c", 8, "-g", 2, "-k", 15)
    bare = Cluster(work / "b", "-k", 15, "--no-dbd", "--no-user-signal")
    failed = 0
    with signals, bare:
        cases = Cases(work, signals, bare)
        print("| case | Slurm's state | starts | updates before | after | difference of losses | weights | passed |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        with ThreadPoolExecutor(4) as pool:
            for name, case in [(name, pool.submit(getattr(cases, name))) for name in names]:
                try:
                    rows = case.result()
                except Exception as error:
                    logs = [f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(work.glob("*/*/*_0_log.out"))]
                    print(*logs, f"{name}: {type(error).__name__}: {error}", sep="\n", file=sys.stderr)
                    rows = [Row(name, "", False)]
                print(*rows, sep="\n", flush=True)
                failed += sum(not row.passed for row in rows)
        for run in cases.undisturbed:
            run.kill()
    return failed


def main() -> None:
    """Runs the given cases; exits with code 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help=f"{', '.join(CASES)} (default: all)")
    names = parser.parse_args().cases or CASES
    subprocess.run([sys.executable, "demo/unpack_data.py"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    work = Path(tempfile.mkdtemp(prefix="mae-slurm-"))
    work.chmod(0o755)  # Slurm's munge requires folders that everybody can enter
    try:
        failed = run_all(names, work)
    except OSError as error:  # raised if slurm-up fails
        if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            raise
        print(f"skipped: {error}")
        failed = 0
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
