"""torch.compile, if a compiler is installed."""

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mae.build import blocks_of

logger = logging.getLogger(__name__)


def compile_model(model: torch.nn.Module, device: torch.device, freeze_weights: bool = False) -> None:
    """Compiles the blocks of a model in place, and its loss. The names of parameters do not change.

    All blocks of a size share a graph for each input shape, so that compilation takes less time than that of the whole
    model. The gradients of a block are averaged over the processes, and the weights of a sharded block are gathered,
    while another block computes. A model without blocks, or with less than half of its weights in them, is one graph.

    Without a compiler, it logs a warning and does not change the model.

    Args:
        freeze_weights: for a model that is only evaluated. On a CPU, the whole model is one graph that contains the
            weights, in the dtype and the layout of the matrix products; later changes of the weights have no effect.
    """
    try:
        torch.compile(torch.relu)(torch.ones(2, device=device))
    except Exception as error:  # the type depends on the backend
        reason = str(error).strip().splitlines()[0]
        need = "Triton" if device.type == "cuda" else "a C++ compiler and Python's headers (g++, python3-dev)"
        logger.warning(f"`compile` needs {need} and does not work here ({reason}): the command continues without it")
        return
    if freeze_weights and device.type == "cpu":  # on a GPU, this was not measured
        from torch._inductor import config  # takes longer to import than PyTorch

        # PyTorch reads this setting when it traces and when it compiles, so an argument of torch.compile is too late.
        model.forward = config.patch(freezing=True)(torch.compile(model.forward, fullgraph=True, dynamic=False))
    else:
        units = blocks_of(model)
        settings: Any = torch._dynamo.config
        if 2 * sum(map(_num_weights, units)) < _num_weights(model):  # its blocks may have another name
            units = [model]
        else:
            settings.optimize_ddp = False  # it would split the graph of a block with more than 25 MiB of weights
        # Blocks of a user may have a constant each, in training and evaluation, for two batch sizes. The default is 8.
        settings.recompile_limit = max(settings.recompile_limit, 4 * len(units))
        for unit in units:
            _compile_method(unit, "forward")
        if hasattr(model, "forward_loss"):
            _compile_method(model, "forward_loss")
    logger.info("`compile`: the first batch, and the first of another size, take up to a minute")


def _num_weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _compile_method(module: torch.nn.Module, name: str) -> None:
    """Compiles a method of a module. Its hooks, such as those that gather sharded weights, are outside the graph.

    The method may be static, or a function that the user has set in this module.
    """
    method = getattr(module, name)
    is_bound = getattr(method, "__self__", None) is module
    compiled = torch.compile(method.__func__ if is_bound else method, fullgraph=True, dynamic=False)
    # A copy of the module has a method of its own.
    setattr(module, name, MethodType(compiled, module) if is_bound else compiled)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether `compile_model`, or its user, has compiled a module. torch.compile marks its functions."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def padded(
    forward: Callable[..., Tensor], model: torch.nn.Module, size_of: Callable[[int], int] | None = None
) -> Callable[..., Tensor]:
    """Pads batches for a compiled model, which has a graph for each size of a batch, and cuts its outputs.

    Args:
        forward: images (B, c, H, W), and extra inputs (B, ...) by name -> outputs (B, ...) of the model.
        size_of: B -> the size with padding. Default: that of the largest batch so far.

    Returns:
        A function like `forward`; for a model that is not compiled, `forward`.
    """
    if not any(map(_is_compiled, model.modules())):
        return forward
    largest = 0

    def padded_forward(imgs: Tensor, **inputs: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(imgs))
        lacking = (size_of(len(imgs)) if size_of else largest) - len(imgs)

        def pad(values: Tensor) -> Tensor:
            return torch.cat([values, *[values[:1]] * lacking])  # keeps the memory format, on which a graph depends

        if not lacking:
            return forward(imgs, **inputs)
        return forward(pad(imgs), **{name: pad(values) for name, values in inputs.items()})[: len(imgs)]

    return padded_forward
