"""--amp: autocast, loss scaler and clipping."""

import shutil
from functools import partial

import pytest
import torch
from mains import lines, parse

import mae.build
import main_finetune
import main_pretrain
from examples.detector import LayerNorm2d
from mae.checkpoints import checkpoint
from mae.training.precision import Precision
from models_dino import DINOv3
from models_vit import Block, Encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_off_for_evaluation_on_cpus_and_for_mps(set_bf16):
    set_bf16(True)
    assert Precision("auto", CPU).name == "fp32"
    assert Precision("auto", torch.device("mps"), trains=True).name == "fp32"


@pytest.fixture
def set_bf16(monkeypatch):
    """Makes the CPU one that has bf16 instructions, or not. Both compute in bf16; the latter slowly."""

    def set_bf16(supported):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return set_bf16


@pytest.mark.slow
@pytest.mark.parametrize("main", [main_pretrain, main_finetune])
def test_auto_trains_in_bf16_where_the_cpu_has_it(main, set_bf16, pretrain, classify, tmp_path):
    def run(name, **flags):
        return pretrain(name, epochs=1, **flags) if main is main_pretrain else classify(main, name, epochs=1, **flags)

    for supported, amp in ((False, "off"), (True, "bf16")):
        set_bf16(supported)
        assert lines(run(f"{amp}-auto", amp="auto"))[-1]["train_loss"] == lines(run(amp, amp=amp))[-1]["train_loss"]
    assert lines(tmp_path / "off")[-1]["train_loss"] != lines(tmp_path / "bf16")[-1]["train_loss"]


def test_evaluation_on_cpus_is_fp32(set_bf16, classify):
    """--eval with --amp off, in a new process with another processor, finds the loss of the run."""
    set_bf16(True)
    out = classify(main_finetune, amp="auto", epochs=1)
    found = classify(main_finetune, eval=True, resume=out / "checkpoint-0.pth", amp="off")
    assert found.loss == lines(out)[-1]["test_loss"]


def test_a_resumed_run_has_the_precision_of_its_checkpoint(set_bf16, pretrain, tmp_path):
    def resumed(name, **flags):
        return lines(pretrain(name, resume="auto", **{"amp": "auto"} | flags))[-1]["train_loss"]

    losses = {}
    for amp in ("bf16", "off"):
        set_bf16(amp == "bf16")
        pretrain(amp, amp="auto", save_every=1)
        losses[amp] = lines(tmp_path / amp)[-1]["train_loss"]
        for name in ("again", "earlier"):
            (tmp_path / f"{amp}-{name}").mkdir()
            shutil.copy(tmp_path / amp / "checkpoint-0.pth", tmp_path / f"{amp}-{name}")
    set_bf16(True)
    assert (resumed("off-again"), resumed("bf16-again")) == (losses["off"], losses["bf16"])
    file = tmp_path / "off-earlier/checkpoint-0.pth"  # as of the published code, which trains in fp32 on CPUs
    state = checkpoint.read(file)
    del state["args"]["precision"]
    checkpoint.write(state, file)
    assert resumed("off-earlier") == losses["off"]
    (tmp_path / "unknown").mkdir()
    state["args"]["precision"] = "fp64"
    checkpoint.write(state, tmp_path / "unknown/checkpoint-0.pth")
    with pytest.raises(ValueError, match="amp="):
        resumed("unknown")
    set_bf16(False)
    with pytest.raises(ValueError, match=r"bf16.*amp=off"):
        resumed("bf16-earlier")
    assert resumed("bf16-earlier", amp="off") != losses["bf16"]


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_cuda_asks_for_native_bf16(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert Precision("auto", CUDA).name == expected


def test_fp16_and_tf32_on_cpu_are_refused_with_the_remedy(pretrain):
    with pytest.raises(ValueError, match=r"amp=fp16.*amp=bf16"):
        pretrain(amp="fp16", device="cpu")
    with pytest.raises(ValueError, match=r"amp=tf32.*amp=off"):
        pretrain(amp="tf32", device="cpu")
    with pytest.raises(ValueError, match=r"trained in tf32.*amp=off"):
        Precision("auto", CPU, recorded="tf32")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("amp", "expected"), [("tf32", True), ("bf16", True), ("off", False)])
@pytest.mark.parametrize("of_the_user", ["none", "tf32", "ieee"])
def test_fp32_products_on_cuda_use_tf32_unless_amp_is_off(amp, expected, of_the_user, monkeypatch):
    """In forward and backward passes. The setting of the process does not change."""
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before, found = (of_the_user, convolutions.fp32_precision), []
    weight = torch.ones((), requires_grad=True)

    def look(*_):
        found.append((products.allow_tf32, torch.backends.cudnn.allow_tf32))

    precision = Precision(amp, CUDA)
    products.fp32_precision = of_the_user
    try:
        with precision.autocast():
            look()
            loss = weight.square()
        loss.register_hook(look)
        precision.backward(loss)
        assert (products.fp32_precision, convolutions.fp32_precision) == before
    finally:
        products.fp32_precision = "none"
    assert found == [(expected, expected)] * 2


@pytest.mark.parametrize(("loss", "gradient"), [(float("inf"), 1.0), (1.0, float("inf")), (float("nan"), 1.0)])
def test_nonfinite_fp16_updates_are_skipped(loss, gradient):
    """The scaler on a CPU; the cases include an infinite loss with a finite gradient."""
    precision = Precision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    precision.backward((weight * gradient).sum() + (loss if gradient == 1.0 else 0.0))
    norm = precision.step(optimizer, None)
    assert not torch.isfinite(norm) and torch.equal(weight.detach(), torch.ones(3))
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
    assert (weight.tolist(), precision.scaler.get_scale()) == (pytest.approx(step, rel=1e-5), 1024.0)


def test_only_fp16_has_a_scaler(monkeypatch):
    for amp, dtype in (("off", None), ("bf16", torch.bfloat16)):
        precision = Precision(amp, CPU)
        assert (precision.dtype, precision.scaler.is_enabled(), precision.overflow_is_normal) == (dtype, False, False)
    monkeypatch.setattr("mae.training.precision.precision_name", lambda *_: "fp16")
    precision = Precision("fp16", CPU)
    assert (precision.name, precision.scaler.is_enabled(), precision.overflow_is_normal) == ("fp16", True, True)


class Sandwich(Block):
    """A block with a layer norm of its own, of the output of the attention."""

    def __init__(self, dim, *arguments, **own):
        super().__init__(dim, *arguments, **own)
        self.after = torch.nn.LayerNorm(dim)

    def compute(self, x, *inputs):
        x = x + self.after(self.attn(self.norm1(x), *inputs))
        return x + self.mlp(self.norm2(x))


class SandwichEncoder(Encoder):
    block = Sandwich


def built(encoder=None, **flags):
    run = parse(main_pretrain, data_path="unused", model="mae_vit_mini_patch4", in_chans=3, input_size=32, **flags)
    return mae.build.autoencoder(run.model, run.images, encoder=encoder)


NORMED = {
    "qk_norm": partial(built, qk_norm="layer"),
    "DINOv3": partial(built, DINOv3, qk_norm="layer", num_cls_tokens=5),
    "own block": partial(built, SandwichEncoder),
    "maps of the detector": lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 32, 4, stride=4), LayerNorm2d(32)),
}


@pytest.mark.parametrize("name", NORMED)
def test_layer_norms_of_bf16_inputs_have_the_gradients_of_fp32(name):
    """On a CPU, the kernel sums the gradients of all tokens in the type of the input."""
    torch.manual_seed(0)
    model, images = NORMED[name]().train(), torch.randn(24, 3, 32, 32)
    names = [f"{path}.{part}" for path, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)
             for part in ("weight", "bias")]  # fmt: skip
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(1)  # of the masks
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = model(images)
        (found[0] if isinstance(found, tuple) else found.float().exp().mean()).backward()
        gradients.append({key: model.get_parameter(key).grad for key in names})
    exact, found = gradients
    for key, expected in exact.items():
        if expected is not None and not key.endswith("k_norm.bias"):  # softmax does not depend on it: rounding errors
            assert (found[key] - expected).norm() < 0.02 * expected.norm(), key
