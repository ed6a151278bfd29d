"""Reads weights: from a checkpoint file of any known format, or by a published name.

`read` finds the file, takes one of its models (`candidates`), gives tensors and settings our names by its format
(`FORMATS`), and checks them.
The names of the tensors determine the kind of a file: an encoder, an encoder with a decoder, a classifier, or a
segmentation model.
"""

import json
import logging
import math
import platform
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from mae import encoders, lora, parallel
from mae.checkpoints import checkpoint, run_directory, sharded_state
from mae.checkpoints.checkpoint import CheckpointError
from mae.files.untrusted import open_file, read_file
from mae.settings import SIZES, ImageSpec, ModelSpec, fits, names_of
from mae.settings.choices import TASK_CHOICES, TIMM
from mae.weights import candidates, model_zoo, shapes, timm_models
from mae.weights.candidates import some, warn_once
from mae.weights.formats import dino, mmpretrain, ours, published, timm, transformers
from mae.weights.formats.format import Record
from mae.weights.model_zoo import CLASSIFIER, ENCODER, FULL, SEGMENTER

logger = logging.getLogger(__name__)

MAX_HEADER = 1 << 22  # bytes of the names and settings of a .safetensors file; a large model has less than 1 MB
SETTINGS = "args"  # the entry in the metadata of a .safetensors file with the settings of the run, as JSON
SAFETENSORS = ".safetensors"
CONFIG = "config.json"  # of a folder of transformers or timm
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# For files of other libraries that do not record them
ASSUMED_MODEL = (
    "as many attention heads as the model of this size has, GELU, LayerNorm eps 1e-6, a head for one class an image on "
    "the mean of the patches if there is an fc_norm, else on the class token, RGB images with"
)
ASSUMED_PIXELS = "ImageNet's, unless mean and std are given. A folder with preprocessor_config.json records them"
# How libraries name tensors and settings. The first format that matches a file reads it.
FORMATS = {each.name: each for each in (
    ours.FORMAT, published.FORMAT, dino.FORMAT, mmpretrain.FORMAT, transformers.FORMAT, timm.FORMAT,
)}  # fmt: skip
# Tensors that every file has, and the numbers of their axes. With an encoder of the user's code: a class token.
AXES = {shapes.PATCHES: 4, "cls_token": 3, "pos_embed": 3, "blocks.0.norm1.weight": 1}


class Weights(NamedTuple):
    """The tensors of a file under our names, and the settings that it records."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]  # settings of the run that wrote the file, or of its library under our names
    kind: str  # ENCODER, FULL, CLASSIFIER or SEGMENTER
    origin: str  # path or published name, for messages
    format: str = ours.NAME  # a name in FORMATS
    # Whether mean and std have to be given: the configuration of mmpretrain, which is not read, has them.
    needs_statistics: bool = False

    @property
    def trained_by(self) -> str:
        """The method whose loss trained the class token, if the format of the file tells it; else ""."""
        return FORMATS[self.format].trained_by

    @property
    def num_cls_tokens(self) -> int:
        """T, the number of class tokens."""
        return self.tensors["cls_token"].shape[1]

    @property
    def learned_pos_embed(self) -> bool:
        """Whether an autoencoder learned its positions. Published autoencoders with several class tokens did."""
        return bool(self.settings.get("learned_pos_embed", self.num_cls_tokens > 1))

    @property
    def num_classes(self) -> int:
        """Number of classes of the head; 0 without a head."""
        found = shapes.determined({name: tensor.shape for name, tensor in self.tensors.items()})
        recorded = None if "probe" in found else self.settings.get("nb_classes")  # of a probe with other tensors
        return recorded or found["nb_classes"]


def read(name: Path | str, rank: int | None = None) -> Weights:
    """Reads weights.

    Args:
        name: a file of this library, of the published code, of mmpretrain or timm; a folder of transformers or timm, or
            a sharded checkpoint; or a published name, which is downloaded. FILE#MODEL is one of several models in a
            file, such as FILE#model_ema. A model of timm is timm:NAME, or FILE#timm:NAME.
        rank: of the low-rank updates of the model; 0: none; None: that of the file. Updates of a file that have another
            rank are merged into its weights.

    Raises:
        CheckpointError: the file is damaged, has no weights of a Vision Transformer, or has NaN or infinite weights.
        ValueError: the file or name does not exist, or can't be downloaded.
    """
    file, model = path_and_model(name) if "#" in str(name) else (Path(name), "")
    if (model or str(name)).startswith(TIMM):
        return _read_timm(str(name), file if model else None)
    path = file if file.exists() else _download(str(name), file)
    if path == file and file.parts[0] == model_zoo.OWNER:
        warn_once(f"the local {file} is read, and not the model of this name on the Hugging Face Hub")
    state, record = _open_folder(path) if path.is_dir() else _read_file(path)
    has_config = path.suffix in (SAFETENSORS, ".bin") and (path.parent / CONFIG).is_file()
    if has_config and path.is_file() and not record.is_ours:
        state, record = _open_folder(path.parent, path)  # of another library, whose folder has the settings
    record = record._replace(args=encoders.renamed(record.args))
    found = candidates.weights_of(state, str(file), model, _keeps_names(record.args), _prefix_of)
    file_format = next(each for each in FORMATS.values() if each.matches(record, found.keys()))
    try:
        tensors = file_format.tensors(record, found)
    except (KeyError, RuntimeError) as error:  # query, key and value can't be concatenated
        raise CheckpointError(f"{path}: its weights are inconsistent: {' '.join(str(error).split())}") from error
    sizes = {key: tensor.shape for key, tensor in tensors.items()}
    try:
        settings = file_format.settings(record, sizes)
    except Exception as error:  # of another structure
        raise _unreadable(record.folder or path, error) from error
    if missing := _missing(sizes, settings):
        has = some(map(str, found)) or "no tensors with known names"
        raise CheckpointError(f"{path} contains no weights of a Vision Transformer: it has no {missing}, but {has}")
    if invalid := _first_invalid(settings):
        raise CheckpointError(f"{path}: its recorded {invalid}, {str(settings[invalid])[:80]}, is invalid")
    checkpoint.require_finite(tensors, str(name), "its run diverged, or the file is damaged; give another file")
    of_file = settings.get("lora")
    if of_file and rank not in (None, of_file):
        logger.info(f"{name}: its low-rank updates of rank {of_file} are merged into its weights")
        tensors = lora.merged(tensors, of_file, settings.pop("lora_alpha", None))
        del settings["lora"]
    records_mean = settings.get("mean") is not None
    needs_statistics = file_format.name == mmpretrain.NAME and not (records_mean or model_zoo.row_of(str(name)))
    if not (record.is_ours or model_zoo.row_of(str(path))):
        _warn_of_assumptions(path, settings, needs_statistics)
    return Weights(tensors, settings, _kind(sizes, settings), str(name), file_format.name, needs_statistics)


def _keeps_names(args: Mapping[str, Any]) -> bool:
    """Whether the tensors are those of user code, which `mae.build` requires, or of a probe on a model of timm."""
    is_of_user = any(args.get(name) is not None for name in ("encoder", "model_class"))
    return is_of_user or str(args.get("model")).startswith(TIMM)


def _prefix_of(prefix: str, names: Collection[str]) -> str:
    for each in FORMATS.values():
        prefix = each.prefix(prefix, names)
    return prefix


def _missing(sizes: Mapping[str, torch.Size], settings: Mapping[str, Any]) -> str:
    """Returns the first tensor of a Vision Transformer that a file does not have; "" if it has all."""
    if str(settings.get("model")).startswith(TIMM):  # a probe of this library
        return ""
    names = AXES if settings.get("encoder") is None else ["cls_token"]
    return next((f"{key} of {AXES[key]} axes" for key in names if len(sizes.get(key, ())) != AXES[key]), "")


def _read_timm(name: str, file: Path | None) -> Weights:
    """Reads a model of timm, from a file or from its hub."""
    tensors = None
    if file:
        found = candidates.tensors_of(_read_file(file)[0])
        tensors = {re.sub(f"^{candidates.WRAPPERS}", "", key): tensor for key, tensor in found.items()}
        if not tensors:
            raise CheckpointError(f"{file} contains no weights")
        checkpoint.require_finite(tensors, name, "give another file")
    tensors, settings = timm_models.load(name.rpartition(TIMM)[2], tensors, name)
    return Weights(tensors, settings, ENCODER, name, timm.NAME)


def _warn_of_assumptions(path: Path, settings: Mapping[str, Any], needs_statistics: bool) -> None:
    """Logs what a file of another library does not record."""
    if not settings.keys() - {"label_names"}:
        statistics = "the given mean and std" if needs_statistics else "ImageNet's mean and std"
        folder = "" if needs_statistics else f". A folder with {CONFIG} records them"
        warn_once(f"{path} records no settings. Assumed are: {ASSUMED_MODEL} {statistics}{folder}")
    elif settings.get("mean") is None:
        warn_once(f"{path} records no mean and std. Assumed are: {ASSUMED_PIXELS}")


def path_and_model(name: Path | str) -> tuple[Path, str]:
    """Splits FILE#MODEL. MODEL is "" without a suffix, or if there is a file or folder with the complete name."""
    text, is_split, model = str(name).rpartition("#")
    return (Path(text), model) if is_split and text and not Path(name).exists() else (Path(name), "")


def _download(name: str, file: Path) -> Path:
    if model_zoo.is_of_hub(file):
        fetch = model_zoo.fetch_from_hub
    elif file.suffix or len(file.parts) > 1:
        raise CheckpointError(f"there is no file {name}{model_zoo.advice(name)}")
    else:
        fetch = model_zoo.fetch
    # A download may take longer than --dist_timeout. Another machine may have a disk of its own.
    host, path = parallel.from_rank_0(lambda: (platform.node(), fetch(str(file))))
    return path if platform.node() == host else fetch(str(file))


def _first_invalid(settings: Mapping[str, Any]) -> str | None:
    """Returns the name of a setting that is used and has a wrong type."""
    for name in names_of(ModelSpec, ImageSpec):
        value = settings.get(name)
        sides = value if isinstance(value, list | tuple) else [value]
        if value is not None and not (
            fits(name, value) and (name not in SIZES or (len(sides) in (1, 2) and min(sides) > 0))
        ):
            return name
    return None


def _open_folder(folder: Path, file: Path | None = None) -> tuple[dict[str, Any], Record]:
    """Reads a folder of transformers, of timm, or of a sharded run.

    Args:
        file: the file with the weights. A file that contains a part of them stands for all parts.
    """
    if (folder / checkpoint.STATE).is_file():
        state = sharded_state.gather(folder)
        return state["model"], Record(folder, True, state["args"])
    present = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not file and len(present) > 1:
        logger.info(f"{folder}: {present[0].name} is read, and not {', '.join(other.name for other in present[1:])}")
    chosen = file or next(iter(present), None)
    if chosen is None:
        run_directory.refuse(folder)
        raise CheckpointError(f"{folder} is a folder without model.safetensors or pytorch_model.bin; give a file")
    try:
        indices = [chosen] if chosen.suffix == ".json" else [other for other in present if other.suffix == ".json"]
        splits = (sorted(set(json.loads(read_file(index))["weight_map"].values())) for index in indices)
        parts = next((parts for parts in splits if chosen in indices or chosen.name in parts), [chosen.name])
        config = dict(json.loads(read_file(folder / CONFIG)))
    except Exception as error:  # of another structure
        raise _unreadable(folder, error) from error
    state = dict[str, Any]()
    args = dict(config.get("settings") or {})  # of `save_pretrained` of this library
    for part in parts:
        tensors, recorded = _read_file(folder / Path(part).name)
        state |= tensors
        args |= recorded.args
    is_ours = "model" in args or isinstance(state.get("model"), dict)
    return state, Record(file or folder, is_ours, args, folder, config, state.get("meta"))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: its configuration can't be read: {error}")


def _read_file(path: Path) -> tuple[dict[str, Any], Record]:
    """Returns the content of a file: its tensors, and other entries if they are not in a .safetensors file."""
    if path.suffix == SAFETENSORS:
        tensors, args = _read_safetensors(path)
        return tensors, Record(path, bool(args), args)
    state = checkpoint.read(path)
    args = dict(state["args"])
    if args.get("task") not in (None, *TASK_CHOICES):  # a flag of forks, such as the name of a run of RETFound
        del args["task"]
    return state, Record(path, isinstance(state.get("model"), dict), args, meta=state.get("meta"))


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with open_file(path) as file:  # a regular file
            checkpoint.check_file(file)
            file.seek(0)
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"its header has {size:,} bytes, and at most {MAX_HEADER:,} are read")
        with safetensors.safe_open(path, "pt") as archive:
            settings = dict(json.loads((archive.metadata() or {}).get(SETTINGS, "{}")))
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    return tensors, settings


def _kind(sizes: Mapping[str, torch.Size], settings: Mapping[str, Any]) -> str:
    if shapes.PIXEL_HEAD in sizes:
        return SEGMENTER
    if any(name.startswith("head.") for name in sizes):
        return CLASSIFIER
    # A decoder that does not predict pixels can't reconstruct. Shapes do not show it for an encoder of the user's code.
    width = sizes["decoder_pred.weight"][0] if sizes.get("decoder_pred.weight") else 0
    expected = width if settings.get("encoder") or shapes.PATCHES not in sizes else math.prod(sizes[shapes.PATCHES][1:])
    return FULL if settings.get("predicts_pixels") is not False and width and width == expected else ENCODER
