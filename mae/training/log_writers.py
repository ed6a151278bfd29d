"""Files that grow during a run: log.txt and the events of TensorBoard."""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from mae.files import atomic

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # after events could not be written


class GrowingFile:
    """Appends data to a file. Data that can't be written stays in memory until `flush` succeeds.

    Attributes:
        pending: the data for the next `flush`, to which callers append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size if path.exists() else 0
        self.pending = bytearray()

    def flush(self) -> None:
        """Writes the pending data.

        Raises:
            OSError: the disk is full, or the folder can't be written to.
        """
        if not self.pending:
            return
        try:
            with self.path.open("ab") as file:
                self.size = min(self.size, file.tell())
                file.truncate(self.size)  # removes the part that an earlier attempt wrote
                file.write(self.pending)
        except OSError as error:
            raise OSError(f"can't write {self.path} ({error.strerror})") from error
        self.size += len(self.pending)
        self.pending.clear()

    def close(self) -> None:
        """Writes the pending data for the last time.

        Raises:
            OSError: the data can't be written. The message names the file that contains the data instead, if any.
        """
        try:
            self.flush()
        except OSError as error:
            try:
                copy = Path(tempfile.mkdtemp(prefix="mae-")) / self.path.name
                copy.write_bytes(self.pending)
            except OSError:
                raise error from None
            raise OSError(f"{error}; the last {len(self.pending):,} bytes are in {copy}") from error


class Events:
    """The events of a run for TensorBoard. Events that can't be written are lost, and a warning is logged.

    Args:
        log_dir: folder of the files; each start of the run has its own.
        first_x: TensorBoard hides the events of earlier starts of the run from this x on.

    Raises:
        OSError: the folder can't be written to.
    """

    def __init__(self, log_dir: Path, first_x: int) -> None:
        self.log_dir = log_dir
        self.next_try = 0.0
        self.writer: SummaryWriter | None = self._open(first_x)

    def scalars(self, values: Mapping[str, float], x: int) -> None:
        """Adds numbers by tag, as one event: a fifth of the time of `add_scalar` for each."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()])
        self.write(lambda writer: writer.file_writer.add_summary(summary, x))  # type: ignore[attr-defined]

    def write(self, write: Callable[[SummaryWriter], None]) -> None:
        """Calls a function with the writer; with a new one a minute after an event could not be written."""
        if self.writer is None and time.monotonic() < self.next_try:
            return
        try:
            self.writer = self.writer or self._open()
            with atomic.writing(self.log_dir):
                write(self.writer)
        except OSError as error:
            # the thread that writes has ended
            self.writer = None
            self.next_try = time.monotonic() + RETRY_SECONDS
            logger.warning(f"{error}. The run continues, and the events of TensorBoard are lost until then.")

    def _open(self, first_x: int | None = None) -> SummaryWriter:
        with atomic.writing(self.log_dir):  # the queue is long, because a network file system may be slow
            return SummaryWriter(str(self.log_dir), purge_step=first_x, max_queue=1000)
