"""The settings that a run takes from the file of weights that it starts from, or evaluates."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from mae import settings
from mae.data import transforms
from mae.encoders import class_named, name_of
from mae.pooling import OF_TIMM, Pooling, pooling_of
from mae.probes import pools_tokens
from mae.settings import EVALUATE, TRAIN, ImageSpec
from mae.settings.arguments import in_words
from mae.settings.choices import BOTH, CLASS_TOKEN, PATCHES
from mae.settings.fields import SPLIT
from mae.settings.images import unused_crops
from mae.settings.run import ARGUMENTS, FLIPS, TAKEN
from mae.user_code import plain_encoder, runs_code
from mae.weights import model_settings, reading
from mae.weights.formats import dino

logger = logging.getLogger(__name__)


def classifier_settings(
    file: reading.Weights | None, given: Mapping[str, Any], explicit: frozenset[str], purpose: str = EVALUATE,
    left_out: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Returns the settings that a file gives a run of supervised training or evaluation: those that are not explicit.

    Mean, std, crop ratio and number of class tokens have their final values. A warning names each explicit flag that
    differs from the file. The head and the data determine the number of classes.

    Args:
        file: the file to start from or to evaluate, if any.
        given: the settings of the run.
        explicit: the names of the explicit ones.
        purpose: EVALUATE, or TRAIN for a new head. Then the settings of the task are not taken from the file, and its
            crops only if it is a file of this library; the crops of other libraries are about evaluation.
        left_out: settings that are not taken from the file.
    """
    found: dict[str, Any] = {}
    if file:
        dataset = str(file.settings.get("dataset"))
        if runs_code(dataset) and not any(given.get(name) for name in settings.DATASETS):
            raise ValueError(
                f"{file.origin} records a `dataset` that runs code: give {in_words({'dataset': dataset})}, or other "
                f"data"
            )
        recorded = model_settings.classifier_settings(file)
        recorded = {name: value for name, value in recorded.items() if name not in left_out}
        found = settings_of_file(file, given, explicit, recorded, purpose)
    now = {**given, **found}
    crop_pct = now.get("crop_pct") or transforms.default_crop_pct(ImageSpec.of(now).input_size)
    num_cls_tokens = now.get("num_cls_tokens") or (file.num_cls_tokens if file else 1)
    return {**found, "crop_pct": crop_pct, "num_cls_tokens": num_cls_tokens}


def pooling_settings(
    file: reading.Weights | None, given: Mapping[str, Any], explicit: frozenset[str]
) -> dict[str, Any]:
    """Returns `global_pool` and `pool` of a run on pooled features: as given, or by `pooling_of`. It logs the pooling.

    Raises:
        ValueError: both are given, and contradict each other; or one is given for a model of timm. A run that resumes
            has both from its checkpoint.
    """
    of_file = model_settings.classifier_settings(file) | {"uniformity": file.settings.get("uniformity") if file else 0}
    if pools_tokens(of_file.get("probe")):  # the head, which pools, is not built
        of_file["nb_classes"] = 0
    pooling = pooling_of(of_file, file.trained_by if file else "")
    if pooling.name == OF_TIMM:
        unused = sorted(explicit & {"global_pool", "pool"})
        # A checkpoint from which a run resumes has them, and a program may give all settings.
        if len(unused) == 1 and not given.get("resume"):
            raise ValueError(f"`{unused[0]}` has no effect on {of_file['model']}, a model of timm: omit it")
        logger.info(f"features: {pooling}")
        return {"global_pool": given["global_pool"], "pool": given["pool"]}
    if given["pool"]:
        if "global_pool" in explicit and given["global_pool"] != (given["pool"] == PATCHES):
            raise ValueError(
                f"pool={given['pool']} and global_pool={given['global_pool']} are one setting: give one of them, and "
                f"none for a run that resumes, which has its own"
            )
        pooling = Pooling(given["pool"], "as given")
    elif "global_pool" in explicit:
        pooling = Pooling(PATCHES if given["global_pool"] else CLASS_TOKEN, "as given")
    logger.info(f"features: {pooling}")
    return {"global_pool": pooling.name == PATCHES, "pool": BOTH if pooling.name == BOTH else None}


def settings_of_file(
    file: reading.Weights, given: Mapping[str, Any], explicit: frozenset[str], recorded: Mapping[str, Any],
    purpose: str,
) -> dict[str, Any]:  # fmt: skip
    """Returns settings as `classifier_settings`, without those that the model of a classifier determines.

    Raises:
        ValueError: the low-rank updates of the file would have another scale.
    """
    model_settings.require_scale(file, given["lora_alpha"] if "lora_alpha" in explicit else None)
    also = [*FLIPS] if purpose == TRAIN else []
    if given.get("eval") and given.get("val_fraction") and "val_fraction" in file.settings:
        # The images that were held out from the training of the file, or a warning that it held out none.
        also = settings.names_with(SPLIT) if file.settings["val_fraction"] else ["val_fraction"]
    left_out = {"nb_classes", "mean", "std"}
    if purpose == TRAIN and (file.format == dino.NAME or "model" not in file.settings):  # of another library
        left_out |= {"crop", "crop_pct"}
    taken = TAKEN[purpose] & given.keys() - left_out
    of_file = {**recorded, **{name: file.settings[name] for name in also if name in file.settings}}
    of_file = {name: value for name, value in of_file.items() if name in taken}
    for used, made in _changes(given, explicit, of_file):
        logger.warning(f"{used} is used, and {file.origin} was made {made}")
    found = settings.taken_from(of_file, given, explicit, purpose)
    now = {**given, **found}
    changed = {
        name: now[name]
        for name in sorted(of_file)
        if settings.differs(name, now[name], settings.effective(given, name))
    }
    if changed:
        logger.info(f"settings of {file.origin}: {in_words(changed)}")
    if "crop" in changed and (unused := unused_crops(now["crop"], explicit)):
        logger.warning(f"no effect with crop=none: {' '.join(f'`{name}`' for name in unused)}")
    images = ImageSpec.of(now)
    if purpose == EVALUATE and "crop_pct" in now and now["crop_pct"] is None:
        found["crop_pct"] = model_settings.crop_pct_of_earlier_version(file, images.input_size)
    found |= {name: recorded[name] for name in ("layer_norm_eps", "interpolation") if recorded.get(name)}  # no flags
    mean, std = model_settings.statistics(file, images.in_chans, images.mean, images.std)
    return {**found, "mean": mean, "std": std}


def _changes(
    given: Mapping[str, Any], explicit: frozenset[str], recorded: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    for name in sorted(explicit & {*recorded, ARGUMENTS}):
        current = given[name]
        value = recorded.get(name)
        if name == ARGUMENTS:  # those that are given; of another encoder, those that both have
            ours, known = ({text.partition("=")[0]: text for text in of or []} for of in (current, value))
            is_same = recorded.get("encoder") == given["encoder"]
            keys = sorted(key for key in ours if key in known or is_same)
            current = [ours[key] for key in keys]
            value = [known[key] for key in keys if key in known]
        if settings.differs(name, current, value) and not (name == "encoder" and _adapts(current, value)):
            before = f"without `{name}`" if value is None else f"with {in_words({name: value})}"
            yield in_words({name: current}), before


def _adapts(encoder: str, recorded: str | None) -> bool:
    """Whether a mix-in that the user names adds adapters to an encoder. The features at the start are the same."""
    with suppress(ValueError):  # a class in a function can't be imported
        return name_of(plain_encoder(class_named(encoder))) == recorded
    return False
