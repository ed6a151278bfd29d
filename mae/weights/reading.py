"""Reads weights: from a checkpoint file of any known format, or by a published name.

The names of the tensors determine the kind of a file: an encoder, an encoder with a decoder, a classifier, or a
segmentation model.
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from mae import parallel
from mae.checkpoints import checkpoint, sharded
from mae.checkpoints.checkpoint import CheckpointError
from mae.data.transforms import channel_statistics
from mae.files.untrusted import open_file, read_file
from mae.positions import Size, to_pair
from mae.settings import SIZES, ImageSpec, ModelSpec, fits, names_of
from mae.settings.choices import TASK_CHOICES, default_crop_pct, published_crop_pct
from mae.weights import candidates, foreign_settings, model_zoo, shapes
from mae.weights.candidates import some
from mae.weights.conversion import to_ours
from mae.weights.model_zoo import CLASSIFIER, ENCODER, FULL, SEGMENTER

logger = logging.getLogger(__name__)

MAX_HEADER = 1 << 22  # bytes of the names and settings of a .safetensors file; a large model has less than 1 MB
SETTINGS = "args"  # the entry in the metadata of a .safetensors file with the settings of the run, as JSON
USUAL = ("", "model", "state_dict")  # names of the weights in published files
CONFIG = "config.json"  # of a folder of transformers or timm
BARE = "bare"  # entry in the settings of a file of another library: what it does not record, a key of ASSUMED
PIXELS = "mean and std"
ASSUMED = {
    "settings": "as many attention heads as the model of this size has, GELU, LayerNorm eps 1e-6, a head on the mean "
    "of the patches if there is an fc_norm, else on the class token, RGB images with ImageNet's mean and std. A "
    f"folder with {CONFIG} records them",
    PIXELS: "ImageNet's, unless mean and std are given. A folder with preprocessor_config.json records them",
}
# Tensors of models that this library does not have, as patterns of their names.
UNSUPPORTED = {
    r"patch_embed\.0\.proj\.weight": "a patch projection for each group of channels",
    r"(.*\.)?(reg_token|register_tokens)": "register tokens",
    r"(.*\.)?(dist_token|distillation_token)": "a distillation token",
    r"(norm_pre|backbone\.pre_norm)\..*": "a norm before its blocks, as the models of CLIP have (timm: pre_norm, "
    "often with quick_gelu)",
}


class Weights(NamedTuple):
    """The tensors of a file under our names, and the settings that it records."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]  # settings of the run that wrote the file, or converted by `foreign_settings`
    kind: str  # ENCODER, FULL, CLASSIFIER or SEGMENTER
    source: str  # path or published name, for messages

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """(rows, columns) of the patch grid of the position table; None if the file does not record it.

        A recorded image size that does not fit the table, as of a file that was fine-tuned at another size, is ignored.
        """
        if self.settings.get("input_size") is None or not {"pos_embed", shapes.PATCHES} <= self.tensors.keys():
            return None
        height, width = to_pair(self.settings["input_size"])
        p, q = self.tensors[shapes.PATCHES].shape[2:]
        length, grid = self.tensors["pos_embed"].shape[1], (height // p, width // q)
        return grid if math.prod(grid) in (length, length - self.num_cls_tokens) else None

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
        return shapes.determined(self.tensors)["nb_classes"]


def read(name: Path | str) -> Weights:
    """Reads weights.

    Args:
        name: a file of this library, of the published code, of mmpretrain or timm; a folder of transformers or timm, or
            a sharded checkpoint; or a published name, which is downloaded. FILE#MODEL is one of several models in a
            file, such as FILE#model_ema.

    Raises:
        CheckpointError: the file is damaged, has no weights of a Vision Transformer, or has NaN or infinite weights.
        ValueError: the file or name does not exist, or can't be downloaded.
    """
    file, model = path_and_model(name)
    path = file
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise CheckpointError(f"there is no file {name}{model_zoo.advice(str(name))}")
        parallel.from_rank_0(lambda: model_zoo.fetch(str(file)))  # a download may take longer than --dist_timeout
        path = model_zoo.fetch(str(file))
    content, settings = _read_folder(path) if path.is_dir() else _read_file(path)
    if settings.get(BARE) and path.suffix in (".safetensors", ".bin") and (path.parent / CONFIG).is_file():
        content, settings = _read_folder(path.parent, path)
    missing = settings.pop(BARE, None)
    has_own_encoder = settings.get("encoder") is not None  # which `mae.build` requires
    has_own_code = has_own_encoder or settings.get("model_class") is not None
    content = _weights_of(content, file, model, has_own_code)
    try:
        tensors = to_ours(content)
    except (KeyError, RuntimeError) as error:  # query, key and value can't be concatenated
        raise CheckpointError(f"{path}: its weights are inconsistent: {' '.join(str(error).split())}") from error
    for pattern, part in UNSUPPORTED.items() if "model_class" not in settings and not has_own_encoder else ():
        if names := [name for name in tensors if re.fullmatch(pattern, name)]:
            raise CheckpointError(f"{path} has {part} ({names[0]}), which this library does not support")
    if not has_own_encoder and not {shapes.PATCHES, "blocks.0.norm1.weight"} <= tensors.keys():
        raise CheckpointError(f"{path} contains no weights of a Vision Transformer: {some(map(str, content))}")
    for key in ("cls_token",) if has_own_encoder else ("cls_token", "pos_embed"):
        if key not in tensors:
            raise CheckpointError(f"{path} has no {key}, which the models of this library have")
    of_patches = {} if has_own_encoder else {shapes.PATCHES: 4, "pos_embed": 3, "decoder_pos_embed": 3}
    for key, axes in {"cls_token": 3, **of_patches}.items():
        if key in tensors and (tensors[key].ndim != axes or not tensors[key].is_floating_point()):
            shape = f"{tensors[key].dtype} {tuple(tensors[key].shape)}"
            raise CheckpointError(f"{path}: its {key} is {shape}, which does not fit a Vision Transformer")
    if "channel_order" in settings:
        tensors, settings = _in_rgb(tensors, settings)
    size = settings.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:  # timm's train.py records (channels, height, width)
        settings = {**settings, "input_size": foreign_settings.side_or_sides(size[1:])}
    _check_settings(path, settings)
    checkpoint.require_finite(tensors, str(name), "its run diverged, or the file is damaged; give another file")
    if missing and path == file:  # the settings of published files are known
        warn_once(f"{path} records no {missing}. Assumed are: {ASSUMED[missing]}")
    return Weights(tensors, settings, _kind(tensors, settings), str(name))


def path_and_model(name: Path | str) -> tuple[Path, str]:
    """Splits FILE#MODEL. MODEL is "" without a suffix, or if there is a file or folder with the complete name."""
    text, is_split, model = str(name).rpartition("#")
    return (Path(text), model) if is_split and text and not Path(name).exists() else (Path(name), "")


def _weights_of(content: dict[str, Any], file: Path, model: str, keeps_names: bool) -> dict[str, Tensor]:
    """Returns the weights of a model in a file. Lines name other models, what is not read, and changed names."""
    found = list(candidates.models(content, keeps_names))
    chosen = candidates.choose(found, model)
    names = ", ".join(other.name for other in found if other.name) or "none"
    if model and not chosen:
        raise CheckpointError(f"{file} has no weights named {model}; it has {names}")
    if not chosen:  # `read` names what is missing
        inner = next((content[key] for key in candidates.PREFERRED if isinstance(content.get(key), dict)), content)
        return {key: t for key, t in inner.items() if isinstance(key, str) and isinstance(t, Tensor)}
    if chosen.wrappers or chosen.name not in USUAL:
        without = f", without {', '.join(chosen.wrappers)} in their names" if chosen.wrappers else ""
        logger.info(f"{file}: its weights {chosen.name or 'at the top'} are read{without}")
    others = [f"{file}#{other.name}" for other in found if other.name != chosen.name]
    if others and not model:
        warn_once(f"{file} has several models; {chosen.name or 'that at the top'} is read. For another, give "
                  f"{' or '.join(others)}")  # fmt: skip
    if chosen.unread:
        count = f"{len(chosen.unread)} tensors beside {chosen.name}"
        warn_once(f"{file}: {count} are not read ({some(chosen.unread)})")
    return chosen.tensors


def _in_rgb(tensors: dict[str, Tensor], settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights and settings of a model of mmpretrain for RGB images, with a mean and std for each channel.

    `channel_order` in the settings is the order in which the model gets its channels, which has a meaning for three.
    """
    channels, p, q = tensors[shapes.PATCHES].shape[1:]
    is_bgr = settings["channel_order"] == "bgr" and channels == 3
    settings = {name: value for name, value in settings.items() if name != "channel_order"}
    settings |= {name: settings[name] * channels for name in ("mean", "std") if len(settings[name]) == 1}
    if not is_bgr:
        return tensors, settings
    tensors = {**tensors, shapes.PATCHES: tensors[shapes.PATCHES].flip(1)}
    for name in ("decoder_pred.weight", "decoder_pred.bias"):  # pixels of a patch, the channel last
        if name in tensors and len(tensors[name]) == p * q * channels:
            tensors[name] = tensors[name].unflatten(0, (p * q, channels)).flip(1).flatten(0, 1)
    return tensors, settings | {name: settings[name][::-1] for name in ("mean", "std")}


@cache  # some scripts read a file twice
def warn_once(message: str) -> None:
    """Logs a warning, unless it was logged before."""
    logger.warning(message)


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises CheckpointError if a setting that is used has a wrong type."""
    for name in names_of(ModelSpec, ImageSpec):
        value = settings.get(name)
        sides = value if isinstance(value, list | tuple) else [value]
        if value is not None and not (
            fits(name, value) and (name not in SIZES or (len(sides) in (1, 2) and min(sides) > 0))
        ):
            raise CheckpointError(f"{path}: its recorded {name}, {str(value)[:80]}, is invalid")


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the content of a file, with its tensors under their own names, and the settings that it records."""
    if path.suffix == ".safetensors":
        try:
            checkpoint.refuse_text(path)
            with open_file(path) as header:  # of a regular file only
                size = int.from_bytes(header.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"its header has {size:,} bytes, and at most {MAX_HEADER:,} are read")
            with safetensors.safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
                if not isinstance(settings, dict):
                    raise ValueError(f"its settings are {settings!r}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, settings or {BARE: "settings"}
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    state = checkpoint.read(path)
    settings = state.get("args")
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("task") not in (None, *TASK_CHOICES):  # a flag of forks, such as the name of a run of RETFound
        settings = {name: value for name, value in settings.items() if name != "task"}
    try:
        settings = {**settings, **foreign_settings.of_timm_run(settings)}
        if isinstance(state.get("meta"), dict) and not settings:  # an export of this library has its own settings
            settings = foreign_settings.of_mmpretrain(state["meta"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Files with "model" have the layout of the published code, whose models this library has.
    is_foreign, is_bare = not isinstance(state.get("model"), dict), not settings.keys() - {"label_names"}
    missing = "settings" if is_bare else PIXELS if settings.get("mean") is None else None
    return state, {**settings, **({BARE: missing} if is_foreign and missing else {})}


def _read_folder(path: Path, file: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Like `_read_file`, for a folder of transformers, of timm, of `save_pretrained` here, or of a sharded run.

    Args:
        file: the file with the weights. A file that contains a part of them stands for all parts.
    """
    if (path / checkpoint.STATE).is_file():
        state = sharded.gather(path)
        return {"model": state["model"]}, state["args"] if isinstance(state.get("args"), dict) else {}
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    present = [path / name for name in names if (path / name).is_file()]
    if not file and len(present) > 1:
        logger.info(f"{path}: {present[0].name} is read, and not {', '.join(other.name for other in present[1:])}")
    file = file or next(iter(present), None)
    if file is None:
        checkpoint.refuse_run_directory(path)
        raise CheckpointError(f"{path} is a folder without model.safetensors or pytorch_model.bin; give a file")
    try:
        indices = [file] if file.suffix == ".json" else [other for other in present if other.suffix == ".json"]
        splits = (sorted(set(json.loads(read_file(index))["weight_map"].values())) for index in indices)
        parts = next((parts for parts in splits if file in indices or file.name in parts), [file.name])
        files = [path / Path(name).name for name in parts]
        recorded = foreign_settings.read_folder(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration can't be read: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration is not that of transformers or timm: {error}") from error
    content: dict[str, Any] = {}
    for file in files:
        tensors, own = _read_file(file)
        content, recorded = content | tensors, recorded | {name: own[name] for name in own.keys() - {BARE}}
    return content, {**recorded, **({} if recorded.get("mean") or "model" in recorded else {BARE: PIXELS})}


def _kind(tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> str:
    if shapes.PIXEL_HEAD in tensors:
        return SEGMENTER
    if any(name.startswith("head.") for name in tensors):
        return CLASSIFIER
    # A decoder that does not predict pixels can't reconstruct. Shapes do not show it for an encoder of the user's code.
    width = len(tensors.get("decoder_pred.weight", ()))
    expected = width if settings.get("encoder") or shapes.PATCHES not in tensors else tensors[shapes.PATCHES][0].numel()
    return FULL if settings.get("predicts_pixels") is not False and width and width == expected else ENCODER


def statistics(
    file: Weights | None, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Returns `mean` and `std`. If one is None, it is taken from the run of a file with the same number of channels.

    A warning names each value that differs from the value of that run.
    """
    records = file is not None and file.settings.keys() & {"in_chans", "mean", "std"}
    theirs_in_chans = shapes.in_chans(file.tensors, file.settings) if file else None
    if not file or not records or theirs_in_chans != in_chans:
        return mean, std
    theirs = file.settings.get("mean"), file.settings.get("std")
    chosen = mean or theirs[0], std or theirs[1]
    pairs = zip(channel_statistics(in_chans, *chosen), channel_statistics(in_chans, *theirs), strict=True)
    for flag, (used, recorded) in zip(("--mean", "--std"), pairs, strict=True):
        if used != recorded:
            now, then = (" ".join(f"{value:g}" for value in values) for values in (used, recorded))
            logger.warning(f"{flag} {now} is used, and {file.source} was made with {flag} {then}")
    return chosen


def crop_pct_of_earlier_version(file: Weights, input_size: Size) -> float | None:
    """Returns the crop ratio of the evaluation of a trained head whose file records none: the published default.

    For other files it returns None. A file is named once, if the default has changed since.
    """
    if file.kind not in (CLASSIFIER, SEGMENTER) or file.settings.get("crop_pct") is not None:
        return None
    crop_pct = published_crop_pct(input_size)
    if crop_pct != default_crop_pct(input_size):
        warn_once(f"{file.source} records no crop ratio, and {crop_pct} is used, the default of its time")
    return crop_pct
