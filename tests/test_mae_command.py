"""The command `mae`: its list of commands, and `mae start`, from a folder of images to a page."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from mains import fails

from mae import __main__ as mae_command
from mae import parallel, start


def run(*words, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "mae", *map(str, words)], cwd=cwd, capture_output=True, text=True)


def test_the_help_lists_the_commands_without_importing_torch():
    code = "import sys, runpy; sys.argv = ['mae', '--help']; runpy.run_module('mae', run_name='__main__'); "
    code += "assert not {'torch', 'numpy'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [name for commands in mae_command.COMMANDS.values() for name in commands]
    assert re.findall(r"^  (\w+)", done.stdout, flags=re.MULTILINE) == names
    assert {"start", "recipe", "pretrain", "finetune", "linprobe", "knn", "segment", "compare", "report", "neighbors",
            "map", "anomalies", "features", "predict", "reconstruct", "export", "submit"} == {*names}  # fmt: skip


def test_each_command_is_a_module_with_a_parser():
    for commands in mae_command.COMMANDS.values():
        for module, text in commands.values():
            found = importlib.import_module("mae.recommend.check" if module == "mae.data" else module)
            assert hasattr(found, "get_args_parser") or module.startswith("submitit"), module
            assert text and not text.endswith(".")


def test_a_command_has_the_flags_of_its_module_and_its_exit_status():
    done = run("knn", "--bank", "x")
    assert done.returncode == 2
    assert "unrecognized arguments: --bank" in done.stderr
    done = run("prtrain")
    assert (done.returncode, done.stderr) == (
        1, "mae: error: there is no command prtrain; did you mean pretrain?; mae --help lists them\n"
    )  # fmt: skip


def test_mistakes_of_start_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, text in (((), "name a folder of images"), ((tmp_path, "--for", "finetune"), "`for`")):
        assert text in fails(capsys, monkeypatch, start, *words)
    monkeypatch.setattr(parallel, "launched_processes", lambda: 2)
    assert "run it without torchrun" in fails(capsys, monkeypatch, start, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_exit_status_of_a_part_is_that_of_the_command(tmp_path, monkeypatch):
    """The images of the first part can't be opened."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        start.main(start.get_args_parser().parse_args([str(tmp_path / "none")]))
    assert stop.value.code == 1
    with pytest.raises(SystemExit) as stop:
        start.call([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
    assert stop.value.code == 128 + 15


def test_the_comparison_has_few_labels_if_each_class_has_many():
    def source(*counts):
        return SimpleNamespace(labels=np.repeat(np.arange(len(counts)), counts), classes=["a"] * len(counts))

    assert start.has_many(source(500, 900))
    assert not start.has_many(source(499, 5000))
    assert not start.has_many(source(*[9] * 600))  # more classes than labels


def test_the_page_of_a_complete_run_is_named(tmp_path, monkeypatch, capsys):
    """tests/demo_readme.py goes from a folder of images to a page."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/mine"
    out.mkdir(parents=True)
    (out / "checkpoint-1.pth").touch()
    (out / "report.html").touch()
    (out / start.COMPLETE).touch()
    words = [str(tmp_path / "none"), "--output_dir", "runs/mine"]
    start.main(start.get_args_parser().parse_args(words))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("runs/mine is complete") and last == "page: runs/mine/report.html"
    os.utime(out / start.COMPLETE, (0, 0))  # a checkpoint is newer
    with pytest.raises(SystemExit):
        start.main(start.get_args_parser().parse_args(words))
    (out / start.COMPLETE).unlink()  # a page of the meantime
    with pytest.raises(SystemExit):
        start.main(start.get_args_parser().parse_args(words))


def test_folders_of_one_name_are_not_confused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/photos"
    out.mkdir(parents=True)
    for name in ("report.html", start.COMPLETE):
        (out / name).touch()
    for folder in ("a/photos", "b/photos", "photos.v2"):
        Path(folder).mkdir(parents=True)

    def write_recipe(text):
        Path("runs/photos.yaml").write_text(text)
        os.utime("runs/photos.yaml", (0, 0))  # it is older than the results

    write_recipe("data_path: a/photos\n")
    for same in ("a/photos", tmp_path / "a/photos"):
        start.main(start.get_args_parser().parse_args([str(same)]))
        assert "page: runs/photos/report.html" in capsys.readouterr().out
    assert "runs/photos has a run of data_path=a/photos" in fails(capsys, monkeypatch, start, "b/photos")
    Path("runs/photos.yaml").unlink()
    (out / "environment.jsonl").write_text('{"settings": {"data_path": "a/photos"}}\n')
    assert "a run of data_path=a/photos" in fails(capsys, monkeypatch, start, "b/photos")
    write_recipe("data_path: a/photos\ntrain_list: one.csv\n")
    start.main(start.get_args_parser().parse_args(["a/photos", "--train_list", "one.csv"]))
    assert "page:" in capsys.readouterr().out
    assert "train_list=two.csv" in fails(capsys, monkeypatch, start, "a/photos", "--train_list", "two.csv")
    assert "dataset=STL10" in fails(capsys, monkeypatch, start, "a/photos", "--dataset", "STL10")
    monkeypatch.setattr(start, "write_recipe", lambda given, file: sys.exit(file.name))
    with pytest.raises(SystemExit, match=r"photos\.v2\.yaml"):
        start.main(start.get_args_parser().parse_args(["photos.v2"]))


def test_the_page_is_written_after_a_comparison_that_fails(tmp_path, monkeypatch, capsys):
    """The exit status is that of the comparison."""
    called = []

    def call(words):
        called.append(words)
        if words == ["compare"]:
            raise SystemExit(2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "call", call)
    monkeypatch.setattr(start, "comparison_of", lambda _: ["compare"])
    monkeypatch.setattr(start.recipe, "command_of", lambda *_: ["train"])
    Path("runs").mkdir()
    Path("runs/mine.yaml").touch()
    with pytest.raises(SystemExit) as stop:
        start.main(start.get_args_parser().parse_args(["images", "--output_dir", "runs/mine"]))
    assert stop.value.code == 2
    assert called[:2] == [["train"], ["compare"]] and "mae.inference.report" in called[2]
    assert "the comparison has failed" in capsys.readouterr().out
    assert not Path("runs/mine", start.COMPLETE).exists()  # the next call repeats it
