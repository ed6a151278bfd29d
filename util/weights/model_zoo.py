"""The published weights: a table of them, their download, and the check of their digests.

The paper's files are pickled {model: ...} under CC-BY-NC 4.0. Those of mmpretrain, a second implementation, are under
Apache-2.0; some of its names were announced and never released.
"""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch

from util.cli.advice import did_you_mean
from util.files import atomic

logger = logging.getLogger(__name__)

META = "https://dl.fbaipublicfiles.com/mae"
MM = "https://download.openmmlab.com/mmselfsup/1.x/mae"
ENCODER, FULL, CLASSIFIER = "encoder", "encoder and decoder", "classifier"
SIMILAR = 0.4  # similarity of names that are suggested; those here are long


class Published(NamedTuple):
    """A row of the table."""

    model: str  # the factory, in models_mae or models_vit
    kind: str
    epochs: int | None  # of pre-training
    top1: float | None  # on ImageNet-1K, as published: of these weights, or of what was fine-tuned from them
    url: str | None  # None: never released
    digest: str | None = None  # md5:PREFIX or sha256:PREFIX
    input_size: int = 224
    norm_pix_loss: bool = True
    licence: str = "CC-BY-NC 4.0"


def _meta() -> dict[str, Published]:
    table = {}
    for size, patch, top1, encoder, classifier in (
        ("base", 16, 83.664, "8cad7c", "1b25e9"),
        ("large", 16, 85.952, "b8b06e", "51f550"),
        ("huge", 14, 86.928, "9bdbb0", "2541f2"),
    ):
        mae, vit = f"mae_vit_{size}_patch{patch}", f"vit_{size}_patch{patch}"
        pretrain, finetuned = f"mae_pretrain_vit_{size}", f"mae_finetuned_vit_{size}"
        table[pretrain] = Published(mae, ENCODER, 1600, top1, f"{META}/pretrain/{pretrain}.pth", f"md5:{encoder}")
        table[f"{pretrain}_full"] = Published(mae, FULL, 1600, top1, f"{META}/pretrain/{pretrain}_full.pth")
        table[finetuned] = Published(
            vit, CLASSIFIER, 1600, top1, f"{META}/finetune/{finetuned}.pth", f"md5:{classifier}"
        )
    for name in ("mae_visualize_vit_large", "mae_visualize_vit_large_ganloss"):
        url = f"{META}/visualize/{name}.pth"
        table[name] = Published("mae_vit_large_patch16", FULL, None, None, url, norm_pix_loss=False)
    return table


def _mmpretrain() -> dict[str, Published]:
    """All 24 names; their sizes, epochs, results and files."""
    tuned = {("base", 300): 83.1, ("base", 400): 83.3, ("base", 800): 83.3, ("base", 1600): 83.5,
             ("large", 400): 85.2, ("large", 800): 85.4, ("large", 1600): 85.7, ("huge", 1600): 86.9}  # fmt: skip
    probed = {("base", 300): 60.8, ("base", 400): 62.5, ("base", 800): 65.1, ("base", 1600): 67.1,
              ("large", 400): 70.7, ("large", 800): 73.7, ("large", 1600): 75.5}  # fmt: skip
    files = {  # the file's name varies in the place of "fp16"
        ("base", 300): "mae_vit-base-p16_8xb512-coslr-300e-fp16_in1k_20220829-c2cf66ba",
        ("base", 400): "mae_vit-base-p16_8xb512-coslr-400e-fp16_in1k_20220825-bc79e40b",
        ("base", 800): "mae_vit-base-p16_8xb512-coslr-800e-fp16_in1k_20220825-5d81fbc4",
        ("base", 1600): "mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k_20220825-f7569ca2",
        ("large", 400): "mae_vit-large-p16_8xb512-fp16-coslr-400e_in1k_20220825-b11d0425",
        ("large", 800): "mae_vit-large-p16_8xb512-fp16-coslr-800e_in1k_20220825-df72726a",
        ("large", 1600): "mae_vit-large-p16_8xb512-fp16-coslr-1600e_in1k_20220825-cc7e98c9",
        ("huge", 1600): "mae_vit-huge-p16_8xb512-fp16-coslr-1600e_in1k_20220916-ff848775",
    }
    tuned_files = {
        (
            "base",
            1600,
        ): "vit-base-p16_ft-8xb128-coslr-100e_in1k/vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21",
        ("huge", 1600): "vit-huge-p16_ft-8xb128-coslr-50e_in1k/vit-huge-p16_ft-8xb128-coslr-50e_in1k_20220916-0bfc9bfd",
    }
    huge_448 = "vit-huge-p16_ft-32xb8-coslr-50e_in1k-448/vit-huge-p16_ft-32xb8-coslr-50e_in1k-448_20220916-95b6a0ce"

    def row(model: str, kind: str, key: tuple[str, int], top1: float, file: str | None, size: int = 224) -> Published:
        folder = f"{MM}/mae_vit-{key[0]}-p16_8xb512-fp16-coslr-{key[1]}e_in1k"
        url, digest = (f"{folder}/{file}.pth", f"sha256:{file[-8:]}") if file else (None, None)
        return Published(model, kind, key[1], top1, url, digest, size, licence="Apache-2.0")

    table = {}
    for key, top1 in tuned.items():
        size, epochs = key
        patch, length = (14 if size == "huge" else 16), (100 if size == "base" else 50)
        mae, vit = f"mae_vit_{size}_patch{patch}", f"vit_{size}_patch{patch}"
        table[f"mae_vit-{size}-p16_8xb512-amp-coslr-{epochs}e_in1k"] = row(mae, FULL, key, top1, files[key])
        start = f"vit-{size}-p{patch}_mae-{epochs}e-pre"
        table[f"{start}_8xb128-coslr-{length}e_in1k"] = row(vit, CLASSIFIER, key, top1, tuned_files.get(key))
        if key in probed:
            table[f"{start}_8xb2048-linear-coslr-90e_in1k"] = row(vit, CLASSIFIER, key, probed[key], None)
        else:
            table[f"{start}_32xb8-coslr-50e_in1k-448px"] = row(vit, CLASSIFIER, key, 87.3, huge_448, 448)
    return table


TABLE = _meta() | _mmpretrain()


def find(name: str) -> Published:
    """The row of a name.

    Raises:
        ValueError: there is no such name, or its file was never released.
    """
    if name not in TABLE:
        near = did_you_mean(name, TABLE, SIMILAR)
        raise ValueError(f"there is no file {name}, nor published weights of that name{near}")
    row = TABLE[name]
    if row.url is None:
        released = [
            other for other, its in TABLE.items() if its.url and its.kind == row.kind and its.licence == row.licence
        ]
        raise ValueError(f"{name} was announced and never released; released are {', '.join(released)}")
    return row


def fetch(name: str) -> Path:
    """The file of published weights, downloaded once into torch.hub's folder, and checked.

    Raises:
        ValueError: there is no such name, it can't be downloaded, or the file is another than the published one.
    """
    row = find(name)
    assert row.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(row.url).name
    if not path.exists():
        logger.info(f"downloading {row.url} ({row.licence}) to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(row.url, str(path), progress=True)
        except (URLError, OSError) as error:
            raise ValueError(
                f"can't download {row.url} ({error}); fetch it where there is a network and put it at {path}, or give "
                f"the file's path"
            ) from error
    _check(path, row.digest)
    return path


def _check(path: Path, digest: str | None) -> None:
    """Compares a file with its published digest, and with the sha256 that it had when it was first used."""
    remembered = path.with_name(f"{path.name}.sha256")
    sha256 = _hash(path, "sha256")
    if digest:
        kind, _, prefix = digest.partition(":")
        digest = sha256 if kind == "sha256" else _hash(path, kind)
        if not digest.startswith(prefix):
            raise ValueError(
                f"{path} is not the published file, whose {kind} starts with {prefix} (this one's with "
                f"{digest[: len(prefix)]}): a download cut short? Delete it and try again"
            )
    elif not remembered.exists():
        logger.warning(f"no digest was published for {path.name}; recording its sha256 {sha256}")
    if remembered.exists() and remembered.read_text().strip() != sha256:
        raise ValueError(f"{path} has changed since it was first used; delete it and {remembered} to fetch it again")
    if not remembered.exists():
        atomic.write_text(remembered, sha256 + "\n")


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
