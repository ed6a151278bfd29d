"""Sharding of a model over the processes (`--fsdp`, FSDP2)."""

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mae import parallel

logger = logging.getLogger(__name__)


def shard(
    model: torch.nn.Module,
    units: Iterable[torch.nn.Module],
    device: torch.device,
    dtype: torch.dtype | None,
    method: str,
) -> None:
    """Shards weights, gradients and optimizer states over the processes (FSDP2), in place.

    The weights of a unit are gathered while it computes. Weights outside units are gathered from the forward to the
    backward pass. No process has a complete model from the meta device in memory: initialization samples one complete
    tensor at a time.

    Args:
        model: a model that was built under `torch.device("meta")`: `initialize_weights` runs after the
            `reset_parameters` of its modules, and with the same seed, the weights equal the weights of a model without
            sharding. Or a model with weights, which are the same in all processes.
        units: the blocks.
        device: device of the weights.
        dtype: data type of the weights of units in communication between GPUs; None: fp32. Gradients are averaged in
            fp32.
        method: another method of the model, in addition to `forward`, that computes with its weights.

    Raises:
        ValueError: `dtype` is fp16, which needs a common loss scale, or a weight or buffer is not initialized.
    """
    if dtype is torch.float16:
        raise ValueError("`fsdp` supports amp=bf16 and off, not fp16")
    if parallel.world_size() == 1:
        logger.warning("`fsdp` shards nothing in a single process: start several processes with torchrun, or omit it")
    # The predictions are a part of the decoder's output. No code changes them in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (parallel.world_size(),))
    # Activations have the dtype of autocast, as without sharding. With param_dtype, LayerNorm would have fp32 input and
    # weights of another dtype, which the CPU does not support.
    param_dtype = dtype if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, method)
    if any(parameter.is_meta for parameter in model.parameters()):
        initialize(model, device)


@torch.no_grad()
def initialize(model: Any, device: torch.device) -> None:
    """Initializes a sharded model in the order of its constructor."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"`fsdp`: the buffer {name} is not initialized: set it in a subclass (model_class)")
    fixed = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}  # position tables
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    model.load_state_dict(fixed, strict=False)
    with _FullTensorSampling():
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        model.initialize_weights()
    unset = [name for name, parameter in model.named_parameters() if parameter.to_local().isnan().any()]
    if names := [name for part in parallel.gather(unset) for name in part]:
        raise ValueError(
            f"`fsdp`: {names[0]} is not initialized: give its module a method reset_parameters that sets it"
        )


class _FullTensorSampling(TorchDispatchMode):
    """Samples the random numbers of the complete tensor on the CPU, and copies the local shard of them.

    DTensor itself samples other numbers than a plain tensor.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args else None
        if not isinstance(tensor, DTensor) or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs or {})
        full = func(torch.empty(tensor.shape, dtype=tensor.dtype), *args[1:], **kwargs or {})
        return tensor.copy_(parallel.placed_as(full, tensor))
