"""The steps of gpu_check.py that check results: tests, equal runs, numerics, and the message of a full memory."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import models_mae
from benchmarks import gpu_task, image_sets
from benchmarks.gpu_task import Task
from mae.checkpoints import checkpoint
from mae.training import log
from mae.training.precision import Precision

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Heads, tokens and channels of a head: ViT-B's encoder in pre-training, its decoder, its encoder on all patches;
# ViT-H's encoder in pre-training and on all patches.
SHAPES = ((12, 50, 64), (16, 197, 32), (12, 197, 64), (16, 65, 80), (16, 257, 80))


def tests(task: Task) -> None:
    """tests/test_cuda.py, with no plugin of pytest. Without a GPU, its tests are skipped."""
    os.environ |= {"CUDA_TESTS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = gpu_task.run_python("-m", "pytest", "-p", "no:cacheprovider", "tests/test_cuda.py")
    summary = gpu_task.last_line(done.stdout or done.stderr)
    task.write(summary=summary)
    task.check(
        f"tests/test_cuda.py: {summary}", done.returncode == 0 and not (task.has_gpu and "passed" not in summary)
    )
    if not task.has_gpu:
        task.skip("tests/test_cuda.py")


# ------------------------------------------------------------------------------------------------- equal runs


class Runs:
    """Runs of main_pretrain.py on a few JPEG files: ViT-S on a GPU, the smallest model on a CPU. Two epochs."""

    def __init__(self, task: Task) -> None:
        self.folder = task.folder / "runs"
        self.batch, side, size = (64, 224, "small_patch16") if task.has_gpu else (8, 32, "mini_patch4")
        image_sets.write_jpeg_files(self.folder / "data", 4 * self.batch, image_sets.OF_SCIKIT_LEARN)
        self.device = "cuda:0" if task.has_gpu else "cpu"
        self.flags = [
            "--data_path", self.folder / "data", "--model", f"mae_vit_{size}", "--input_size", side, "--epochs", 2,
            "--warmup_epochs", 1, "--save_every", 1, "--blr", 0.001, "--norm_pix_loss", "--num_workers", 2,
            "--vis_every", 0, "--device", self.device,
        ]  # fmt: skip
        if not task.has_gpu:  # auto is bf16 on some CPUs
            self.flags += ["--amp", "off"]

    def start(self, name: str, *flags: object, processes: int = 1) -> str:
        """Runs a command; returns its error message, or nothing."""
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
        words = [*launcher[: 5 if processes > 1 else 0], "main_pretrain.py", "--output_dir", self.folder / name]
        done = gpu_task.run_python(*words, *self.flags, "--batch_size", self.batch // processes, *flags)
        if done.returncode == 0:
            return ""
        lines = [line for line in done.stderr.splitlines() if ": error: " in line]
        return lines[0] if lines else gpu_task.last_line(done.stderr)

    def losses(self, name: str) -> list[float]:
        return [line["train_loss"] for line in log.read(self.folder / name)]

    def differing(self, a: str, b: str) -> list[str]:
        """Names of the weights that differ in two runs."""
        first, second = (checkpoint.read(self.folder / name / "checkpoint-1.pth")["model"] for name in (a, b))
        return [name for name in first if not torch.equal(first[name], second[name])]

    def resume(self) -> str:
        """Repeats the second epoch of the first run from its checkpoint."""
        (self.folder / "resumed").mkdir()
        shutil.copy(self.folder / "first" / "checkpoint-0.pth", self.folder / "resumed")
        return self.start("resumed", "--resume", "auto")


def equality(task: Task) -> None:
    """Runs of main_pretrain.py: twice the same, resumed, in two processes on one device, with FSDP2, and in fp16."""
    runs = Runs(task)
    ways: dict[str, Any] = {
        "first": partial(runs.start, "first"),
        "second": partial(runs.start, "second"),
        "two": partial(runs.start, "two", "--dist_backend", "gloo", processes=2),
        "fsdp": partial(runs.start, "fsdp", "--fsdp"),
    }
    if task.has_gpu:
        ways["fp16"] = partial(runs.start, "fp16", "--amp", "fp16")
    else:
        task.skip("a run in fp16")
    with ThreadPoolExecutor(len(ways) if task.has_gpu else 1) as pool:
        errors = {name: future.result() for name, future in {n: pool.submit(way) for n, way in ways.items()}.items()}
    errors["resumed"] = runs.resume()
    task.write(errors={name: error for name, error in errors.items() if error})
    first = runs.losses("first")  # without them there is nothing to compare
    task.write(losses=first)
    for name, title in {"second": "twice the same run", "resumed": "a resumed run"}.items():
        differing = runs.differing("first", name) if not errors[name] else ["all"]
        task.write(**{f"weights that differ, {title}": len(differing)})
        task.check(f"{title}: equal to the bit" + (f" ({errors[name]})" if errors[name] else ""), not differing)
    # In bf16, sums over other batches and gathered weights are rounded differently.
    tolerance = 5e-3 if task.has_gpu else 1e-5
    others = {"two": "two processes on one device, gloo", "fsdp": "FSDP2 of one process", "fp16": "fp16"}
    for name, title in others.items():
        if name not in errors:
            continue
        if errors[name]:
            task.check(f"{title}: {errors[name]}", False)
            continue
        difference = max(abs(b / a - 1) for a, b in zip(first, runs.losses(name), strict=True))
        task.check(f"{title}: losses differ by {difference:.1e}, at most {tolerance:g}", difference <= tolerance)


# ---------------------------------------------------------------------------------------------------- numerics


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """The norm of the difference, divided by the norm of the reference."""
    ours = ours.detach().double().cpu()
    reference = reference.detach().double().cpu()
    return float((ours - reference).norm() / reference.norm())


def compare_attention(task: Task) -> None:
    """Output and gradient of each kernel of attention in bf16, compared with matrix products in fp32."""

    def compute(qkv: Tensor, kernel: SDPBackend) -> tuple[Tensor, Tensor]:
        qkv = qkv.detach().clone().requires_grad_()
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(*qkv)
        out.square().sum().backward()
        assert qkv.grad is not None
        return out, qkv.grad

    for heads, tokens, width in SHAPES:
        qkv = torch.randn(3, 4, heads, tokens, width, device=task.device).bfloat16()
        expected = compute(qkv.float(), SDPBackend.MATH)
        for name, kernel in KERNELS.items():
            title = f"attention, {name}, {tokens} tokens of {width} channels"
            try:
                found = [relative_difference(*pair) for pair in zip(compute(qkv, kernel), expected, strict=True)]
            except RuntimeError as error:  # the kernel does not support the shape
                task.write(**{title: gpu_task.last_line(str(error))[:100]})
                continue
            task.check(f"{title}: differs by {found[0]:.1e}, gradient {found[1]:.1e}", max(found) < 2e-2)


def compare_devices(task: Task) -> None:
    """Loss and gradient of two images in each precision, compared with fp32 on the CPU."""
    size = "base_patch16" if task.has_gpu else "mini_patch4"
    torch.manual_seed(0)
    model = getattr(models_mae, f"mae_vit_{size}")(norm_pix_loss=True)
    imgs = torch.randn(2, 3, *model.patch_embed.img_size)
    noise = torch.rand(2, model.num_patches)

    def compute(device: torch.device, amp: str) -> tuple[Tensor, Tensor]:
        model.to(device).zero_grad()
        with Precision(amp, device).autocast():
            loss = model(imgs.to(device), noise=noise.to(device))[0]
        (1024 * loss).backward()  # fp16 has no smaller gradients
        return loss, torch.cat([p.grad.flatten() / 1024 for p in model.parameters() if p.grad is not None])

    reference = [tensor.cpu() for tensor in compute(torch.device("cpu"), "off")]
    tolerances = {"off": (1e-4, 1e-3), "bf16": (1e-2, 5e-2), "fp16": (2e-3, 1e-2)}
    for amp in tolerances if task.has_gpu else ("off", "bf16"):
        loss, gradient = (relative_difference(*pair) for pair in zip(compute(task.device, amp), reference, strict=True))
        title = f"{size}, --amp {amp}, compared with fp32 on a CPU: loss differs by {loss:.1e}, gradient {gradient:.1e}"
        task.check(title, loss <= tolerances[amp][0] and gradient <= tolerances[amp][1])


def overflow(task: Task) -> None:
    """fp16 with a loss scale that is too large: the first updates are skipped and change nothing, later ones train."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_mini_patch4().to(task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    precision = Precision("fp16", task.device)
    precision.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    imgs = torch.randn(8, 3, 32, 32, device=task.device)
    changed = []
    for _ in range(40):
        before = model.decoder_pred.weight.detach().clone()
        with precision.autocast():
            loss = model(imgs)[0]
        precision.backward(loss)
        is_finite = bool(precision.step(optimizer, None).isfinite())
        changed.append((is_finite, not torch.equal(before, model.decoder_pred.weight)))
    skipped = sum(not is_finite for is_finite, _ in changed)
    task.check(
        f"fp16: {skipped} of {len(changed)} updates overflow and change nothing, the others train",
        0 < skipped < len(changed) and all(is_finite == is_changed for is_finite, is_changed in changed),
    )


def numerics(task: Task) -> None:
    """Kernels of attention, devices and precisions compared; overflows of fp16."""
    compare_devices(task)
    if not task.has_gpu:
        return task.skip("kernels of attention compared with fp32", "overflows of fp16")
    compare_attention(task)
    overflow(task)


def memory(task: Task) -> None:
    """A batch that does not fit: the command ends with the code 1 and one line."""
    task.wait_for_turn()
    if not task.has_gpu:
        return task.skip("the message of a full GPU memory")
    data = task.folder / "large_batch"
    image_sets.write_jpeg_files(data, 2048, image_sets.OF_SCIKIT_LEARN, num_different=64)
    done = gpu_task.run_python(
        "main_pretrain.py", "--data_path", data, "--output_dir", data / "run", "--model", "mae_vit_large_patch16",
        "--batch_size", 2048, "--epochs", 1, "--warmup_epochs", 0, "--amp", "off", "--device", "cuda:0",
        "--num_workers", 2,
    )  # fmt: skip
    message = gpu_task.last_line(done.stderr)
    one_line = "--batch_size" in message and "Traceback" not in done.stderr
    task.check(f"2,048 images of ViT-L in fp32: {message}", done.returncode == 1 and one_line)
