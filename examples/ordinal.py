"""Ordinal regression: classes in the order of their names, such as grades, with a head, a loss and a metric for them.

    python examples/ordinal.py --metric examples.ordinal:distance --data_path IMAGES --finetune FILE \\
        --output_dir runs/grades

The head has a score and ordered thresholds (McCullagh 1980). The loss is the squared earth mover's distance (Hou et al.
2016). The mean distance of the grades selects checkpoint-best.pth.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples run from a clone

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import main_finetune
from mae.cli import entry_point
from mae.evaluate.metrics import Metric
from mae.settings import Run
from models_vit import VisionTransformer

distance = Metric("", lambda given: abs(given.truth - given.predictions).mean(), ("classification",), True)


class OrdinalHead(nn.Module):
    """Features (B, D) -> log-probabilities (B, C): class k is between the thresholds k - 1 and k of a score."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)
        self.gaps = nn.Parameter(torch.zeros(num_classes - 1))  # the first threshold, and logarithms of differences

    def forward(self, features: Tensor) -> Tensor:
        thresholds = torch.cat([self.gaps[:1], self.gaps[1:].exp()]).cumsum(0)
        up_to = F.pad((thresholds - self.score(features).float()).sigmoid(), (0, 1), value=1.0)  # (B, C)
        return up_to.diff(dim=1, prepend=torch.zeros_like(up_to[:, :1])).clamp(min=1e-8).log()


class Ordinal(VisionTransformer):
    """A classifier with this head."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head = OrdinalHead(self.embed_dim, self.num_classes)


def squared_distance(outputs: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (B, C) and classes (B,) -> the squared earth mover's distance ()."""
    return (outputs.exp() - F.one_hot(labels, outputs.shape[1])).cumsum(dim=1).square().sum(dim=1).mean()


def main(run: Run) -> None:
    """Trains the classifier; with --eval, evaluates a file."""
    main_finetune.main(run, loss=squared_distance, model_class=Ordinal)


if __name__ == "__main__":
    entry_point.run_script(main, main_finetune.get_args_parser())
