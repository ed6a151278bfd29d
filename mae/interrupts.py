"""Signals that stop a run. The process records them, and the training loop stops after the current update.

A terminal, `timeout`, torchrun and Slurm send them to all processes of a run, including its worker processes. Worker
processes ignore them; the process that started them terminates them.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)

# Sent before SIGKILL: SIGTERM by Slurm and torchrun, SIGINT by a keyboard, SIGHUP by a terminal that is closed, SIGUSR1
# and SIGUSR2 by schedulers.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


class Interrupted(Exception):
    """A signal stopped the run.

    Args:
        signum: number of the signal. The exit code is 128 + signum, as in a shell.
        is_saved: the state of the run is saved.
    """

    def __init__(self, signum: int, is_saved: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (", the state is saved" if is_saved else ""))
        self.signum = signum


class Interrupts:
    """Context manager that records signals. A second SIGINT raises KeyboardInterrupt.

    SIGHUP remains ignored under nohup.

    Args:
        saves: the run saves its state when it stops, which a warning says.
    """

    def __init__(self, saves: bool = True) -> None:
        self.saves = saves
        self.pending: int | None = None  # the recorded signal
        self.earlier: dict[int, Any] = {}
        self.raises = False

    def __enter__(self) -> "Interrupts":
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.earlier = {signum: signal.signal(signum, self._record) for signum in SIGNALS if signum not in nohup}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Context manager of code that does not change the state of the run, such as an evaluation.

        Raises:
            Interrupted: at a signal in the block, or if a signal is pending.
        """
        self.raises = True
        try:
            if self.pending:
                raise Interrupted(self.pending, self.saves)
            yield
        finally:
            self.raises = False

    def _record(self, signum: int, frame: object) -> None:
        if signum == signal.SIGINT and self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is None and self.saves:
            when = "now" if self.raises else "after this update"
            logger.warning(
                f"{signal.Signals(signum).name}: the run stops {when} and saves its state"
                + ("; a second one stops it at once" if signum == signal.SIGINT else ""),
                extra={"every_rank": True},
            )
        self.pending = signum
        if self.raises:
            self.raises = False  # not during the handling of the error
            raise Interrupted(signum, self.saves)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Context manager, or decorator, of code in which a signal raises `Interrupted` at once."""
    with Interrupts(saves=False) as interrupts, interrupts.at_once():
        yield


@contextlib.contextmanager
def command(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Context manager of a process that does not outlive the block; without an exception, the block waits for its end.

    The process has a process group of its own, so that a signal of a terminal reaches this process only. An exception,
    such as `Interrupted`, ends the group by SIGTERM. torchrun passes this signal on to its ranks, but not SIGUSR1. On
    Linux, the process also gets SIGTERM after SIGKILL of this process.

    Args:
        options: of `subprocess.Popen`.
    """
    with_parent = None
    if sys.platform == "linux":
        with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)
    with subprocess.Popen(words, text=True, process_group=0, preexec_fn=with_parent, **options) as process:
        try:
            yield process
            process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Blocks the signals: processes and threads started in the block inherit this; pending signals arrive after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_from_others(run_pid: int, *_: object) -> None:
    """Ignores the signals in a worker process, except SIGTERM from its run, which `multiprocessing` sends to end it.

    Args:
        run_pid: process ID of the run. The parent may be another process, a fork server.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != run_pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
