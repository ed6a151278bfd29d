"""The published weights: their table, their download, and the verification of their digests.

The files of the paper are pickled {model: ...} under CC-BY-NC 4.0. The files of mmpretrain, a second implementation,
are under Apache-2.0. Some names of mmpretrain were announced, but their files were never released.
"""

import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae.checkpoints import run_directory
from mae.files import atomic
from mae.files.untrusted import file_digest
from mae.suggestions import did_you_mean

logger = logging.getLogger(__name__)

META = "https://dl.fbaipublicfiles.com/mae"
MM = "https://download.openmmlab.com/mmselfsup/1.x/mae"
ENCODER = "encoder"
FULL = "encoder and decoder"
CLASSIFIER = "classifier"
SEGMENTER = "segmentation model"
PROBE = "probe"  # a classifier on a frozen encoder
OWNER = "facebook"  # of the released encoders of the Hugging Face Hub
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar", ".zip")  # of files of weights


class Published(NamedTuple):
    """A row of the table."""

    model: str  # name of the factory in models_mae or models_vit
    kind: str
    epochs: int | None  # epochs of pre-training
    top1: float | None  # published accuracy on ImageNet-1K, of these weights or of weights fine-tuned from them
    url: str | None  # None: never released
    digest: str | None = None  # md5:PREFIX or sha256:PREFIX
    input_size: int = 224
    norm_pix_loss: bool = True
    license: str = "CC-BY-NC 4.0"


def row_of(name: str) -> Published | None:
    """Returns the row of a name, or of a file with the name of a published file."""
    file = Path(name).name.partition("#")[0]  # FILE#MODEL is one of several models in a file
    files = (row for row in TABLE.values() if row.url and Path(row.url).name == file)
    return TABLE.get(name) or next(files, None)


def row_settings(name: str) -> dict[str, Any]:
    """Returns the settings of a model in the table, for a name or a file as in `row_of`; {} for others."""
    row = row_of(name)
    if not row:
        return {}
    head = {"probe": "linear", "global_pool": False} if "-linear-" in Path(name).name else {}
    return {"input_size": row.input_size, "norm_pix_loss": row.norm_pix_loss, **head}


def _mm(model: str, kind: str, epochs: int, top1: float, file: str | None = None, input_size: int = 224) -> Published:
    """Returns a row of mmpretrain. Its file, if any, is in the folder of its pre-training."""
    size = model.split("_")[-2]
    url = f"{MM}/mae_vit-{size}-p16_8xb512-fp16-coslr-{epochs}e_in1k/{file}.pth" if file else None
    digest = f"sha256:{file[-8:]}" if file else None
    return Published(model, kind, epochs, top1, url, digest, input_size, license="Apache-2.0")


TABLE = {
    "mae_pretrain_vit_base": Published("mae_vit_base_patch16", ENCODER, 1600, 83.664,
        f"{META}/pretrain/mae_pretrain_vit_base.pth", "md5:8cad7c"),
    "mae_pretrain_vit_base_full": Published("mae_vit_base_patch16", FULL, 1600, 83.664,
        f"{META}/pretrain/mae_pretrain_vit_base_full.pth"),
    "mae_finetuned_vit_base": Published("vit_base_patch16", CLASSIFIER, 1600, 83.664,
        f"{META}/finetune/mae_finetuned_vit_base.pth", "md5:1b25e9"),
    "mae_pretrain_vit_large": Published("mae_vit_large_patch16", ENCODER, 1600, 85.952,
        f"{META}/pretrain/mae_pretrain_vit_large.pth", "md5:b8b06e"),
    "mae_pretrain_vit_large_full": Published("mae_vit_large_patch16", FULL, 1600, 85.952,
        f"{META}/pretrain/mae_pretrain_vit_large_full.pth"),
    "mae_finetuned_vit_large": Published("vit_large_patch16", CLASSIFIER, 1600, 85.952,
        f"{META}/finetune/mae_finetuned_vit_large.pth", "md5:51f550"),
    "mae_pretrain_vit_huge": Published("mae_vit_huge_patch14", ENCODER, 1600, 86.928,
        f"{META}/pretrain/mae_pretrain_vit_huge.pth", "md5:9bdbb0"),
    "mae_pretrain_vit_huge_full": Published("mae_vit_huge_patch14", FULL, 1600, 86.928,
        f"{META}/pretrain/mae_pretrain_vit_huge_full.pth"),
    "mae_finetuned_vit_huge": Published("vit_huge_patch14", CLASSIFIER, 1600, 86.928,
        f"{META}/finetune/mae_finetuned_vit_huge.pth", "md5:2541f2"),
    "mae_visualize_vit_large": Published("mae_vit_large_patch16", FULL, None, None,
        f"{META}/visualize/mae_visualize_vit_large.pth", norm_pix_loss=False),
    "mae_visualize_vit_large_ganloss": Published("mae_vit_large_patch16", FULL, None, None,
        f"{META}/visualize/mae_visualize_vit_large_ganloss.pth", norm_pix_loss=False),
    "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k": _mm("mae_vit_base_patch16", FULL, 300, 83.1,
        "mae_vit-base-p16_8xb512-coslr-300e-fp16_in1k_20220829-c2cf66ba"),
    "vit-base-p16_mae-300e-pre_8xb128-coslr-100e_in1k": _mm("vit_base_patch16", CLASSIFIER, 300, 83.1),
    "vit-base-p16_mae-300e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_base_patch16", CLASSIFIER, 300, 60.8),
    "mae_vit-base-p16_8xb512-amp-coslr-400e_in1k": _mm("mae_vit_base_patch16", FULL, 400, 83.3,
        "mae_vit-base-p16_8xb512-coslr-400e-fp16_in1k_20220825-bc79e40b"),
    "vit-base-p16_mae-400e-pre_8xb128-coslr-100e_in1k": _mm("vit_base_patch16", CLASSIFIER, 400, 83.3),
    "vit-base-p16_mae-400e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_base_patch16", CLASSIFIER, 400, 62.5),
    "mae_vit-base-p16_8xb512-amp-coslr-800e_in1k": _mm("mae_vit_base_patch16", FULL, 800, 83.3,
        "mae_vit-base-p16_8xb512-coslr-800e-fp16_in1k_20220825-5d81fbc4"),
    "vit-base-p16_mae-800e-pre_8xb128-coslr-100e_in1k": _mm("vit_base_patch16", CLASSIFIER, 800, 83.3),
    "vit-base-p16_mae-800e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_base_patch16", CLASSIFIER, 800, 65.1),
    "mae_vit-base-p16_8xb512-amp-coslr-1600e_in1k": _mm("mae_vit_base_patch16", FULL, 1600, 83.5,
        "mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k_20220825-f7569ca2"),
    "vit-base-p16_mae-1600e-pre_8xb128-coslr-100e_in1k": _mm("vit_base_patch16", CLASSIFIER, 1600, 83.5,
        "vit-base-p16_ft-8xb128-coslr-100e_in1k/vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21"),
    "vit-base-p16_mae-1600e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_base_patch16", CLASSIFIER, 1600, 67.1),
    "mae_vit-large-p16_8xb512-amp-coslr-400e_in1k": _mm("mae_vit_large_patch16", FULL, 400, 85.2,
        "mae_vit-large-p16_8xb512-fp16-coslr-400e_in1k_20220825-b11d0425"),
    "vit-large-p16_mae-400e-pre_8xb128-coslr-50e_in1k": _mm("vit_large_patch16", CLASSIFIER, 400, 85.2),
    "vit-large-p16_mae-400e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_large_patch16", CLASSIFIER, 400, 70.7),
    "mae_vit-large-p16_8xb512-amp-coslr-800e_in1k": _mm("mae_vit_large_patch16", FULL, 800, 85.4,
        "mae_vit-large-p16_8xb512-fp16-coslr-800e_in1k_20220825-df72726a"),
    "vit-large-p16_mae-800e-pre_8xb128-coslr-50e_in1k": _mm("vit_large_patch16", CLASSIFIER, 800, 85.4),
    "vit-large-p16_mae-800e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_large_patch16", CLASSIFIER, 800, 73.7),
    "mae_vit-large-p16_8xb512-amp-coslr-1600e_in1k": _mm("mae_vit_large_patch16", FULL, 1600, 85.7,
        "mae_vit-large-p16_8xb512-fp16-coslr-1600e_in1k_20220825-cc7e98c9"),
    "vit-large-p16_mae-1600e-pre_8xb128-coslr-50e_in1k": _mm("vit_large_patch16", CLASSIFIER, 1600, 85.7),
    "vit-large-p16_mae-1600e-pre_8xb2048-linear-coslr-90e_in1k": _mm("vit_large_patch16", CLASSIFIER, 1600, 75.5),
    "mae_vit-huge-p16_8xb512-amp-coslr-1600e_in1k": _mm("mae_vit_huge_patch14", FULL, 1600, 86.9,
        "mae_vit-huge-p16_8xb512-fp16-coslr-1600e_in1k_20220916-ff848775"),
    "vit-huge-p14_mae-1600e-pre_8xb128-coslr-50e_in1k": _mm("vit_huge_patch14", CLASSIFIER, 1600, 86.9,
        "vit-huge-p16_ft-8xb128-coslr-50e_in1k/vit-huge-p16_ft-8xb128-coslr-50e_in1k_20220916-0bfc9bfd"),
    "vit-huge-p14_mae-1600e-pre_32xb8-coslr-50e_in1k-448px": _mm("vit_huge_patch14", CLASSIFIER, 1600, 87.3,
        "vit-huge-p16_ft-32xb8-coslr-50e_in1k-448/vit-huge-p16_ft-32xb8-coslr-50e_in1k-448_20220916-95b6a0ce", 448),
}  # fmt: skip


def advice(name: str, known: Iterable[str] = ()) -> str:
    """Returns the end of a message about a name of weights that is no file: what to type instead, or "".

    It recognizes checkpoints that a run does not have, URLs and files of published weights, configurations of
    mmpretrain, and names of models of timm and of the Hugging Face Hub.

    Args:
        known: names that are similar to a misspelled one.
    """
    stem = Path(name.partition("#")[0]).stem
    published = [key for key, row in TABLE.items() if stem == key or (row.url and stem == Path(row.url).stem)]
    of_hub = re.fullmatch(r"(hf[-_]hub:|https://huggingface\.co/)?([\w-]+/[\w.-]+)", name)
    if name.endswith(".pth") and (milestones := run_directory.milestones(Path(name).parent)):
        return f"; the newest checkpoint there is {milestones[-1]}"
    if published:
        return f"; give {published[0]}, the name of these published weights"
    if re.fullmatch(r"(timm/)?vit_\w+_patch\w+\.\w+", name):
        return _from_hub(f"timm/{name.removeprefix('timm/')}")
    if re.fullmatch(r"(dino|dinov2|dinov3|vit-mae)-[\w-]+", name):
        return f"; a released encoder of this name is {OWNER}/{name}"
    if of_hub and not name.endswith(SUFFIXES) and not Path(name).parent.is_dir():
        return _from_hub(of_hub[2])
    if "://" in name:
        return "; download it, and give the path of the file"
    return did_you_mean(name, known)


def _from_hub(name: str) -> str:
    return f"; if it is on the Hugging Face Hub: hf download {name} --local-dir FOLDER, and give FOLDER"


def fetch(name: str) -> Path:
    """Downloads published weights to the folder of torch.hub, unless they are there, and verifies them.

    Returns:
        The path of the file.

    Raises:
        ValueError: the name is unknown, its file was never released or can't be downloaded, or the file differs from
            the published file.
    """
    if name not in TABLE:
        raise ValueError(f"there is no file and no published weights named {name}{advice(name, TABLE)}")
    row = TABLE[name]
    if row.url is None:
        released = [
            other for other, its in TABLE.items() if its.url and its.kind == row.kind and its.license == row.license
        ]
        raise ValueError(f"{name} was announced and never released; released are {', '.join(released)}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(row.url).name
    if not path.exists():
        logger.info(f"downloading {row.url} ({row.license}) to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(row.url, str(path), progress=True)
        except OSError as error:
            raise ValueError(
                f"can't download {row.url} ({error}); copy it to {path} from a machine with a network"
            ) from error
    _check(path, row.digest)
    return path


def is_of_hub(name: Path | str) -> bool:
    """Whether a name may be OWNER/NAME of the Hugging Face Hub: there is no such file or folder, and no OWNER/.

    A folder of the owner of the released encoders does not hide them.
    """
    file = Path(name)
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(file)) and file.suffix not in SUFFIXES
    return bool(is_name) and not file.exists() and (file.parts[0] == OWNER or not file.parent.exists())


def fetch_from_hub(name: str) -> Path:
    """Downloads a model of the Hugging Face Hub to its cache, unless it is there: .safetensors and .json files only.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such model, its license has to be accepted, or it can't be downloaded.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{name}"
    try:
        logger.info(f"weights from {page}")
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except GatedRepoError as error:
        raise ValueError(f"{page} is gated: accept its license there, and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"there is no file or folder {name}, and no {page} that you may read") from error
    except Exception as error:  # of the network, of the disk; the library has many
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"there is no file or folder {name}, and {page} can't be downloaded: {reason} On a machine with a network: "
            f"`hf download {name} --local-dir FOLDER`; then give the folder"
        ) from error


def _check(path: Path, digest: str | None) -> None:
    """Compares a file with its published digest, or with the SHA-256 that was recorded at its first use."""
    if digest:
        kind, _, prefix = digest.partition(":")
        digest = file_digest(path, kind)
        if not digest.startswith(prefix):
            raise ValueError(f"{path} is not the published file: its {kind} does not start with {prefix}; delete it")
        return
    remembered = path.with_name(f"{path.name}.sha256")
    sha256 = file_digest(path)
    if not remembered.exists():
        logger.warning(f"no digest was published for {path.name}; recording its SHA-256 {sha256}")
        with suppress(OSError):  # the folder is read-only, or another process records it
            atomic.write_text(remembered, sha256 + "\n")
    elif remembered.read_text().strip() != sha256:
        raise ValueError(f"{path} has changed since its first use; delete it and {remembered} to download it again")
