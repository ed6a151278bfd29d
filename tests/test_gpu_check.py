"""benchmarks/gpu_check.py: what its rehearsal on a CPU (./run gpu-check) does not show."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_check, listed_packages


def test_steps_that_fail_or_are_left_out_are_named(tmp_path, monkeypatch):
    failing = gpu_check.Step("gpu_task:absent", 60)
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
