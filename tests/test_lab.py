"""benchmarks/lab: the variants are the same model, their update can be a CUDA graph, and the rules are applied."""

import contextlib
import json
import linecache
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from fake_cuda import DEVICE, fake_cuda, on_gpu
from test_loop import train_epoch

import engine_pretrain
from benchmarks.lab import curves, ops, profiles, tables, variants
from benchmarks.lab.graph import Update
from mae.data.item import Batch
from mae.data.transforms import Normalize
from mae.training import log, optimizers
from mae.training.precision import Precision

SIZE = "mini_patch4"
EXACT = [name for name, variant in variants.VARIANTS.items() if variant.kind == variants.EXACT]
# Of the four blocks of the encoder and the block of the decoder, forward and backward.
OPERATIONS = {
    "packed": {"attention": 5, "attention_backward": 5},
    "gelu": {"bias_gelu_backward": 5},
    "fused": {"bias_gelu_backward": 5, "add_norm_backward": 10},
    "exact": {"attention": 5, "attention_backward": 5, "bias_gelu_backward": 5, "add_norm_backward": 10},
}
OPERATIONS["all"] = OPERATIONS["exact"]


# ---------------------------------------------------------------------------------------------------- numerics


@pytest.fixture(scope="module")
def numerics(tmp_path_factory):
    """What the command writes."""
    out = tmp_path_factory.mktemp("numerics")
    command = [sys.executable, "benchmarks/lab/numerics.py", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return json.loads((out / "lab_numerics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_has_loss_and_gradients_of_the_model(numerics, name):
    found, main = numerics["variants"][name], numerics["variants"]["main"]
    assert abs(found["fp32: loss"]) < 1e-6
    assert found["fp32: gradient"] < 5e-7
    assert found["bf16: gradient"] < (1.1 if name in EXACT else 1.3) * main["bf16: gradient"]
    if name == "carry":  # only its kernels differ, once it is compiled
        assert found["bf16: gradient, from main in bf16"] == 0


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter_have_the_results_of_fp64(numerics):
    pytest.importorskip("triton")
    kernels = numerics["kernels"]
    assert {name.partition(",")[0] for name in kernels} == {"attention", "GELU", "LayerNorm"}
    for name, errors in kernels.items():
        assert max(errors) < (5e-7 if name.endswith("float32") else 5e-4), name


def test_the_page_has_the_differences_of_the_file():
    found = json.loads((ROOT / "benchmarks/results/amd_epyc/lab_numerics.json").read_text())["variants"]
    lines = (ROOT / "benchmarks/lab/README.md").read_text().splitlines()
    assert [*found] == [*variants.VARIANTS]
    for name, one in found.items():
        expected = [f"{value:.1e}" for key, value in one.items() if key != "bf16: loss"]
        assert f"| {name} | {variants.VARIANTS[name].kind} | {' | '.join(expected)} |" in lines


def test_attention_falls_back_where_the_kernel_does_not_fit():
    def is_supported(tokens, width, dtype=torch.bfloat16, device="cpu"):
        return ops.is_supported(torch.empty(1, tokens, 3 * 2 * width, dtype=dtype, device=device), 2)

    assert is_supported(257, 32)
    assert is_supported(197, 64)
    assert not is_supported(257, 64)
    x = torch.randn(1, 300, 128)
    torch.manual_seed(0)
    packed = variants.PackedAttention(128, 2)
    plain = variants.PlainAttention(128, 2)
    plain.load_state_dict(packed.state_dict())
    assert not is_supported(300, 64)
    torch.testing.assert_close(packed(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["carry", "gelu", "all"])  # the last one has the classes of all others
def test_a_compiled_block_is_one_graph(name):
    """Forward and backward; no code is generated."""
    torch._dynamo.reset()  # all blocks share a method, which has at most 8 graphs
    model = variants.of_size(name, SIZE, depth=2, decoder_depth=1)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.rand(2, 3, 32, 32))[0]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_without_triton_a_gpu_has_the_attention_of_pytorch(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    assert "attention" not in record_update("packed").kernels


# ------------------------------------------------------------------------------------------------ the CUDA graph


def build_update(name):
    model = on_gpu(partial(variants.of_size, name, SIZE))
    noise = torch.empty(8, model.num_patches)
    return Update(model, Precision("bf16", DEVICE), torch.empty(8, 3, 32, 32), noise)


def record_update(name):
    with fake_cuda() as found, found:
        update = build_update(name)
        update.compute()  # creates the state of the optimizer
        found.kernels.clear()
        found.findings.clear()
        update.compute()
    return found


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_nothing_in_an_update_waits_for_the_gpu(monkeypatch, name):
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    found = record_update(name)
    assert [str(finding) for finding in found.findings] == []
    ours = {one: count for one, count in found.kernels.items() if one in OPERATIONS["exact"]}
    assert ours == OPERATIONS.get(name, {})


WAITS = {
    "float(loss)": float,
    "loss.cpu()": torch.Tensor.cpu,
    "if loss > 0": lambda loss: bool(loss > 0),
    "torch.cuda.synchronize()": lambda loss: torch.cuda.synchronize(),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_found_and_its_line_is_named(monkeypatch, name):
    backward = Precision.backward
    monkeypatch.setattr(Precision, "backward", lambda self, loss: (WAITS[name](loss), backward(self, loss)))
    (finding,) = record_update("main").findings
    print(f"{name}: {finding}")
    assert finding.kind == "wait"
    file, number = finding.line.split(":")
    assert "backward(" in linecache.getline(str(ROOT / file), int(number))
    assert file == "benchmarks/lab/graph.py"


def test_capture_records_one_update_after_the_warm_ups_and_replays_it(monkeypatch):
    """The calls of CUDA have stand-ins: a graph is the number of kernels that are started while it is captured."""
    graphs = []

    class Graph:
        def replay(self):
            graphs.append("replay")

    @contextlib.contextmanager
    def capturing(graph, capture_error_mode):
        before = found.kernels.total()
        yield
        graphs.append(found.kernels.total() - before)

    with fake_cuda() as found:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capturing)
        with found:
            update = build_update("main")
            update.capture()
        terms = update(torch.empty(8, 3, 32, 32), torch.empty(8, 64), 1e-3)
    assert graphs == [record_update("main").kernels.total(), "replay"]
    assert [*terms] == ["loss"]
    assert found.findings.total() == 0


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 1, 28, 28, generator=generator), torch.rand(4, 16, generator=generator)


def test_an_update_is_that_of_the_training_loop():
    class Batches(list):
        images_per_iteration = 4

        def seek(self, *_):
            pass

        def seed_iteration(self, _):
            pass

        def counts(self):
            return {}

    batches, losses = [batch(seed) for seed in range(3)], []
    model = curves.model_of("main", 0)
    logged = log.NullLog()
    logged.update = lambda iterations, lr, loss, grad_norm, terms=None: losses.append(loss)

    def schedule(epoch):
        for group in optimizer.param_groups:
            group["lr"] = 2**-10 * (1 + 3 * epoch)
        return 0.0

    groups = optimizers.param_groups_weight_decay(model, 0.05)
    optimizer = optimizers.build(None, None, model, groups, betas=(0.9, 0.95))
    precision = Precision("off", torch.device("cpu"))
    data = Batches(Batch(images, torch.zeros(4), noise=noise) for images, noise in batches)
    loss = partial(engine_pretrain.loss, mask_ratio=0.75, normalize=Normalize([0.0], [1.0]))
    train_epoch(loss, model, data, optimizer, precision=precision, log=logged, schedule=schedule)

    other = curves.model_of("main", 0)
    update = Update(other, precision, *batches[0])
    found = [sum(update(*inputs, 2**-10 * (1 + number)).values()) for number, inputs in enumerate(batches)]
    assert [float(loss) for loss in found] == losses
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


def test_warm_ups_change_neither_weights_nor_state():
    runs = []
    for warm_ups_after in ((), (0, 2)):
        update = Update(curves.model_of("main", 0), Precision("off", torch.device("cpu")), *batch(0))
        for number in range(4):
            if number in warm_ups_after:
                update.warm_up()
            terms = update(*batch(number), 1e-3)
            runs.append({name: float(term) for name, term in terms.items()})
    assert runs[:4] == runs[4:]


# --------------------------------------------------------------------------------------------- curves and tables


def test_ways_of_a_curve_differ_by_their_rounding_only(tmp_path):
    args = ["--updates", "3", "--ways", "main", "carry", "control-1", "--out", str(tmp_path), "--device", "cpu"]
    curves.main(curves.get_args_parser().parse_args(args))
    found = json.loads((tmp_path / "curves_3.json").read_text())["curves"]["0"]
    assert found["carry"]["means"] == found["main"]["means"]
    assert found["carry"]["held_out"] == found["main"]["held_out"]
    assert 0 < abs(found["control-1"]["first"] - found["main"]["first"]) < 1e-3


def test_learning_rate_by_hand():
    assert curves.lr_of(78, 700) == 1e-3  # half of the warm-up to 4e-3 * 128 / 256
    assert curves.lr_of(156, 700) == 2e-3
    assert curves.lr_of(156 + 272, 700) == pytest.approx(1e-3)


def test_gain_and_rules_by_hand():
    found = tables.gain([100.0, 100.0, 100.0], [104.0, 105.0, 106.0])
    assert found.mean == pytest.approx(0.05)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)  # Student's t, 2 degrees
    faster, equal = tables.Gain(0.03, 0.01, 0.05), tables.Gain(0.0, -0.009, 0.009)
    assert tables.is_adopted([faster, equal, equal])
    assert not tables.is_adopted([tables.Gain(0.029, 0.02, 0.04), equal, equal])
    assert not tables.is_adopted([tables.Gain(0.04, -0.001, 0.08), equal, equal])
    assert not tables.is_adopted([faster, equal, tables.Gain(0.0, -0.011, 0.011)])


def steps_of(times):
    """Results of the lab: times of main and a variant by size."""
    found = {}
    for size, (main, ours) in times.items():
        for variant, milliseconds in (("main", main), ("packed", ours)):
            found[f"{size} {variant}"] = {
                "size": size, "batch_size": tables.COMPARED[size], "variant": variant,
                "milliseconds": milliseconds, "host_milliseconds": milliseconds,
            }  # fmt: skip
    return found


@pytest.mark.parametrize(("huge", "verdict"), [(50.0, "default on CUDA"), (51.0, "stays here")])
def test_the_table_names_what_the_rules_adopt(huge, verdict):
    times = {"base_patch16": ([105.0] * 5, [100.0] * 5), "large_patch16": ([90.0] * 5, [90.0] * 5)}
    steps = steps_of({**times, "huge_patch14": ([50.0] * 5, [huge] * 5)})
    (row,) = [line for line in tables.adoption_table(steps).splitlines() if line.startswith("| packed")]
    assert row.split(" | ")[-1].rstrip(" |") == verdict
    machine = {"gpu": "NVIDIA H100 80GB HBM3"}
    assert verdict in tables.table(machine, {"steps": steps, "seconds": {}, "failed": {}})


def test_kernels_by_hand():
    kernels = [
        (0.0, 3000.0, "nvjet_gemm"),
        (1000.0, 6000.0, "triton_per_fused_native_layer_norm"),
        (9000.0, 12000.0, "x"),
    ]
    found = profiles.summary(kernels, wall=5.0)
    assert found["groups"] == {"LayerNorm": 5 / 3, "products": 1.0, "others": 1.0}
    assert found["idle_milliseconds"] == pytest.approx(5 - (6 + 3) / 3)
    assert profiles.group_of("_attention_backward") == "attention"
