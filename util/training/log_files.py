"""Files that grow during a run: log.txt and the events of TensorBoard. Data that can't be written is written later."""

import glob
import hashlib
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from util.files import atomic


class GrowingFile:
    """Appends data to a file. Data that can't be written stays in memory until `flush` succeeds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size if path.exists() else 0
        self.pending = bytearray()

    def add(self, data: bytes) -> None:
        """Adds data for the next `flush`."""
        self.pending += data

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
                place = Path(tempfile.mkdtemp(prefix="mae-")) / self.path.name
                place.write_bytes(self.pending)
            except OSError:
                raise error from None
            raise OSError(f"{error}; the last {len(self.pending):,} bytes are in {place}") from error


class EventFile(GrowingFile):
    """The events of a run for TensorBoard, from one start of the run.

    Args:
        log_dir: folder of the file.
        run_name: the end of the file name, of `name_of_run`.
        first_step: TensorBoard ignores events of earlier starts of the run from this step on.
    """

    def __init__(self, log_dir: Path, run_name: str, first_step: int) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(
            log_dir / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{run_name}"
        )
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers by tag."""
        for tag, value in values.items():
            self._add(Event(wall_time=time.time(), step=step, summary=summary.scalar(tag, value)))

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Adds a uint8 image (H, W, c)."""
        self._add(Event(wall_time=time.time(), step=step, summary=summary.image(tag, picture, dataformats="HWC")))

    def _add(self, event: Event) -> None:
        self.add(_framed(event.SerializeToString()))


def name_of_run(output_dir: Path, log_dir: Path) -> str:
    """Returns a name that differs between the runs that share a `log_dir`, and remains when both folders are moved."""
    place = os.path.relpath(output_dir.resolve(), log_dir.resolve())
    return f"{output_dir.resolve().name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def drop_events(
    log_dir: Path, run_name: str, by_step: Collection[str], first_step: int, first_epoch: int, at_first_step: int = 0
) -> None:
    """Removes the events that a resumed run logs again.

    Args:
        by_step: tags to remove from `first_step` on; the other tags count epochs and are removed from `first_epoch`.
        at_first_step: number of events of each tag at `first_step` that remain, the earliest ones.
    """
    earlier = Counter[str]()  # events at `first_step` by tag
    for path in sorted(log_dir.glob(f"events.out.tfevents.*.{glob.escape(run_name)}")):  # by time
        records = list(RawEventFileLoader(str(path)).Load())
        remaining = []
        for record in records:
            event = Event.FromString(record)
            tags = {value.tag for value in event.summary.value}
            is_by_step = tags <= set(by_step)
            at_first = bool(tags) and is_by_step and event.step == first_step
            earlier.update(tags if at_first else ())
            is_earlier = at_first and earlier[min(tags)] <= at_first_step
            if not tags or is_earlier or event.step < (first_step if is_by_step else first_epoch):
                remaining.append(record)
        if len(remaining) < len(records):
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(b"".join(map(_framed, remaining)))


def _framed(record: bytes) -> bytes:
    """Returns a record with its length and checksums, in the format of TensorFlow."""
    file = BytesIO()
    RecordWriter(file).write(record)
    return file.getvalue()
