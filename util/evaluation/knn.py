"""Weighted k nearest neighbours (Wu et al. 2018, section 3.4), for banks that fill a GPU.

Every process holds a part of the bank and compares all queries with it; the nearest of each part together are the
nearest of all. Nothing of the size queries x bank is ever held.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util import dist

CHUNK = 2**25  # similarities that are held at once: 128 MiB
SLICE = 2**16  # rows of the bank that are compared at once, in fp32: 320 MiB of ViT-H's features


def classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    device: torch.device,
) -> dict[int, int]:
    """Counts the queries whose class is found by a vote of the k nearest, weighted by exp(cosine / temperature).

    Args:
        bank: this process's part of the training features (m, D), with its labels (m,).
        queries: this process's part of the features to be classified (n, D), with their labels (n,).
        ks: numbers of neighbours.
        device: where the products are computed; there, the bank takes m x D halves on CUDA, and floats elsewhere.

    Returns:
        For each k, how many queries of all processes were classified rightly.

    Raises:
        ValueError: the bank has fewer features than the largest k.
    """
    bank, bank_labels = _unit(bank, device), bank_labels.to(device)
    sizes = dist.gather(len(bank))
    if sum(sizes) < max(ks):
        raise ValueError(f"--k {max(ks)}: there are only {sum(sizes)} training images")
    step = max(1, CHUNK // min(SLICE, max(sizes)))  # the same in all processes, which go through the queries together
    right = dict.fromkeys(ks, 0)
    # Each process's queries in turn go round to all parts of the bank.
    for batch, expected in zip(dist.gather(queries), dist.gather(labels), strict=True):
        for part, truth in zip(batch.split(step), expected.split(step), strict=True):
            similarity, neighbours = _nearest(nn.functional.normalize(part.to(device).float(), dim=1), bank, max(ks))
            candidates = dist.gather((similarity.cpu(), bank_labels[neighbours].cpu()))
            similarity, order = torch.cat([s for s, _ in candidates], dim=1).sort(dim=1, descending=True, stable=True)
            classes = torch.cat([c for _, c in candidates], dim=1).gather(1, order)
            weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor, which no vote minds
            for k in ks:
                votes = torch.zeros(len(part), num_classes).scatter_add_(1, classes[:, :k], weights[:, :k])
                right[k] += int((votes.argmax(dim=1) == truth).sum())
    return right


def _unit(features: Tensor, device: torch.device) -> Tensor:
    """Features (n, D) of length 1 on the device, made there part by part, so that no copy of them all is needed."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    unit = torch.empty(features.shape, dtype=dtype, device=device)
    for target, chunk in zip(unit.split(SLICE), features.split(SLICE), strict=True):
        target.copy_(nn.functional.normalize(chunk.to(device), dim=1))
    return unit


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines, fp32, and places of the k nearest in this part of the bank: (n, k) each.

    The bank may be in halves; products are not: near neighbours differ by less than a half can tell.
    """
    similarity = queries.new_zeros(len(queries), 0)
    places = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for number, rows in enumerate(bank.split(SLICE)):
        cosines, where = (queries @ rows.to(queries.dtype).T).topk(min(k, len(rows)), dim=1)
        similarity, order = torch.cat([similarity, cosines], dim=1).topk(min(k, similarity.shape[1] + len(rows)), dim=1)
        places = torch.cat([places, where + number * SLICE], dim=1).gather(1, order)
    return similarity, places
