"""Settings of a run as values. A field is the home of a setting: other files ask the fields, and list no names.

A setting is an explicit flag, else what a file records, else what the shapes of its tensors determine, else the default
of the field or of the script. `chosen` is this rule. None counts as absent.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from mae.positions import Size, to_pair

FREE, WARNS, FIXED = "free", "warns", "fixed"  # whether a resumed run may change a setting
NUMBER = (int, float)
SIZES = ("input_size", "patch_size")  # one number is the size of a square
DATASETS = ("data_path", "dataset", "train_list", "val_list", "train_folders", "val_folders")  # each names a dataset

Spec = TypeVar("Spec", bound="Values")


def setting(
    default: Any = MISSING,
    kind: type | tuple[type, ...] | None = None,
    *,
    resumed: str = WARNS,
    rebuilds: bool = True,
    of_task: bool = False,
    of_labels: bool = False,
    in_result: bool = True,
    only_ours: bool = False,
    of_block: bool = False,
    of_start: bool = False,
    optimizes: bool = False,
    splits: bool = False,
    of_training: bool = False,
) -> Any:
    """Returns a field of a settings class. The flag has its name.

    Args:
        kind: type of the value, or of the elements of a list, in files that others wrote. None: not read from them.
        resumed: FREE, WARNS or FIXED; a setting that is FIXED determines the meaning of the data or the task.
        rebuilds: an evaluation of the file needs the setting. Else it is about training only.
        of_task: the setting is about head and labels. A training that starts from the file does not take it.
        of_labels: the setting is about labels. An evaluation of features of the file does not take it.
        in_result: two results with different values are not the same (main_compare.py).
        only_ours: no format of other libraries has it.
        of_block: an argument of `models_vit.Block` with this name. Other libraries do not read such models.
        of_start: the setting belongs to a machine or to a start of the program, and is never taken from a file.
        optimizes: the setting is about optimization. Of files of the published code, a resumed run takes these and
            the settings of the model.
        splits: it determines which training images `val_fraction` holds out.
        of_training: a training that starts from the file takes it, and an evaluation does not.
    """
    metadata = {"kind": kind, "resumed": FREE if of_start else resumed, "rebuilds": rebuilds, "of_task": of_task,
                "of_labels": of_labels,
                "in_result": in_result, "only_ours": only_ours, "of_block": of_block, "of_start": of_start,
                "optimizes": optimizes, "splits": splits, "of_training": of_training}  # fmt: skip
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


class Values:
    """The base of the settings classes."""

    @classmethod
    def of(cls: type[Spec], settings: Mapping[str, Any]) -> Spec:
        """Returns the settings of a class among all settings of a run. Absent settings and None are the default."""
        known = {one.name: settings.get(one.name) for one in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in known.items() if value is not None})

    def record(self) -> dict[str, Any]:
        """Returns the settings by the names of the flags, as plain values."""
        return {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageSpec(Values):
    """How a picture becomes the input of a model, and what its label means."""

    input_size: Size = setting(224, int, resumed=FIXED)
    in_chans: int = setting(3, int, resumed=FIXED)
    mean: list[float] | None = setting(None, NUMBER, resumed=FIXED)  # None: ImageNet's
    std: list[float] | None = setting(None, NUMBER, resumed=FIXED)
    crop: str = setting("random", str, resumed=FIXED)
    crop_pct: float | None = setting(None, NUMBER, resumed=FIXED)  # None: the default for the input size
    exif: bool | None = setting(None, bool, resumed=FIXED, only_ours=True)  # orientation; None: of photographs
    hflip: float | None = setting(None, NUMBER, rebuilds=False, of_training=True, only_ours=True)  # may change labels
    crop_ratio: list[float] | None = setting(None, resumed=FIXED, rebuilds=False)
    crop_scale: list[float] | None = setting(None, resumed=FIXED, rebuilds=False)
    nodata: float | str | None = setting(None, (*NUMBER, str), resumed=FIXED, only_ours=True)  # NaN is text
    value_range: list[float] | None = setting(None, NUMBER, resumed=FIXED, only_ours=True)
    channels_last: bool | None = setting(None, bool, resumed=FIXED, only_ours=True)  # of arrays; None: by their shapes
    min_valid: float = setting(0.5, resumed=FIXED, rebuilds=False)
    task: str = setting("classification", resumed=FIXED, of_task=True, of_labels=True)
    label_columns: list[str] | None = setting(None, of_task=True, of_labels=True)
    short_side: int | None = setting(None, int, resumed=FIXED)  # of segmentation
    reduce_zero_label: bool = setting(False, resumed=FIXED, of_task=True)
    colors: list[int] | None = setting(None, int, of_task=True)


@dataclass(frozen=True)
class ModelSpec(Values):
    """What builds a model for images of an `ImageSpec`."""

    model: str = setting("", str)
    patch_size: Size | None = setting(None, int, resumed=FIXED)  # None: that in the name of the model
    num_cls_tokens: int = setting(1, int)
    learned_pos_embed: bool = setting(False, only_ours=True)
    layer_norm_eps: float | None = setting(None, NUMBER)  # of foreign models; None: 1e-6
    num_heads: int | None = setting(None, int, rebuilds=False)  # in foreign files, to be checked
    decoder_num_heads: int | None = setting(None, int, rebuilds=False)
    encoder: str | None = setting(None, str, resumed=FIXED)  # module:Class of a mix-in
    encoder_args: list[str] | None = setting(None, str, resumed=FIXED)  # name=value
    model_class: str | None = setting(None, str, rebuilds=False)  # of a subclass
    model_args: list[str] | None = setting(None, resumed=FIXED, rebuilds=False)  # name=value
    predicts_pixels: bool = setting(True, rebuilds=False)
    qk_norm: str | None = setting(None, str, of_block=True)
    drop_path: float = setting(0.0, rebuilds=False)
    grad_checkpointing: bool = setting(False, resumed=FREE, rebuilds=False)
    unfreeze_blocks: int | str | None = setting(None, (int, str), rebuilds=False)
    decoder_depth: int | None = setting(None)  # None: the decoder of the model
    norm_pix_loss: bool = setting(False, resumed=FIXED)
    mask_ratio: float = setting(0.75, NUMBER)
    mask_block: int = setting(1, int, only_ours=True)
    global_pool: bool = setting(False, of_task=True)
    nb_classes: int = setting(0, of_task=True)
    probe: str | None = setting(None, of_task=True)
    num_queries: int | None = setting(None, of_task=True)
    head: str | None = setting(None, of_task=True)  # of segmentation
    regression_loss: str = setting("l1", of_task=True, of_labels=True)
    target_mean: list[float] | None = setting(None, resumed=FIXED, of_task=True, of_labels=True)  # no flag
    target_std: list[float] | None = setting(None, resumed=FIXED, of_task=True, of_labels=True)  # no flag
    classes: list[str] | None = setting(None, str)  # names of folders, or of targets
    label_names: list[str] | None = setting(None, str)  # names of labels in foreign files


@dataclass(frozen=True)
class DataSpec(Values):
    """The images of a run, and how they are read."""

    data_path: str | None = setting(None, resumed=FREE)
    dataset: str | None = setting(None)
    train_list: str | None = setting(None, resumed=FREE)
    val_list: str | None = setting(None, resumed=FREE)
    train_folders: list[str] | None = setting(None, resumed=FREE)
    val_folders: list[str] | None = setting(None, resumed=FREE)
    extras: list[str] | None = setting(None, resumed=FIXED)
    download: bool = setting(False, of_start=True, in_result=False)
    train_per_class: int | None = setting(None, splits=True)
    val_fraction: float | None = setting(None, resumed=FIXED, splits=True)
    train_images: str | None = setting(None, resumed=FREE)  # no flag; FREE: they are compared as classes are
    held_out_images: str | None = setting(None, resumed=FREE)  # the same
    held_out: float | None = setting(None, resumed=FIXED)
    on_bad_image: str | None = setting(None, resumed=FREE)
    fast_jpeg: bool = setting(False, resumed=FREE)
    cache_images: bool = setting(False, resumed=FREE)
    num_workers: int = setting(0, of_start=True, in_result=False)
    pin_mem: bool = setting(True, resumed=FREE)
    seed: int = setting(0, splits=True)


@dataclass(frozen=True)
class RunSpec(Values):
    """Length, optimization, files and processes of a run."""

    epochs: int = setting(400, optimizes=True)
    start_epoch: int = setting(0, of_start=True)
    batch_size: int = setting(64, resumed=FREE, optimizes=True)  # the effective batch size must be the same
    accum_iter: int = setting(1, resumed=FREE, optimizes=True)
    lr: float | None = setting(None, optimizes=True)  # None: computed from blr
    blr: float | list[float] | None = setting(None, optimizes=True)
    min_lr: float = setting(0.0, optimizes=True)
    warmup_epochs: float = setting(0, optimizes=True)
    poly_power: float | None = setting(None, optimizes=True)  # None: a cosine
    weight_decay: float = setting(0.0, optimizes=True)
    layer_decay: float | None = setting(None, optimizes=True)
    smoothing: float | None = setting(None, optimizes=True)
    clip_grad: float | None = setting(None, optimizes=True)
    optimizer: str | None = setting(None, resumed=FIXED)  # module:function; None: AdamW
    lr_schedule: str | None = setting(None, resumed=FIXED)  # module:function; None: a cosine
    class_weight: str | None = setting(None)
    on_nonfinite: str = setting("abort")
    updates_per_epoch: int | None = setting(None)
    metric: list[str] | None = setting(None, resumed=FIXED)  # None: top-1 accuracy
    eval_every: int = setting(1)
    vis_every: int = setting(0, resumed=FREE)
    probe_every: int = setting(0, resumed=FREE)
    probe_path: str | None = setting(None, resumed=FREE)
    finetune: str = setting("", resumed=FREE)
    init_from: str = setting("", resumed=FREE)
    report: str | None = setting(None, resumed=FREE)
    output_dir: str = setting("", of_start=True, in_result=False)
    log_dir: str = setting("", of_start=True, in_result=False)
    resume: str = setting("", of_start=True)
    eval: bool = setting(False, of_start=True)
    save_every: int = setting(20, resumed=FREE)
    save_minutes: float = setting(15.0, resumed=FREE)
    keep_last: int | None = setting(None, resumed=FREE)
    amp: str = setting("auto")
    precision: str | None = setting(None, in_result=False)  # what `auto` chose at the start of the run; no flag
    compile: bool = setting(False, of_start=True)
    fsdp: bool = setting(False, of_start=True)
    device: str = setting("auto", of_start=True)
    config: str | None = setting(None, of_start=True)
    debug: bool = setting(False, of_start=True)
    dist_backend: str = setting("auto", of_start=True)
    dist_url: str = setting("env://", of_start=True)
    dist_timeout: float = setting(600, of_start=True)
    dist_eval: bool = setting(False, of_start=True)
    dist_on_itp: bool = setting(False, of_start=True)
    world_size: int = setting(1, of_start=True)
    local_rank: int = setting(-1, of_start=True)


def specs(settings: Mapping[str, Any]) -> tuple[ModelSpec, ImageSpec]:
    """Returns the model and the images of a run or of a file."""
    return ModelSpec.of(settings), ImageSpec.of(settings)


def names_where(applies: Callable[[Mapping[str, Any]], bool], *classes: type[Values]) -> list[str]:
    """Lists the settings of classes (default: all) whose metadata fulfil a condition."""
    return [one.name for kind in classes or CLASSES for one in fields(kind) if applies(one.metadata)]  # type: ignore[arg-type]


def chosen(
    explicit: Mapping[str, Any], recorded: Mapping[str, Any], determined: Mapping[str, Any], default: Mapping[str, Any]
) -> dict[str, Any]:
    """The rule: an explicit flag, else what a file records, else what its shapes determine, else the default."""
    return {**default, **_known(determined), **_known(recorded), **_known(explicit)}


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a recorded value, or each element of a list, has a type. bool is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return all(type(part) in kinds for part in (value if isinstance(value, list | tuple) else [value]))


def differs(name: str, first: Any, second: Any) -> bool:
    """Whether two values of a setting differ. One number is the size of a square, and tuples are lists."""
    first, second = (list(value) if isinstance(value, tuple) else value for value in (first, second))
    if name in SIZES and None not in (first, second):
        return to_pair(first) != to_pair(second)
    return first != second


CLASSES: tuple[type[Values], ...] = (ModelSpec, ImageSpec, DataSpec, RunSpec)
REBUILDS = names_where(lambda one: one["rebuilds"], ModelSpec, ImageSpec)  # what rebuilds a model and its transform
EXPORTED = [*REBUILDS, *names_where(lambda one: one["of_training"], ModelSpec, ImageSpec)]
KINDS = {one.name: one.metadata["kind"] for kind in (ModelSpec, ImageSpec) for one in fields(kind)
         if one.metadata["kind"]}  # fmt: skip
