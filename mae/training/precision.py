"""Mixed precision: autocast, the fp16 loss scaler, gradient clipping, and updates that skip non-finite gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mae.training.amp import DTYPES, precision_name


def _set_fp32_products(precisions: Sequence[str]) -> None:
    """Sets the precision of fp32 matrix products, convolutions and recurrent layers on CUDA: "tf32", "ieee" or "none".

    PyTorch has an earlier and a newer setting, and raises errors where they disagree: both are set.
    """
    torch.backends.cuda.matmul.allow_tf32 = precisions[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = precisions[1] == "tf32"
    for operation, precision in zip(_fp32_operations(), precisions, strict=True):
        operation.fp32_precision = precision


def _fp32_operations() -> list[Any]:
    cudnn: Any = torch.backends.cudnn  # its annotations lack these
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


class Precision:
    """Autocast and the optimizer step. Weights, gradients and the loss are fp32.

    On CUDA, the matrix products that remain in fp32 use TF32, unless the precision is fp32. The setting of the process
    changes only during forward and backward passes.

    A step with a non-finite loss or gradient does not change the weights. Optimizers that support `found_inf` check it
    on the device: fused ones, and `mae.training.lars.LARS`. The host waits for the gradients of others. A non-finite
    loss makes all gradients NaN, and averaging propagates them to all processes.

    Args:
        amp, device, trains, recorded: as in `precision_name`.
    """

    def __init__(self, amp: str, device: torch.device, trains: bool = False, recorded: str | None = None) -> None:
        self.amp = amp
        self.device = device
        self.name = precision_name(amp, device, trains, recorded)
        self.dtype = DTYPES[self.name]
        # fp16 gradients overflow until the loss scaler has adapted.
        self.overflow_is_normal = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.overflow_is_normal)

    def of_evaluation(self) -> "Precision":
        """Returns the precision of evaluations: fp32 on a CPU, unless `--amp` is explicit."""
        return Precision(self.amp, self.device) if self.device.type == "cpu" else self

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of a forward pass."""
        with (
            self._fp32_products(),
            torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None),
        ):
            yield

    @contextmanager
    def _fp32_products(self) -> Iterator[None]:
        """The context in which fp32 products on CUDA use TF32, or do not if the precision is fp32."""
        if self.device.type != "cuda":
            yield
            return
        before = [operation.fp32_precision for operation in _fp32_operations()]
        _set_fp32_products(["ieee" if self.name == "fp32" else "tf32"] * len(before))
        try:
            yield
        finally:
            _set_fp32_products(before)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradients of `loss`. They are NaN if the loss is not finite."""
        factor = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
        with self._fp32_products():
            self.scaler.scale(loss * factor).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip_grad: float | None) -> torch.Tensor:
        """Clips the gradients, updates the weights and clears the gradients.

        The update is skipped if a gradient is not finite.

        Args:
            clip_grad: maximum global norm of the gradient; None: no clipping.

        Returns:
            The global norm of the gradient before clipping, on the device.
        """
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), clip_grad, norm)
        if hasattr(norm, "full_tensor"):  # sharded gradients
            norm = norm.full_tensor()
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)  # sets found_inf
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            # The attributes that GradScaler sets for fused optimizers.
            vars(optimizer).update(grad_scale=None, found_inf=(~torch.isfinite(norm)).float())
            optimizer.step()
        elif torch.isfinite(norm):
            optimizer.step()
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
