"""Signals that ask a run to stop. The process notes them, and the loop stops after the current update.

A terminal, `timeout`, torchrun and Slurm send them to all processes of a run, its worker processes included. Those
ignore them: the process that started them decides when they end.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# What launchers and people send before they kill: Slurm and torchrun SIGTERM, a keyboard SIGINT, schedulers SIGUSR1/2.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A signal ended the run, and its state is saved.

    Args:
        signum: of the signal; the exit code is 128 + signum, as shells count.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupts:
    """Notes signals while it is open (`with`); a second SIGINT stops at once, by KeyboardInterrupt."""

    def __init__(self) -> None:
        self.pending: int | None = None  # the signal that came, if one did
        self.earlier: dict[int, Any] = {}
        self.raises = False

    def __enter__(self) -> "Interrupts":
        self.earlier = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around code that changes nothing of the run's state, such as an evaluation: a signal ends it immediately.

        Raises:
            Interrupted: a signal came, now or before.
        """
        self.raises = True
        try:
            if self.pending:
                raise Interrupted(self.pending)
            yield
        finally:
            self.raises = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is None:
            when = "now" if self.raises else "after this update"
            logger.warning(
                f"{signal.Signals(signum).name}: the run stops {when} and saves its state"
                + ("; a second one stops it at once" if signum == signal.SIGINT else ""),
                extra={"every_rank": True},
            )
        self.pending = signum
        if self.raises:
            self.raises = False  # the error travels upwards undisturbed
            raise Interrupted(signum)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes and threads that are started inside never receive the signals; this process does so afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_from_others(run: int, *_: object) -> None:
    """In a worker process: the signals are ignored, but for SIGTERM of its run, by which `multiprocessing` ends it.

    Args:
        run: the run's process. It need not be the parent: a fork server may be.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
