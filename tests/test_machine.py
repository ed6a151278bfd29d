"""Files with measurements: settings, machine, commit, and the table of targets."""

import subprocess

import pytest
import torch

from benchmarks import machine, targets


def test_a_result_without_git_has_no_commit(tmp_path, monkeypatch):
    commit = machine.commit()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ("-c", "user.name=a", "-c", "user.email=b")
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "c"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert machine.commit() == commit  # of the code, not of the working directory
    monkeypatch.setenv("PATH", "")
    machine.write("a", torch.device("cpu"), {}, {}, tmp_path)
    assert machine.read("a", tmp_path)["machine"]["commit"] is None


def test_a_result_has_its_settings_and_machine(tmp_path, monkeypatch):
    settings = {"out": tmp_path, "name": "x", "batch_size": 64}
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "processor", lambda: "Intel Xeon, AMX")
    for out, folder in ((tmp_path / "new", tmp_path / "new"), (None, tmp_path / "intel_xeon_amx")):
        machine.write("a", torch.device("cpu"), settings, {"images_per_second": {"ours": 3.0}}, out)
        result = machine.read("a", folder)
        assert result["settings"] == {"batch_size": 64}
        assert result["images_per_second"] == {"ours": 3.0}
        assert (result["machine"]["torch"], result["machine"]["gpu"]) == (torch.__version__, None)
        assert machine.read("b", folder) is None
    assert machine.folders(tmp_path) == [tmp_path / "intel_xeon_amx", tmp_path / "new"]


def test_ratios_use_the_fastest_other_implementation(tmp_path, monkeypatch):
    result = {"images_per_second": {"ours compiled": 6.0, "ours eager": 5.0, "plain": 4.0, "transformers": 3.0},
              "flops_per_image": 10.0, "peak_flops": 80.0}  # fmt: skip
    assert targets.ratio("ours compiled", "transformers", "plain")(result) == 1.5
    assert targets.share_of_peak(result) == 0.75
    monkeypatch.setattr(targets, "ROWS", [("most", "a", lambda result: result["wait"], -0.02, "{:.1%}"),
                                          ("least", "b", lambda result: result["wait"], 0.5, "{:.2f}")])  # fmt: skip
    (tmp_path / "a.json").write_text('{"wait": 0.01, "machine": {"gpu": null, "processor": "AMD EPYC"}}')
    (tmp_path / "a_tunables.json").write_text('{"wait": 0.005}')
    assert targets.table([tmp_path]).splitlines() == [
        "| | target | AMD EPYC |",
        "|---|---|---|",
        "| most | 2.0% | 1.0% (0.5%) |",
    ]
    (tmp_path / "gpu").mkdir()
    with pytest.raises(ValueError, match=r"gpu has no measurements; `\./run bench .*gpu`"):
        targets.table([tmp_path / "gpu"])
    (tmp_path / "gpu" / "b.json").write_text('{"wait": 0.7, "machine": {"gpu": "NVIDIA H200", "processor": "Intel"}}')
    assert targets.table([tmp_path, tmp_path / "gpu"]).splitlines()[::3] == [
        "| | target | AMD EPYC | NVIDIA H200 |",
        "| least | 0.50 |  | 0.70 |",
    ]
    assert machine.find("b", tmp_path)["wait"] == 0.7
    assert machine.find("a", tmp_path) is None
