"""What a run logs: the header, a progress bar or lines, log.txt and TensorBoard. Off rank 0 it is a `NullLog`."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from util import dist
from util.files import atomic
from util.files.untrusted import printable
from util.training import log_files

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_WARNINGS = 60.0  # of files that can't be written


class _LineHandler(logging.StreamHandler):
    """Writes above a progress bar that is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            text = "\n".join(printable(line) for line in self.format(record).split("\n"))
            tqdm.write(prefix + text, file=sys.stdout)
        except Exception:  # a log that can't be written, to a closed pipe say, must not end a run
            self.handleError(record)


def start_logging() -> None:
    """Rank 0 logs everything from INFO on, to stdout.

    Most of it holds for all processes alike. So the others log only errors, and warnings about themselves alone, which
    have `extra={"every_rank": True}`; with their rank.
    """
    handler = _LineHandler()
    handler.addFilter(
        lambda record: dist.is_main() or record.levelno > logging.WARNING or hasattr(record, "every_rank")
    )
    logging.basicConfig(
        level=logging.INFO if dist.is_main() else logging.WARNING,
        format="%(message)s" if dist.is_main() else f"[rank {dist.rank()}] %(message)s",
        handlers=[handler],
        force=True,
    )
    logging.captureWarnings(True)


@dataclass
class Meters:
    """Sums over the updates of an epoch; plain numbers, so that a checkpoint in the middle of an epoch holds them.

    Every update takes the same number of images, however they are split into batches and processes.
    """

    loss: float = 0.0
    lr: float = 0.0
    updates: int = 0
    skipped_steps: int = 0

    def add(self, loss: float, grad_norm: float, lr: float) -> None:
        """Counts an update; one that was not finite changed nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped_steps += 1
            return
        self.loss += loss
        self.lr += lr
        self.updates += 1

    def means(self) -> dict[str, float | None]:
        """The epoch's entries in log.txt; None where no update counted."""
        count = self.updates
        stats = {"train_lr": self.lr / count if count else None, "train_loss": self.loss / count if count else None}
        return stats | ({"skipped_steps": self.skipped_steps} if self.skipped_steps else {})

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `Meters(**state)` is the way back."""
        return asdict(self)


class Stopwatch:
    """How the loop's time divides between waiting for data and the rest."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ended: float | None = None
        self.waited = 0.0
        self.batches = 0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes batches on and adds up the time until each of them came."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch
            self.batches += 1

    def stop(self) -> None:
        """The epoch's last batch is done."""
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last batch's end, or to now."""
        return (self.ended or time.perf_counter()) - self.started

    @property
    def seconds_per_iteration(self) -> float:
        """Mean time of a batch, waiting included."""
        return self.seconds / max(1, self.batches)

    @property
    def wait_share(self) -> float:
        """Part of the time, 0 to 1, in which the loop had nothing to compute."""
        return self.waited / max(self.seconds, 1e-9)


class NullLog:
    """Tells nothing: what processes other than rank 0 have."""

    def begin_epoch(
        self, epoch: int, first_iteration: int, num_iterations: int, images_per_iteration: int, watch: Stopwatch
    ) -> None:
        """The loop starts an epoch, at one of its iterations."""

    def update(self, iterations: int, lr: float, loss: float, grad_norm: float) -> None:
        """The numbers of an update, some updates later, when they have reached the host.

        Args:
            iterations: of the epoch, up to the end of the update.
        """

    def end_epoch(self, stats: dict[str, Any]) -> None:
        """The epoch's entries for log.txt."""

    def picture(self, tag: str, picture: np.ndarray, epoch: int) -> None:
        """A uint8 picture (H, W, c) for TensorBoard."""

    def close(self) -> None:
        """Writes out what is still buffered."""


class RunLog(NullLog):
    """Tells everything, once: what rank 0 has.

    Args:
        output_dir: where log.txt grows, a JSON object an epoch.
        log_dir: where TensorBoard's files go.
        epochs: of the whole run, for the time left.
        first_epoch: lines from this epoch on, left by a run that was stopped, are dropped.
        first_x: the same for TensorBoard's scalars, in thousandths of an epoch.
        loss_tag: the loss's name in TensorBoard.

    Raises:
        OSError: log.txt or TensorBoard's files can't be written, at the start or when the log is closed. In between,
            the log keeps what it could not write, and tries again.
    """

    def __init__(
        self,
        output_dir: Path,
        log_dir: Path,
        epochs: int,
        first_epoch: int = 0,
        first_x: int = 0,
        loss_tag: str = "train_loss",
    ) -> None:
        self.epochs = epochs
        self.loss_tag = loss_tag
        path, run_name = output_dir / "log.txt", output_dir.resolve().name
        _drop_lines_from(path, first_epoch)
        log_files.drop_events(log_dir, run_name, (loss_tag, "lr", "grad_norm"), first_x, first_epoch)
        self.lines = log_files.GrowingFile(path)
        self.events = log_files.EventFile(log_dir, run_name, first_x)
        self.next_warning = 0.0
        self.bar: tqdm | None = None

    def begin_epoch(
        self, epoch: int, first_iteration: int, num_iterations: int, images_per_iteration: int, watch: Stopwatch
    ) -> None:
        self.epoch, self.num_iterations = epoch, num_iterations
        self.images_per_iteration, self.watch = images_per_iteration, watch
        self.last_line = -SECONDS_BETWEEN_LINES  # so that the first update is logged
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=num_iterations * images_per_iteration,
                initial=first_iteration * images_per_iteration,
                desc=f"epoch {epoch}/{self.epochs}",
                unit="img",
                unit_scale=True,
                leave=False,
            )

    def update(self, iterations: int, lr: float, loss: float, grad_norm: float) -> None:
        # Thousandths of an epoch, the axis of the published code.
        x = int(1000 * (self.epoch + (iterations - 1) / self.num_iterations))
        self.events.scalar(self.loss_tag, loss, x)
        self.events.scalar("lr", lr, x)
        self.events.scalar("grad_norm", grad_norm, x)
        watch = self.watch
        left = watch.seconds_per_iteration * ((self.epochs - self.epoch) * self.num_iterations - iterations)
        is_due = watch.seconds - self.last_line >= SECONDS_BETWEEN_LINES
        if is_due:
            self.last_line = watch.seconds
            self._flush()
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, lr {lr:.2e}, data wait {watch.wait_share:.0%}, run ends in {_duration(left)}", False
            )
            self.bar.update(iterations * self.images_per_iteration - self.bar.n)
        elif is_due:
            total, rate = self.num_iterations, self.images_per_iteration / watch.seconds_per_iteration
            logger.info(
                f"epoch {self.epoch} [{iterations:>{len(str(total))}}/{total}]  loss {loss:.4f}  lr {lr:.2e}  "
                f"grad {grad_norm:.3g}  {rate:,.0f} images/s  "
                f"data wait {watch.wait_share:.0%}  left {_duration(left)}"
            )

    def end_epoch(self, stats: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        watch = self.watch
        rate = self.images_per_iteration / watch.seconds_per_iteration if watch.batches else 0.0
        for name, value in stats.items():
            if name.startswith("test_"):
                self.events.scalar(f"perf/{name}", value, self.epoch)
        self.events.scalar("perf/images_per_s", rate, self.epoch)
        self.events.scalar("perf/data_wait", watch.wait_share, self.epoch)
        line = stats | {
            "epoch": self.epoch,
            "seconds": round(watch.seconds, 3),
            "images_per_s": round(rate, 1),
            "data_wait": round(watch.wait_share, 4),
        }
        self.lines.add((json.dumps(line) + "\n").encode())
        self._flush()
        loss = math.nan if stats["train_loss"] is None else stats["train_loss"]
        logger.info(
            f"epoch {self.epoch} done in {_duration(watch.seconds)}: loss {loss:.4f}, "
            f"{rate:,.0f} images/s, data wait {watch.wait_share:.0%}"
        )

    def picture(self, tag: str, picture: np.ndarray, epoch: int) -> None:
        self.events.picture(tag, picture, epoch)
        self._flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.events.close()
        self.lines.close()

    def _flush(self) -> None:
        """Writes what is pending; if that fails, the run continues."""
        try:
            self.lines.flush()
            self.events.flush()
        except OSError as error:
            if time.monotonic() >= self.next_warning:
                self.next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
                logger.warning(f"{error}. The run continues, and writes it later.")


def open_log(output_dir: Path, log_dir: Path, epochs: int, **options: Any) -> NullLog:
    """The log of this process: a `RunLog` on rank 0, a `NullLog` elsewhere."""
    return RunLog(output_dir, log_dir, epochs, **options) if dist.is_main() else NullLog()


def _drop_lines_from(path: Path, first_epoch: int) -> None:
    """Keeps the lines of epochs before `first_epoch`: a resumed run writes the others again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["epoch"] < first_epoch:
                kept.append(line)
        except (ValueError, KeyError):  # a line that a crash cut off
            continue
    atomic.write_text(path, "".join(kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
