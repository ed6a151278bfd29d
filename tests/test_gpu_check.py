"""benchmarks/gpu_check.py: what its rehearsal on a CPU (./run gpu-check) does not show."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check, gpu_training, listed_packages, masked_queries
from models_mae import DECODERS, MaskedAutoencoderViT
from models_vit import SIZES


def test_steps_that_fail_or_are_left_out_are_named(tmp_path, monkeypatch):
    failing = gpu_check.Step("gpu_task:absent", 60, is_alone=False)
    monkeypatch.setattr(gpu_check, "STEPS", {"failing": failing, "late": failing._replace(is_alone=True)})
    monkeypatch.setattr(gpu_check, "FEWEST_SECONDS", 1000)
    args = gpu_check.get_args_parser().parse_args(["--out", str(tmp_path), "--seconds", "200"])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(args)
    assert stop.value.code == "failed: failing, late"
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert "absent" in found["failed"]["failing"]
    assert "--seconds" in found["failed"]["late"]


def test_packages_that_are_not_listed_are_hidden(tmp_path):
    listed_packages.write_hook(tmp_path)
    program = "import numpy, yaml, importlib.util as u; assert u.find_spec('submitit') is None; import torchcodec"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] == ["ModuleNotFoundError: No module named 'torchcodec'"]


def test_the_largest_batch_fills_the_memory(monkeypatch):
    """10 GB of 100 are the weights; an image takes .1 GB; the batch size is a multiple of 32."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70e9, 100e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30e9)
    cells = [{"way": "eager", "batch_size": n, "peak_bytes": 10e9 + n * 0.1e9} for n in (64, 128)]
    cells += [
        {"way": "compiled", "batch_size": 128, "peak_bytes": 5e9},
        {"way": "eager", "batch_size": 999, "fits": False},
    ]
    assert gpu_training.largest_batch(cells) == 832


def test_masked_queries_have_the_loss_and_the_gradients_of_the_model():
    arguments = {**SIZES["mini_patch4"], **DECODERS["mini_patch4"], "img_size": 16, "decoder_depth": 2}
    whole = MaskedAutoencoderViT(**arguments)
    parts = masked_queries.MaskedQueries(**arguments)
    parts.load_state_dict(whole.state_dict())
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    losses = [model(images, noise=noise)[0] for model in (whole, parts)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
