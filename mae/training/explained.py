"""The share of the loss that an autoencoder explains: 1 - loss / loss of the best constant prediction.

The loss of normalized pixels alone does not say whether a model learns: .98 may be much, on noisy images.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae import parallel
from mae.data import loader
from mae.data.batches import prefetch
from mae.data.generators import preserve_generators
from mae.data.item import Batch
from mae.data.run_data import RunData
from mae.data.samples import Samples
from mae.data.source import evenly_spaced, is_stream
from mae.fp32 import in_fp32
from models_mae import MaskedAutoencoderViT

logger = logging.getLogger(__name__)

IMAGES = 2_000  # evenly spaced images on which the constant is computed
TERMS = ("pixels", "target")  # terms of the loss that score the predictions; without them, the whole loss does
OF_TARGET = (*(f"train_{name}" for name in TERMS), "train_loss")  # entries of log.txt, the first that an epoch has
TOLERANCE = 1e-4  # of a loss in fp32

LossOf = Callable[[Tensor], Tensor]  # constant prediction (P,) -> loss ()


class NoConstant(Exception):
    """The loss has no best constant that can be computed. The message has the reason."""


class Parabola(NamedTuple):
    """A loss of constants (P,), which is a parabola of each of their values. fp64, on the host."""

    base: Tensor  # the constant (P,) near which it is exact
    value: Tensor  # the loss () there
    slope: Tensor  # (P,)
    curvature: Tensor  # (P,)

    def __call__(self, constant: Tensor) -> Tensor:
        """Constant (P,) -> loss ()."""
        step = constant - self.base
        return self.value + (self.slope * step + self.curvature * step**2 / 2).sum()


def open_share(
    model: MaskedAutoencoderViT, samples: Samples, data: RunData, mask_ratio: float, batch_size: int
) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """Returns `share` with the constant of some training images; None for a stream, or as in `loss_of_mean`.

    Args:
        samples: the augmented training images.
        mask_ratio: fraction of masked patches.
    """
    if is_stream(samples.source):
        return None
    some = evenly_spaced(len(samples), IMAGES)
    batches = loader.eval_loader(samples, batch_size, data.data.num_workers, data.pin_memory, some)
    begin = time.perf_counter()
    constant = loss_of_mean(model.train(), batches, mask_ratio, data.normalize, data.device)
    if constant is None:
        return None
    seconds = time.perf_counter() - begin
    images = f"{len(some):,} training images"
    logger.info(f"0 % explained is a loss of {constant:.4f}, without other terms, of {images} ({seconds:.1f} s)")
    return partial(share, constant=constant)


def loss_of_mean(
    model: MaskedAutoencoderViT, batches: Iterable[Batch], mask_ratio: float, normalize: Any, device: torch.device
) -> float | None:
    """Returns the loss of the best prediction (P,) that is the same for all patches, by `forward_loss` of the model.

    It is the mean of the targets. None, and a line that says why, if it can't be computed: the loss is not quadratic
    in the predictions, it depends on more than predictions, images and masks, or the user's code raises an error.

    All processes call it. The result is that of the images of all processes. Random number generators and buffers of
    the model do not change.

    Args:
        model: in the mode of the loss, training or evaluation.
        batches: images, and the noise of their masks.
        mask_ratio: fraction of masked patches.
        normalize: images -> the input of the model, on the device.
    """
    zero = torch.zeros(model.decoder_pred.out_features, dtype=torch.float64)
    total: Parabola | None = None  # the sum of the losses of the images
    count = 0
    reason = ""
    buffers = [buffer.clone() for buffer in model.buffers()]
    with preserve_generators(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in prefetch(batches, device):
            try:
                loss_of = _loss_of_constants(model, batch, mask_ratio, normalize, is_checked=total is None)
                # Near the best constant, so that the difference of large losses does not round the result.
                base = total.base if total else _minimum([_parabola(loss_of, zero)])
                part = _parabola(loss_of, base)
            except Exception as error:  # of the user's code; if it is a mistake, the first update shows it
                reason = str(error) if isinstance(error, NoConstant) else f"it raises {type(error).__name__}"
                break
            images = len(batch.images)
            count += images
            sums = [images * value for value in part[1:]]
            total = Parabola(base, *(map(torch.add, total[1:], sums) if total else sums))
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    reshard: Any = getattr(model, "reshard", None)
    if reshard:  # of FSDP: weights outside its units stay gathered without a backward pass
        reshard()
    results = parallel.gather((total, count, reason))
    if reasons := [reason for _, _, reason in results if reason]:
        _log_once(f"the share of the loss that {type(model).__name__} explains is not known: {reasons[0]}")
        return None
    parabolas = [total for total, _, _ in results if total]
    best = _minimum(parabolas)
    return sum(float(parabola(best)) for parabola in parabolas) / sum(count for _, count, _ in results)


@cache
def _log_once(line: str) -> None:
    logger.info(line)


def _loss_of_constants(
    model: MaskedAutoencoderViT, batch: Batch, mask_ratio: float, normalize: Any, is_checked: bool
) -> LossOf:
    """Returns the loss of a batch as a function of a constant prediction.

    Args:
        is_checked: check that it is the loss of `forward`, and the same after another batch.

    Raises:
        NoConstant: it is not.
    """
    imgs = batch.normalized(normalize)

    def seeded(step: Callable[..., Any], imgs: Tensor) -> Any:
        torch.manual_seed(0)  # of masks that the model draws
        with torch.no_grad():
            return step(imgs, mask_ratio, noise=batch.noise, **batch.context)

    def masked(imgs: Tensor, mask_ratio: float, **given: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        inputs, mask_ratio, context = model.prepare_masking(imgs, mask_ratio, **given)
        tokens = inputs.new_zeros(*context["noise"].shape, 1)
        return inputs, model.random_masking(tokens, mask_ratio, **context)[1], context

    found = seeded(model, imgs) if is_checked else None
    if is_checked:
        seeded(model, torch.zeros_like(imgs))
    inputs, mask, context = seeded(masked, imgs)

    def loss_of(pred: Tensor) -> Tensor:
        return _scored(model, in_fp32(model.forward_loss)(inputs, pred, mask, **context))

    if found:
        loss, pred, of_forward = found[:3]
        if not torch.equal(mask, of_forward):
            raise NoConstant("the masks are not those of `random_masking` and the noise")
        if not torch.allclose(_scored(model, loss), loss_of(pred), rtol=TOLERANCE):
            raise NoConstant("the loss is not that of `forward_loss` for predictions, images and masks")
    return lambda constant: loss_of(constant.to(mask.device).expand(*mask.shape, -1).clone())


def _scored(model: MaskedAutoencoderViT, loss: Any) -> Tensor:
    """Returns the loss () whose share is computed: in training that of OF_TARGET, else the whole loss."""
    if not isinstance(loss, Mapping):
        return loss
    named = [loss[name] for name in TERMS if name in loss and model.training]
    return named[0] if named else torch.stack([*loss.values()]).sum()


def _parabola(loss_of: LossOf, base: Tensor) -> Parabola:
    """Returns the loss of constants (P,) as a parabola of each of their values.

    Raises:
        NoConstant: the loss is no such parabola, or has no minimum.
    """

    def at(constant: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss () and its gradient (P,)."""
        with torch.enable_grad():
            leaf = constant.float().requires_grad_()
            loss = loss_of(leaf)
        (slope,) = torch.autograd.grad(loss, leaf)
        return loss.detach().cpu().double(), slope.double()

    value, slope = at(base)
    above, slope_above = at(base + 1)
    parabola = Parabola(base, value, slope, slope_above - slope)
    lowest = _minimum([parabola])
    tolerance = TOLERANCE * (value.abs() + parabola.curvature.sum() / 2)
    for constant, loss in ((base + 1, above), (lowest, at(lowest)[0])):
        if not (parabola(constant) - loss).abs() <= tolerance:
            raise NoConstant("`forward_loss` is not the square of an error")
    if ((parabola.curvature <= 0) & (slope != 0)).any():
        raise NoConstant("`forward_loss` has no lowest value")
    return parabola


def _minimum(parabolas: Sequence[Parabola]) -> Tensor:
    """Returns the constant (P,) for which the sum of losses is the lowest; 0 where no loss depends on it."""
    curvature = torch.stack([parabola.curvature for parabola in parabolas]).sum(dim=0)
    products = torch.stack([parabola.curvature * parabola.base - parabola.slope for parabola in parabolas]).sum(dim=0)
    return torch.where(curvature > 0, products / curvature, 0).float().double()  # exact in fp32


def share(entries: Mapping[str, Any], constant: float | None) -> dict[str, float]:
    """Returns the entry of log.txt of an epoch: train_explained, at most 1; none if the constant is not known.

    Args:
        entries: means of the epoch.
        constant: the `loss_of_mean` of training images.
    """
    loss = next((entries[name] for name in OF_TARGET if entries.get(name) is not None), None)
    return {"train_explained": 1 - loss / constant} if constant and loss is not None else {}
