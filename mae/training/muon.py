"""Muon (Jordan et al. 2024), an optimizer of matrices.

The updates of Muon are scaled to the size of those of AdamW (Liu et al. 2025, section 2.2), so that learning rate and
weight decay of AdamW fit both. Matrices of the same shape are orthogonalized together, in fp32: not all processors are
fast in bf16, in which torch.optim.Muon iterates.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from mae import parallel
from mae.training.optimizers import Joined

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: p(x) = 3.4445 x - 4.7750 x^3 + 2.0315 x^5
STEPS = 5


def muon_and_adamw(model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    """Returns Muon for the matrices of the blocks, and AdamW for all other parameters.

    Args:
        groups: each is divided, with its weight decay and its `lr_scale`.
        betas: of AdamW.

    Raises:
        ValueError: no matrix of the blocks is trained.
    """
    blocks = (module for name, module in model.named_children() if name.endswith("blocks"))
    matrices = {parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2}
    chosen = [{**group, "params": [p for p in group["params"] if p in matrices]} for group in groups]
    others = [{**group, "params": [p for p in group["params"] if p not in matrices]} for group in groups]
    if not any(group["params"] for group in chosen):
        raise ValueError("optimizer=muon: no matrix of the blocks is trained")
    muon = BatchedMuon([group for group in chosen if group["params"]], lr=0.0)
    return Joined([muon, AdamW([group for group in others if group["params"]], lr=0.0, betas=betas, fused=True)])


class BatchedMuon(Muon):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", for all matrices of a shape at once."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                scale = 0.2 * math.sqrt(max(shape))  # the RMS of an update of AdamW is about 0.2
                directions = self._directions(parameters, group["momentum"])
                whole = orthogonalized(torch.stack([parallel.gathered(direction) for direction in directions]))
                updates = [parallel.placed_as(update, p) for update, p in zip(whole, parameters, strict=True)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-scale * group["lr"])

    def _directions(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Updates the momentum buffers, and returns the directions of Nesterov's momentum."""
        grads: Any = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        return list(torch._foreach_lerp(grads, buffers, momentum))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (n, r, c) -> the orthogonal matrices next to them, roughly: singular values from .7 to 1.2.

    Newton-Schulz iterations X <- p(X) of Jordan et al. 2024. With G = X Xᵀ, p(X) = q(G) X. All q(G) commute, so that
    the iterations need only products of small square matrices, and X is multiplied once.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    gram = x @ x.mT
    product = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    return product @ x
