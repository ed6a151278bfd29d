"""The log of a run: a progress bar or lines, log.txt and TensorBoard. Only rank 0 writes it."""

import logging
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mae import parallel
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.checkpoints.run_directory import BEST, milestone
from mae.encoders import user_code_of
from mae.files import atomic, results
from mae.files.untrusted import printable
from mae.plurals import counted
from mae.settings import DataSpec, EvaluationSpec, ModelSpec
from mae.settings.arguments import arguments
from mae.training import costs, environment
from mae.training.gate import KNN
from mae.training.meters import Stopwatch
from mae.user_code import runs_code

logger = logging.getLogger(__name__)

# Entries of log.txt that the log itself adds.
LINES = "log.txt"  # in the directory of a run
OF_EPOCH = ("epoch", "seconds", "images_per_s", "data_wait", "tflops", "mfu", "peak_memory_gb")
UNLABELLED = {"data_path": "LABELLED"}  # in commands, in place of images without labels
MAX_LOADING = 0.05  # of the time; more slows the run down
SECONDS_BETWEEN_LINES = 10.0
SHORT = 1.0  # seconds of epochs that share a line
SECONDS_BETWEEN_WARNINGS = 60.0  # about files that can't be written


class LineHandler(logging.StreamHandler):
    """Writes above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            text = "\n".join(printable(line) for line in self.format(record).split("\n"))
            tqdm.write(prefix + text, file=sys.stdout)
        except Exception:  # a failing log, for example a closed pipe, must not end a run
            self.handleError(record)


def _print_thread_error(error: threading.ExceptHookArgs) -> None:
    """Prints a traceback, except for the thread of TensorBoard: `log_writers.Events` logs its error in one line."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(error)


def start_logging() -> None:
    """Starts logging to stdout, on rank 0 from level INFO.

    The other ranks log errors, and warnings with `extra={"every_rank": True}`, with their rank as a prefix.
    """
    handler = LineHandler()
    handler.addFilter(
        lambda record: parallel.is_main() or record.levelno > logging.WARNING or hasattr(record, "every_rank")
    )
    logging.basicConfig(
        level=logging.INFO if parallel.is_main() else logging.WARNING,
        format="%(message)s" if parallel.is_main() else f"[rank {parallel.rank()}] %(message)s",
        handlers=[handler],
        force=True,
    )
    logging.captureWarnings(True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs that it caches fonts
    threading.excepthook = _print_thread_error


class NullLog:
    """The log of processes other than rank 0, which logs nothing."""

    def begin_epoch(
        self, epoch: int, first_iteration: int, num_iterations: int, images_per_iteration: int, watch: Stopwatch
    ) -> None:
        """Starts an epoch, at one of its iterations."""

    def update(
        self, iterations: int, lr: float, loss: float, grad_norm: float, terms: Mapping[str, float] | None = None
    ) -> None:
        """Logs the numbers of an update. They reach the host some updates later.

        Args:
            iterations: number of iterations of the epoch, up to the end of the update.
            terms: terms of the loss by name; TensorBoard and log.txt have them as train_NAME.
        """

    def end_epoch(self, stats: dict[str, Any]) -> None:
        """Adds the entries of an epoch to log.txt."""

    def picture(self, tag: str, picture: np.ndarray, epoch: int) -> None:
        """Adds a uint8 image (H, W, c) to TensorBoard."""

    def flush(self) -> None:
        """Writes buffered data, before a state is saved whose updates are not logged again."""

    def close(self) -> None:
        """Writes buffered data for the last time."""


class RunLog(NullLog):
    """The log of rank 0.

    Args:
        output_dir: folder of log.txt, which has one JSON object per epoch. Undefined values are null.
        log_dir: folder of the files of TensorBoard.
        epochs: number of epochs of the run, for the remaining time.
        first_epoch: first epoch that this run logs. Earlier entries of this and later epochs are removed.
        first_x: the same for TensorBoard, in thousandths of an epoch.
        loss_tag: name of the loss in TensorBoard.
        measure_costs: returns further entries of log.txt for a throughput, as `costs.of_epoch`.
        remedies: returns flags and commands that make data loading faster. The log names them after the first epoch if
            the device waits for more than MAX_LOADING of the time.

    Raises:
        OSError: log.txt can't be written when the log is closed, or the files of TensorBoard when it is opened. In
            between, the lines of log.txt stay in memory.
    """

    def __init__(
        self,
        output_dir: Path,
        log_dir: Path,
        epochs: int,
        first_epoch: int = 0,
        first_x: int = 0,
        loss_tag: str = "train_loss",
        measure_costs: Callable[[float], dict[str, float]] = lambda images_per_s: {},
        remedies: Callable[[], list[str]] = list,
    ) -> None:
        self.epochs = epochs
        self.first_epoch = first_epoch
        self.measure_costs = measure_costs
        self.remedies = remedies
        self.loss_tag = loss_tag
        path = output_dir / LINES
        _drop_lines_from(path, first_epoch)
        from mae.training import log_writers  # imports TensorBoard

        self.lines = log_writers.GrowingFile(path)
        self.events = log_writers.Events(log_dir, first_x)
        self.next_x = first_x
        self.next_warning = 0.0
        self.next_line = 0.0  # of an update, in seconds of the clock: the first update has one
        self.epoch_ended = 0.0  # in seconds of the clock
        self.seconds_between = 0.0  # of all epochs: their evaluations, and writes of checkpoints
        self.shared: list[float] = []  # seconds of the epochs since the last line about an epoch
        self.bar = tqdm(disable=True)

    def begin_epoch(
        self, epoch: int, first_iteration: int, num_iterations: int, images_per_iteration: int, watch: Stopwatch
    ) -> None:
        if self.epoch_ended:
            self.seconds_between += time.perf_counter() - self.epoch_ended
        self.epoch = epoch
        self.num_iterations = num_iterations
        self.images_per_iteration = images_per_iteration
        self.watch = watch
        self.bar = tqdm(
            total=num_iterations * images_per_iteration,
            initial=first_iteration * images_per_iteration,
            desc=f"epoch {epoch}/{self.epochs}",
            unit="img",
            unit_scale=True,
            leave=False,
            disable=None,  # unless stderr is a terminal
        )

    def update(
        self, iterations: int, lr: float, loss: float, grad_norm: float, terms: Mapping[str, float] | None = None
    ) -> None:
        x = x_of(self.epoch, iterations, self.num_iterations)
        if x >= self.next_x:  # long epochs have several updates at each x
            self.next_x = x + 1
            named_terms = {f"train_{name}": value for name, value in (terms or {}).items()}
            self.events.scalars({self.loss_tag: loss, "lr": lr, "grad_norm": grad_norm, **named_terms}, x)
        watch = self.watch
        epochs_left = self.epochs - self.epoch
        left = watch.seconds_per_iteration * (epochs_left * self.num_iterations - iterations)
        left += epochs_left * self.seconds_between / max(1, self.epoch - self.first_epoch)
        is_due = time.monotonic() >= self.next_line
        if is_due:
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self.flush()
        if not self.bar.disable:
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, lr {lr:.2e}, data loading {watch.loading_share:.0%}, run ends in {duration(left)}",
                False,
            )
            self.bar.update(iterations * self.images_per_iteration - self.bar.n)
        elif is_due:
            total = self.num_iterations
            rate = self.images_per_iteration / watch.seconds_per_iteration
            logger.info(
                f"epoch {self.epoch} [{iterations:>{len(str(total))}}/{total}]  loss {loss:.4f}  lr {lr:.2e}  "
                f"grad {grad_norm:.3g}  {rate:,.0f} images/s  "
                f"data loading {watch.loading_share:.0%}  left {duration(left)}"
            )

    def end_epoch(self, stats: dict[str, Any]) -> None:
        self.bar.close()
        watch = self.watch
        self.epoch_ended = watch.ended or time.perf_counter()
        rate = self.images_per_iteration / watch.seconds_per_iteration if watch.batches else 0.0
        scores = {f"perf/{name}": value for name, value in stats.items() if name.startswith("test_")}
        speed = {"images_per_s": round(rate, 1), "data_wait": round(watch.loading_share, 4), **self.measure_costs(rate)}
        self.events.scalars(scores | {f"perf/{name}": value for name, value in speed.items()}, x_of_epoch(self.epoch))
        line = stats | {"epoch": self.epoch, "seconds": round(watch.all_seconds, 3)} | speed
        self.lines.pending += (results.to_line(line) + "\n").encode()
        self.flush()
        self.shared.append(watch.all_seconds)
        if sum(self.shared) >= SHORT or self.epoch in (self.first_epoch, self.epochs - 1):
            self._log_epochs(stats, rate, speed)
        if self.epoch == self.first_epoch and watch.later_loading_share > MAX_LOADING and (found := self.remedies()):
            logger.info(f"data loading limits the throughput; faster with {' or '.join(found)} (docs/runs.md, Speed)")

    def _log_epochs(self, stats: dict[str, Any], rate: float, speed: dict[str, float]) -> None:
        """Logs the last epoch. It names the epochs since the last line, which were short."""
        first = self.epoch + 1 - len(self.shared)
        named = f"epoch {self.epoch}" if first == self.epoch else f"epochs {first} to {self.epoch}"
        seconds = sum(self.shared)
        self.shared = []
        loss = math.nan if stats["train_loss"] is None else stats["train_loss"]
        share = f"{stats['train_explained']:.1%} explained, " if "train_explained" in stats else ""
        logger.info(
            f"{named} done in {duration(seconds)}: loss {loss:.4f}, {share}"
            f"{rate:,.0f} images/s, data loading {self.watch.loading_share:.0%}{costs.describe(speed)}"
        )

    def picture(self, tag: str, picture: np.ndarray, epoch: int) -> None:
        self.events.write(lambda writer: writer.add_image(tag, picture, x_of_epoch(epoch), dataformats="HWC"))
        self.flush()

    def close(self) -> None:
        self.bar.close()
        self.events.write(lambda writer: writer.close())
        self.lines.close()

    def flush(self) -> None:  # if it fails, the run continues
        self.events.write(lambda writer: writer.flush())
        try:
            self.lines.flush()
        except OSError as error:
            if time.monotonic() >= self.next_warning:
                self.next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
                logger.warning(f"{error}. The run continues and tries again later.")


def labelled_images(images: Mapping[str, Any], probe_path: str | None, has_labels: bool) -> Mapping[str, Any]:
    """Returns the labelled images of the commands after a pre-training, as settings by name.

    Args:
        images: the training images.
        probe_path: the setting.
        has_labels: the training images have labels.
    """
    if probe_path:
        return {"data_path": probe_path}
    return images if has_labels else UNLABELLED


def finetune_command(images: Mapping[str, Any], file: str, encoder: Mapping[str, Any]) -> list[str]:
    """Returns the command that writes a recipe of fine-tuning beside a run directory; it prints the one that trains.

    Args:
        images: from `labelled_images`.
        file: a checkpoint in the run directory.
        encoder: settings of an encoder of the user's code.
    """
    recipe = {"recipe": f"{Path(file).parent}_tuned.yaml", "for": "finetune", "finetune": file}
    return ["python", "-m", "mae.data", *arguments({**images, **recipe, **encoder})]


def log_commands(
    output_dir: str, epochs: int, data: DataSpec, model: ModelSpec, evaluation: EvaluationSpec, has_labels: bool,
    has_best: bool = False,
) -> None:  # fmt: skip
    """Logs what to do after a run of `main_pretrain.py`: the commands of a fine-tuning, and of a page about the run.

    The commands name the user's code, because no file makes a command import code.

    Args:
        has_labels: the training images have labels.
        has_best: the run has selected its best state, which may be its start.
        output_dir, epochs, data, model, evaluation: the settings.

    Raises:
        CheckpointError: the last state can't be read back.
    """
    if not parallel.is_main():  # rank 0 may still be writing the files
        return
    code = user_code_of({"encoder": model.encoder, "encoder_args": model.encoder_args})
    last = Path(output_dir, milestone(epochs - 1))
    if last.exists():  # that of a sharded run is a folder
        file = _read_back(last, has_best)
        images = {"data_path": data.data_path, "dataset": data.dataset, "train_list": data.train_list}
        labelled = labelled_images(images, evaluation.probe_path, has_labels)
        logger.info(f"fine-tune: {shlex.join(finetune_command(labelled, str(file), code))}")
        if labelled is UNLABELLED:
            logger.info(f"{labelled['data_path']} is a folder of images in train/CLASS and val/CLASS")
    log_report_command(output_dir, data, model)
    # It is absent if the disk was full.
    if Path(output_dir, LINES).exists() and (entries := read(Path(output_dir))):
        logger.info(summary_of(entries, len(environment.read(Path(output_dir)))))


def _read_back(last: Path, has_best: bool) -> Path:
    """Returns the best state of a run, or the last one, which was read.

    A warning says what to do if the file of the best state can't be read: a run that has resumed in another directory
    has none.
    """
    if not has_best:
        checkpoint.read(last)
        return last
    best = last.with_name(BEST)
    try:
        checkpoint.read(best)
        return best
    except CheckpointError as error:
        reason = str(error)
    state = checkpoint.read(last)
    epoch = state["progress"]["selection"]["epoch"]
    others = f"the state after epoch {epoch}" if epoch >= 0 else f"the start, init_from={state['args']['init_from']}"
    logger.warning(f"the best state can't be read ({reason}): use {others} instead, or the last one, {last}")
    return last


def summary_of(entries: Sequence[Mapping[str, Any]], starts: int) -> str:
    """Returns a sentence about all epochs of a run of `main_pretrain.py`: time, starts, loss, and the highest k-NN.

    Args:
        entries: those of log.txt.
        starts: number of starts of the run.
    """
    last = entries[-1]
    seconds = sum(entry["seconds"] for entry in entries)
    parts = [f"{counted(len(entries), 'epoch')} in {duration(seconds)} of training"]
    if starts > 1:
        parts.append(f"resumed ({starts} starts)")
    parts.append(f"loss {last['train_loss']:.4f}")
    if "train_explained" in last:
        parts.append(f"{last['train_explained']:.1%} explained")
    if measured := [entry for entry in entries if KNN in entry]:
        now = measured[-1]
        highest = max(measured, key=lambda entry: entry[KNN])
        pixels = f" (raw pixels {now['test_knn_pixels']:.1f} %)" if "test_knn_pixels" in now else ""
        parts.append(f"k-NN {now[KNN]:.1f} %{pixels}")
        parts.append(f"highest {highest[KNN]:.1f} % after epoch {highest['epoch']}")
    return ", ".join(parts)


def log_report_command(output_dir: str, data: DataSpec, model: ModelSpec) -> None:
    """Logs the command of a page about a run, which names the user's code. The arguments are settings."""
    code = user_code_of({"encoder": model.encoder, "encoder_args": model.encoder_args})
    if data.dataset and runs_code(data.dataset):
        code["dataset"] = data.dataset
    command = ["python", "-m", "mae.inference.report", output_dir, *arguments(code)]
    logger.info(f"report: {shlex.join(command)}")


def x_of(epoch: int, iterations: int, num_iterations: int) -> int:
    """Returns the x of an update in TensorBoard: thousandths of an epoch, the axis of the published code.

    Args:
        iterations: number of iterations of the epoch, up to the end of the update.
        num_iterations: number of iterations of a complete epoch.
    """
    return math.floor(1000 * (epoch + (iterations - 1) / num_iterations))


def x_of_epoch(epoch: int) -> int:
    """Returns the x of the results of an epoch in TensorBoard: the last of the epoch.

    TensorBoard hides events from one x on, so a run that resumes within the epoch hides earlier results of it.
    """
    return 1000 * epoch + 999


def next_x(epoch: int, iterations: int, num_iterations: int) -> int:
    """Returns the x from which a run logs in TensorBoard if it resumes after a number of iterations of an epoch."""
    last, first = (x_of(epoch, number, num_iterations) for number in (iterations, iterations + 1))
    return min(max(last + 1, first), x_of_epoch(epoch))


def read(output_dir: Path) -> list[dict[str, Any]]:
    """Returns the entries of log.txt, one per completed epoch. Undefined values, which are null, become NaN."""
    return [
        {name: math.nan if value is None else value for name, value in entries.items()}
        for entries in results.read_lines(output_dir / LINES)
    ]


def _drop_lines_from(path: Path, first_epoch: int) -> None:
    """Removes the lines of `first_epoch` and later epochs, which a resumed run writes again, and damaged ones.

    Raises:
        ValueError: the file is not text. It may be another one, so it is not replaced.
    """
    if not path.exists():
        return
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text, so the run can't add to it: rename it") from error
    kept = [entries for entries in results.read_lines(path) if entries.get("epoch", first_epoch) < first_epoch]
    atomic.write_text(path, "".join(f"{results.to_line(entries)}\n" for entries in kept))


def duration(seconds: float) -> str:
    """Returns a time as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
