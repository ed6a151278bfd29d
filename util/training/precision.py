"""Mixed precision: autocast, the fp16 loss scaler, gradient clipping, and updates that skip non-finite gradients."""

import torch

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}


def amp_dtype(amp: str, device: torch.device, trains: bool = False, recorded: str | None = None) -> torch.dtype | None:
    """Returns the autocast dtype of `--amp` on a device; None: fp32.

    auto is bf16 on devices with native support, fp16 on other CUDA devices, and fp32 on other CPUs. Evaluation on a CPU
    is in fp32.

    Args:
        trains: weights of an encoder are trained.
        recorded: for auto, the name of the precision of the resumed run; "" for a run of an earlier version, which
            trained in fp32 on CPUs; None for a new run.

    Raises:
        ValueError: the device does not support fp16 or the precision of the resumed run, or its name is unknown.
    """
    is_cpu = device.type == "cpu"
    if amp == "auto" and recorded:
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        if recorded not in dtypes:
            raise ValueError(f"the resumed run records the precision {recorded[:80]!r}: give --amp bf16, fp16 or off")
        dtype = dtypes[recorded]
        if is_cpu and (dtype is torch.float16 or (dtype is torch.bfloat16 and not _cpu_has_bf16())):
            raise ValueError(f"--amp auto: the resumed run trained in {recorded}, which this CPU lacks; give --amp off")
        return dtype
    if amp == "auto":
        if is_cpu:
            return torch.bfloat16 if trains and recorded is None and _cpu_has_bf16() else None
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if amp == "fp16" and is_cpu:
        raise ValueError("--amp fp16 needs a GPU; on a CPU give --amp bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies matrices in bf16 (AVX512-BF16, AMX). Others convert to fp32, and are slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Precision:
    """Autocast and the optimizer step. Weights, gradients and the loss are fp32.

    A step with a non-finite loss or gradient does not change the weights. Optimizers that support `found_inf` check it
    on the device: fused ones, and `util.lars.LARS`. The host waits for the gradients of others. A non-finite loss makes
    all gradients NaN, and averaging propagates them to all processes.

    Args:
        amp, device, trains, recorded: as in `amp_dtype`.
    """

    def __init__(self, amp: str, device: torch.device, trains: bool = False, recorded: str | None = None) -> None:
        self.amp = amp
        self.device = device
        self.dtype = amp_dtype(amp, device, trains, recorded)
        # fp16 gradients overflow until the loss scaler has adapted.
        self.overflow_is_normal = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.overflow_is_normal)

    @property
    def name(self) -> str:
        """bf16, fp16 or fp32."""
        return NAMES[self.dtype]

    def of_evaluation(self) -> "Precision":
        """Returns the precision of evaluations: fp32 on a CPU, unless `--amp` is explicit."""
        return Precision(self.amp, self.device) if self.device.type == "cpu" else self

    def autocast(self) -> torch.autocast:
        """Returns the context manager of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradients of `loss`. They are NaN if the loss is not finite."""
        factor = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
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
