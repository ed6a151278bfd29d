"""The Fashion-MNIST study: completed commands are not repeated, and a changed command is run again."""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def study(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("study", ROOT / "benchmarks/fashion_mnist/study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    return module


def test_a_result_is_computed_once_per_command(study, tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"test_acc1": 80.0 + len(calls)}

    for command in ("a", "a", "b", "b"):
        study.Study(tmp_path, tmp_path).keep("svm/100/0", command, compute)
    assert len(calls) == 2
    assert json.loads((tmp_path / "results.json").read_text()) == {"svm/100/0": {"test_acc1": 82.0, "command": "b"}}
    study.Study(tmp_path, tmp_path).keep("svm/100/0", "b", compute, needed=Path(tmp_path / "checkpoint.pth"))
    assert len(calls) == 3


def test_the_report_has_the_results_so_far(study, tmp_path):
    for seed, accuracy in enumerate((60.0, 62.0, 64.0)):
        study.Study(tmp_path, tmp_path).keep(f"svm/100/{seed}", "c", lambda found=accuracy: {"test_acc1": found})
    (tmp_path / "masked" / "ratio-0.5").mkdir(parents=True)
    (tmp_path / "masked" / "ratio-0.5" / "log.txt").write_text("{}\n")
    study.report(study.Study(tmp_path, tmp_path))
    assert (tmp_path / "logs" / "ratio-0.5.txt").read_text() == "{}\n"
    assert "| RBF-SVM on raw pixels | 62.0 ± 2.0 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 5000
