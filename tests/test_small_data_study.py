"""The study of small data: encoders are pre-trained and compared, results are not computed twice."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import main_pretrain
from util.cli import entry_point
from util.cli.advice import arguments


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The module with results, encoders and images in a temporary folder."""
    spec = importlib.util.spec_from_file_location("small_data_study", ROOT / "benchmarks/small_data/study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("HERE", "WORK", "DATA"):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    monkeypatch.setattr(module, "RESULTS", module.HERE / "results.json")
    monkeypatch.chdir(ROOT)
    for folder in (module.HERE, module.WORK):
        folder.mkdir()
    for split, images in (("train", 12), ("val", 2)):
        for label in range(10):
            folder = module.DATA / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(images):
                Image.fromarray(np.full((28, 28), 25 * label + number, np.uint8)).save(folder / f"{number:03}.png")
    return module


def test_two_encoders_are_pretrained_and_compared_once(study, monkeypatch, capfd):
    runs = {"base": study.Run(100, 1, {}), "mask-0.5": study.Run(100, 2, {"mask_ratio": 0.5})}
    monkeypatch.setattr(study, "RUNS", runs)
    evaluation = {name: value for name, value in study.EVALUATION.items() if name not in ("recipes", "budget")}
    own = {
        "data_path": study.DATA,
        "output_dir": study.WORK / "compare",
        "protocols": ["knn"],
        "labels": [10],
        "draws": [1],
    }
    monkeypatch.setattr(study, "EVALUATION", {**evaluation, **own})
    monkeypatch.setattr("sys.argv", ["study.py"])
    study.main()
    lines = (study.HERE / "table.md").read_text().splitlines()
    assert lines[0] == "| encoder | images | epochs | minutes | loss | k-NN, % |"
    assert [line.split(" | ")[:3] for line in lines[2:]] == [["| base", "100", "1"], ["| mask-0.5", "100", "2"]]
    results = json.loads(study.RESULTS.read_text())
    assert len(results["base"]["accuracies"]["k-NN"]) == 1
    assert "--mask_ratio 0.5" in results["mask-0.5"]["command"]
    losses = [json.loads(line)["train_loss"] for line in (study.WORK / "mask-0.5" / "log.txt").read_text().splitlines()]
    assert results["mask-0.5"]["loss"] == losses[1]

    monkeypatch.setattr(study, "compare", None)  # is not called again
    study.main()
    assert json.loads(study.RESULTS.read_text()) == results


def test_its_commands_parse_and_differ_in_one_setting(study):
    arguments_of = {
        name: entry_point.parse(main_pretrain.get_args_parser(), arguments(run.flags("x")))
        for name, run in study.RUNS.items()
    }
    for name, args in arguments_of.items():
        base = vars(arguments_of["1000-images" if name.startswith("1000-images") else "base"])
        changed = {flag for flag, value in vars(args).items() if value != base[flag]}
        assert len(changed - {"save_every", "warmup_epochs"}) == (name not in ("base", "1000-images")), name


def test_the_images_are_the_first_of_each_class(study):
    study.write_list(100)
    lines = (study.WORK / "100.txt").read_text().splitlines()
    assert len(lines) == 100
    assert (lines[0], lines[9], lines[10]) == ("class0/000.png", "class0/009.png", "class1/000.png")
