"""What an epoch measures: sums over its updates, and its time."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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


class Stopwatch:
    """Measures the time of the training loop, and the time of data loading in it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ended: float | None = None
        self.loading_seconds = 0.0
        self.batches = 0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches, and sums the time until each is available."""
        begin = time.perf_counter()
        for batch in batches:
            self.loading_seconds += time.perf_counter() - begin
            yield batch
            self.batches += 1
            begin = time.perf_counter()

    def stop(self) -> None:
        """Ends the measurement, after the last batch."""
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end, or until now."""
        return (self.ended or time.perf_counter()) - self.started

    @property
    def seconds_per_iteration(self) -> float:
        """Mean seconds per iteration, including data loading."""
        return self.seconds / max(1, self.batches)

    @property
    def loading_share(self) -> float:
        """Data-loading time as a fraction of the time, 0 to 1."""
        return self.loading_seconds / max(self.seconds, 1e-9)
