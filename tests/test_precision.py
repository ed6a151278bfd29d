"""--amp: autocast, loss scaler and clipping."""

import pytest
import torch

from util.training.precision import Precision, amp_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_off_on_cpu_and_mps():
    assert amp_dtype("auto", CPU) is None
    assert amp_dtype("auto", torch.device("mps")) is None


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_asks_for_native_bf16(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert amp_dtype("auto", CUDA) is expected


def test_fp16_on_cpu_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="--amp bf16"):
        amp_dtype("fp16", CPU)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    precision = Precision("bf16", CPU)
    layer = torch.nn.Linear(8, 8)
    with precision.autocast():
        out = layer(torch.randn(2, 8))
    precision.backward(out.float().square().mean())
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    assert precision.name == "bf16"


def test_the_norm_is_computed_before_clipping():
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD(weights, lr=1.0, fused=True)
    weights[0].grad, weights[1].grad = torch.full((2,), 3.0), torch.full((3,), 4.0)
    norm = Precision("off", CPU).step(optimizer, clip_grad=1.0)
    assert norm.item() == pytest.approx((2 * 9 + 3 * 16) ** 0.5)
    assert torch.cat([w.detach() for w in weights]).norm().item() == pytest.approx(1.0, rel=1e-4)
    assert weights[0].grad is None


@pytest.mark.parametrize(("loss", "gradient"), [(float("inf"), 1.0), (1.0, float("inf")), (float("nan"), 1.0)])
def test_nonfinite_fp16_updates_are_skipped(loss, gradient):
    """The scaler on a CPU; the cases include an infinite loss with a finite gradient."""
    precision = Precision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    precision.backward((weight * gradient).sum() + (loss if gradient == 1.0 else 0.0))
    norm = precision.step(optimizer, None)
    assert not torch.isfinite(norm)
    assert torch.equal(weight.detach(), torch.ones(3))
    assert precision.scaler.get_scale() == 2.0
    precision.backward(weight.sum())
    assert precision.step(optimizer, None).item() == pytest.approx(3**0.5)
    assert not torch.equal(weight.detach(), torch.ones(3))


@pytest.mark.parametrize(("clip_grad", "step"), [(1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0]), (None, [-3.0, -4.0])])
def test_gradients_are_unscaled_before_they_are_clipped(clip_grad, step):
    """The gradient (3, 4) has the norm 5 for every scale."""
    precision = Precision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    precision.backward((weight * torch.tensor([3.0, 4.0])).sum())
    assert weight.grad.tolist() == [3072.0, 4096.0]
    assert precision.step(optimizer, clip_grad).item() == pytest.approx(5.0)
    assert weight.tolist() == pytest.approx(step, rel=1e-5)
    assert precision.scaler.get_scale() == 1024.0


def test_only_fp16_has_a_scaler(monkeypatch):
    for amp, dtype in (("off", None), ("bf16", torch.bfloat16)):
        precision = Precision(amp, CPU)
        assert (precision.dtype, precision.scaler.is_enabled(), precision.overflow_is_normal) == (dtype, False, False)
    monkeypatch.setattr("util.training.precision.amp_dtype", lambda amp, device: torch.float16)
    precision = Precision("fp16", CPU)
    assert (precision.name, precision.scaler.is_enabled(), precision.overflow_is_normal) == ("fp16", True, True)
