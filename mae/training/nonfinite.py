"""Handles updates whose loss or gradient is infinite or not a number."""

import logging
import math
from collections.abc import Callable

from mae import parallel

logger = logging.getLogger(__name__)

MAX_SKIPS_IN_A_ROW = 20


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient was infinite or not a number, and `--on_nonfinite` ends the run."""


class NonFiniteGuard:
    """Handles updates whose loss or gradient is not finite. All processes have the same numbers.

    Args:
        policy: "abort" ends the run; "skip" skips the update, up to MAX_SKIPS_IN_A_ROW times in a row.
        overflow_is_normal: fp16 gradients overflow until the loss scaler has adapted.
    """

    def __init__(self, policy: str, overflow_is_normal: bool = False) -> None:
        self.policy = policy
        self.overflow_is_normal = overflow_is_normal
        self.in_a_row = 0

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether an update needs no reaction."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        return self.overflow_is_normal and math.isfinite(loss) and self.in_a_row < MAX_SKIPS_IN_A_ROW

    def react(self, what: str, save: Callable[[], str]) -> None:
        """Logs a warning about a skipped update, or saves the state and ends the run.

        Args:
            what: description of the update.
            save: saves the state, and returns the name of the file.

        Raises:
            NonFiniteLoss: the run ends.
        """
        if self.policy == "skip" and self.in_a_row < MAX_SKIPS_IN_A_ROW:
            logger.warning(f"{what}; the update is skipped")
            return
        file = save()
        parallel.barrier()  # when one process ends, the launcher kills the others, including one that writes
        saved = f"The weights, without this update and perhaps with a few later ones, are in {file}. " if file else ""
        raise NonFiniteLoss(
            f"{what} ({self.in_a_row} in a row). {saved}Try clip_grad=1.0, a lower learning rate (`lr`, or "
            f"`blr` if `lr` is not given), amp=off (or bf16 instead of fp16), or on_nonfinite=skip if it "
            f"happens rarely."
        )
