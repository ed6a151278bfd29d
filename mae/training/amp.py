"""The precision that `--amp` means on a device."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": None, "fp32": None}  # of autocast; None: no autocast


def precision_name(amp: str, device: torch.device, trains: bool = False, recorded: str | None = None) -> str:
    """Returns the precision of `--amp` on a device: bf16, fp16, tf32 or fp32.

    auto is bf16 on devices with native support, fp16 on other CUDA devices, and fp32 on other CPUs. Evaluation on a CPU
    is in fp32.

    Args:
        trains: weights of an encoder are trained.
        recorded: for auto, the name of the precision of the resumed run; "" for a run of the published code, which
            trains in fp32 on CPUs; None for a new run.

    Raises:
        ValueError: `amp` is unknown, the device does not support fp16, TF32 or the precision of the resumed run, or its
            name is unknown.
    """
    is_cpu = device.type == "cpu"
    if amp == "auto" and recorded:
        if recorded not in DTYPES:
            raise ValueError(f"the resumed run records the precision {recorded[:80]!r}: give amp=bf16, fp16 or off")
        lacks_half = is_cpu and (recorded == "fp16" or (recorded == "bf16" and not _cpu_has_bf16()))
        if lacks_half or (recorded == "tf32" and not _has_tf32(device)):
            kind = "CPU" if is_cpu else "GPU"
            raise ValueError(f"amp=auto: the resumed run trained in {recorded}, which this {kind} lacks; give amp=off")
        return recorded
    if amp == "auto":
        if is_cpu:
            return "bf16" if trains and recorded is None and _cpu_has_bf16() else "fp32"
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and is_cpu:
        raise ValueError("amp=fp16 needs a GPU; on a CPU give amp=bf16 or off")
    if amp == "tf32" and not _has_tf32(device):
        raise ValueError("amp=tf32 needs an NVIDIA GPU of compute capability 8.0 or more (Ampere); give amp=off")
    return "fp32" if amp == "off" else amp


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_tf32_supported()


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies matrices in bf16 (AVX512-BF16, AMX). Others convert to fp32, and are slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
