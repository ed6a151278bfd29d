"""The loss of a batch in supervised training, and evaluation of classifiers; for fine-tuning and probing."""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util import dist, settings
from util.cli import advice, entry_point
from util.cli.choices import CLASSIFICATION, REGRESSION
from util.cli.flags import runs_code
from util.data import extras, labels, transforms
from util.data.batches import Batch, to_device
from util.data.run_data import RunData
from util.data.sources import Source
from util.evaluation import report
from util.evaluation.tasks import Classification, TargetEvaluation
from util.training import feature_files, loop
from util.training.precision import Precision
from util.weights import loading, reading
from util.weights.model_zoo import CLASSIFIER

logger = logging.getLogger(__name__)


def train_one_epoch(
    model: nn.Module,
    data_loader: loop.Loader,
    optimizer: torch.optim.Optimizer,
    options: loop.EpochOptions,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
    erase: Callable[[Tensor], Tensor] | None = None,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Trains a classifier for an epoch.

    Args:
        model: images (B, c, H, W) -> logits (B, classes).
        data_loader: batches of images, labels (B,), and noise (unused).
        criterion: returns the loss of logits and labels (B,) or mixed targets (B, classes).
        normalize: images -> the input of the model, on the device.
        erase: random erasing of normalized images.
        mixup: timm's mixup and cutmix.
    """

    def compute_loss(batch: Any) -> Tensor:
        images, targets = normalize(batch.images), batch.labels
        if erase is not None:
            images = erase(images)
        if mixup is not None:
            images, targets = mixup(images, targets)
        return criterion(model(images, **batch.extras), targets)

    loop.run_epoch(compute_loss, model, data_loader, optimizer, options)


def evaluate(
    model: nn.Module,
    data_loader: Iterable[Sequence[Any]],
    *,
    normalize: Callable[[Tensor], Tensor],
    precision: Precision,
    task: Classification | None = None,
) -> Any:
    """Evaluates a model on the batches of this process, and gathers the predictions of all processes.

    Args:
        data_loader: batches of this process, distributed as in `loader.eval_loader`.
        task: what the labels mean. Default: one class for each image.
    """
    return evaluate_heads([model], data_loader, normalize=normalize, precision=precision, task=task)[0]


@torch.inference_mode()
def evaluate_heads(
    models: Sequence[nn.Module],
    data_loader: Iterable[Sequence[Any]],
    *,
    normalize: Callable[[Tensor], Tensor],
    precision: Precision,
    task: Classification | None = None,
) -> list[Any]:
    """Evaluates several models in one pass, as `evaluate` does."""
    task, columns, num_outputs = task or Classification(), [list[tuple[Tensor, ...]]() for _ in models], 0
    for model in models:
        model.eval()
    for loaded in data_loader:
        batch = Batch(*to_device(loaded, precision.device))
        for model, own in zip(models, columns, strict=True):
            with precision.autocast():
                outputs = model(normalize(batch.images), **batch.extras).float()
            own.append(task.columns(outputs, batch.labels))
            num_outputs = outputs.shape[1]
    evaluations = []
    for own in columns:
        local = [torch.cat(column).cpu().numpy() for column in zip(*own, strict=True)]
        shards = dist.gather((local, num_outputs))
        parts = zip(*(shard for shard, _ in shards if shard), strict=True)
        merged = [dist.interleave(list(part)) for part in parts]
        evaluations.append(task.evaluation(merged, max(number for _, number in shards)))
    return evaluations


def encode(
    data: RunData, source: Source, model: Any, batch_size: int, precision: Precision, on_bad_image: str | None = None
) -> Iterator[Batch]:
    """Returns batches with the input of the head of a `VisionTransformer`, from `feature_files.encode`."""
    batches = data.eval_batches(source, batch_size, on_bad_image)
    forward = model.eval().forward_features
    return feature_files.encode(forward, batches, normalize=data.normalize, precision=precision)


def open_weights(flags: Mapping[str, Any], kind: str = CLASSIFIER) -> reading.Weights | None:
    """Reads the weights of `--finetune`; with `--eval`, the classifier of `--resume` or `--finetune`.

    Args:
        kind: the kind of a file to evaluate.

    Raises:
        ValueError: with `--eval`, neither names a file, or the file is of another kind.
    """
    if not flags["eval"]:
        return loading.read(flags["finetune"]) if flags["finetune"] else None
    name = flags["resume"] if flags["resume"] not in ("", "auto") else flags["finetune"]
    if not name:
        raise ValueError(f"--eval needs --resume or --finetune: the file of a {kind}, or a published name")
    return loading.read_classifier(name, kind)


def with_recorded_settings(
    args: Namespace, file: reading.Weights | None, recorded: Mapping[str, Any], trains: bool = False
) -> Namespace:
    """Returns the settings of a run that uses a file: explicit flags, else the settings of the file, else defaults.

    Mean, std, crop ratio and number of class tokens have their final values. A warning names each explicit flag that
    differs from the file. The head and the data determine the number of classes.

    Args:
        file: the file to start from or to evaluate, if any.
        recorded: the settings of the file that determine its model, by the names of the flags.
        trains: a new head is trained. The settings of the task are not taken from the file, and its crops only if it is
            a file of this library; the crops of other libraries are about evaluation.
    """
    if file:
        dataset = str(file.settings.get("dataset"))
        if runs_code(dataset) and not any(getattr(args, name, None) for name in settings.DATASETS):
            raise ValueError(
                f"{file.source} records a --dataset that runs code: give --dataset '{dataset}', or other data"
            )
        args = _with_settings_of(file, args, recorded, trains)
    mean, std = reading.statistics(file, args.in_chans, args.mean, args.std)
    crop_pct = getattr(args, "crop_pct", None) or transforms.default_crop_pct(args.input_size)
    num_cls_tokens = args.num_cls_tokens or (file.num_cls_tokens if file else 1)
    return entry_point.changed(args, {"mean": mean, "std": std, "crop_pct": crop_pct, "num_cls_tokens": num_cls_tokens})


def _with_settings_of(file: reading.Weights, args: Namespace, recorded: Mapping[str, Any], trains: bool) -> Namespace:
    also = settings.names_where(lambda one: one["of_training"]) if trains else []
    if getattr(args, "eval", False) and getattr(args, "val_fraction", None) and "val_fraction" in file.settings:
        # The images that were held out from the training of the file, or a warning that it held out none.
        also = settings.names_where(lambda one: one["splits"]) if file.settings["val_fraction"] else ["val_fraction"]
    recorded = {**recorded, **{name: file.settings[name] for name in also if name in file.settings}}
    names = (recorded.keys() & vars(args).keys()) - {"nb_classes", "mean", "std"}
    if trains:
        names -= {*settings.names_where(lambda one: one["of_task"])}
        names -= set() if "model" in file.settings else {"crop", "crop_pct"}
    warn_of_changes(file.source, args, names, recorded)
    taken = {name: recorded[name] for name in sorted(names - entry_point.explicit(args))}
    default = {**settings.ModelSpec().record(), **settings.ImageSpec().record()}  # of the flags whose default is None
    changed = {
        name: value
        for name, value in taken.items()
        if settings.differs(name, value, default.get(name) if getattr(args, name) is None else getattr(args, name))
    }
    if changed:
        logger.info(f"settings of {file.source}: {' '.join(advice.arguments(changed))}")
    args = entry_point.changed(args, taken)
    if not trains and "crop_pct" in args and args.crop_pct is None:
        args.crop_pct = reading.crop_pct_of_earlier_version(file, args.input_size)
    if recorded.get("layer_norm_eps"):  # of foreign models; there is no flag
        args.layer_norm_eps = recorded["layer_norm_eps"]
    return args


def warn_of_changes(source: str, args: Namespace, names: Iterable[str], recorded: Mapping[str, Any]) -> None:
    """Logs a warning for each explicit flag among `names` that differs from the recorded setting of a file."""
    for name in sorted(entry_point.explicit(args) & recorded.keys() & set(names)):
        current, value = getattr(args, name), recorded[name]
        if settings.differs(name, current, value):
            used, recorded_flag = (" ".join(advice.arguments({name: setting})) for setting in (current, value))
            origin = f"with {recorded_flag}" if recorded_flag else f"without --{name}"
            logger.warning(f"{used} is used, and {source} was made {origin}")


def open_labelled(
    data: RunData, nb_classes: int | None, reads_in_order: bool = False
) -> tuple[Source, Source, dict[str, list[float]]]:
    """Opens the training and the validation set, as `RunData.open_pair` does.

    Returns:
        The sets, in which numbers are standardized on the training set; and mean and standard deviation of the numbers,
        as settings.
    """
    train, val = data.open_pair(nb_classes, reads_in_order)
    if data.images.task == CLASSIFICATION:
        return train, val, {}
    mean, std = labels.statistics(train, data.images.task)
    train, val = (labels.standardized(source, mean, std) for source in (train, val))
    return train, val, {"target_mean": mean, "target_std": std} if data.images.task == REGRESSION else {}


def load_for_evaluation(
    build: Callable[[settings.ModelSpec, settings.ImageSpec], nn.Module],
    flags: Mapping[str, Any],
    file: reading.Weights,
    val: Source,
) -> tuple[nn.Module, Source]:
    """Loads the classifier of a file, and converts the labels of a dataset to indices into its classes.

    Raises:
        ValueError: the file has another architecture, or the dataset has classes that the classifier does not have.
    """
    num_classes, task = file.num_classes, flags.get("task", CLASSIFICATION)
    if task != file.settings.get("task", CLASSIFICATION):
        recorded = file.settings.get("task", CLASSIFICATION)
        raise ValueError(f"--task {task}: {file.source} was trained with --task {recorded}; omit --task")
    classes, names = file.settings.get("classes"), file.settings.get("label_names")
    if not classes and names and set(val.classes) <= set(names):
        classes = names
    if flags["nb_classes"] not in (None, num_classes):
        raise ValueError(f"{file.source} has {num_classes} classes, and --nb_classes is {flags['nb_classes']}")
    if task != CLASSIFICATION:
        val = labels.counted_as(val, classes or (), task)
        if task == REGRESSION:
            val = labels.standardized(val, file.settings["target_mean"], file.settings["target_std"])
    elif classes:
        val = labels.counted_as(val, classes)
    elif len(val.classes) != num_classes:
        raise ValueError(f"{file.source} has {num_classes} classes, and the validation set has {len(val.classes)}")
    model = build(*settings.specs({**flags, "nb_classes": num_classes}))
    loading.load_classifier(model, file)
    extras.require_fitting(model, val)
    return model, val


def load_frozen(
    model: nn.Module, file: reading.Weights | None, adapt_input: str, classes: Sequence[str] | None = None
) -> None:
    """Loads the encoder of a file, as `loading.load_encoder` does. Without a file, it logs a warning."""
    if file:
        loading.load_encoder(model, file, adapt_input, classes)
    else:
        logger.warning("no --finetune: the features are from an untrained encoder with random weights")


def report_scores(scores: Any, classes: Sequence[str], folder: str | None) -> None:
    """Logs the scores, and writes the files of `--report` to a folder."""
    logger.info(str(scores))
    if folder and dist.is_main():
        write = report.write_targets if isinstance(scores, TargetEvaluation) else report.write
        write(Path(folder), classes, scores.labels, scores.predictions)
