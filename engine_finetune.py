"""The loss of a batch in supervised training, and evaluation of classifiers; for fine-tuning and probing."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mae.build
from mae import parallel
from mae.checkpoints.checkpoint import compute_digest
from mae.data import extras, labels, transforms
from mae.data.batches import prefetch
from mae.data.item import Batch
from mae.data.run_data import RunData
from mae.data.source import Source
from mae.evaluate import report, tasks
from mae.evaluate.imagenet import require_imagenet, synsets
from mae.evaluate.tasks import Classification, TargetEvaluation
from mae.fp32 import in_fp32
from mae.settings import ImageSpec, ModelSpec, Run, names_with
from mae.settings.choices import CLASSIFICATION, REGRESSION
from mae.settings.fields import IMAGES, MODEL
from mae.training import published_loop
from mae.training.compiling import compile_model, padded
from mae.training.precision import Precision
from mae.weights import loading, reading, shapes

if TYPE_CHECKING:
    from mae.evaluate.suites import Suite

logger = logging.getLogger(__name__)


def loss(
    model: nn.Module,
    batch: Batch,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
    erase: Callable[[Tensor], Tensor] | None = None,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Returns the loss () of a batch. It is computed in fp32.

    Args:
        model: images (B, c, H, W) -> logits (B, classes).
        batch: images and labels (B,); its noise is not used.
        criterion: returns the loss of logits and labels (B,) or mixed targets (B, classes).
        normalize: images -> the input of the model, on the device.
        erase: random erasing of normalized images.
        mixup: timm's mixup and cutmix.
    """
    images, targets = batch.normalized(normalize), batch.labels
    if erase is not None:
        images = erase(images)
    if mixup is not None:
        images, targets = mixup(images, targets)
    return in_fp32(criterion)(model(images, **batch.inputs), targets)


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    epoch: int,
    loss_scaler: Any,
    max_norm: float | None = 0,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    log_writer: Any = None,
    args: Any = None,
) -> dict[str, float]:
    """Trains for an epoch, for scripts in the style of the published code. `main_finetune.py` has `loop.Trainer`.

    Args:
        data_loader: pairs of normalized images (B, c, H, W) and labels (B,).
        loss_scaler: as `util.misc.NativeScalerWithGradNormCount`.
        max_norm: maximum global norm of the gradient; 0 or None: no clipping.
        mixup_fn: images, labels -> mixed images, mixed targets.
        log_writer: a `SummaryWriter`, or None.
        args: has `accum_iter`, `lr`, `min_lr`, `epochs` and `warmup_epochs`.

    Returns:
        The means of the epoch over all processes, `loss` and `lr`, the largest of the groups.

    Raises:
        NonFiniteLoss: a loss is infinite or not a number.
    """

    def compute_loss(images: Tensor, targets: Tensor) -> Tensor:
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        return in_fp32(criterion)(model(images), targets)

    return published_loop.train_one_epoch(
        compute_loss, model, data_loader, optimizer, torch.device(device), epoch, loss_scaler, log_writer, args,
        loss_tag="loss", max_norm=max_norm,
    )  # fmt: skip


@torch.no_grad()
def evaluate(data_loader: Any, model: nn.Module, device: torch.device | str) -> dict[str, float]:
    """Evaluates a classifier, for scripts in the style of the published code. `main_finetune.py` has `evaluate_model`.

    Args:
        data_loader: pairs of normalized images (B, c, H, W) and labels (B,) of this process.

    Returns:
        The cross-entropy `loss`, and the accuracies `acc1` and `acc5` in percent, of the images of all processes.
    """
    device = torch.device(device)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top 1, top 5, images
    for batch in data_loader:
        images, targets = batch[0].to(device), batch[-1].to(device)
        with torch.autocast("cuda", enabled=device.type == "cuda"):
            outputs = model(images)
        outputs = outputs.float()
        ranks = outputs.topk(min(5, outputs.shape[1])).indices == targets[:, None]
        sums += torch.stack([
            nn.functional.cross_entropy(outputs, targets, reduction="sum"), ranks[:, :1].sum(), ranks.sum(),
            torch.tensor(len(targets), device=device),
        ])  # fmt: skip
    loss_sum, top1, top5, count = parallel.mean_over_processes(sums).tolist()
    stats = {"loss": loss_sum / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count}
    print(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    return stats


def evaluate_model(
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
    """Evaluates several models in one pass, as `evaluate_model` does."""
    task, columns, num_outputs = task or Classification(), [list[tuple[Tensor, ...]]() for _ in models], 0
    forwards = [padded(model.eval(), model) for model in models]
    for loaded in prefetch(data_loader, precision.device):
        batch = Batch(*loaded)
        for forward, own in zip(forwards, columns, strict=True):
            with precision.autocast():
                outputs = forward(batch.normalized(normalize), **batch.inputs).float()
            own.append(task.columns(outputs, batch.labels))
            num_outputs = outputs.shape[1]
    evaluations = []
    for own in columns:
        local = [torch.cat(column).cpu().numpy() for column in zip(*own, strict=True)]
        shards = parallel.gather((local, num_outputs))
        parts = zip(*(shard for shard, _ in shards if shard), strict=True)
        merged = [parallel.interleave(list(part)) for part in parts]
        evaluations.append(task.evaluation(merged, max(number for _, number in shards)))
    return evaluations


def open_labelled(
    data: RunData, nb_classes: int | None, reads_in_order: bool = False
) -> tuple[Source, Source, dict[str, Any]]:
    """Opens the training and the validation set, as `RunData.open_pair` does.

    Returns:
        The sets, in which numbers are standardized on the training set; and, as settings, what identifies the chosen
        images, and mean and standard deviation of the numbers.
    """
    train, val, record = data.open_pair(nb_classes, reads_in_order)
    if data.images.task == CLASSIFICATION:
        return train, val, record
    mean, std = labels.statistics(train, data.images.task)
    train, val = (labels.standardized(source, mean, std) for source in (train, val))
    units = {"target_mean": mean, "target_std": std} if data.images.task == REGRESSION else {}
    return train, val, record | units


def load_for_evaluation(
    build: Callable[[ModelSpec, ImageSpec], nn.Module],
    run: Run,
    file: reading.Weights,
    data: RunData,
) -> tuple[nn.Module, Source]:
    """Loads the classifier of a file, and converts the labels of the validation set to indices into its classes.

    A warning says that other training images are held out than in the training of the file.

    Raises:
        ValueError: the file has another architecture, or the dataset has classes that the classifier does not have.
    """
    (val, chosen), num_classes, task = data.open_val(), file.num_classes, run.images.task
    recorded, current = (found.get("held_out_images") for found in (file.settings, chosen))
    if current and recorded != current:
        logger.warning(
            f"the training of {file.origin} held out {recorded or 'none of its images, or does not record them'}, and "
            f"now {current} are held out: images that it was trained on may be among them"
        )
    if task != file.settings.get("task", CLASSIFICATION):
        recorded = file.settings.get("task", CLASSIFICATION)
        raise ValueError(f"task={task}: {file.origin} was trained with task={recorded}; omit `task`")
    classes, names = file.settings.get("classes"), file.settings.get("label_names")
    if not classes and names and set(val.classes) <= set(names):
        classes = names
    if run.model.nb_classes not in (None, num_classes):
        raise ValueError(f"{file.origin} has {num_classes} classes, and `nb_classes` is {run.model.nb_classes}")
    if task == CLASSIFICATION and num_classes != len(val.classes):
        val = labels.without_placeholders(val)
    if task == REGRESSION:
        units = ("target_mean", "target_std")
        shapes.require_settings(file.settings, units, file.origin, "it predicts numbers; train a head")
    if not classes and task == CLASSIFICATION and labels.has_ids(val):
        classes = labels.outputs(num_classes)
    if not classes and len(val.classes) != num_classes:
        raise ValueError(f"{file.origin} has {num_classes} classes, and the validation set has {len(val.classes)}")
    if not classes and names and val.classes != synsets():
        ours, theirs = next(pair for pair in zip(val.classes, names, strict=True) if pair[0] != pair[1])
        logger.warning(
            f"{file.origin} has other names of classes: its labels are taken in the order of the validation set, such "
            f"as {theirs!r} for {ours!r}"
        )
    val = labels.counted_as(val, classes or val.classes, task)
    if task == REGRESSION:
        val = labels.standardized(val, file.settings["target_mean"], file.settings["target_std"])
    model = build(replace(run.model, nb_classes=num_classes), run.images)
    loading.load_classifier(model, file)
    extras.require_fitting(model, val)
    return model, val


def evaluate_suites(
    build: Callable[[ModelSpec, ImageSpec], nn.Module],
    run: Run,
    file: reading.Weights,
    data: RunData,
    precision: Precision,
    crop_pct: float | None,
) -> None:
    """Evaluates the classifier of a file on the robustness suites of `--suite`, and logs a table of the results.

    Args:
        crop_pct: the crop ratio, if it is explicit. Default: that of the file; of imagenet-c, whose images are center
            crops, 1.

    Raises:
        ValueError: the classifier is not one of ImageNet-1K, or a folder is no folder of its suite.
    """
    from mae.evaluate import suites  # a training does not need it

    if unused := [f"`{name}`" for name in ("metric", "report", "dataset", "val_list", "val_fraction") if run[name]]:
        logger.warning(f"no effect with `suite`: {' '.join(unused)}")
    require_imagenet(file.settings, file.num_classes, file.origin)
    opened = [suites.open_suite(e, run.data.data_path, run.evaluation.subset) for e in run.evaluation.suite or ()]
    opened = [suite._replace(crop_pct=crop_pct or suite.crop_pct or run.images.crop_pct) for suite in opened]
    model = build(replace(run.model, nb_classes=file.num_classes), run.images)
    loading.load_classifier(model, file)
    model.to(precision.device)
    settings = {**run.model.record(), **run.images.record()}
    record = {name: settings[name] for name in names_with(MODEL, IMAGES) if name in run.names & settings.keys()}
    record |= {"precision": precision.name, "subset": run.evaluation.subset}
    record["weights"] = compute_digest(model.state_dict())
    if run.machine.compile:
        compile_model(model, precision.device, freeze_weights=True)
    evaluate_folder = partial(_evaluate_folder, model, data, run.optim.batch_size, precision)
    table = suites.evaluate(opened, evaluate_folder, record, Path(run.machine.output_dir))
    logger.info(f"\n{table}")


def _evaluate_folder(
    model: nn.Module, data: RunData, batch_size: int, precision: Precision, suite: "Suite", source: Source
) -> tasks.Evaluation:
    """Evaluates a classifier of ImageNet-1K on the images of a folder of a suite, restricted to its classes."""
    from mae.evaluate import suites

    transform = transforms.eval_transform(data.images.input_size, suite.crop_pct, data.images.crop)
    batches = data.eval_batches(source, batch_size, transform=transform)
    restricted = suites.Restricted(model, suite.columns).to(precision.device)
    return evaluate_model(restricted, batches, normalize=data.normalize, precision=precision)


def load_frozen(
    model: nn.Module, file: reading.Weights | None, adapt_input: str, classes: Sequence[str] | None = None
) -> None:
    """Loads the encoder of a file, as `loading.load_encoder` does. Without a file, it logs a warning."""
    if file:
        loading.load_encoder(model, file, adapt_input, classes)
    else:
        logger.warning("no `finetune`: the features are from an untrained encoder with random weights")


def build_frozen(run: Run, file: reading.Weights | None, encoder: Any, has_both: bool) -> Any:
    """Builds the encoder of a run without a head, with the weights of a file.

    Args:
        encoder: as in `mae.build.frozen_encoder`.
        has_both: whatever `global_pool` is, the encoder has the norm of its tokens, as `FrozenFeatures` needs it for
            both poolings; unless the file is a classifier without this norm.
    """
    spec = run.model
    if has_both and not (file and "fc_norm.weight" in file.tensors):
        spec = replace(spec, global_pool=False)
    model = mae.build.frozen_encoder(spec, run.images, encoder)
    load_frozen(model, file, spec.adapt_input)
    return model


def report_scores(scores: Any, classes: Sequence[str], folder: str | None) -> None:
    """Logs the scores, and writes the files of `--report` to a folder."""
    logger.info(str(scores))
    tasks.warn_of_undefined(scores.scores())
    if folder and parallel.is_main():
        write = report.write_targets if isinstance(scores, TargetEvaluation) else report.write
        write(Path(folder), classes, scores.labels, scores.predictions)
