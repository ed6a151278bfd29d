"""The nearest features of each query, by cosine similarity."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae.data.source import first_few
from mae.evaluate import knn


class Neighbors(NamedTuple):
    """Features, and the nearest of them to each query."""

    features: Tensor  # (n, D), as given
    indices: Tensor  # (q, k), of the features, nearest first
    similarities: Tensor  # (q, k), cosines, fp32


def find(bank: Tensor, queries: Tensor | None = None, excluded: Sequence[int] | None = None, k: int = 6) -> Neighbors:
    """Finds the k nearest features (n, D) of each query, as `mae.inference.neighbors.find`."""
    _require_finite("features", bank)
    if queries is None:
        queries = bank
        excluded = range(len(bank))
    _require_finite("queries", queries)
    same = torch.tensor([-1] * len(queries) if excluded is None else list(excluded))
    more = int(same.max() >= 0)
    k = min(k, len(bank) - more)
    unit = nn.functional.normalize(bank.float(), dim=1)  # a copy, which `knn.neighbors` may overwrite
    indices = []
    similarities = []
    for _, cosines, near, query in knn.neighbors(
        unit, torch.arange(len(bank)), queries, same, k=k + more, num_classes=1, device=bank.device
    ):
        others = (near == query[:, None]).int().argsort(dim=1, stable=True)[:, :k]
        indices.append(near.gather(1, others))
        similarities.append(cosines.gather(1, others))
    return Neighbors(bank, torch.cat(indices), torch.cat(similarities))


def _require_finite(name: str, rows: Tensor) -> None:
    """Raises ValueError if some of rows (n, D) have values that are not finite: NaN would be nearest to all."""
    bad = (~rows.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"{name} have values that are not finite, in rows {first_few([str(row) for row in bad])}")
