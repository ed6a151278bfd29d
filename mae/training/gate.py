"""The best state of a run that starts from a file: it is never worse than the start."""

import logging
import math
from typing import Any, Protocol

import torch

from mae.checkpoints.run_state import Progress

logger = logging.getLogger(__name__)

KNN = "test_knn_acc1"  # the entry of log.txt
FEW = 200  # held-out images: with fewer, differences have large standard errors


class Probe(Protocol):
    """What a gate uses of an `online_probe.OnlineProbe`."""

    is_labelled: bool
    identity: str  # of the held-out images and their labels
    hits: torch.Tensor  # whether each held-out image is classified correctly (n,), after `scores`

    def scores(self, model: Any) -> dict[str, float]:
        """Returns entries of log.txt."""


class Gate:
    """Selects the best state by k-NN on the held-out images of `probe_every`. The start is the first one.

    A later state takes its place if its accuracy is higher by more than the standard error of the paired difference.

    Args:
        probe: it has labels.
        progress: its `selection` has the results of the start and of the best state, which checkpoints contain.
    """

    def __init__(self, probe: Probe, progress: Progress) -> None:
        self.probe = probe
        self.progress = progress

    @property
    def has_start(self) -> bool:
        """Whether the start was measured, in this or in an earlier start of the run."""
        return bool(self.progress.selection)

    def measure_start(self, model: Any) -> float:
        """Returns the accuracy of the start, in percent."""
        logger.info("the start, before the first update:")
        score = self.probe.scores(model)[KNN]
        count = len(self.probe.hits)
        if count < FEW:
            logger.warning(f"`probe_every` has {count} held-out images, which are few: their k-NN decides what is best")
        hits = self.probe.hits
        self.progress.selection = {"start": hits, "best": hits, "epoch": -1, "images": self.probe.identity}
        return score

    def accepts(self, epoch: int) -> bool:
        """Whether the state that the probe has evaluated last replaces the best one."""
        selection = self.progress.selection
        difference, error = paired(self.probe.hits, selection["best"])
        if not difference > error:
            return False
        self.progress.selection = {**selection, "best": self.probe.hits, "epoch": epoch}
        return True

    def log_end(self) -> None:
        """Logs the accuracy at the start, at the best epoch and at the end; a warning if the start is the best."""
        selection = self.progress.selection
        difference, error = paired(self.probe.hits, selection["start"])
        start, best, now = (accuracy(hits) for hits in (selection["start"], selection["best"], self.probe.hits))
        epoch = selection["epoch"]
        at_best = f"{best:.1f} at epoch {epoch} (best), " if epoch >= 0 else ""
        change = f"{difference:+.1f} ± {error:.1f} from the start"
        logger.info(f"k-NN {start:.1f} at the start, {at_best}{now:.1f} now ({change})")
        if epoch < 0:
            logger.warning("no later state is better than the start, by more than the standard error: it is the best")


def open_gate(init_from: str, probe: Probe | None, progress: Progress) -> Gate | None:
    """Returns the gate of a run that starts from the file `init_from`. A line says if its start is not measured.

    Raises:
        ValueError: a resumed run holds out other images than those of its start.
    """
    if not init_from:
        return None
    if probe is None or not probe.is_labelled:
        reason = "the images have no labels" if probe else "`probe_every` is not given"
        logger.info(f"the start is not measured, because {reason}: the last state is the result")
        return None
    if not progress.selection and (progress.epoch or progress.first_iteration):
        logger.warning("the start was not measured, and the run is past it: the last state is the result")
        return None
    if progress.selection.get("images", probe.identity) != probe.identity:
        raise ValueError(
            f"`probe_every`: the held-out images are now {probe.identity}, and those of the start were "
            f"{progress.selection['images']}, so that its k-NN can't be compared: give those images, or probe_every=0"
        )
    return Gate(probe, progress)


def accuracy(hits: torch.Tensor) -> float:
    """Returns the share of the images that are classified correctly (n,), in percent."""
    return 100 * float(hits.double().mean())


def paired(hits: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """Returns the difference of two accuracies on the same images (n,), and its standard error, in percent.

    The standard error of one image is infinite.
    """
    difference = hits.double() - others.double()
    count = len(difference)
    error = float(difference.std()) / math.sqrt(count) if count > 1 else math.inf
    return 100 * float(difference.mean()), 100 * error
