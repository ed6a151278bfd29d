"""Loads weights into models, for each use: which differences between a file and a model are errors."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mae import lora
from mae.checkpoints.checkpoint import CheckpointError
from mae.probes import LINEAR
from mae.settings.arguments import advice
from mae.settings.choices import CLASSIFICATION
from mae.weights import model_zoo, shapes, timm_models
from mae.weights.candidates import some
from mae.weights.fitting import DECODER, ENCODER, HEAD, TABLES, Fit, fit, part_of
from mae.weights.reading import Weights, read
from models_timm import TimmEncoder

logger = logging.getLogger(__name__)

# Positions are interpolated and compared, and the data determine the number of classes.
NOT_OF_MODEL = ("input_size", "learned_pos_embed", "nb_classes")
FC_NORM = {"fc_norm.weight", "fc_norm.bias"}  # the norm of pooled patch tokens, in place of `norm`
NORM = {"norm.weight", "norm.bias"}  # the norm of the tokens
MODULES = {  # of models_mae.MaskedAutoencoderViT
    "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "mask_token", "decoder_pos_embed", "decoder_embed",
    "decoder_blocks", "decoder_norm", "decoder_pred",
}  # fmt: skip
ADDED_TO_BLOCK = re.compile(  # to models_vit.Block
    r"(decoder_)?blocks\.\d+\.(?!(norm[12]|attn\.(qkv|proj|q_norm|k_norm)|mlp\.fc[12])\.(weight|bias)$)"
)
SCRIPTS = {model_zoo.CLASSIFIER: "main_finetune", model_zoo.PROBE: "main_linprobe", model_zoo.SEGMENTER: "main_segment"}
LIBRARY = ("models_mae", "models_vit", "mae.inference.classes")  # a user's class may have the name of one of theirs


def require_fit(model: nn.Module, weights: Weights, fitted: Fit, optional: Collection[str] = ()) -> None:
    """Raises an error for the tensors that `fit` did not load.

    Args:
        optional: names that may be missing or unexpected. Another shape is an error for these, too.

    Raises:
        CheckpointError: it names the tensors, and the settings of the model that differ from those of the file.
        ValueError: the file has a model of timm, and the model is another one.
    """
    if not isinstance(model, TimmEncoder):
        timm_models.require_other(str(weights.settings.get("model")))
    reshaped = fitted.missing & fitted.unexpected
    missing, unexpected = (names - reshaped - {*optional} for names in (fitted.missing, fitted.unexpected))
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
            differing = _differing(weights, model.state_dict())
            if not FC_NORM & (missing | unexpected):
                differing.pop("global_pool", None)
            if not any(part_of(name) == HEAD for name in missing | unexpected):
                differing.pop("head", None)
            remedy = f": {advice(differing)}" if differing else ""
            raise CheckpointError(f"{weights.origin} ({weights.kind}): {count} {problem} ({some(names)}){remedy}")


def init_mae(model: Any, weights: Weights) -> None:
    """Loads weights into a `MaskedAutoencoderViT`: all of them, or the encoder only.

    Of a classifier or a segmentation model, it loads the encoder. One that pools patches has no norm of the tokens, so
    that this norm is new.

    Raises:
        CheckpointError: weights of the encoder are missing, or there are unexpected names or shapes; or the file has
            learned positions, and the model has fixed positions.
    """
    name = weights.settings.get("model_class")
    if not _has_class(model, name):
        logger.warning(f"{weights.origin} was trained with the class {name}, and this model lacks its changes")
    left_out = set() if name else _of_classifier(weights)
    tensors = {key: tensor for key, tensor in weights.tensors.items() if key not in left_out}
    fitted = fit(model, weights._replace(tensors=tensors))
    updates = _new_updates(fitted.missing, weights.settings)
    new, dropped = _of_user_code(fitted, weights.settings)
    new -= updates
    if left_out >= FC_NORM:
        new |= NORM & fitted.missing
    if new or dropped:
        _warn_of_user_code(weights, new, dropped)
    optional = new | dropped | updates
    if not model.learned_pos_embed:
        optional |= TABLES  # the model computes them
    decoder = {name for name in model.state_dict() if part_of(name) == DECODER} - optional
    if fitted.missing - fitted.unexpected - optional == decoder:
        logger.warning(f"{weights.origin} contains an encoder only; the decoder starts from random weights")
        optional |= decoder
    require_fit(model, weights, fitted, optional)
    without = f", without {some(left_out)}" if left_out else ""
    logger.info(f"weights from {weights.origin} ({weights.kind}){without}")


def _has_class(model: nn.Module, name: str | None) -> bool:
    """Whether a model has the class of the user's code that a file records, if any."""
    classes = {kind.__name__ for kind in type(model).__mro__ if kind.__module__ not in LIBRARY}
    return not name or re.split("[.:]", name)[-1] in classes


def _of_classifier(weights: Weights) -> set[str]:
    """Returns the names of the weights of a classifier or a segmentation model that are not those of its encoder.

    A file with a decoder is of an autoencoder, whose class may have a head.
    """
    if any(part_of(name) == DECODER for name in weights.tensors):
        return set()
    return {name for name in weights.tensors if part_of(name) == HEAD} | (FC_NORM & weights.tensors.keys())


def has_decoder_for(model: nn.Module, weights: Weights) -> bool:
    """Whether a file has the tensors of the decoder of a model. A user's class may have a decoder of its own."""
    shapes = {name: value.shape for name, value in model.state_dict().items() if part_of(name) == DECODER}
    found = {name: weights.tensors[name].shape for name in shapes if name in weights.tensors}
    return all(found.get(name) == shape for name, shape in shapes.items() if name not in TABLES)


def load_encoder(
    model: Any,
    weights: Weights,
    adapt_input: str = "error",
    classes: Sequence[str] | None = None,
    task: str = CLASSIFICATION,
    has_ids: bool = False,
) -> bool:
    """Loads an encoder into a classifier, and the head if the file has a head with the same classes.

    Args:
        model: a `models_vit.VisionTransformer`.
        adapt_input: as in `fit`.
        classes: the classes of the model. A head of other classes, or of other features, is not loaded. None: no head
            is loaded.
        task: the task of the model (--task). A head of a different task is not loaded.
        has_ids: the classes are integer ids, which count the outputs of a head without names.

    Returns:
        Whether the head was loaded.

    Raises:
        CheckpointError: weights are missing, or there are unexpected names or shapes; or as in `fit`.
    """
    has_head = any(part_of(name) == HEAD for name in weights.tensors)
    takes_head = has_head and classes is not None and _has_same_head(model, weights, classes, task, has_ids)
    fitted = fit(model, weights, (ENCODER, HEAD) if takes_head else (ENCODER,), adapt_input)
    optional = (FC_NORM & fitted.missing) | _new_updates(fitted.missing, weights.settings)
    if "fc_norm.weight" in model.state_dict():
        optional |= NORM
    if adapt_input == "skip":
        optional |= {name for name in fitted.missing if name.startswith("patch_embed.")}
    new, dropped = _of_user_code(fitted, weights.settings)
    new = new - optional if model.encoder_name != weights.settings.get("encoder") else set()  # without this mix-in
    if new or dropped:
        _warn_of_user_code(weights, new, dropped)
    require_fit(model, weights, fitted, optional | new | dropped)
    of_head = ", including the head" if takes_head else ", without its head" if has_head else ""
    logger.info(f"weights from {weights.origin} ({weights.kind}){of_head}")
    return takes_head


def load_classifier(model: Any, weights: Weights) -> None:
    """Loads all weights of a classifier or of a segmentation model.

    Raises:
        CheckpointError: the file has another architecture or several heads, or a class of the user's code.
    """
    _require_one_head(weights)
    if not _has_class(model, name := weights.settings.get("model_class")):
        raise CheckpointError(f"{weights.origin} was trained with model_class={name}, whose changes this model lacks")
    fitted = fit(model, weights)
    require_fit(model, weights, fitted)
    if "pos_embed" in fitted.resized and "input_size" not in weights.settings:
        logger.warning(
            f"{weights.origin} records no input_size, and its positions are interpolated to the "
            f"{model.patch_embed.num_patches} patches of these images: give the input_size that it was trained with"
        )


def read_classifier(name: Path | str, kind: str = model_zoo.CLASSIFIER, rank: int | None = None) -> Weights:
    """Reads a file that must contain a classifier, or with the kinds PROBE and SEGMENTER one of these models.

    Args:
        rank: as in `read`.

    Raises:
        CheckpointError: as in `read`, or the file is of another kind or contains several heads.
    """
    weights = read(name, rank)
    _require_one_head(weights)
    probe = _probe_of(weights)
    found = model_zoo.PROBE if probe else weights.kind
    if found == kind:
        return weights
    if found in SCRIPTS:
        raise CheckpointError(f"{name} is a {f'{probe} {found}'.strip()}: {SCRIPTS[found]}.py evaluates it")
    raise CheckpointError(
        f"{name} has no head of a {kind}: it contains the weights of: {weights.kind}; {SCRIPTS[kind]}.py trains one"
    )


def _probe_of(weights: Weights) -> str:
    """Returns the name of the probe in a file, "" if there is none. Earlier versions recorded True for a linear one."""
    determined = shapes.determined({name: tensor.shape for name, tensor in weights.tensors.items()})
    recorded = {**weights.settings, **shapes.certain(determined)}.get("probe")
    probe = recorded or determined.get("probe") or ""
    return LINEAR if probe is True else probe


def _require_one_head(weights: Weights) -> None:
    """A checkpoint of several learning rates has a head for each, and none of its own."""
    if shapes.FIRST_OF_HEADS in weights.tensors and shapes.PROBE_HEAD not in weights.tensors:
        raise CheckpointError(
            f"{weights.origin} has several heads; give probe.pth in the same folder, which has the best head"
        )


def _has_same_head(model: Any, weights: Weights, classes: Sequence[str], task: str, has_ids: bool) -> bool:
    """Whether the head of a file predicts the classes of a model from the same features."""
    ours, of_file = (
        {name: tensor.shape for name, tensor in tensors.items() if part_of(name) == HEAD}
        for tensors in (model.state_dict(), weights.tensors)
    )
    names = weights.settings.get("label_names") or ()  # of another library, perhaps in another language
    recorded = weights.settings.get("classes") or (names if set(names) & set(classes) else None)
    if has_ids and recorded is None:
        recorded = [str(number) for number in range(weights.num_classes)]
    is_pooled, pools = ("fc_norm.weight" in tensors for tensors in (weights.tensors, model.state_dict()))
    has_same_task = weights.settings.get("task", CLASSIFICATION) == task
    return ours == of_file and recorded in (None, list(classes)) and has_same_task and is_pooled == pools


def _new_updates(missing: Collection[str], settings: Mapping[str, Any]) -> set[str]:
    """Returns the names of the low-rank updates, which are zero, unless the file has updates of its own."""
    return set() if settings.get("lora") else {name for name in missing if name.endswith(lora.PARAMETERS)}


def _added(names: Iterable[str], in_blocks: bool = False) -> set[str]:
    """Returns the names of the weights that the user's code adds to a model, and with `in_blocks` to its blocks."""
    return {
        name for name in names
        if name.partition(".")[0] not in MODULES or (in_blocks and ADDED_TO_BLOCK.match(name))
    }  # fmt: skip


def _of_user_code(fitted: Fit, settings: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Returns the weights that the user's code adds to the model, and those that it had added to the model of the file.

    Args:
        settings: the settings of the file. Without a recorded class, unknown weights are no addition.
    """
    new = _added(fitted.missing - fitted.unexpected, in_blocks=True)
    return new, _added(fitted.unexpected - fitted.missing) if settings.get("model_class") else set()


def _warn_of_user_code(weights: Weights, new: set[str], dropped: set[str]) -> None:
    if of_encoder := {name for name in dropped if part_of(name) != DECODER}:
        name = weights.settings["model_class"]
        logger.warning(f"{weights.origin} was trained with the class {name}: {some(of_encoder)} are not loaded")
    if new:
        logger.warning(f"{weights.origin} has no {some(new)}: they keep their initial values")


def _differing(weights: Weights, ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the settings of the model of a file that differ from those of our model, for a remedy."""
    sizes, our_sizes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights.tensors, ours))
    found = shapes.determined(sizes)
    expected = shapes.determined(our_sizes)
    names = [name for name in found if name not in NOT_OF_MODEL and expected.get(name) is not None]
    different = {name: found[name] for name in names if found[name] not in (None, expected[name])}
    width, depth = shapes.width_and_depth(sizes)
    if (width, depth) != shapes.width_and_depth(our_sizes):
        row = model_zoo.TABLE.get(weights.origin)
        recorded = row.model if row else weights.settings.get("model", f"(of {depth} blocks, {width} wide)")
        prefix = "mae_" if "mask_token" in ours else ""
        model = prefix + str(recorded).removeprefix("mae_")
        different = {"model": model, **different}
    return different
