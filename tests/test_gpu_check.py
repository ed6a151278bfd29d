"""benchmarks/gpu_check.py: what its rehearsal on a CPU (./run gpu-check) does not show."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check, gpu_speed, gpu_steps, gpu_task, listed_packages, peers, timing, train_step
from mae.training.precision import Precision


def test_steps_that_fail_or_are_left_out_are_named(tmp_path, monkeypatch):
    failing = gpu_steps.Step("gpu_task:absent", 60)
    monkeypatch.setattr(gpu_check, "CHECKS", {"failing": failing})
    monkeypatch.setattr(gpu_check, "IN_TURNS", {"late": failing})
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


def test_ways_take_turns_in_five_rounds(tmp_path, monkeypatch):
    """As with a GPU; the device has stand-ins. A way that does not fit is left out, and the others are measured."""
    monkeypatch.setattr(gpu_task.Task, "has_gpu", True)
    monkeypatch.setattr(gpu_speed, "empty_cache", lambda task: None)
    memory = iter([100, 300, 300])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(memory))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1100)
    order = []

    def times(call, repeats, device):
        for _ in range(repeats):
            call()
        return 1.0, 0.5

    monkeypatch.setattr(timing, "times", times)

    def too_large():
        raise torch.OutOfMemoryError("full")

    def build(name):
        return lambda: lambda: order.append(name)

    task = gpu_task.Task("base", tmp_path)
    found = gpu_speed.measure({"a": build("a"), "large": too_large, "b": build("b")}, task)
    assert found["large"] == {"fits": False}
    # Two warm-ups; in each round, an update that chooses the number of repetitions, and two repetitions.
    assert "".join(order) == "aabb" + 5 * "aaabbb"
    assert [found[name]["peak_bytes"] for name in "ab"] == [1000, 800]
    assert found["a"]["times"] == 5 * [(1.0, 0.5)]
    assert found["b"]["host_milliseconds"] == 500


def test_a_model_of_transformers_is_compiled_by_blocks(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    precision = Precision("off", torch.device("cpu"))
    train_step.update("pretrain", "transformers", "compiled by blocks", "mini_patch4", 2, precision, decoder_depth=2)
    assert len(compiled) == 4 + 2
    assert len({*compiled}) == 1
    model = peers.transformers_mae("mini_patch4", depth=3)
    assert compiled[0] in {type(module).__name__ for module in model.modules()}
