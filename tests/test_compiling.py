"""--compile: one graph, equal results, one and two processes, resume; and a machine without a compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import assert_close, call, in_processes, lines, stop_and_resume
from torch._dynamo.utils import counters

import main_finetune
import models_vit
from mae.build import set_grad_checkpointing
from mae.inference import features
from mae.training.compiling import compile_model
from models_mae import MaskedAutoencoderViT, mae_vit_mini_patch4
from models_vit import SIZES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _compiler():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATEN_CPU_CAPABILITY", "default")  # code without vector instructions is compiled in half the time
        try:
            torch.compile(torch.relu)(torch.ones(2))
        except Exception:  # which ones is up to the backend
            headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
            if headers and shutil.which(os.environ.get("CXX", "g++")):
                raise
            pytest.skip("there is no compiler")
        yield


@pytest.fixture(autouse=True)
def _fresh(_compiler, monkeypatch):
    monkeypatch.setitem(models_vit.SIZES, "mini_patch4", SIZES["mini_patch4"] | {"depth": 1})  # compiles faster
    torch.compiler.reset()
    counters.clear()


def test_blocks_share_graphs_and_have_equal_gradients(monkeypatch):
    """Three graphs: of the encoder's two blocks, of the decoder's block, and of the loss."""
    monkeypatch.setitem(models_vit.SIZES, "mini_patch4", SIZES["mini_patch4"] | {"depth": 2})
    mini_mae, imgs, noise = mae_vit_mini_patch4(img_size=16), torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    set_grad_checkpointing(mini_mae)

    def gradients():
        mini_mae.zero_grad()
        loss = mini_mae(imgs, 0.75, noise=noise)[0]
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in mini_mae.named_parameters() if p.requires_grad}

    eager, names = gradients(), list(mini_mae.state_dict())
    compile_model(mini_mae, torch.device("cpu"))
    counters.clear()
    compiled = gradients()
    assert counters["stats"]["unique_graphs"] == 3
    torch._dynamo.config.error_on_recompile = True
    try:
        for _ in range(2):
            imgs = imgs.clone()
            compiled = gradients()
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert not counters["graph_break"]
    assert list(mini_mae.state_dict()) == names
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)


def test_blocks_of_other_rates_of_drop_path_share_a_graph(monkeypatch):
    """The first block has none, and another graph. The graphs are not compiled to C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setitem(models_vit.SIZES, "mini_patch4", SIZES["mini_patch4"] | {"depth": 12})
    model, imgs = models_vit.vit_mini_patch4(img_size=16, drop_path_rate=0.5), torch.randn(512, 3, 16, 16)
    compile_model(model, torch.device("cpu"))
    counters.clear()
    model(imgs)
    assert counters["stats"]["unique_graphs"] == 2
    drop_path, branches = model.blocks[-1].drop_path, torch.ones(1000, 1, 1, dtype=torch.bfloat16)
    for kept in (drop_path(branches), torch.compile(drop_path, fullgraph=True)(branches)):
        assert kept.dtype == torch.bfloat16  # half of the branches, twice as large
        assert set(kept.flatten().tolist()) == {0, 2}
        assert kept.float().mean() == pytest.approx(1, abs=0.15)


def test_functions_that_replace_a_method_are_compiled(monkeypatch):
    """Users replace the forward pass of a block in an object; a loss may be a static method."""

    class PlainLoss(MaskedAutoencoderViT):
        @staticmethod
        def forward_loss(imgs, pred, mask, **context):
            return pred.square().mean()

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, imgs, noise = mae_vit_mini_patch4(img_size=16), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    model.__class__ = PlainLoss
    block, bound = model.blocks[0], model.decoder_blocks[0]
    block.forward = lambda x, forward=block.forward: forward(2 * x)
    bound.forward = MethodType(lambda self, x: self.compute(3 * x), bound)
    before = model(imgs, noise=noise)[0]
    compile_model(model, torch.device("cpu"))
    torch.testing.assert_close(model(imgs, noise=noise)[0], before)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(monkeypatch):
    """The copy is an average of the weights, or the teacher of a method."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, imgs, noise = mae_vit_mini_patch4(img_size=16), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    compile_model(model, torch.device("cpu"))
    before = model(imgs, noise=noise)[0]
    copy = deepcopy(model)
    copy.norm_pix_loss = True
    for parameter in copy.blocks.parameters():
        parameter.data.zero_()
    assert torch.equal(model(imgs, noise=noise)[0], before)
    expected = mae_vit_mini_patch4(img_size=16, norm_pix_loss=True)
    expected.load_state_dict(copy.state_dict())
    torch.testing.assert_close(copy(imgs, noise=noise)[0], expected(imgs, noise=noise)[0])


def test_methods_that_a_user_replaced_in_a_module_are_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, imgs, noise = mae_vit_mini_patch4(img_size=16), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    model.forward_loss = lambda imgs, pred, *given, **context: pred.square().sum()
    model.blocks[0].forward = lambda x: 2 * x
    expected = model(imgs, noise=noise)[0]
    compile_model(model, torch.device("cpu"))
    torch.testing.assert_close(model(imgs, noise=noise)[0], expected)


# main_pretrain.py with as many blocks as `_fresh` sets.
SHALLOW = """
import models_vit
models_vit.SIZES["mini_patch4"]["depth"] = 1
import main_pretrain
from mae.cli import entry_point
entry_point.run(main_pretrain.main, main_pretrain.get_args_parser())
"""


def test_compiled_training_resumes_and_runs_in_two_processes(pretrain, pictures, tmp_path, monkeypatch):
    """All runs use the graph of the previous test, which is compiled once."""
    settings = {"accum_iter": 2, "grad_checkpointing": True}
    eager = pretrain("eager", **settings)
    assert_close(stop_and_resume(monkeypatch, pretrain, 2, compile=True, **settings), eager)
    (tmp_path / "shallow.py").write_text(SHALLOW)
    flags = ("--batch_size", 4, "--epochs", 2, "--compile", "--grad_checkpointing")
    in_processes(2, pictures, tmp_path / "two", *flags, script=tmp_path / "shallow.py")
    assert_close(eager, tmp_path / "two")


def test_sharded_blocks_have_their_own_rates_of_drop_path(pictures, tmp_path):
    """Each is another graph. They are not compiled to C++, which takes minutes."""
    eager = "import functools, torch\ntorch.compile = functools.partial(torch.compile, backend='eager')\n"
    code = SHALLOW.replace('["depth"] = 1', '["depth"] = 12').replace(
        "import main_pretrain", f"{eager}import main_pretrain"
    )
    (tmp_path / "deep.py").write_text(code)
    flags = ("--batch_size", 4, "--epochs", 1, "--drop_path", 0.1, "--fsdp", "--compile")
    in_processes(2, pictures, tmp_path / "deep", *flags, script=tmp_path / "deep.py")
    assert np.isfinite(lines(tmp_path / "deep")[0]["train_loss"])


def test_a_classifier_is_compiled_for_training_evaluation_and_features(classify, labelled, tmp_path):
    settings = {"mixup": 0.8, "drop_path": 0.2, "aa": "none", "batch_size": 24}
    eager, compiled = classify(main_finetune, "eager", **settings), classify(main_finetune, compile=True, **settings)
    for ours, theirs in zip(lines(compiled), lines(eager), strict=True):
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-4)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    file = eager / "checkpoint-1.pth"  # evaluated in batches of two sizes
    scores = classify(main_finetune, eval=True, finetune=file, compile=True, batch_size=16)
    assert scores.loss == pytest.approx(theirs["test_loss"], rel=1e-4)
    assert scores.acc1 == theirs["test_acc1"]
    rows = []
    for how in ([], ["--compile"]):
        call(features, labelled, *how, model=file, out=tmp_path / "rows.npz", num_workers=0, device="cpu")
        rows.append(np.load(tmp_path / "rows.npz")["features"])
    np.testing.assert_allclose(*rows, rtol=1e-3, atol=1e-5)


def test_a_graph_with_frozen_weights_contains_them_in_bf16():
    model, imgs = models_vit.vit_mini_patch4(img_size=16).eval(), torch.rand(2, 3, 16, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        eager = model(imgs)
        compile_model(model, torch.device("cpu"), freeze_weights=True)
        before = model(imgs)
        torch.testing.assert_close(before, eager, rtol=0.05, atol=0.02)
        model.head.weight.zero_()
        assert torch.equal(model(imgs), before)


def test_without_a_compiler_the_run_warns_and_continues(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code = """
import logging, torch
from models_vit import vit_mini_patch4
from mae.training.compiling import compile_model
logging.basicConfig(format="%(message)s", level="INFO")
model = vit_mini_patch4(img_size=8)
compile_model(model, torch.device("cpu"))
print(model(torch.rand(1, 3, 8, 8)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "torch.Size([1, 1000])\n", done.stderr
    assert "`compile` needs a C++ compiler" in done.stderr
    assert "no-such-compiler" in done.stderr
