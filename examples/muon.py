"""Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for all other parameters.

    python main_pretrain.py --optimizer examples.muon:muon_and_adamw ...

The updates of Muon are scaled to the size of those of AdamW (Liu et al. 2025, section 2.2), so that learning rate and
weight decay of AdamW fit both.
"""

from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from mae.training.optimizers import Joined


def muon_and_adamw(model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns the optimizer of a model. Each group is divided, with its weight decay and its `lr_scale`."""
    blocks = (module for name, module in model.named_children() if name.endswith("blocks"))
    matrices = {parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2}
    chosen = [{**group, "params": [p for p in group["params"] if p in matrices]} for group in groups]
    others = [{**group, "params": [p for p in group["params"] if p not in matrices]} for group in groups]
    muon = Muon([group for group in chosen if group["params"]], lr=0.0, adjust_lr_fn="match_rms_adamw")
    return Joined([muon, AdamW([group for group in others if group["params"]], lr=0.0, betas=(0.9, 0.95))])
