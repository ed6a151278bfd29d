"""Numbers' precision in training: autocast, the fp16 loss scaler, clipping, and the guard against non-finite steps."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What `--amp` means on a device: the autocast type, or None for full fp32.

    auto is bf16 on CUDA that has it natively, fp16 on other CUDA, off elsewhere. On a CPU, bf16 pays for
    large models only.

    Raises:
        ValueError: fp16 on a CPU, which has no fast fp16 arithmetic.
    """
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 needs a GPU; on a CPU give --amp bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


class Precision:
    """Autocast, and the optimizer step in that precision. Weights, gradients and the loss are fp32 throughout.

    A step whose loss or gradient is not finite leaves the weights as they were. That is decided on the device, inside
    the fused optimizer (`found_inf`), so that the host need not wait for it. A loss that is not finite spoils its whole
    gradient, and so, once gradients are averaged, that of every process.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        self.device = device
        self.dtype = amp_dtype(amp, device)
        # fp16 overflows now and then until the scaler has found its scale: such gradients are no fault of the run.
        self.overflow_is_normal = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.overflow_is_normal)

    @property
    def name(self) -> str:
        """bf16, fp16 or fp32."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[self.dtype]

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`; they are NaN if it is not finite, even where its formula's would be finite."""
        spoil = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
        self.scaler.scale(loss * spoil).backward()

    def step(self, optimizer: Optimizer, clip_grad: float | None) -> Tensor:
        """Clips, steps and clears the gradients; one that is not finite makes it a step of nothing.

        Args:
            clip_grad: largest global norm of the gradient, or None.

        Returns:
            The global norm of the gradient before clipping, on the device.
        """
        assert getattr(optimizer, "_step_supports_amp_scaling", False), "the optimizer must heed found_inf (fused=True)"
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), clip_grad, norm)
        if isinstance(norm, DTensor):  # of sharded gradients
            norm = norm.full_tensor()
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)  # looks at its own found_inf
        else:
            # What GradScaler sets for optimizers that take its verdict on the device; here it is ours.
            vars(optimizer).update(grad_scale=None, found_inf=(~torch.isfinite(norm)).float())
            optimizer.step()
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
