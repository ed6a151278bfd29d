"""Scripts in forks of a server that has imported PyTorch: a process starts in a second instead of four.

Tests of torchrun itself, its signals and its restarts, start it (`conftest.torchrun`).
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Listener, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as td

ROOT = Path(__file__).parents[1]
# The scripts, and what they import when it is used: two thirds of the time of a small run.
PRELOAD = ["main_pretrain", "main_finetune", "mae.cli.entry_point", "torch._dynamo", "torch.distributed.checkpoint",
           "torch.distributed.fsdp", "torch.utils.flop_counter", "torch.utils.tensorboard", "torchvision.datasets",
           "timm"]  # fmt: skip


class Forks:
    """The processes of a script, each with a process group of its own.

    Args:
        script: its file; relative paths begin at the repository.
        argv: its arguments.
        output: the file that stdout and stderr of all processes are appended to.
        count: the number of processes. Several have the environment variables of torchrun.
        environment: variables beside those of this process.
        errors: another file for stderr.
        folder: the working directory.
    """

    def __init__(
        self, script: str | Path, argv: Sequence[Any], output: Path, count: int = 1,
        environment: Mapping[str, str] | None = None, errors: Path | None = None, folder: Path = ROOT,
    ) -> None:  # fmt: skip
        # As in torchrun, the store belongs to the launcher, which chooses a free port.
        self.store = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if count > 1 else None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.processes: list[ForkServerProcess] = []
        for rank in range(count):
            variables = {**os.environ, **(environment or {})}
            if self.store:
                variables |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
                variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
                variables |= {"MASTER_ADDR": self.store.host, "MASTER_PORT": str(self.store.port)}
                variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            files = {"folder": folder, "output": output, "errors": errors or output, "python": sys.executable}
            arguments = (str(folder / script), [str(argument) for argument in argv], files, variables)
            self.processes.append(context.Process(target=_run, args=arguments))
            self.processes[-1].start()

    def wait(self, seconds: float) -> list[int]:
        """Waits for the end; returns the exit codes, and -1000 for a process that hangs."""
        ends = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, ends - time.monotonic()))
        return [-1000 if process.exitcode is None else process.exitcode for process in self.processes]

    def signal(self, signum: int) -> None:
        """Sends a signal to all processes, including worker processes, like launchers and terminals."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signum)


def run(
    script: str | Path, argv: Sequence[Any], output: Path, count: int = 1,
    environment: Mapping[str, str] | None = None, folder: Path = ROOT,
) -> str:  # fmt: skip
    """Runs a script to its end and returns its output.

    Raises:
        subprocess.CalledProcessError: a process failed.
    """
    forks = Forks(script, argv, output, count, environment, folder=folder)
    codes = forks.wait(300)
    said = output.read_text()
    if any(codes):
        forks.signal(9)
        print(said[-4000:])
        raise subprocess.CalledProcessError(next(filter(None, codes)), [str(script), *map(str, argv)], said)
    return said


def run_code(code: str, folder: Path, *argv: Any, count: int = 1) -> str:
    """Runs Python code in a folder, in one or several processes; returns the output."""
    (folder / "code.py").write_text(code)
    return run("code.py", argv, folder / "code.output", count, folder=folder)


# In place of Python: a script runs in a fork, whose output and exit code this process has, and which receives SIGTERM.
# Python runs everything else.
STARTER = """#!{python} -S
import os, signal, sys
if not os.path.basename(sys.argv[1]).startswith(("main_", "sandbox")):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
from multiprocessing.connection import Client
fork = Client("{address}")
signal.signal(signal.SIGTERM, lambda signum, _: fork.send(signum))
fork.send((os.getpid(), os.getcwd(), sys.argv[1:], dict(os.environ)))
if (code := fork.recv()) < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def starter(folder: Path) -> Iterator[Path]:
    """An executable that is used like Python, and starts main_*.py and sandbox.py as forks."""
    address, file, lock = str(folder / "socket"), folder / "python", threading.Lock()
    file.write_text(STARTER.format(python=sys.executable, address=address))
    file.chmod(0o755)

    def serve(connection: Connection) -> None:
        pid, folder, argv, environment = connection.recv()
        with lock:
            output, errors = (Path(f"/proc/{pid}/fd/{number}") for number in (1, 2))
            forks = Forks(argv[0], argv[1:], output, environment=environment, errors=errors, folder=Path(folder))
        try:
            while connection in wait([connection, forks.processes[0].sentinel]):
                forks.signal(connection.recv())
            connection.send(forks.wait(60)[0])
        except (EOFError, OSError):  # the starter was killed
            forks.signal(9)

    with Listener(address) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    threading.Thread(target=serve, args=(listener.accept(),), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield file


def _run(script: str, argv: list[str], files: Mapping[str, Any], environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # worker processes use the default of the platform
    os.chdir(files["folder"])
    os.environ.clear()
    os.environ.update(environment)
    if "coverage" in sys.modules:  # ./run mutate; other programs do not need this package
        import coverage
        import mutate

        if measured := coverage.Coverage.current():
            measured.switch_context(os.environ.get(mutate.TEST, ""))
    for number, name in enumerate(("output", "errors"), start=1):
        os.dup2(os.open(files[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv, sys.executable = [script, *argv], files["python"]
    exec(compile(Path(script).read_text(), script, "exec"), {"__name__": "__main__", "__file__": script})
