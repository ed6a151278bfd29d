"""Breaks runs on purpose, and counts what is lost: ./run faults (five minutes on two cores).

    python tests/faults.py                 # everything
    python tests/faults.py kills damage --trials 5

Every trial is a real run of main_pretrain.py on the embedded images, or real bytes of a real checkpoint. A run survives
if it can be continued, ends with the very weights of the run that nothing happened to, and tells each epoch once.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import ROOT, torchrun
from mains import lines

from util import checkpoint
from util.checkpoint import CheckpointError

EPOCHS = 8
LOADS = 10_000
SECONDS = 120  # after which a run that should have ended hangs
NOBODY = 65534
# As root one passes through modes: the run takes another user's rights once Python is up.
UNPRIVILEGED = """
import os, sys
import main_pretrain
from util import cli
os.seteuid(int(sys.argv.pop(1)))
cli.run(main_pretrain.main, main_pretrain.get_args_parser())
"""


class Run:
    """A run of main_pretrain.py that saves its state after every step.

    Args:
        processes: how many share it; the batch stays the same.
        user: whose rights it takes.
        restarts: how often torchrun starts it again by itself, without being told to resume.
        said: file for what it prints; beside its folder by default.
    """

    def __init__(
        self, data: Path, out: Path, processes: int = 1, user: int | None = None, restarts: int = 0,
        said: Path | None = None,
    ) -> None:  # fmt: skip
        self.data, self.out, self.processes, self.user, self.restarts = data, out, processes, user, restarts
        self.process: subprocess.Popen | None = None
        self.said = said or out.with_suffix(".said")

    def start(self) -> "Run":
        """Starts or continues it."""
        launcher = [sys.executable] if self.processes == 1 else torchrun(self.processes, self.restarts)
        script = ["main_pretrain.py"] if self.user is None else ["-c", UNPRIVILEGED, str(self.user)]
        flags = [
            "--config", "recipes/pretrain_fashion_mnist.yaml", "--data_path", self.data, "--output_dir", self.out,
            "--epochs", EPOCHS, "--warmup_epochs", 1, "--batch_size", 32 // self.processes, "--num_workers", 0,
            "--save_minutes", 0, "--save_every", 4, "--vis_every", 0, "--device", "cpu",
            *([] if self.restarts else ["--resume", "auto"]),
        ]  # fmt: skip
        with self.said.open("a") as said:
            self.process = subprocess.Popen(
                [*launcher, *script, *map(str, flags)], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        return self

    def wait_for(self, text: str) -> bool:
        """Waits until it has said something since its last start, or ended; whether it is still going on."""
        assert self.process
        begun = len(self.said.read_text())
        ends = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < ends:
            if text in self.said.read_text()[begun:]:
                return True
            time.sleep(0.01)
        return False

    def kill(self) -> bool:
        """Ends all its processes at once, as a power cut would; False if it had ended."""
        assert self.process
        if self.process.poll() is not None:
            return False
        for pid in [self.process.pid, *self.ranks().values()]:  # a launcher's processes outlive it for a while
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while self.ranks():
            time.sleep(0.01)
        return True

    def finish(self) -> int:
        """Waits for its end; the exit code, or -1 if it hangs."""
        assert self.process
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"\0{self.out}\0" in (folder / "cmdline").read_text():
                    variables = (folder / "environ").read_text().split("\0")
                    found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith("RANK=")}
            except OSError:
                continue
        return found

    def equals(self, other: "Run") -> bool:
        """Whether two finished runs have the same weights, bit for bit, and the same epochs in their logs."""
        a, b = (checkpoint.read(run.out / f"checkpoint-{EPOCHS - 1}.pth")["model"] for run in (self, other))
        losses = [[(line["epoch"], line["train_loss"]) for line in lines(run.out)] for run in (self, other)]
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and losses[0] == losses[1]


class Faults:
    """The trials, each in a folder of its own.

    Args:
        trials: kills of each kind.
        loads: damaged files.
    """

    def __init__(self, work: Path, trials: int, loads: int) -> None:
        self.work, self.trials, self.loads = work, trials, loads
        self.random = random.Random(0)
        self.data = work / "data"
        images = sorted((ROOT / "demo/data/fashion_mnist/train").glob("*/*.png"))[:: 10_000 // 320]
        for number, image in enumerate(images[:320]):
            (self.data / "all").mkdir(parents=True, exist_ok=True)
            shutil.copy(image, self.data / "all" / f"{number:03}.png")
        self.whole: dict[int, Run] = {}

    def undisturbed(self, processes: int) -> Run:
        """The run that nothing happens to."""
        if processes not in self.whole:
            self.whole[processes] = run = Run(self.data, self.work / f"whole{processes}", processes).start()
            assert run.finish() == 0, run.said.read_text()
        return self.whole[processes]

    def kills(self, counts: tuple[int, ...] = (1, 2)) -> list[tuple[str, int, int]]:
        """SIGKILL at random moments, of which many lie within a save, since the run saves all the time."""
        rows = []
        for processes in counts:
            whole = self.undisturbed(processes)
            left, survived, number = self.trials, 0, 0
            while left > 0:
                run, kills = Run(self.data, self.work / f"killed{processes}.{number}", processes), 0
                number += 1
                while run.start().wait_for("epoch ") and left > 0:
                    time.sleep(self.random.uniform(0, 1.5))
                    if not run.kill():
                        break  # it had come to its end
                    kills, left = kills + 1, left - 1
                survived += kills if run.finish() == 0 and run.equals(whole) else 0
            rows.append((f"SIGKILL, {processes} process{'es' * (processes > 1)}", self.trials, survived))
        return rows

    def ranks(self) -> list[tuple[str, int, int]]:
        """One process of two is killed: the other ends too, not with 0, and the run can be continued."""
        whole, survived, trials = self.undisturbed(2), 0, max(2, self.trials // 6)
        for number in range(trials):
            run = Run(self.data, self.work / f"rank{number}", 2).start()
            run.wait_for("epoch ")
            os.kill(run.ranks()[number % 2], signal.SIGKILL)
            ended = run.finish()
            survived += ended not in (0, -1) and run.start().finish() == 0 and run.equals(whole)
        return [("one process of two killed", trials, survived)]

    def restarts(self, trials: int = 4) -> list[tuple[str, int, int]]:
        """One process of two is killed, and torchrun --max-restarts starts both again: nobody need do anything."""
        whole, survived = self.undisturbed(2), 0
        for number in range(trials):
            run = Run(self.data, self.work / f"restarted{number}", 2, restarts=2).start()
            run.wait_for("epoch 1 ")
            os.kill(run.ranks()[number % 2], signal.SIGKILL)
            survived += run.finish() == 0 and "resuming from" in run.said.read_text() and run.equals(whole)
        return [("one process of two killed, torchrun --max-restarts", trials, survived)]

    def disk(self) -> list[tuple[str, int, int]]:
        """The disk fills up, and is freed an epoch later."""
        if os.geteuid() != 0:
            return [("disk full (skipped: needs root)", 0, 0)]
        place = self.work / "small"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", place], check=True)
        try:
            run = Run(self.data, place / "run", said=self.work / "small.said").start()
            run.wait_for("epoch 1 ")
            filled = run.out.parent / "filler"
            with filled.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(2**16))
                        file.flush()
                except OSError:
                    pass
            warned = run.wait_for("No space left on device")
            filled.unlink()
            return [("disk full", 1, int(run.finish() == 0 and warned and run.equals(self.undisturbed(1))))]
        finally:
            subprocess.run(["umount", "-l", place], check=True)

    def modes(self) -> list[tuple[str, int, int]]:
        """The folder's rights are taken away for a while, as an unprivileged user."""
        if os.geteuid() != 0:
            return [("read-only folder (skipped: needs root)", 0, 0)]
        for folder in [self.work, *self.work.parents]:
            if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/root"):
                folder.chmod(folder.stat().st_mode | 0o055)
        run = Run(self.data, self.work / "modes", user=NOBODY)
        run.out.mkdir()
        os.chown(run.out, NOBODY, -1)
        run.start().wait_for("epoch 1 ")
        run.out.chmod(0o555)
        warned = run.wait_for("Permission denied")
        run.out.chmod(0o755)
        ended = run.finish()
        return [("read-only folder", 1, int(ended == 0 and warned and run.equals(self.undisturbed(1))))]

    def damage(self) -> list[tuple[str, int, int]]:
        """Every region of a checkpoint overwritten, and random damage: refused in a sentence, or loaded equal."""
        torch.manual_seed(0)
        state = {"model": {f"block{n}.weight": torch.randn(16, 16) for n in range(8)}, "epoch": 3,
                 "args": {"lr": 0.1, "model": "vit"}, "progress": {"epoch": 4, "images_done": 0}}  # fmt: skip
        file, broken = self.work / "good.pth", self.work / "broken.pth"
        checkpoint.write(state, file)
        good = file.read_bytes()

        def judge(data: bytes) -> bool:
            broken.write_bytes(data)
            try:
                found = checkpoint.read(broken)
            except CheckpointError:
                return True
            return checkpoint.compute_digest(found) == checkpoint.compute_digest(state)

        regions = range(0, len(good), 16)
        kept = sum(judge(good[:at] + bytes(b ^ 0xFF for b in good[at : at + 16]) + good[at + 16 :]) for at in regions)
        return [
            ("each 16 bytes of a checkpoint inverted", len(regions), kept),
            ("checkpoint damaged at random", self.loads, sum(judge(self._spoil(good)) for _ in range(self.loads))),
        ]

    def _spoil(self, data: bytes) -> bytes:
        """Flipped bits, changed runs of bytes, cuts, holes, and pieces of itself in other places."""
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


PARTS: dict[str, Callable[[Faults], list[tuple[str, int, int]]]] = {
    part.__name__: part
    for part in (Faults.kills, Faults.ranks, Faults.restarts, Faults.disk, Faults.modes, Faults.damage)
}


def main() -> None:
    """Prints the table; ends with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--trials", type=int, default=25, help="kills, with one process and with two")
    parser.add_argument("--loads", type=int, default=LOADS, help="damaged checkpoints")
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
