"""Signals that ask a run to stop: noted when they come, acted upon between two steps."""

import logging
import signal
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

    def __enter__(self) -> "Interrupts":
        self.earlier = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is None:
            logger.warning(
                f"{signal.Signals(signum).name}: the run stops after this step and saves its state"
                + ("; once more stops it at once" if signum == signal.SIGINT else "")
            )
        self.pending = signum
