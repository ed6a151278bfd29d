"""Expected efficiency on many GPUs: formulas with known results, and the tables in SCALING.md."""

import json
import math

import pytest
from conftest import ROOT

from benchmarks import machine, scaling

GB = 1e9


@pytest.fixture
def no_latency(monkeypatch):
    monkeypatch.setattr(scaling, "LATENCY", 0.0)


def test_simple_cases(no_latency, monkeypatch):
    assert scaling.all_reduce(GB, 1, GB) == 0  # one GPU
    assert scaling.efficiency(0.01, GB, 1, GB) == 1
    smaller_than_a_bucket = 1 / (1 + 1e-6 * 450e6 / scaling.NVLINK)
    assert scaling.efficiency(1.0, 450, 2, GB) == pytest.approx(smaller_than_a_bucket)
    monkeypatch.setattr(scaling, "NVLINK", math.inf)
    for gpus in (2, 8, 64, 512):
        assert scaling.efficiency(0.01, GB, gpus, math.inf) == 1


def test_two_nodes_by_hand(no_latency, monkeypatch):
    """1.8 GB in ten buckets: 7/4 of them over NVLink take 7 ms, and all of them over a link of 18 GB/s 100 ms."""
    monkeypatch.setattr(scaling, "BUCKET", 0.18 * GB)
    assert scaling.all_reduce(1.8 * GB, 16, 18 * GB) == pytest.approx(0.107)
    # Nine tenths take 96.3 ms, of which a backward pass of 60 ms hides 60 ms; the last bucket adds 10.7 ms.
    assert scaling.efficiency(0.090, 1.8 * GB, 16, 18 * GB) == pytest.approx(90 / (90 + 36.3 + 10.7))
    # A backward pass of 200 ms hides all buckets but the last.
    assert scaling.efficiency(0.300, 1.8 * GB, 16, 18 * GB) == pytest.approx(300 / 310.7)


def test_messages_by_hand(monkeypatch):
    """Three buckets, the last one not full; 14 messages within a node, 2 · 3 between 8 nodes."""
    monkeypatch.setattr(scaling, "NVLINK", math.inf)
    monkeypatch.setattr(scaling, "BUCKET", 100)
    assert scaling.all_reduce(250, 64, math.inf) == pytest.approx(3 * 20 * scaling.LATENCY)


def test_gradients_are_those_of_trained_parameters_and_the_page_has_the_printed_tables():
    assert scaling.gradient_bytes("base_patch16") == 4 * (111_907_840 - 197 * (768 + 512))  # without positions
    assert scaling.tables(machine.RESULTS) in (ROOT / "benchmarks/SCALING.md").read_text(encoding="utf-8")


def test_models_that_were_measured_have_rows(tmp_path):
    measurement = {"machine": {"gpu": "NVIDIA H200"}, "settings": {"batch_size": 1024},
                   "images_per_second": {"ours compiled": 5000.0}}  # fmt: skip
    (tmp_path / "nvidia_h200").mkdir()
    (tmp_path / "nvidia_h200/pretrain_base_patch16_bf16_cuda.json").write_text(json.dumps(measurement))
    first, *others = [row for row in scaling.tables(tmp_path).splitlines() if row.startswith("| ViT-")]
    assert first == "| ViT-B | 111.66 M | 0.447 GB | 58.46 | 5,000 | 30% | NVIDIA H200, 1024 images |"
    assert [" | ".join(row.split(" | ")[1:4]) for row in others] == [
        "8 | 256 | 51.2", "64 | 256 | 51.2", "512 | 256 | 51.2", "8 | 512 | 102.4", "64 | 64 | 12.8", "512 | 8 | 1.6"
    ]  # fmt: skip
