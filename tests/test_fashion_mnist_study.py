"""The study of Fashion-MNIST: its commands parse, the data are unpacked, and results are reused and copied back."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from torchvision.datasets import FashionMNIST

import main_compare
import main_pretrain
from benchmarks.fashion_mnist import study
from inference import export
from util.cli import entry_point


@pytest.mark.parametrize("name", ["PRETRAIN", "EXPORT", "COMPARE"])
def test_its_commands_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = {"main_pretrain.py": main_pretrain, "inference.export": export, "main_compare.py": main_compare}
    words = list(map(str, getattr(study, name)))
    script = next(word for word in words if word in scripts)
    arguments = words[words.index(script) + 1 :]
    args = entry_point.parse(scripts[script].get_args_parser(), arguments)
    if name == "COMPARE":
        assert len(args.labels) == len(args.draws) == len(args.budget) == 5
    if name == "PRETRAIN":
        assert args.epochs == study.EPOCHS  # the exported checkpoint is the last one


def test_the_data_are_unpacked_for_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "DEBIAN", tmp_path / "debian")
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        study.prepare(tmp_path / "data")
    study.DEBIAN.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array([4, 0, 9], dtype=np.uint8))):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
            with gzip.open(study.DEBIAN / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    study.prepare(tmp_path / "data")
    train = FashionMNIST(str(tmp_path / "data"), train=True)
    assert np.array_equal(train.data.numpy(), pixels)
    assert train.targets.tolist() == [4, 0, 9]


def test_results_are_reused_and_come_back_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(study.scripts, "ROOT", tmp_path)
    monkeypatch.setattr(study, "HERE", tmp_path / "study")
    study.HERE.mkdir()
    (study.HERE / "results.json").write_text("first")
    out = tmp_path / study.WORK / "compare"

    def run(*command):
        assert Path(command[command.index("--output_dir") + 1]) == study.WORK / "compare"
        assert (out / "results.json").read_text() == "first"
        (out / "results.json").write_text("second")
        (out / "table.md").write_text("table")
        raise KeyboardInterrupt

    monkeypatch.setattr(study.scripts, "run", run)
    with pytest.raises(KeyboardInterrupt):
        study.compare()
    assert (study.HERE / "results.json").read_text() == "second"
    assert (study.HERE / "table.md").read_text() == "table"
