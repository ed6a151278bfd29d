"""Code generated for a model (`torch.compile`), where this machine can generate any."""

import logging

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Has calls of the model run as generated code, one graph a shape of batch; its names stay as they are.

    Where no code can be generated, because a compiler is missing, it says so in a sentence and leaves the model alone.
    """
    try:
        torch.compile(torch.relu)(torch.ones(2, device=device))
    except Exception as error:  # which ones is up to the backend
        reason = str(error).strip().splitlines()[0]
        need = "Triton" if device.type == "cuda" else "a C++ compiler and Python's headers (g++, python3-dev)"
        logger.warning(f"--compile needs {need}, and works not here ({reason}): training goes on without it")
        return
    if isinstance(model, FSDPModule):  # weights come and go between its units, around what can be one graph
        for unit in model.modules():
            if isinstance(unit, FSDPModule) and unit is not model:
                unit.forward = torch.compile(unit.forward, fullgraph=True, dynamic=False)
    else:
        model.compile(fullgraph=True, dynamic=False)
    logger.info("--compile: the first step, and the first evaluation, take a minute or more")
