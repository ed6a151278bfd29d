"""Heads of several learning rates, trained together on the features of a frozen encoder."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae import parallel
from mae.training.lars import LARS

logger = logging.getLogger(__name__)


def make_heads(model: nn.Module, blrs: Sequence[float], weight_decay: float) -> tuple[list[nn.Module], LARS]:
    """Returns a copy of the head for each learning rate, and the optimizer of all heads.

    Of several heads, a gradient that is infinite or not a number counts as zero, so that the others train on. The
    momentum of earlier updates still changes the head.
    """
    head = model.get_submodule("head")
    heads = [head, *(copy.deepcopy(head) for _ in blrs[1:])]
    for parameter in (parameter for head in heads for parameter in head.parameters() if len(heads) > 1):
        parameter.register_hook(lambda gradient: torch.where(gradient.isfinite().all(), gradient, 0.0))
    groups = [
        {"params": list(head.parameters()), "lr_scale": blr / max(blrs)} for head, blr in zip(heads, blrs, strict=True)
    ]
    return heads, LARS(groups, weight_decay=weight_decay)


def report_best_rate(
    blrs: Sequence[float], best: int, title: str, scores: Sequence[float], losses: Sequence[float],
    shares: Sequence[float], is_last: bool,
) -> dict[str, float]:  # fmt: skip
    """Logs the rate with the best held-out score, and in the last epoch a warning if it is the largest or smallest.

    A warning names the rates whose loss was not finite in all batches; `shares` are the shares of the finite batches.

    Args:
        best: index of the rate.
        title: name of the score.
        scores: held-out scores of the rates.

    Returns:
        The entries of log.txt: the rate, and the training loss of its head.
    """
    loss = f", training loss {losses[best]:.4f}" if losses else ""
    logger.info(f"best of {len(blrs)} rates: blr={blrs[best]:g}, held-out {title} {scores[best]:.3f}{loss}")
    for rate, share in zip(blrs, shares, strict=False):
        if share < 1:
            logger.warning(f"blr={rate:g}: {1 - share:.0%} of the updates had an infinite loss, which counts as zero")
    for end, extreme, beyond in ((max(blrs), "largest", 3), (min(blrs), "smallest", 1 / 3)):
        if is_last and blrs[best] == end:
            rates = ", ".join(f"{rate:g}" for rate in sorted([*blrs, float(f"{end * beyond:.2g}")]))
            logger.warning(
                f"blr={end:g}, the {extreme} value, is the best; give blr=[{rates}] and another `output_dir`"
            )
    return {"chosen_blr": blrs[best], **({"train_loss": losses[best]} if losses else {})}


class HeadLosses:
    """The criterion: the loss of outputs (B, C), or of several heads (heads, B, C).

    The gradient of several heads is the gradient of the sum of their losses, so each head trains independently. The
    value is the smallest loss of each batch, because heads with too large a rate have any loss. It is infinite if no
    loss is finite. As a `Callback`, it sums the losses of each head over the updates of an epoch; checkpoints contain
    the sums.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> None:
        self.loss = loss
        self.epoch = self.batches = 0
        self.sums: Tensor | None = None  # (2, heads): finite losses, and number of them; means over the processes
        self.of_update: list[Tensor] = []  # the same of each batch since the last update

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim == 2:
            return self.loss(logits, targets)
        losses = torch.stack([self.loss(outputs, targets) for outputs in logits])
        finite = losses.isfinite()
        total = losses.where(finite, 0.0).sum()
        batch = torch.stack([losses.detach().where(finite, 0.0), finite.to(losses.dtype)])
        # Not after the update: if another process has ended, this raises an error before the weights change.
        self.of_update.append(parallel.mean_over_processes(batch))
        return total - total.detach() + losses.detach().where(finite, torch.inf).min()

    def after_update(self, model: nn.Module, epoch: float) -> None:
        """Adds the mean over the batches of an update: the sums do not depend on the number of batches."""
        if self.epoch != math.ceil(epoch):
            self.epoch = math.ceil(epoch)
            self.batches = 0
            self.sums = None
        if self.of_update:
            mean = torch.stack(self.of_update).mean(dim=0)
            self.sums = mean if self.sums is None else self.sums.to(mean) + mean
            self.batches += 1
        self.of_update.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of the epoch so far."""
        return {"epoch": self.epoch, "batches": self.batches, "sums": self.sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the sums."""
        self.epoch = state_dict["epoch"]
        self.batches = state_dict["batches"]
        self.sums = state_dict["sums"]

    def means(self) -> tuple[list[float], list[float]]:
        """Returns the mean loss of each head over its finite batches of the epoch, and the share of these batches.

        They are of all processes. Both are [] without batches.
        """
        if self.sums is None:
            return [], []
        losses, counts = self.sums
        return (losses / counts).tolist(), (counts / self.batches).tolist()
