"""Files with measurements: settings, machine, commit."""

import json
import subprocess

import torch

from benchmarks import machine


def test_a_result_without_git_has_no_commit(tmp_path, monkeypatch):
    commit = machine.commit()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ("-c", "user.name=a", "-c", "user.email=b")
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "c"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert machine.commit() == commit  # of the code, not of the working directory
    monkeypatch.setenv("PATH", "")
    machine.write("a", torch.device("cpu"), {}, {}, tmp_path)
    assert json.loads((tmp_path / "a.json").read_text())["machine"]["commit"] is None


def test_a_result_has_its_settings_and_machine(tmp_path, monkeypatch):
    settings = {"out": tmp_path, "name": "x", "batch_size": 64}
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "processor", lambda: "Intel Xeon, AMX")
    for out, folder in ((tmp_path / "new", tmp_path / "new"), (None, tmp_path / "intel_xeon_amx")):
        machine.write("a", torch.device("cpu"), settings, {"images_per_second": {"ours": 3.0}}, out)
        result = json.loads((folder / "a.json").read_text())
        assert result["settings"] == {"batch_size": 64}
        assert result["images_per_second"] == {"ours": 3.0}
        assert (result["machine"]["torch"], result["machine"]["gpu"]) == (torch.__version__, None)
