"""Loss and gradients of the variants against the model as it is, and the Triton kernels against fp64.

    python benchmarks/lab/numerics.py                  # on a CPU; the kernels in Triton's interpreter
    python benchmarks/lab/numerics.py --device cuda    # the kernels on a GPU

Differences are norms of the difference of all gradients, divided by the norm of those of the model. In bf16, the error
of a variant is as large as that of the model, unless it rounds more. The interpreter has no products of bf16, so that
it computes in fp16 and fp32.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.gpu_correct import relative_difference
from benchmarks.lab import ops, variants
from benchmarks.lab.emulation import fast_bf16
from mae.cli import entry_point
from mae.evaluate.tables import markdown
from mae.parallel import choose_device
from mae.training.precision import Precision

# Images, tokens, heads, channels of a head: encoders and decoders in pre-training, and short sequences.
SHAPES = ((2, 50, 2, 64), (1, 197, 2, 32), (1, 65, 1, 80), (1, 257, 1, 32), (2, 17, 4, 32), (2, 5, 1, 24))
ROWS = ((300, 96), (33, 257), (3, 1280))  # rows and channels of GELU and LayerNorm
IMAGES = 8
SIDE = 32


def attention_in_fp64(qkv: Tensor, heads: int, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient by PyTorch's attention."""
    qkv = qkv.double().requires_grad_()
    parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    out = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, qkv, dout.double())[0]


def of_attention(device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """Errors of output and gradient of the packed kernels, for each shape; then those of the formulas in PyTorch."""
    from benchmarks.lab import attention_kernels as kernels

    found = {}
    for images, tokens, heads, width in SHAPES:
        qkv = torch.randn(images, tokens, 3 * heads * width).to(device, dtype)
        dout = torch.randn(images, tokens, heads * width).to(device, dtype)
        expected = attention_in_fp64(qkv, heads, dout)
        formulas = (ops.attention(qkv.cpu(), heads), ops.attention_backward(qkv.cpu(), dout.cpu(), heads))
        ours = (kernels.forward(qkv, heads), kernels.backward(qkv, dout, heads))
        pairs = [*zip(ours, expected, strict=True), *zip(formulas, expected, strict=True)]
        title = f"attention, {tokens} tokens, {heads} x {width} channels, {str(dtype).removeprefix('torch.')}"
        found[title] = [relative_difference(*pair) for pair in pairs]
    return found


def of_sums(device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """Errors of the gradients of GELU and LayerNorm: of the input, the other outputs, and the sums over the rows."""
    from benchmarks.lab import backward_kernels as kernels

    found = {}
    name = str(dtype).removeprefix("torch.")
    for rows, dim in ROWS:
        a, dout = (torch.randn(rows, dim).to(device, dtype) for _ in range(2))
        x, dstream = (torch.randn(rows, dim).to(device) for _ in range(2))
        bias, weight = (torch.randn(dim).to(device) for _ in range(2))
        leaves = [tensor.double().requires_grad_() for tensor in (a, bias)]
        expected = torch.autograd.grad(F.gelu(leaves[0] + leaves[1]), leaves, dout.double())
        ours = kernels.bias_gelu_backward(a, bias, dout)
        title = f"{rows} rows, {dim} channels, {name}"
        found[f"GELU, {title}"] = [relative_difference(*pair) for pair in zip(ours, expected, strict=True)]

        leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
        normed = F.layer_norm(leaves[0], (dim,), leaves[1], leaves[2], 1e-6)
        dx, *of_weights = torch.autograd.grad([normed, leaves[0]], leaves, [dout.double(), dstream.double()])
        stream, branch, sums = kernels.add_norm_backward(x, weight, dout, dstream, 1e-6)
        pairs = [(stream, dx), (branch, dx), *zip(sums, (*of_weights, dx.sum(0)), strict=True)]
        found[f"LayerNorm, {title}"] = [relative_difference(*pair) for pair in pairs]
    return found


def gradients(name: str, amp: str, device: torch.device) -> tuple[float, Tensor]:
    """Loss and gradients of a variant of the smallest model in training, from the same weights, images and noise."""
    torch.manual_seed(0)
    model = variants.of_size(name, "mini_patch4").to(device).train()
    images = torch.rand(IMAGES, 3, SIDE, SIDE).to(device)
    noise = torch.rand(IMAGES, model.num_patches).to(device)
    precision = Precision(amp, device)
    with fast_bf16(device):
        with precision.autocast():
            loss = model(images, noise=noise)[0]
        loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def of_variants(device: torch.device) -> dict[str, dict[str, float]]:
    """Differences of the loss and of all gradients, in fp32 from the model, and in bf16 from the model in fp32."""
    loss, reference = gradients("main", "off", device)
    _, in_bf16 = gradients("main", "bf16", device)
    found = {}
    for name in variants.VARIANTS:
        exact = gradients(name, "off", device)
        rounded = gradients(name, "bf16", device)
        found[name] = {
            "fp32: loss": exact[0] - loss, "fp32: gradient": relative_difference(exact[1], reference),
            "bf16: loss": rounded[0] - loss, "bf16: gradient": relative_difference(rounded[1], reference),
            "bf16: gradient, from main in bf16": relative_difference(rounded[1], in_bf16),
        }  # fmt: skip
    return found


def of_kernels(device: torch.device) -> dict[str, list[float]]:
    """The errors of all kernels; {} without Triton."""
    if not ops.HAS_TRITON:
        return {}
    torch.manual_seed(0)
    if device.type == "cuda":  # the attention of a GPU has no fp32
        return of_attention(device, torch.bfloat16) | of_sums(device, torch.bfloat16) | of_sums(device, torch.float32)
    found: dict[str, list[float]] = {}
    for dtype in (torch.float16, torch.float32):
        found |= of_attention(device, dtype) | of_sums(device, dtype)
    return found


def main(args: argparse.Namespace) -> None:
    """Prints both tables, and writes them as JSON."""
    device = choose_device(args.device)
    results: dict[str, Any] = {"variants": of_variants(device), "kernels": of_kernels(device)}
    titles = ["variant", "kind", *next(iter(results["variants"].values()))]
    rows = [
        [name, variants.VARIANTS[name].kind, *(f"{value:.1e}" for value in found.values())]
        for name, found in results["variants"].items()
    ]
    print(f"\n{markdown(titles, rows)}\n")
    rows = [[name, " ".join(f"{error:.1e}" for error in errors)] for name, errors in results["kernels"].items()]
    print(markdown(["kernel", "errors, compared with fp64"], rows) if rows else "Triton is not installed")
    machine.write("lab_numerics", device, vars(args), results, args.out)


def get_args_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = entry_point.parser("Loss and gradients of the variants, and errors of the Triton kernels.")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the JSON file (default: benchmarks/results/MACHINE)"
    )
    return parser


if __name__ == "__main__":
    entry_point.run(main, get_args_parser())
