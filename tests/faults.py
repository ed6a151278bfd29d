"""Injects faults into runs and counts the lost runs: ./run faults (a quarter of an hour on two cores).

    python tests/faults.py                 # everything
    python tests/faults.py kills damage --trials 5

Every trial is a run of main_pretrain.py or main_finetune.py on the embedded images with worker processes, or a read of
a damaged checkpoint. A run survives if it ends with the documented exit code, can be resumed at once, ends with weights
that are bit-equal to those of an undisturbed run, and logs each epoch once.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import mutations
import torch
from conftest import ROOT, torchrun
from forks import Forks
from mains import lines, wait_until

from mae.checkpoints import checkpoint, run_directory, sharded_state
from mae.checkpoints.checkpoint import CheckpointError

EPOCHS = 8
SECONDS = 180  # timeout of a run
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
Row = tuple[str, int, int]  # fault, trials, survived


class Layout(NamedTuple):
    """The processes and the flags of a run."""

    name: str
    processes: int
    flags: tuple[str, ...] = ()


ALONE, DDP, FSDP = Layout("1 process", 1), Layout("2 processes", 2), Layout("2 processes, --fsdp", 2, ("--fsdp",))


class Run:
    """A run that saves its state after every update.

    Args:
        script: the module of the script.
        output: file for the output (default: beside the run directory).
    """

    def __init__(
        self, data: Path, out: Path, layout: Layout = ALONE, script: str = "main_pretrain", output: Path | None = None
    ) -> None:
        self.out, self.layout, self.script = out, layout, script
        self.output = output or out.with_suffix(".output")
        self.processes: list[Any] = []
        self.offset = 0  # of the output since the last start
        config = f"recipes/{script.removeprefix('main_')}_fashion_mnist.yaml"
        self.flags = [
            "--config", config, "--data_path", data, "--output_dir", out, "--epochs", EPOCHS, "--warmup_epochs", 1,
            "--batch_size", 32 // layout.processes, "--save_minutes", 0, "--device", "cpu", "--no_cache_images",
            "--num_workers", 2, *layout.flags,
        ]  # fmt: skip
        if script == "main_pretrain":
            self.flags += ["--save_every", 4, "--vis_every", 0]

    def start(self) -> "Run":
        """Starts or resumes the run."""
        self.offset = self.output.stat().st_size if self.output.exists() else 0
        argv = [*self.flags, "--resume", "auto"]
        self.forks = Forks(f"{self.script}.py", argv, self.output, self.layout.processes)
        self.processes = self.forks.processes
        return self

    def text(self) -> str:
        """The output since the last start."""
        return self.output.read_bytes()[self.offset :].decode() if self.output.exists() else ""

    def wait_for(self, text: str) -> bool:
        """Waits until the output since the last start contains `text`; returns False if the run ends before."""
        return self._wait(lambda: text in self.text())

    def wait_for_epoch(self, epoch: int) -> bool:
        """Waits until an epoch has begun. Short epochs share a line of the output, and a full disk has no log.txt."""

        def has_begun() -> bool:
            ended = [int(number) + 1 for number in re.findall(r"epochs? (?:\d+ to )?(\d+) done", self.text())]
            path = self.out / "log.txt"
            logged = path.read_text().count("\n") if path.exists() else 0
            return max([0, *ended]) >= epoch or logged >= epoch

        return self._wait(has_begun)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        ends = time.monotonic() + SECONDS
        while all(process.is_alive() for process in self.processes) and time.monotonic() < ends:
            if condition():
                return True
            time.sleep(0.01)
        return False

    def kill(self) -> bool:
        """Sends SIGKILL to all processes except worker processes; returns False if the run had ended."""
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
        self.finish()
        return bool(alive)

    def workers(self, rank: int = 0) -> list[int]:
        children = Path(f"/proc/{self.processes[rank].pid}/task/{self.processes[rank].pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def finish(self) -> list[int]:
        """Waits for the end of the run; returns the exit codes, and -1000 for a process that hangs."""
        codes = self.forks.wait(SECONDS)
        if -1000 in codes:
            self.forks.signal(signal.SIGKILL)
        return codes

    def finishes(self) -> bool:
        """Resumes the run and waits for its end; returns whether all exit codes are 0."""
        return set(self.start().finish()) == {0}

    def is_finished(self) -> bool:
        """Whether the checkpoint of the last epoch exists."""
        path = self.out / f"checkpoint-{EPOCHS - 1}"
        return path.exists() or path.with_suffix(".pth").exists()

    def result(self) -> tuple[str, list[dict[str, Any]]]:
        """The digest of the weights of the last epoch, and the log."""
        path = self.out / f"checkpoint-{EPOCHS - 1}"
        state = sharded_state.gather(path) if path.is_dir() else checkpoint.read(path.with_suffix(".pth"))
        keys = {"epoch", "train_loss", "test_acc1"}
        log = [{key: line[key] for key in keys & line.keys()} for line in lines(self.out)]
        return checkpoint.compute_digest(dict(sorted(state["model"].items()))), log

    def equals(self, other: "Run") -> bool:
        """Whether two finished runs have bit-equal weights, and the same epochs in their logs."""
        try:
            return self.result() == other.result()
        except CheckpointError:
            return False


def ranks(out: Path) -> dict[int, int]:
    """The process id of each rank of a run under torchrun; worker processes have higher ids."""
    ids: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0{out}\0" in (folder / "cmdline").read_text():
                variables = (folder / "environ").read_text().split("\0")
                for rank in (int(v[5:]) for v in variables if v.startswith("RANK=")):
                    ids[rank] = min(int(folder.name), ids.get(rank, int(folder.name)))
        except OSError:
            continue
    return ids


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A small file system with space for a few checkpoints."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> Path:
    """Fills a disk; returns the file that fills it."""
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return filler


def sigkill(run: Run, draw: random.Random) -> bool | None:
    """SIGKILL to all processes, many of them during a save."""
    return run.kill() or None


def stop(run: Run, draw: random.Random) -> bool | None:
    """A signal to all processes, including workers: within 15 s they exit with 128 + signal, without a traceback."""
    signum, started = draw.choice(STOPS), time.monotonic()
    run.forks.signal(signum)
    codes, seconds = set(run.finish()), time.monotonic() - started
    if codes == {0} or run.is_finished():
        return None
    return codes == {128 + signum} and seconds < 15 and not re.search("Traceback|DataLoader", run.text())


def kill_worker(run: Run, draw: random.Random) -> bool | None:
    """SIGKILL to one worker process, as by Linux when memory is full."""
    rank = draw.randrange(run.layout.processes)
    if not (workers := run.workers(rank)):
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(workers), signal.SIGKILL)
    codes = run.finish()
    if set(codes) == {0}:
        return None
    return codes[rank] == 1 and set(codes) <= {1} and "Traceback" not in run.text()


def kill_rank(run: Run, draw: random.Random) -> bool | None:
    """SIGKILL to one process of two: the other ends with an error."""
    rank = draw.randrange(2)
    if not run.processes[rank].is_alive():
        return None
    run.processes[rank].kill()
    codes = run.finish()
    if codes[1 - rank] == 0:  # the run was complete; only the exit of this process was missing
        return None
    return 0 not in codes


class Disturbance(NamedTuple):
    """A fault at random moments.

    Attributes:
        fault: disturbs a run and waits for its end; returns whether it ended as documented, or None if it had ended
            before.
        shares: of --trials, for each layout.
    """

    name: str
    fault: Callable[[Run, random.Random], bool | None]
    shares: dict[Layout, float]
    script: str = "main_pretrain"


DISTURBANCES = {
    "kills": Disturbance("SIGKILL", sigkill, {ALONE: 1.0, DDP: 0.6, FSDP: 0.3}),
    "stops": Disturbance("signal to all processes", stop, {ALONE: 0.8, DDP: 0.4, FSDP: 0.2}),
    "evaluations": Disturbance(
        "signal while main_finetune.py trains or evaluates", stop, {ALONE: 0.25}, "main_finetune"
    ),
    "workers": Disturbance("one worker process killed", kill_worker, {ALONE: 0.6, DDP: 0.2}),
    "ranks": Disturbance("one process of two killed", kill_rank, {DDP: 1 / 6}),
}
OTHERS = ("restarts", "newest", "disk", "damage")  # methods of Faults


class Faults:
    """The trials, each in its own folder.

    Args:
        trials: number of SIGKILLs of a run in one process; the other numbers of trials are derived from it.
        loads: number of damaged checkpoints.
    """

    def __init__(self, work: Path, trials: int, loads: int) -> None:
        self.work, self.trials, self.loads = work, trials, loads
        self.random = random.Random(0)
        self.data = work / "data"
        for split, count in (("train", 320), ("val", 1000)):
            images = sorted((ROOT / "demo/data/fashion_mnist" / split).glob("*/*.png"))
            for image in images[:: len(images) // count][:count]:
                (self.data / split / image.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(image, self.data / split / image.parent.name)
        self.references: dict[tuple[str, Layout], Run] = {}
        self.number = 0

    def rows(self, part: str) -> list[Row]:
        return self.disturb(DISTURBANCES[part]) if part in DISTURBANCES else getattr(self, part)()

    def new_run(self, name: str, layout: Layout = ALONE, script: str = "main_pretrain") -> Run:
        self.number += 1
        return Run(self.data, self.work / f"{name}{self.number}", layout, script=script)

    def undisturbed(self, layout: Layout, script: str = "main_pretrain") -> Run:
        if (script, layout) not in self.references:
            self.references[script, layout] = run = self.new_run("reference", layout, script)
            assert run.finishes(), run.text()
        return self.references[script, layout]

    def disturb(self, disturbance: Disturbance) -> list[Row]:
        """Injects a fault into runs, several times each, which are resumed at once until they are complete."""
        name, fault, shares, script = disturbance
        rows = []
        for layout, share in shares.items():
            trials = left = max(1, int(share * self.trials))
            survived = 0
            while left > 0:
                run, done, good = self.new_run("disturbed", layout, script), 0, True
                while run.start().wait_for("epoch ") and left > 0:
                    time.sleep(self.random.uniform(0, 1.2))
                    if (ended := fault(run, self.random)) is None:
                        break
                    if not ended:
                        print(f"{name}, {layout.name}: {run.text()[-2000:]}", file=sys.stderr)
                    done, left, good = done + 1, left - 1, good and ended
                good = (set(run.finish()) == {0} or run.finishes()) and good
                if not (good and run.equals(self.undisturbed(layout, script))):
                    print(f"{name}, {layout.name}: {run.out} was lost; {run.text()[-2000:]}", file=sys.stderr)
                    done = 0
                survived += done
            rows.append((f"{name}, {layout.name}", trials, survived))
        return rows

    def restarts(self, trials: int = 4) -> list[Row]:
        """One process of two is killed, and torchrun --max-restarts restarts both with --resume auto."""
        survived = 0
        for _ in range(trials):
            run = self.new_run("restarted", DDP)
            command = [*torchrun(2, restarts=2), "main_pretrain.py", *map(str, run.flags), "--resume", "auto"]
            with run.output.open("w") as output:
                process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            wait_until(lambda log=run.out / "log.txt": log.exists() and log.read_text(), seconds=SECONDS)
            os.kill(ranks(run.out)[self.random.randrange(2)], signal.SIGKILL)
            ended = process.wait(SECONDS)
            survived += ended == 0 and "resuming from" in run.text() and run.equals(self.undisturbed(DDP))
        return [("one process of two killed, torchrun --max-restarts", trials, survived)]

    def disk(self) -> list[Row]:
        """The disk is full for three epochs; or to the end, and the run resumes from its last complete checkpoint."""
        if os.geteuid() != 0:
            return [("disk full (skipped: needs root)", 0, 0)]
        rows = []
        for layout, suffix in ((ALONE, ".pth"), (FSDP, "")):
            with small_disk(self.work / f"small{layout.flags}") as place:
                run = Run(self.data, place / "run", layout, output=self.work / f"small{layout.flags}.output")
                run.start().wait_for_epoch(3)
                filler = fill(place)
                warned = run.wait_for("No space left on device") and run.wait_for_epoch(6)
                filler.unlink()
                good = set(run.finish()) == {0} and warned and run.equals(self.undisturbed(layout))
                good = good and all((run.out / f"checkpoint-{n}{suffix}").exists() for n in (0, 7))
                rows.append((f"disk full for three epochs, {layout.name}", 1, int(good)))
        with small_disk(self.work / "full") as place:
            run = Run(self.data, place / "run", output=self.work / "full.output")
            run.start().wait_for_epoch(5)
            filler = fill(place)
            run.wait_for("No space left on device")
            fill(place)  # fills the space of the incomplete checkpoint
            ended = run.finish()
            filler.unlink()
            ending = run.text()[-2000:]
            good = ended == [1] and "error: can't write" in ending
            good = good and run.finishes() and run.equals(self.undisturbed(ALONE))
            if not good:
                print(f"disk full to the end: {ended}; {ending}", file=sys.stderr)
            rows.append(("disk full to the end, resumed from the last complete checkpoint", 1, int(good)))
        return rows

    def newest(self) -> list[Row]:
        """The newest checkpoint is damaged: --resume auto resumes from the previous one."""
        rows = []
        for layout in (ALONE, DDP, FSDP):
            trials, survived = max(1, self.trials // 10), 0
            for _ in range(trials):
                run = self.new_run("damaged", layout)
                run.start().wait_for_epoch(2)
                run.kill()
                path = run_directory.newest_first(run.out)[0]
                file = self.random.choice(sorted(path.iterdir())) if path.is_dir() else path
                data = file.read_bytes()[: self.random.randrange(1, file.stat().st_size)]
                file.write_bytes(mutations.mutate(data, [data], self.random))
                survived += run.finishes() and "skips" in run.text() and run.equals(self.undisturbed(layout))
            rows.append((f"newest checkpoint damaged, {layout.name}", trials, survived))
        return rows

    def damage(self) -> list[Row]:
        """Every region of a checkpoint is inverted, and random damage: an error message, or equal contents."""
        torch.manual_seed(0)
        state = {"model": {f"block{n}.weight": torch.randn(16, 16) for n in range(8)}, "epoch": 3,
                 "args": {"lr": 0.1, "model": "vit"}, "progress": {"epoch": 4, "images_done": 0}}  # fmt: skip
        file, broken = self.work / "good.pth", self.work / "broken.pth"
        checkpoint.write(state, file)
        good = file.read_bytes()

        def judge(data: bytes) -> bool:
            broken.write_bytes(data)
            try:
                loaded = checkpoint.read(broken)
            except CheckpointError:
                return True
            return checkpoint.compute_digest(loaded) == checkpoint.compute_digest(state)

        regions = range(0, len(good), 16)
        kept = sum(judge(good[:at] + bytes(b ^ 0xFF for b in good[at : at + 16]) + good[at + 16 :]) for at in regions)
        survived = sum(judge(mutations.mutate(good, [good], self.random)) for _ in range(self.loads))
        return [
            ("each 16 bytes of a checkpoint inverted", len(regions), kept),
            ("checkpoint damaged at random", self.loads, survived),
        ]


def main() -> None:
    """Prints the table; exits with code 1 if a trial was lost."""
    parts = [*DISTURBANCES, *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], metavar="PART", help=f"{', '.join(parts)}, or all")
    parser.add_argument("--trials", type=int, default=60, help="SIGKILLs; the other numbers are relative to it")
    parser.add_argument("--loads", type=int, default=10_000, help="number of damaged checkpoints")
    args = parser.parse_args()
    subprocess.run([sys.executable, "demo/unpack_data.py"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print("| fault | trials | survived | lost |\n|---|---|---|---|", flush=True)
    lost = 0
    with tempfile.TemporaryDirectory() as work:
        faults = Faults(Path(work), args.trials, args.loads)
        for part in args.parts or parts:
            for fault, trials, survived in faults.rows(part):
                print(f"| {fault} | {trials:,} | {survived:,} | {trials - survived:,} |", flush=True)
                lost += trials - survived
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
