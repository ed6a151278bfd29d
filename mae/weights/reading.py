"""Reads weights: from a checkpoint file of any known format, or by a published name.

`read` finds the file, takes one of its models (`candidates`), gives the tensors our names (`conversion`), and checks
them.
The names of the tensors determine the kind of a file: an encoder, an encoder with a decoder, a classifier, or a
segmentation model.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from mae import parallel
from mae.checkpoints import checkpoint, run_directory, sharded_state
from mae.checkpoints.checkpoint import CheckpointError
from mae.files.untrusted import open_file, read_file
from mae.settings import SIZES, ImageSpec, ModelSpec, fits, names_of
from mae.settings.choices import TASK_CHOICES, TIMM
from mae.weights import candidates, foreign_settings, model_zoo, shapes, timm_models
from mae.weights.candidates import some, warn_once
from mae.weights.formats import dino
from mae.weights.formats.transformers import to_ours
from mae.weights.model_zoo import CLASSIFIER, ENCODER, FULL, SEGMENTER

logger = logging.getLogger(__name__)

MAX_HEADER = 1 << 22  # bytes of the names and settings of a .safetensors file; a large model has less than 1 MB
SETTINGS = "args"  # the entry in the metadata of a .safetensors file with the settings of the run, as JSON
CONFIG = "config.json"  # of a folder of transformers or timm
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# For files of other libraries that do not record them
ASSUMED_MODEL = (
    "as many attention heads as the model of this size has, GELU, LayerNorm eps 1e-6, a head for one class an image on "
    "the mean of the patches if there is an fc_norm, else on the class token, RGB images with"
)
ASSUMED_PIXELS = "ImageNet's, unless mean and std are given. A folder with preprocessor_config.json records them"
OF_MMPRETRAIN = "backbone.patch_embed.projection.weight"
# Tensors that every file has, and the numbers of their axes. With an encoder of the user's code: a class token.
AXES = {shapes.PATCHES: 4, "cls_token": 3, "pos_embed": 3, "blocks.0.norm1.weight": 1}


class Weights(NamedTuple):
    """The tensors of a file under our names, and the settings that it records."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]  # settings of the run that wrote the file, or converted by `foreign_settings`
    kind: str  # ENCODER, FULL, CLASSIFIER or SEGMENTER
    origin: str  # path or published name, for messages
    needs_statistics: bool = False  # whether mean and std have to be given: another library's configuration has them
    is_foreign: bool = False  # of another library, whose crops are about evaluation

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


class Content(NamedTuple):
    """What a file contains."""

    tensors: dict[str, Any]  # in nested dicts and lists, under the names of the library that wrote the file
    settings: dict[str, Any]
    is_ours: bool  # of this library or the published code, whose models and images are known


def read(name: Path | str) -> Weights:
    """Reads weights.

    Args:
        name: a file of this library, of the published code, of mmpretrain or timm; a folder of transformers or timm, or
            a sharded checkpoint; or a published name, which is downloaded. FILE#MODEL is one of several models in a
            file, such as FILE#model_ema. A model of timm is timm:NAME, or FILE#timm:NAME.

    Raises:
        CheckpointError: the file is damaged, has no weights of a Vision Transformer, or has NaN or infinite weights.
        ValueError: the file or name does not exist, or can't be downloaded.
    """
    file, model = path_and_model(name) if "#" in str(name) else (Path(name), "")
    if (model or str(name)).startswith(TIMM):
        return _read_timm(str(name), file if model else None)
    path = file if file.exists() else _download(str(name), file)
    content = _read_folder(path) if path.is_dir() else _reader(path.suffix)(path)
    is_of_hub = path.suffix in (".safetensors", ".bin") and (path.parent / CONFIG).is_file()
    if is_of_hub and not content.is_ours:  # its folder has the settings
        content = _read_folder(path.parent, path)
    settings = content.settings
    if str(settings.get("model")).startswith(TIMM):  # a probe of this library
        tensors = candidates.tensors_of(content.tensors)
        return Weights(
            tensors, settings, _kind({key: value.shape for key, value in tensors.items()}, settings), str(name)
        )
    # The user's code, which `mae.build` requires, may have any tensors.
    has_encoder = settings.get("encoder") is not None
    has_class = settings.get("model_class") is not None
    found = candidates.weights_of(content.tensors, str(file), model, has_encoder or has_class)
    is_dino = not (content.is_ours or has_encoder) and dino.matches(found)
    try:
        tensors, unused = dino.convert(found) if is_dino else (to_ours(found), [])
        settings = dino.settings_of(tensors, settings) if is_dino else settings
    except (KeyError, RuntimeError) as error:  # query, key and value can't be concatenated
        raise CheckpointError(f"{path}: its weights are inconsistent: {' '.join(str(error).split())}") from error
    if unused:
        logger.info(f"{path}: the features do not depend on {', '.join(unused)}")
    sizes = {name: tensor.shape for name, tensor in tensors.items()}
    for key in ["cls_token"] if has_encoder or is_dino else AXES:
        if len(sizes.get(key, ())) != AXES[key]:
            raise CheckpointError(
                f"{path} contains no weights of a Vision Transformer: it has no {key} of {AXES[key]} axes, but "
                f"{some(map(str, found))}"
            )
    size = settings.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:  # timm's train.py records (channels, height, width)
        settings = {**settings, "input_size": foreign_settings.side_or_sides(size[1:])}
    if invalid := _first_invalid(settings):
        raise CheckpointError(f"{path}: its recorded {invalid}, {str(settings[invalid])[:80]}, is invalid")
    checkpoint.require_finite(tensors, str(name), "its run diverged, or the file is damaged; give another file")
    is_known = content.is_ours or path != file or model_zoo.row_of(str(path)) is not None
    needs_statistics = not is_known and OF_MMPRETRAIN in found and settings.get("mean") is None
    if not is_known:
        _warn_of_assumptions(path, settings, needs_statistics)
    if is_dino and "num_heads" not in content.settings:
        warn_once(f"{path} records no heads. Assumed are: {settings['encoder']}, {dino.HEAD_WIDTH} channels a head")
    is_foreign = is_dino or "model" not in settings
    return Weights(tensors, settings, _kind(sizes, settings), str(name), needs_statistics, is_foreign)


def _read_timm(name: str, file: Path | None) -> Weights:
    """Reads a model of timm, from a file or from its hub."""
    tensors = None
    if file:
        found = candidates.tensors_of(_reader(file.suffix)(file).tensors)
        tensors = {re.sub(f"^{candidates.WRAPPERS}", "", key): tensor for key, tensor in found.items()}
        if not tensors:
            raise CheckpointError(f"{file} contains no weights")
        checkpoint.require_finite(tensors, name, "give another file")
    tensors, settings = timm_models.load(name.rpartition(TIMM)[2], tensors, name)
    return Weights(tensors, settings, ENCODER, name)


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
    if file.suffix or len(file.parts) > 1:
        raise CheckpointError(f"there is no file {name}{model_zoo.advice(name)}")
    parallel.from_rank_0(lambda: model_zoo.fetch(str(file)))  # a download may take longer than --dist_timeout
    return model_zoo.fetch(str(file))


def _reader(suffix: str) -> Callable[[Path], Content]:
    return _read_safetensors if suffix == ".safetensors" else _read_pickle


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


def _read_safetensors(path: Path) -> Content:
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
    return Content(tensors, settings, bool(settings))


def _read_pickle(path: Path) -> Content:
    """Reads a file of torch.save: of this library or the published code, or of timm, mmpretrain or others."""
    state = checkpoint.read(path)
    settings = dict(state["args"])
    if settings.get("task") not in (None, *TASK_CHOICES):  # a flag of forks, such as the name of a run of RETFound
        del settings["task"]
    try:
        settings |= foreign_settings.of_timm_run(settings)
        if isinstance(state.get("meta"), dict) and not settings and not model_zoo.row_of(str(path)):
            settings = foreign_settings.of_mmpretrain(state["meta"])
    except Exception as error:  # of another structure
        raise CheckpointError(f"{path}: its configuration can't be read: {error}") from error
    return Content(state, settings, isinstance(state.get("model"), dict))  # the layout of the published code


def _read_folder(path: Path, file: Path | None = None) -> Content:
    """Reads a folder of transformers, of timm, of `save_pretrained` here, or of a sharded run.

    Args:
        file: the file with the weights. A file that contains a part of them stands for all parts.
    """
    if (path / checkpoint.STATE).is_file():
        state = sharded_state.gather(path)
        return Content({"model": state["model"]}, state["args"], True)
    present = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not file and len(present) > 1:
        logger.info(f"{path}: {present[0].name} is read, and not {', '.join(other.name for other in present[1:])}")
    file = file or next(iter(present), None)
    if file is None:
        run_directory.refuse(path)
        raise CheckpointError(f"{path} is a folder without model.safetensors or pytorch_model.bin; give a file")
    try:
        indices = [file] if file.suffix == ".json" else [other for other in present if other.suffix == ".json"]
        splits = (sorted(set(json.loads(read_file(index))["weight_map"].values())) for index in indices)
        parts = next((parts for parts in splits if file in indices or file.name in parts), [file.name])
        files = [path / Path(name).name for name in parts]
        settings = foreign_settings.read_folder(path)
    except Exception as error:  # of another structure
        raise CheckpointError(f"{path}: its configuration can't be read: {error}") from error
    tensors: dict[str, Any] = {}
    for file in files:
        content = _reader(file.suffix)(file)
        tensors, settings = tensors | content.tensors, settings | content.settings
    return Content(tensors, settings, "model" in settings)


def _kind(sizes: Mapping[str, torch.Size], settings: Mapping[str, Any]) -> str:
    if shapes.PIXEL_HEAD in sizes:
        return SEGMENTER
    if any(name.startswith("head.") for name in sizes):
        return CLASSIFIER
    # A decoder that does not predict pixels can't reconstruct. Shapes do not show it for an encoder of the user's code.
    width = sizes["decoder_pred.weight"][0] if sizes.get("decoder_pred.weight") else 0
    expected = width if settings.get("encoder") or shapes.PATCHES not in sizes else math.prod(sizes[shapes.PATCHES][1:])
    return FULL if settings.get("predicts_pixels") is not False and width and width == expected else ENCODER
