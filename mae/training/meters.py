"""What an epoch measures: sums over its updates, and its time."""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

HOST = torch.device("cpu")


@dataclass
class Meters:
    """Sums over the updates of an epoch, as plain numbers for checkpoints.

    All updates have the same number of images, so that the means do not depend on the batch size and the number of
    processes.
    """

    loss: float = 0.0
    lr: float = 0.0
    updates: int = 0
    skipped_steps: int = 0
    terms: dict[str, float] = field(default_factory=dict)  # of the loss, by name
    seconds: float = 0.0  # of the epoch, in all starts of the run

    def add(self, loss: float, grad_norm: float, lr: float, terms: Mapping[str, float] | None = None) -> None:
        """Adds an update. An update that is not finite counts as skipped."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped_steps += 1
            return
        self.loss += loss
        self.lr += lr
        self.updates += 1
        self.terms |= {name: self.terms.get(name, 0.0) + value for name, value in (terms or {}).items()}

    def means(self) -> dict[str, float | None]:
        """Returns the entries of an epoch in log.txt; None without updates."""
        count = self.updates
        sums = {"lr": self.lr, "loss": self.loss, **self.terms}
        stats = {f"train_{name}": value / count if count else None for name, value in sums.items()}
        return stats | ({"skipped_steps": self.skipped_steps} if self.skipped_steps else {})

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint; `Meters(**state)` restores them."""
        return asdict(self)


class HostEvent:
    """The clock of the host, with the interface of `torch.cuda.Event`."""

    def record(self) -> None:
        """Records the time."""
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        """Returns True: the host has passed the event."""
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        """Returns the milliseconds from this event to a later one."""
        return 1000 * (end.seconds - self.seconds)


class Stopwatch:
    """Measures the time of the training loop, and the time in which the device waits for batches.

    On CUDA, timing events in the stream of the computation measure the wait, from the end of an iteration to the start
    of the next one. The host runs ahead of the GPU, so its own wait for a batch does not show that the GPU is idle. On
    other devices, the clock of the host measures it.

    Args:
        earlier: seconds of the same epoch before the run was resumed.
    """

    def __init__(self, device: torch.device = HOST, earlier: float = 0.0) -> None:
        self.earlier = earlier
        self.new_event = partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else HostEvent
        self.waits: deque[tuple[Any, Any]] = deque()  # start and end of each wait that the device has not passed
        self.started = time.perf_counter()
        self.ended: float | None = None
        self.loading_seconds = 0.0
        self.first_wait = 0.0  # for the first batch, and for the start of the worker processes
        self.batches = 0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches on the device, and measures the time until the device can start with each."""
        start = self._event()
        for batch in batches:
            self.waits.append((start, self._event()))
            self._add_waits()
            yield batch
            self.batches += 1
            start = self._event()

    def stop(self) -> None:
        """Ends the measurement, after the device has completed the last batch."""
        self.ended = time.perf_counter()
        self._add_waits()

    def _event(self) -> Any:
        event = self.new_event()
        event.record()
        return event

    def _add_waits(self) -> None:
        """Adds the waits that the device has passed. The host does not wait for others."""
        while self.waits and self.waits[0][1].query():
            start, end = self.waits.popleft()
            wait = start.elapsed_time(end) / 1000
            self.loading_seconds += wait
            self.first_wait = self.first_wait or wait

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end, or until now."""
        return (self.ended or time.perf_counter()) - self.started

    @property
    def all_seconds(self) -> float:
        """The same with the seconds before the run was resumed."""
        return self.earlier + self.seconds

    @property
    def seconds_per_iteration(self) -> float:
        """Mean seconds per iteration, including data loading."""
        return self.seconds / max(1, self.batches)

    @property
    def loading_share(self) -> float:
        """The time in which the device waits for batches, as a fraction of the time, 0 to 1."""
        return self.loading_seconds / max(self.seconds, 1e-9)

    @property
    def later_loading_share(self) -> float:
        """The same after the first batch."""
        return (self.loading_seconds - self.first_wait) / max(self.seconds - self.first_wait, 1e-9)
