"""Settings of a run that starts from a file of weights, or evaluates it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mae import parallel, settings
from mae.checkpoints import run_directory
from mae.data import transforms
from mae.pooling import CLASS_TOKEN, OF_TIMM, PATCHES, Pooling, pooling_of
from mae.settings import EVALUATE, TRAIN, Run
from mae.settings.arguments import in_words
from mae.settings.choices import ATTENTIVE
from mae.settings.fields import SPLIT
from mae.settings.images import unused_crops
from mae.settings.run import ARGUMENTS, FLIPS, TAKEN
from mae.user_code import import_object, name_of, plain_encoder, runs_code
from mae.weights import model_settings, reading

logger = logging.getLogger(__name__)


def with_initial_weights(run: Run) -> tuple[Run, reading.Weights | None]:
    """Returns the settings of a pre-training, with those of the file of `init_from`, and the file.

    They are unchanged, and there is no file, if the run resumes.
    """
    machine = run.machine
    if parallel.from_rank_0(lambda: run_directory.source(Path(machine.output_dir), machine.resume) is not None):
        return run, None
    file = reading.read(machine.init_from)
    return with_settings_of(file, run, model_settings.autoencoder_settings(file), TRAIN), file


def with_recorded_settings(
    run: Run, file: reading.Weights | None, recorded: Mapping[str, Any], purpose: str = EVALUATE
) -> Run:
    """Returns the settings of a run that uses a file: explicit flags, else the settings of the file, else defaults.

    Mean, std, crop ratio and number of class tokens have their final values. A warning names each explicit flag that
    differs from the file. The head and the data determine the number of classes.

    Args:
        file: the file to start from or to evaluate, if any.
        recorded: the settings of the file that determine its model, by the names of the flags.
        purpose: EVALUATE, or TRAIN for a new head. Then the settings of the task are not taken from the file, and its
            crops only if it is a file of this library; the crops of other libraries are about evaluation.
    """
    if file:
        dataset = str(file.settings.get("dataset"))
        if runs_code(dataset) and not any(run[name] for name in settings.DATASETS):
            raise ValueError(
                f"{file.origin} records a `dataset` that runs code: give {in_words({'dataset': dataset})}, or other "
                f"data"
            )
        run = with_settings_of(file, run, recorded, purpose)
    crop_pct = run.images.crop_pct or transforms.default_crop_pct(run.images.input_size)
    num_cls_tokens = run.model.num_cls_tokens or (file.num_cls_tokens if file else 1)
    return run.changed({"crop_pct": crop_pct, "num_cls_tokens": num_cls_tokens})


def with_pooling(run: Run, file: reading.Weights | None) -> Run:
    """Returns the settings of a run on pooled features, with `global_pool` as given or by `pooling_of`, and logs it."""
    settings = model_settings.classifier_settings(file) | {"uniformity": file.settings.get("uniformity") if file else 0}
    if settings.get("probe") == ATTENTIVE:  # the head, which pools, is not built
        settings["nb_classes"] = 0
    pooling = pooling_of(settings)
    if "global_pool" in run.explicit and pooling.name != OF_TIMM:
        pooling = Pooling(PATCHES if run.model.global_pool else CLASS_TOKEN, "as given")
    logger.info(f"features: {pooling}")
    return run.changed({"global_pool": run.model.global_pool if pooling.name == OF_TIMM else pooling.name == PATCHES})


def with_settings_of(file: reading.Weights, run: Run, recorded: Mapping[str, Any], purpose: str) -> Run:
    """Returns settings as `with_recorded_settings`, without those that the model of a classifier determines."""
    also = [*FLIPS] if purpose == TRAIN else []
    if run.evaluation.eval and run.data.val_fraction and "val_fraction" in file.settings:
        # The images that were held out from the training of the file, or a warning that it held out none.
        also = settings.names_with(SPLIT) if file.settings["val_fraction"] else ["val_fraction"]
    left_out = {"nb_classes", "mean", "std"}
    if purpose == TRAIN and file.is_foreign:
        left_out |= {"crop", "crop_pct"}
    taken = TAKEN[purpose] & run.names - left_out
    of_file = {**recorded, **{name: file.settings[name] for name in also if name in file.settings}}
    of_file = {name: value for name, value in of_file.items() if name in taken}
    for used, made in _changes(run, of_file):
        logger.warning(f"{used} is used, and {file.origin} was made {made}")
    before, run = run, settings.resolve(run, of_file, purpose)
    changed = {
        name: run[name]
        for name in sorted(of_file)
        if settings.differs(name, run[name], settings.effective(before, name))
    }
    if changed:
        logger.info(f"settings of {file.origin}: {in_words(changed)}")
    if "crop" in changed and (unused := unused_crops(run.images.crop, before.explicit)):
        logger.warning(f"no effect with crop=none: {' '.join(f'`{name}`' for name in unused)}")
    if purpose == EVALUATE and "crop_pct" in run and run.images.crop_pct is None:
        crop_pct = model_settings.crop_pct_of_earlier_version(file, run.images.input_size)
        run = run.changed({"crop_pct": crop_pct})
    of_foreign = {name: recorded[name] for name in ("layer_norm_eps", "interpolation") if recorded.get(name)}
    run = run.changed(of_foreign)  # there are no flags
    mean, std = model_settings.statistics(file, run.images.in_chans, run.images.mean, run.images.std)
    return run.changed({"mean": mean, "std": std})


def _changes(run: Run, recorded: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in sorted(run.explicit & {*recorded, ARGUMENTS}):
        current, value = run[name], recorded.get(name)
        if name == ARGUMENTS:  # those that are given; of another encoder, those that both have
            given, known = ({text.partition("=")[0]: text for text in of or []} for of in (current, value))
            is_same = recorded.get("encoder") == run["encoder"]
            keys = sorted(key for key in given if key in known or is_same)
            current, value = [given[key] for key in keys], [known[key] for key in keys if key in known]
        if settings.differs(name, current, value) and not (name == "encoder" and _adapts(current, value)):
            before = f"without `{name}`" if value is None else f"with {in_words({name: value})}"
            yield in_words({name: current}), before


def _adapts(encoder: str, recorded: str | None) -> bool:
    """Whether a mix-in that the user names adds adapters to an encoder. The features at the start are the same."""
    with suppress(ValueError):  # a class in a function can't be imported
        return name_of(plain_encoder(import_object("encoder=", encoder))) == recorded
    return False
