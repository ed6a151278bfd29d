"""The study of small data: results are computed once per command, and the table has all so far."""

import importlib.util
import json

import pytest
from conftest import ROOT


@pytest.fixture
def study(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("small_data_study", ROOT / "benchmarks/small_data/study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    for number in range(10):
        folder = tmp_path / module.DATA / "train" / f"class{number}"
        folder.mkdir(parents=True)
        for image in range(110):
            (folder / f"{image:03}.png").touch()
    return module


def test_results_are_computed_once_and_the_table_has_all(study, tmp_path, monkeypatch):
    commands = []

    def call(command):
        commands.append([str(word) for word in command])
        out = tmp_path / command[command.index("--output_dir") + 1]
        out.mkdir(parents=True)
        if command[0] == "main_pretrain.py":
            (out / "log.txt").write_text('{"train_loss": 0.5, "seconds": 90}\n{"train_loss": 0.25, "seconds": 90}\n')
        else:
            rows = ["protocol,labels,accuracy", "linear probe,500,80", "linear probe,500,82", "fine-tuned,10000,90"]
            (out / "results.csv").write_text("\n".join(rows) + "\n")

    monkeypatch.setattr(study, "call", call)
    for names in (["mask-0.9"], ["base", "mask-0.9"]):
        monkeypatch.setattr("sys.argv", ["study.py", *names])
        study.main()
    assert [command[0] for command in commands] == ["main_pretrain.py", "main_compare.py"] * 2
    assert commands[0][-4:] == ["--mask_ratio", "0.9", "--resume", "auto"]
    assert "mask-0.9=runs/small_data/mask-0.9/checkpoint-49.pth" in commands[1]
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| base | 3 | 0.2500 | 81.0 ± 1.4 | 90.0 |",
        "| mask-0.9 | 3 | 0.2500 | 81.0 ± 1.4 | 90.0 |",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["base"]["accuracies"]["linear probe, 500 labels"] == [
        80,
        82,
    ]


def test_the_images_are_the_first_of_each_class(study, tmp_path):
    (tmp_path / study.WORK).mkdir(parents=True)
    study.write_list(1_000)
    lines = (tmp_path / study.WORK / "1000.txt").read_text().splitlines()
    assert len(lines) == 1_000
    assert (lines[0], lines[99], lines[100]) == ("class0/000.png", "class0/099.png", "class1/000.png")
