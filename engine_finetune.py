"""The loss of a batch in supervised training, and evaluation of classifiers; for fine-tuning and probing."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mae import parallel
from mae.data.batches import prefetch
from mae.data.item import Batch
from mae.evaluate.tasks import Classification
from mae.fp32 import in_fp32
from mae.training import published_loop
from mae.training.compiling import padded
from mae.training.precision import Precision


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
    images = batch.normalized(normalize)
    targets = batch.labels
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
        targets = targets.to(images.device, non_blocking=True)
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
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
    sums = torch.zeros(4, dtype=dtype, device=device)  # loss, top 1, top 5, images
    for batch in data_loader:
        images = batch[0].to(device)
        targets = batch[-1].to(device)
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
    task = task or Classification()
    columns = [list[tuple[Tensor, ...]]() for _ in models]
    num_outputs = 0
    forwards = [padded(model.eval(), model) for model in models]
    for loaded in prefetch(data_loader, precision.device):
        batch = Batch(*loaded)
        for forward, results in zip(forwards, columns, strict=True):
            with precision.autocast():
                outputs = forward(batch.normalized(normalize), **batch.inputs).float()
            results.append(task.columns(outputs, batch.labels))
            num_outputs = outputs.shape[1]
    evaluations = []
    for results in columns:
        local = [torch.cat(column).cpu().numpy() for column in zip(*results, strict=True)]
        shards = parallel.gather((local, num_outputs))
        parts = zip(*(shard for shard, _ in shards if shard), strict=True)
        merged = [parallel.interleave(list(part)) for part in parts]
        evaluations.append(task.evaluation(merged, max(number for _, number in shards)))
    return evaluations
