"""The study of Fashion-MNIST: its commands parse, the data are unpacked, and results are copied back."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from mains import parse
from PIL import Image
from test_libraries import write_idx
from torchvision.datasets import FashionMNIST

import main_compare
import main_pretrain
from benchmarks.fashion_mnist import study
from mae.inference import export


@pytest.mark.parametrize("name", ["PRETRAIN", "EXPORT", "COMPARE"])
def test_its_commands_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = {"main_pretrain.py": main_pretrain, "mae.inference.export": export, "main_compare.py": main_compare}
    words = list(map(str, getattr(study, name)))
    script = next(word for word in words if word in scripts)
    args = parse(scripts[script], *words[words.index(script) + 1 :])
    if name == "COMPARE":
        assert len(args["labels"]) == len(args["draws"]) == len(args["budget"]) == 5
    if name == "PRETRAIN":
        assert args["epochs"] == study.EPOCHS  # the exported checkpoint is the last one


def test_the_data_are_unpacked_for_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "DEBIAN", tmp_path / "debian")
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        study.prepare(tmp_path / "data")
    study.DEBIAN.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array([4, 0, 9], dtype=np.uint8))):
            write_idx(tmp_path / "idx", array)
            (study.DEBIAN / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress((tmp_path / "idx").read_bytes()))
    monkeypatch.setattr(study.scripts, "ROOT", tmp_path)
    study.prepare(tmp_path / study.WORK / "data")
    train = FashionMNIST(str(tmp_path / study.WORK / "data"), train=True)
    assert np.array_equal(train.data.numpy(), pixels)
    assert train.targets.tolist() == [4, 0, 9]
    study.images()
    for split in ("train", "val"):
        for number, name in enumerate(("coat", "t-shirt_top", "ankle_boot")):
            file = tmp_path / study.WORK / "images" / split / name / f"{number:05}.png"
            assert np.array_equal(np.asarray(Image.open(file)), pixels[number])


def test_results_come_back_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(study.scripts, "ROOT", tmp_path)
    monkeypatch.setattr(study, "HERE", tmp_path / "study")
    study.HERE.mkdir()
    out = tmp_path / study.WORK / "compare"

    def run(*command):
        assert Path(command[command.index("--output_dir") + 1]) == study.WORK / "compare"
        out.mkdir(parents=True)
        (out / "table.md").write_text("table")
        raise KeyboardInterrupt

    monkeypatch.setattr(study.scripts, "run", run)
    with pytest.raises(KeyboardInterrupt):
        study.compare()
    assert (study.HERE / "table.md").read_text() == "table"
