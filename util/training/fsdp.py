"""A model whose weights are shared out among the processes (`--fsdp`, FSDP2), from its start."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from util import dist


def shard(
    model: nn.Module, units: Iterable[nn.Module], device: torch.device, dtype: torch.dtype | None, method: str
) -> None:
    """Leaves each process its part of the weights, and so of gradients and optimizer states (FSDP2), in place.

    Each unit's weights come together while it computes; what is in no unit stays together from forward to backward.
    No process holds the whole model: random numbers are drawn for one whole tensor at a time.

    Args:
        model: built under `torch.device("meta")`; its `initialize_weights` follows its modules' `reset_parameters`.
            With the same seed, it gets the weights of a model that is built without sharding.
        units: its blocks.
        device: of the weights.
        dtype: in which the weights of units travel between GPUs, fp32 if None. Gradients are averaged in fp32.
        method: of the model, besides a call, that computes with its weights.

    Raises:
        ValueError: there is one process only, or the type is fp16, which would need a scale common to all; or a weight
            has no initialisation.
    """
    if dtype is torch.float16:
        raise ValueError("--fsdp goes with --amp bf16 or off, not with fp16")
    if dist.world_size() == 1:
        raise ValueError("--fsdp shares the weights among processes, and there is one: start several with torchrun")
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    # Activations keep the type that autocast gives them, as without sharding; so LayerNorm gets fp32 and weights of
    # another type, which a CPU's does not take.
    travels_as = dtype if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=travels_as, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, method)
    _initialize(model, device)


@torch.no_grad()
def _initialize(model: Any, device: torch.device) -> None:
    """Initialises a sharded model, in the order of a model's constructor."""
    fixed = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}  # position tables
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    model.load_state_dict(fixed, strict=False)
    with _WholeDraws():
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        model.initialize_weights()
    unset = dist.gather([name for name, parameter in model.named_parameters() if parameter.to_local().isnan().any()])
    for name in chain(*unset):
        raise ValueError(f"--fsdp: {name} is not initialised: give its module a method reset_parameters that sets it")


class _WholeDraws(TorchDispatchMode):
    """Draws the random numbers of a sharded tensor for the whole tensor, on the CPU, and keeps the local part.

    DTensor's own random numbers are other ones than a plain tensor's.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args else None
        if not isinstance(tensor, DTensor) or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs or {})
        whole = func(torch.empty(tensor.shape, dtype=tensor.dtype), *args[1:], **kwargs or {})
        return tensor.copy_(dist.placed_as(whole, tensor))
