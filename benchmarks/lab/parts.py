"""The steps of gpu_lab.py that measure parts of a model: ceilings, attention, and blocks.

On a CPU they are a rehearsal: small shapes, nothing compiled, no CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from benchmarks.gpu_steps import ROUNDS
from benchmarks.gpu_task import Task
from benchmarks.lab import ops, variants
from benchmarks.lab.graph import captured

# Images, tokens, channels and heads of the blocks in pre-training at the batch size of the lab.
SHAPES = {
    "B encoder": (512, 50, 768, 12),
    "B decoder": (512, 197, 512, 16),
    "L encoder": (256, 50, 1024, 16),
    "H encoder": (128, 65, 1280, 16),
    "H decoder": (128, 257, 512, 16),
}
SMALL = (2, 17, 64, 2)  # of a rehearsal
# Rows, columns and inner channels of the products of these blocks.
PRODUCTS = (
    (25600, 2304, 768), (25600, 768, 768), (25600, 3072, 768), (25600, 768, 3072), (100864, 1536, 512),
    (100864, 512, 512), (100864, 2048, 512), (100864, 512, 2048), (12800, 4096, 1024), (12800, 1024, 4096),
    (8320, 3840, 1280), (8320, 5120, 1280), (8320, 1280, 5120),
)  # fmt: skip
FP8_CHANNELS = 1024  # of both sides of a weight, from which fp8 products might pay


def milliseconds(step: Callable[[], Any], task: Task, least: float = 0.05) -> list[float]:
    """Milliseconds of a step in each round, under a CUDA graph, in which the host takes no time.

    Args:
        least: seconds of a round.
    """
    if not task.has_gpu:
        return [1e3 * timing.seconds(step, 1, task.device)]
    replay = captured(step, lambda: [step() for _ in range(3)])
    replay()
    repeats = max(3, round(least / timing.seconds(replay, 3, task.device)))
    return [1e3 * timing.seconds(replay, repeats, task.device) for _ in range(ROUNDS)]


def ceilings(task: Task) -> None:
    """TB/s of a copy, and TFLOP/s of the three products of linear layers of our shapes, in bf16 and fp8."""
    task.wait_for_turn()
    a = torch.randn(2**28 if task.has_gpu else 2**16, device=task.device, dtype=torch.bfloat16)
    times = milliseconds(partial(torch.empty_like(a).copy_, a), task)
    found: dict[str, Any] = {"copy, TB/s": [2 * a.nbytes / time / 1e9 for time in times]}
    del a
    for rows, columns, inner in PRODUCTS if task.has_gpu else ((64, 32, 16),):
        x, weight, gradient = (
            torch.randn(shape, device=task.device, dtype=torch.bfloat16)
            for shape in ((rows, inner), (columns, inner), (rows, columns))
        )
        ways: dict[str, Callable[[], Any]] = {
            "forward": partial(torch.mm, x, weight.T),
            "of the input": partial(torch.mm, gradient, weight),
            "of the weight": partial(torch.mm, gradient.T, x),
        }
        if task.has_gpu and min(inner, columns) >= FP8_CHANNELS:
            ways["forward in fp8"] = fp8_product(x, weight)
        flops = 2 * rows * columns * inner
        for way, product in ways.items():
            times = milliseconds(product, task, least=0.02)
            found[f"{rows} x {columns} x {inner}, {way}, TFLOP/s"] = [flops / time / 1e9 for time in times]
        task.write(ceilings=found)


def fp8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """x weight^T of e4m3 operands with a scale for each tensor; the conversion is not part of it."""
    one = torch.ones((), device=x.device)
    a, b = (tensor.to(torch.float8_e4m3fn) for tensor in (x, weight))
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def attention(task: Task) -> None:
    """Microseconds per image of attention, forward and backward, from packed inputs to packed gradients."""
    from benchmarks.gpu_correct import relative_difference

    if task.has_gpu:
        for shape in SHAPES.values():  # compiles the kernels, while others use the GPU
            tune(shape, task)
    task.wait_for_turn()
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items() if task.has_gpu else [("small", SMALL)]:
        images, tokens, dim, heads = shape
        qkv, dout = (
            torch.randn(images, tokens, width, device=task.device, dtype=torch.bfloat16) for width in (3 * dim, dim)
        )
        qkv.requires_grad_()
        ways = attention_ways(task, heads)
        if task.has_gpu:
            found[f"{name}: settings of the packed kernels"] = tune(shape, task)
        reference = of_attention(ways["default"], qkv[:4].detach().float(), dout[:4].float())
        for way, call in ways.items():
            try:
                errors = map(relative_difference, of_attention(call, qkv[:4], dout[:4]), reference)
                found[f"{name}, {way}: errors of output and gradient"] = [*errors]
                times = milliseconds(partial(of_attention, call, qkv, dout), task)
                found[f"{name}, {way}, us per image"] = [1e3 * time / images for time in times]
            except RuntimeError as error:  # the kernel does not support the shape
                found[f"{name}, {way}"] = str(error).partition("\n")[0][:100]
            task.write(attention=found)
        packed = found.get(f"{name}, packed: errors of output and gradient", [1.0])
        task.check(f"packed attention, {name}: differs from fp32 by at most 1 %", max(packed) < 1e-2)


def attention_ways(task: Task, heads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of packed queries, keys and values (B, L, 3·h·d) -> (B, L, h·d)."""

    def by_backend(backend: SDPBackend, qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return variants.mix_by_pytorch(qkv, heads)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"default": partial(variants.mix_by_pytorch, heads=heads)}
    if task.has_gpu:
        ways |= {
            "cuDNN": partial(by_backend, SDPBackend.CUDNN_ATTENTION),
            "flash": partial(by_backend, SDPBackend.FLASH_ATTENTION),
            "efficient": partial(by_backend, SDPBackend.EFFICIENT_ATTENTION),
        }
    return {**ways, "packed": partial(ops.attention, heads=heads)}


def of_attention(call: Callable[[Tensor], Tensor], qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the packed input."""
    qkv = qkv.detach().requires_grad_()
    out = call(qkv)
    return out, torch.autograd.grad(out, qkv, dout)[0]


def tune(shape: tuple[int, int, int, int], task: Task) -> dict[str, float | str]:
    """Chooses the launch settings of the packed kernels for a shape, in this process."""
    from benchmarks.lab import attention_kernels  # Triton

    images, tokens, dim, heads = shape
    qkv = torch.randn(images, tokens, 3 * dim, device=task.device, dtype=torch.bfloat16)
    return attention_kernels.tune(qkv, heads)


def blocks(task: Task) -> None:
    """Microseconds per image of a block, forward and backward, in every variant, under CUDA graphs; blocks.SHAPE."""
    shape = SHAPES[task.name.partition(".")[2].replace("_", " ")] if task.has_gpu else SMALL
    steps = {name: block_step(name, shape, task) for name in variants.VARIANTS}
    for step in steps.values():
        step()
        step()
    if task.has_gpu:
        tune(shape, task)  # compiles the kernels
    task.wait_for_turn()
    if task.has_gpu:
        tune(shape, task)
    found: dict[str, list[float]] = {}
    for name, step in steps.items():
        found[name] = [1e3 * time / shape[0] for time in milliseconds(step, task)]
        task.write(shape=shape, microseconds_per_image=found)


def block_step(name: str, shape: tuple[int, int, int, int], task: Task) -> Callable[[], None]:
    """The forward and backward pass of a block that is neither the first nor the last one."""
    images, tokens, dim, heads = shape
    variant = variants.VARIANTS[name]
    block = variant.block(dim, heads, norm_layer=variant.norm_layer).to(task.device)
    if task.has_gpu:
        block.compile(fullgraph=True, dynamic=False)
    is_half = issubclass(variant.model, variants.BF16Encoder)
    stream = torch.randn(images, tokens, dim, device=task.device, dtype=torch.bfloat16 if is_half else torch.float32)
    branch = torch.randn(images, tokens, dim, device=task.device, dtype=torch.bfloat16)
    inputs = [stream]
    gradients = [torch.randn_like(stream)]
    if carries := isinstance(block, variants.CarryBlock | variants.FusedBlock):
        inputs.append(branch)
        gradients.append(torch.randn_like(branch))
    if isinstance(block, variants.FusedBlock):
        inputs.append(torch.zeros(dim, device=task.device))
    for tensor in inputs:
        tensor.requires_grad_()

    def step() -> None:
        with torch.autocast(task.device.type, dtype=torch.bfloat16):
            out = block(variants.Pending(*inputs) if carries else stream)
        torch.autograd.backward(out[:2] if carries else [out], gradients)
        for tensor in (*inputs, *block.parameters()):
            tensor.grad = None

    return step
