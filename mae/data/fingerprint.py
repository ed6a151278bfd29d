"""Fingerprints of the images, by which a run that resumes finds that they have changed."""

import hashlib
from typing import Any

import numpy as np

from mae import parallel
from mae.data.source import is_stream, whole

VALIDATION = "validation"  # the digest of the images and labels that select the best state


def fingerprint(source: Any, with_labels: bool, val: Any = None) -> dict[str, str]:
    """Returns digests of the names of the samples, in their order, and of their labels. All processes call it.

    The names start below the folder that contains all files: a moved dataset has the same. A dataset without names has
    no digest of names, and a stream has none at all.

    Args:
        source: a dataset, or a subset of one. The labels are those of the dataset, as they were before
            `labels.standardized`, whose rounding depends on the machine.
        with_labels: the training depends on the labels.
        val: the validation set of a supervised training. Its names and labels have one digest, VALIDATION.
    """
    digests = {} if is_stream(source) else parallel.from_rank_0(lambda: _digests(source, with_labels))
    if val is not None and (of_val := fingerprint(val, with_labels)):
        digests[VALIDATION] = _digest(" ".join(of_val.values()).encode())
    return digests


def _digests(source: Any, with_labels: bool) -> dict[str, str]:
    source, indices = whole(source)
    digests = {}
    parts: list[list[bytes]] = getattr(source, "file_names", list)()
    if parts:
        chosen = [[names[index] for index in indices.tolist()] for names in parts]
        digests["names"] = _digest(b"\n".join(_below_common_folder(names) for names in chosen))
    if with_labels:
        labels = np.asarray(source.labels)[indices]
        digests["labels"] = _digest(labels.astype("<f8" if labels.dtype.kind == "f" else "<i8").tobytes())
    return digests


def _below_common_folder(names: list[bytes]) -> bytes:
    """Joins names without the folder that contains all of them."""
    first = min(names)
    last = max(names)
    differ = next(
        (position for position, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    start = first.rfind(b"/", 0, differ) + 1
    return b"\0".join(name[start:] for name in names)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
