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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import ROOT, torchrun
from forks import Forks
from mains import lines

from util.checkpoints import checkpoint, sharded
from util.checkpoints.checkpoint import CheckpointError

EPOCHS = 8
LOADS = 10_000
SECONDS = 180  # timeout of a run
NOBODY = 65534
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
Row = tuple[str, int, int]  # fault, trials, survived


class Layout(NamedTuple):
    """The processes and the flags of a run."""

    name: str
    processes: int
    flags: tuple[str, ...] = ()


ALONE, DDP, FSDP = Layout("1 process", 1), Layout("2 processes", 2), Layout("2 processes, --fsdp", 2, ("--fsdp",))
LAYOUTS = (ALONE, DDP, FSDP)


class Run:
    """A run that saves its state after every update.

    Args:
        script: the module of the script.
        user: user id of the processes.
        output: file for the output (default: beside the run directory).
    """

    def __init__(
        self, data: Path, out: Path, layout: Layout = ALONE, *more: Any, script: str = "main_pretrain",
        user: int | None = None, output: Path | None = None,
    ) -> None:  # fmt: skip
        self.out, self.layout, self.script, self.user = out, layout, script, user
        self.output = output or out.with_suffix(".output")
        self.processes: list[Any] = []
        self.offset = 0  # of the output since the last start
        config = f"recipes/{script.removeprefix('main_')}_fashion_mnist.yaml"
        self.flags = [
            "--config", config, "--data_path", data, "--output_dir", out, "--epochs", EPOCHS, "--warmup_epochs", 1,
            "--batch_size", 32 // layout.processes, "--save_minutes", 0, "--device", "cpu", "--no_cache_images",
            "--num_workers", 2, *layout.flags, *more,
        ]  # fmt: skip
        if script == "main_pretrain":
            self.flags += ["--save_every", 4, "--vis_every", 0]

    def start(self, *flags: Any) -> "Run":
        """Starts or resumes the run; later flags take precedence."""
        self.offset = self.output.stat().st_size if self.output.exists() else 0
        argv = [*self.flags, "--resume", "auto", *flags]
        environment = {"OMP_NUM_THREADS": "1"}
        self.forks = Forks(f"{self.script}.py", argv, self.output, self.layout.processes, environment, self.user)
        self.processes = self.forks.processes
        return self

    def text(self) -> str:
        """The output since the last start."""
        return self.output.read_bytes()[self.offset :].decode() if self.output.exists() else ""

    def wait_for(self, text: str) -> bool:
        """Waits until the output since the last start contains `text`; returns False if the run ends before."""
        ends = time.monotonic() + SECONDS
        while all(process.is_alive() for process in self.processes) and time.monotonic() < ends:
            if text in self.text():
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
        """The worker processes of a rank."""
        children = Path(f"/proc/{self.processes[rank].pid}/task/{self.processes[rank].pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def finish(self) -> list[int]:
        """Waits for the end of the run; returns the exit codes, and -1000 for a process that hangs."""
        codes = self.forks.wait(SECONDS)
        if -1000 in codes:
            self.forks.signal(signal.SIGKILL)
        return codes

    def finishes(self, *flags: Any) -> bool:
        """Resumes the run and waits for its end; returns whether all exit codes are 0."""
        return set(self.start(*flags).finish()) == {0}

    def is_finished(self) -> bool:
        """Whether the checkpoint of the last epoch exists."""
        path = self.out / f"checkpoint-{EPOCHS - 1}"
        return path.exists() or path.with_suffix(".pth").exists()

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the last epoch."""
        path = self.out / f"checkpoint-{EPOCHS - 1}"
        state = sharded.gather(path) if path.is_dir() else checkpoint.read(path.with_suffix(".pth"))
        return state["model"]

    def equals(self, other: "Run") -> bool:
        """Whether two finished runs have bit-equal weights, and the same epochs in their logs."""
        try:
            a, b = self.weights(), other.weights()
        except CheckpointError:
            return False
        logs = [
            [{key: line[key] for key in ("epoch", "train_loss", "test_acc1") if key in line} for line in lines(run.out)]
            for run in (self, other)
        ]
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and logs[0] == logs[1]


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
def small_disk(place: Path, size: str = "128m") -> Iterator[Path]:
    """A small file system with space for a few checkpoints."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Fills a disk except for `leave` bytes; returns the file that fills it."""
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - leave)
    return filler


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

    def new_run(self, name: str, layout: Layout = ALONE, *more: Any, **options: Any) -> Run:
        """A run in a new folder."""
        self.number += 1
        return Run(self.data, self.work / f"{name}{self.number}", layout, *more, **options)

    def undisturbed(self, layout: Layout, script: str = "main_pretrain") -> Run:
        """The undisturbed run of a layout."""
        if (script, layout) not in self.references:
            self.references[script, layout] = run = self.new_run("reference", layout, script=script)
            assert run.finishes(), run.text()
        return self.references[script, layout]

    def disturb(
        self, name: str, layout: Layout, trials: int, fault: Callable[[Run], bool | None], script: str = "main_pretrain"
    ) -> Row:
        """Injects a fault into runs at random moments, several times each, until they are complete.

        Args:
            fault: disturbs a run and waits for its end; returns whether it ended as documented, or None if it had ended
                before.
        """
        reference, left, survived = self.undisturbed(layout, script), trials, 0
        while left > 0:
            run, done, good = self.new_run("disturbed", layout, script=script), 0, True
            while run.start().wait_for("epoch ") and left > 0:
                time.sleep(self.random.uniform(0, 1.2))
                ended = fault(run)
                if ended is None:
                    break
                if not ended:
                    print(f"{name}, {layout.name}: {run.text()[-2000:]}", file=sys.stderr)
                done, left, good = done + 1, left - 1, good and ended
            good = (set(run.finish()) == {0} or run.finishes()) and good and run.equals(reference)
            if not good:
                print(f"{name}, {layout.name}: {run.out} was lost; {run.text()[-2000:]}", file=sys.stderr)
            survived += done * good
        return f"{name}, {layout.name}", trials, survived

    def kills(self, layouts: Sequence[Layout] = LAYOUTS) -> list[Row]:
        """SIGKILL at random moments, many of them during a save; the run is resumed immediately."""
        shares = {ALONE: 1.0, DDP: 0.6, FSDP: 0.3}
        return [
            self.disturb("SIGKILL", layout, max(1, int(shares[layout] * self.trials)), lambda run: run.kill() or None)
            for layout in layouts
        ]

    def stops(self, layouts: Sequence[Layout] = LAYOUTS) -> list[Row]:
        """A signal to all processes, including worker processes; the exit code is 128 + signal, without a traceback."""

        def stop(run: Run) -> bool | None:
            signum = self.random.choice(STOPS)
            run.forks.signal(signum)
            codes = set(run.finish())
            if codes == {0} or run.is_finished():
                return None
            return codes == {128 + signum} and "Traceback" not in run.text() and "DataLoader" not in run.text()

        shares = {ALONE: 0.8, DDP: 0.4, FSDP: 0.2}
        return [
            self.disturb("signal to all processes", layout, max(1, int(shares[layout] * self.trials)), stop)
            for layout in layouts
        ]

    def evaluations(self) -> list[Row]:
        """A signal to main_finetune.py during training or evaluation."""

        def stop(run: Run) -> bool | None:
            run.forks.signal(signal.SIGTERM)
            started = time.monotonic()
            codes = run.finish()
            if codes == [0] or run.is_finished():
                return None
            return codes == [128 + signal.SIGTERM] and time.monotonic() - started < 15

        trials = max(1, self.trials // 4)
        return [
            self.disturb("SIGTERM while main_finetune.py trains or evaluates", ALONE, trials, stop, "main_finetune")
        ]

    def workers(self, layouts: Sequence[Layout] = (ALONE, DDP)) -> list[Row]:
        """SIGKILL to one worker process, as by Linux when memory is full."""

        def kill_worker(run: Run) -> bool | None:
            rank = self.random.randrange(run.layout.processes)
            workers = run.workers(rank)
            if not workers:
                return None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(workers), signal.SIGKILL)
            codes = run.finish()
            if set(codes) == {0}:
                return None
            return codes[rank] == 1 and set(codes) <= {1} and "Traceback" not in run.text()

        shares = {ALONE: 0.6, DDP: 0.2}
        return [
            self.disturb("one worker process killed", layout, max(1, int(shares[layout] * self.trials)), kill_worker)
            for layout in layouts
        ]

    def ranks(self) -> list[Row]:
        """One process of two is killed: the other ends with an error, and the run can be resumed."""

        def kill_one(run: Run) -> bool | None:
            rank = self.random.randrange(2)
            if not run.processes[rank].is_alive():
                return None
            run.processes[rank].kill()
            codes = run.finish()
            if codes[1 - rank] == 0:  # the run was complete; only the exit of this process was missing
                return None
            return 0 not in codes

        return [self.disturb("one process of two killed", DDP, max(2, self.trials // 6), kill_one)]

    def restarts(self, trials: int = 4) -> list[Row]:
        """One process of two is killed, and torchrun --max-restarts restarts both without --resume."""
        reference, survived = self.undisturbed(DDP), 0
        for _ in range(trials):
            run = self.new_run("restarted", DDP)
            command = [*torchrun(2, restarts=2), "main_pretrain.py", *map(str, run.flags)]
            with run.output.open("w") as output:
                process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            ends = time.monotonic() + SECONDS
            while "epoch 1 " not in run.text() and time.monotonic() < ends:
                time.sleep(0.01)
            os.kill(ranks(run.out)[self.random.randrange(2)], signal.SIGKILL)
            ended = process.wait(SECONDS)
            survived += ended == 0 and "resuming from" in run.text() and run.equals(reference)
        return [("one process of two killed, torchrun --max-restarts", trials, survived)]

    def disk(self, layouts: Sequence[Layout] = (ALONE, FSDP)) -> list[Row]:
        """The disk is full for three epochs; or to the end, and the error message names the directory of the state."""
        if os.geteuid() != 0:
            return [("disk full (skipped: needs root)", 0, 0)]
        rows = []
        for layout in layouts:
            reference = self.undisturbed(layout)
            with small_disk(self.work / f"small{layout.flags}") as place:
                run = Run(self.data, place / "run", layout, output=self.work / f"small{layout.flags}.output")
                run.start().wait_for("epoch 3 ")
                filler = fill(place)
                warned = run.wait_for("No space left on device") and run.wait_for("epoch 5 done")
                filler.unlink()
                good = set(run.finish()) == {0} and warned and run.equals(reference)
                suffix = "" if layout is FSDP else ".pth"
                good = good and all((run.out / f"checkpoint-{n}{suffix}").exists() for n in (0, 4, 7))
                rows.append((f"disk full for three epochs, {layout.name}", 1, int(good)))
        with small_disk(self.work / "full") as place:
            run = Run(self.data, place / "run", output=self.work / "full.output")
            run.start().wait_for("epoch 5 ")
            filler = fill(place)
            run.wait_for("No space left on device")
            fill(place)  # fills the space of the incomplete checkpoint
            ended = run.finish()
            message = re.search(r"The state is in (\S+): move its files to (\S+), and --resume auto", run.text())
            filler.unlink()
            for file in Path(message[1]).iterdir() if message else []:
                shutil.move(file, Path(message[2] if message else "") / file.name)
            ending = run.text()[-2000:]
            good = ended == [1] and message and run.finishes() and run.equals(self.undisturbed(ALONE))
            if not good:
                print(f"disk full to the end: {ended}; {ending}", file=sys.stderr)
            rows.append(("disk full to the end, state resumed from the temporary directory", 1, int(bool(good))))
        return rows

    def modes(self) -> list[Row]:
        """The run directory is read-only for a while; the run has no root permissions."""
        if os.geteuid() != 0:
            return [("read-only folder (skipped: needs root)", 0, 0)]
        for folder in [self.work, *self.work.parents]:
            if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/root"):
                folder.chmod(folder.stat().st_mode | 0o055)
        # Without worker processes: their shared files would be in a folder that belongs to root.
        run = self.new_run("modes", ALONE, "--num_workers", 0, user=NOBODY)
        run.out.mkdir()
        os.chown(run.out, NOBODY, -1)
        run.start().wait_for("epoch 1 ")
        run.out.chmod(0o555)
        warned = run.wait_for("Permission denied")
        run.out.chmod(0o755)
        good = run.finish() == [0] and warned and run.equals(self.undisturbed(ALONE))
        if not good:
            print(f"read-only folder: {run.text()[-2000:]}", file=sys.stderr)
        return [("read-only folder", 1, int(good))]

    def newest(self, layouts: Sequence[Layout] = LAYOUTS) -> list[Row]:
        """The newest checkpoint is damaged: --resume auto resumes from the previous one."""
        rows = []
        for layout in layouts:
            trials, survived = max(1, self.trials // 10), 0
            for _ in range(trials):
                run = self.new_run("damaged", layout)
                run.start().wait_for("epoch 2 ")
                run.kill()
                path = checkpoint.newest_first(run.out)[0]
                file = self.random.choice(sorted(path.iterdir())) if path.is_dir() else path
                file.write_bytes(self._spoil(file.read_bytes()[: self.random.randrange(1, file.stat().st_size)]))
                survived += run.finishes() and "skips" in run.text() and run.equals(self.undisturbed(layout))
            rows.append((f"newest checkpoint damaged, {layout.name}", trials, survived))
        return rows

    def exports(self) -> list[Row]:
        """The disk is full when results are written: no incomplete file remains, and the error message has one line."""
        if os.geteuid() != 0:
            return [("exports on a full disk (skipped: needs root)", 0, 0)]
        model = self.undisturbed(ALONE, "main_finetune").out / f"checkpoint-{EPOCHS - 1}.pth"
        survived, images = 0, self.data / "val"
        commands = {
            "model.safetensors": ["inference.export", "--model", model, "--to", "timm", "--out"],
            "reference.pth": ["inference.export", "--model", model, "--to", "reference", "--out"],
            "features.npz": ["inference.features", images, "--model", model, "--out"],
        }
        for name, command in commands.items():
            with small_disk(self.work / f"exports-{name}", "4m") as place:
                fill(place, leave=2**17)
                argv = [sys.executable, "-m", *map(str, command), str(place / name)]
                done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
                good = done.returncode == 1 and "No space left on device" in done.stderr.splitlines()[-1]
                good = good and "Traceback" not in done.stderr and not (place / name).exists()
                if not good:
                    print(f"{name}: {done.returncode}, {done.stderr[-2000:]}", file=sys.stderr)
                survived += good
        return [("exports and features on a full disk", len(commands), survived)]

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
        return [
            ("each 16 bytes of a checkpoint inverted", len(regions), kept),
            ("checkpoint damaged at random", self.loads, sum(judge(self._spoil(good)) for _ in range(self.loads))),
        ]

    def _spoil(self, data: bytes) -> bytes:
        """Damages data: flipped bits, random bytes, truncation, zeros, and pieces copied to other places."""
        spoiled, draw = bytearray(data), self.random
        for _ in range(draw.choice((1, 1, 2, 8))):
            at, length = draw.randrange(len(spoiled)), draw.choice((1, 4, 64, 512))
            how = draw.randrange(5)
            if how == 0:
                spoiled[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                spoiled[at : at + length] = draw.randbytes(length)
            elif how == 2:
                del spoiled[at:]
            elif how == 3:
                spoiled[at : at + length] = bytes(length)
            else:
                spoiled[at : at + length] = spoiled[(other := draw.randrange(len(spoiled))) : other + length]
            if not spoiled:
                break
        return bytes(spoiled)


PARTS: dict[str, Callable[[Faults], list[Row]]] = {
    part.__name__: part
    for part in (
        Faults.kills, Faults.stops, Faults.evaluations, Faults.workers, Faults.ranks, Faults.restarts, Faults.newest,
        Faults.disk, Faults.modes, Faults.exports, Faults.damage,
    )
}  # fmt: skip


def main() -> None:
    """Prints the table; exits with code 1 if a trial was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--trials", type=int, default=60, help="number of SIGKILLs; the other numbers are relative to it"
    )
    parser.add_argument("--loads", type=int, default=LOADS, help="number of damaged checkpoints")
    args = parser.parse_args()
    subprocess.run([sys.executable, "demo/unpack_data.py"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print("| fault | trials | survived | lost |\n|---|---|---|---|", flush=True)
    lost = 0
    with tempfile.TemporaryDirectory() as work:
        faults = Faults(Path(work), args.trials, args.loads)
        for name in args.parts or PARTS:
            for fault, trials, survived in PARTS[name](faults):
                print(f"| {fault} | {trials:,} | {survived:,} | {trials - survived:,} |", flush=True)
                lost += trials - survived
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
