"""Weighted k-nearest-neighbor classification (Wu et al. 2018, section 3.4), for feature banks that fill a GPU.

Each process stores a part of the bank and compares all queries with it. The k nearest neighbors are among the k
nearest neighbors of each part. The memory never contains all similarities, (queries, bank).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mae import parallel
from mae.plurals import counted

CHUNK = 2**25  # similarities in memory at a time: 128 MiB
SLICE = 2**16  # rows of the bank that are compared at a time, in fp32: 320 MiB for the features of ViT-H


def classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    device: torch.device,
) -> dict[tuple[int, float], list[int]]:
    """Classifies queries by a vote of their k nearest neighbors, weighted by exp(cosine similarity / temperature).

    The neighbors for the largest k are computed once. All k and temperatures use them.

    Args:
        bank: training features of this process (m, D). Those in fp32 on the CPU are normalized in place if `device` is
            the CPU, because a copy of ImageNet's takes 4 GB.
        bank_labels: their labels (m,).
        queries: features to classify, of this process (n, D).
        labels: their labels (n,).
        ks: numbers of neighbors.
        device: the device of the products. The bank takes m x D values in fp16 on CUDA, and in fp32 elsewhere.

    Returns:
        The numbers of correctly classified queries of each class, of all processes, by k and temperature.

    Raises:
        ValueError: the bank has fewer features than the largest k.
    """
    found = predict(
        bank, bank_labels, queries, labels, lambda votes, truth: (truth, votes.argmax(dim=1) == truth), ks=ks,
        temperatures=temperatures, num_classes=num_classes, device=device,
    )  # fmt: skip
    return {pair: np.bincount(truth[right], minlength=num_classes).tolist() for pair, (truth, right) in found.items()}


def accuracy(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the share of queries (n, D) that k neighbors in a bank (m, D) classify correctly, on the CPU.

    Raises:
        ValueError: as `classify`.
    """
    parts = (torch.tensor(part) for part in (bank, bank_labels, queries, labels))
    (right,) = classify(
        *parts, ks=[k], temperatures=[0.07], num_classes=int(bank_labels.max()) + 1, device=torch.device("cpu")
    ).values()
    return sum(right) / len(labels)


def in_words(k: int | str, bank: int | str, queries: int) -> str:
    """Returns what an accuracy is measured on: the number of neighbors, of their images, and of held-out images.

    Args:
        k: the number, or a text.
        bank: number of images among which the neighbors are, or a text.
        queries: number of images that are classified.
    """
    bank = f"{bank:,}" if isinstance(bank, int) else bank
    neighbors = "nearest neighbor" if k == 1 else "nearest neighbors"
    verb = "classifies" if k == 1 else "classify"
    return f"{k} {neighbors} among {bank} images {verb} {counted(queries, 'held-out image')}"


def predict(
    bank: Tensor,
    bank_targets: Tensor,
    queries: Tensor,
    targets: Tensor,
    columns: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    device: torch.device,
) -> dict[tuple[int, float], list[np.ndarray]]:
    """Predicts the targets of queries from their neighbors, weighted as in `classify`.

    Args:
        bank_targets: classes (m,), or vectors (m, C).
        targets: of the queries (n, ...), for `columns`.
        columns: outputs (b, C) and targets of b queries -> tensors (b, ...). The outputs are the shares of the votes
            for the classes, or the weighted means of the vectors of the neighbors.
        bank, queries, ks, temperatures, num_classes, device: as in `classify`.

    Returns:
        The columns of all queries of all processes in the order of the dataset, by k and temperature.

    Raises:
        ValueError: as in `classify`.
    """
    found: dict[tuple[int, float], list[list[tuple[Tensor, ...]]]] = {
        pair: [[] for _ in range(parallel.world_size())] for pair in itertools.product(ks, temperatures)
    }
    for rank, similarity, near, truth in neighbors(
        bank, bank_targets, queries, targets, k=max(ks), num_classes=num_classes, device=device
    ):
        for (k, temperature), by_rank in found.items():
            # The subtraction prevents overflow. It multiplies all weights of a query by the same factor.
            weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
            if near.ndim == 3:
                sums = (weights[:, None].double() @ near[:, :k].double())[:, 0]
            else:
                sums = torch.zeros(len(near), num_classes).scatter_add_(1, near[:, :k], weights).double()
            by_rank[rank].append(columns(sums / weights.double().sum(dim=1, keepdim=True), truth))
    return {
        pair: [
            parallel.interleave([torch.cat(part).numpy() for part in parts])
            for parts in zip(*(zip(*batches, strict=True) for batches in by_rank if batches), strict=True)
        ]
        for pair, by_rank in found.items()
    }


def neighbors(
    bank: Tensor, bank_targets: Tensor, queries: Tensor, targets: Tensor, *, k: int, num_classes: int,
    device: torch.device,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Yields parts of the queries of all processes, with their k nearest neighbors in descending order.

    Args:
        bank, bank_targets, queries, num_classes, device: as in `predict`.
        targets: of the queries (n, ...).
        k: number of neighbors.

    Yields:
        The rank of the queries, cosine similarities (b, k), targets of the neighbors (b, k, ...), and targets of the
        queries (b, ...).

    Raises:
        ValueError: as in `classify`.
    """
    bank = _unit(bank, device)
    bank_targets = bank_targets.to(device)
    sizes = parallel.gather(len(bank))
    if sum(sizes) < k:
        raise ValueError(f"k={k}: there are only {sum(sizes)} training images; give a smaller `k`")
    # Equal in all processes, which process the queries together. The votes are for each class.
    step = max(1, CHUNK // max(min(SLICE, max(sizes)), num_classes))
    # All processes compare the queries of rank 0 with their parts of the bank, then the queries of rank 1, and so on.
    for rank, (batch, expected) in enumerate(zip(parallel.gather(queries), parallel.gather(targets), strict=True)):
        for part, truth in zip(batch.split(step), expected.split(step), strict=True):
            if not len(part):
                continue
            similarity, indices = nearest(nn.functional.normalize(part.to(device).float(), dim=1), bank, k)
            candidates = parallel.gather((similarity.cpu(), bank_targets[indices].cpu()))
            similarity, order = torch.cat([s for s, _ in candidates], dim=1).sort(dim=1, descending=True, stable=True)
            found = torch.cat([t for _, t in candidates], dim=1)
            yield rank, similarity[:, :k], found[torch.arange(len(found))[:, None], order[:, :k]], truth


def _unit(features: Tensor, device: torch.device) -> Tensor:
    """Normalizes features (n, D) to length 1 on the device, in parts; in place if they have the type of the result."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    in_place = features.device == device and features.dtype == dtype
    unit = features if in_place else torch.empty(features.shape, dtype=dtype, device=device)
    for target, chunk in zip(unit.split(SLICE), features.split(SLICE), strict=True):
        target.copy_(nn.functional.normalize(chunk.to(device), dim=1))
    return unit


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns cosine similarities (fp32) and indices of the k nearest neighbors in this part of the bank, (n, k) each.

    The bank may be fp16, but products are fp32: similarities of near neighbors differ by less than fp16 can represent.
    """
    similarity = queries.new_zeros(len(queries), 0)
    indices = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for number, rows in enumerate(bank.split(SLICE)):
        cosines, where = (queries @ rows.to(queries.dtype).T).topk(min(k, len(rows)), dim=1)
        similarity, order = torch.cat([similarity, cosines], dim=1).topk(min(k, similarity.shape[1] + len(rows)), dim=1)
        indices = torch.cat([indices, where + number * SLICE], dim=1).gather(1, order)
    return similarity, indices
