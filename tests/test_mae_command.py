"""The command `mae`: its list of commands, and `mae start`, from a folder of images to a page."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT
from mains import fails
from PIL import Image

from mae import __main__ as mae_command
from mae import parallel, start
from mae.checkpoints import checkpoint, run_directory
from mae.data.fingerprint import fingerprint
from mae.data.open import open_source
from mae.recommend.facts import Machine
from mae.settings import DataSpec


def run(*words, cwd=ROOT, **variables):
    command = [sys.executable, "-m", "mae", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True)


def test_the_help_lists_the_commands_without_importing_torch():
    code = "import sys, runpy; sys.argv = ['mae', '--help']; runpy.run_module('mae', run_name='__main__'); "
    code += "assert not {'torch', 'numpy'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [name for commands in mae_command.COMMANDS.values() for name in commands]
    assert re.findall(r"^  (\w+)", done.stdout, flags=re.MULTILINE) == names
    assert {"start", "recipe", "pretrain", "finetune", "linprobe", "knn", "segment", "compare", "report", "neighbors",
            "map", "anomalies", "features", "predict", "reconstruct", "export", "submit"} == {*names}  # fmt: skip


LAZY = {"mae.data": "mae.recommend.check", "mae.recommend": "mae.start"}  # they import it after their arguments


def test_each_command_is_a_module_with_a_parser():
    for commands in mae_command.COMMANDS.values():
        for module, text in commands.values():
            found = importlib.import_module(LAZY.get(module, module))
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


def test_arguments_are_checked_before_pytorch_is_imported(tmp_path):
    """Importing it takes up to half a minute. In its place is a module that can't be imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "photos").mkdir()
    for words, named in (
        ("start photos --minutes 0", "--minutes"), ("start photos --minuts 3", "--minutes"),
        ("start photos --split val", "split"), ("start none", "data_path"),
        ("recipe none", "data_path"), ("recipe photos --minutes 3", "recipe"),
    ):  # fmt: skip
        done = run(*words.split(), cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert done.returncode and named in done.stderr and "torch" not in done.stderr, words


def test_a_run_within_its_images_is_refused(tmp_path):
    """Its files would be among them. The message names another directory, with the name of the folder."""
    done = run("start", ".", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and f"output_dir={tmp_path.parent / 'runs' / tmp_path.name}" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_closed_pipe_is_no_error():
    """Such as that of `| head`. The command prints and logs."""
    code = """
import logging, sys
from mae.cli import entry_point
def main(args):
    logging.basicConfig(stream=sys.stdout)
    logging.warning("a line")
    print("another")
entry_point.run(main, entry_point.parser(""))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


def test_a_torchvision_that_does_not_fit_is_one_line(tmp_path):
    """With both versions and a command."""
    package = tmp_path / "site-packages/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = "from mae.cli import entry_point\n"
    code += "entry_point.run(lambda _: __import__('torchvision.transforms'), entry_point.parser(''))"
    variables = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "pip install" in line and "torchvision::nms does not exist" in line
    assert all(metadata.version(name) in line for name in ("torch", "torchvision"))


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
    monkeypatch.setattr(start, "write_recipe", lambda *_: sys.exit("begins"))
    with pytest.raises(SystemExit, match="begins"):
        start.main(start.get_args_parser().parse_args(words))
    (out / start.COMPLETE).unlink()  # a page of the meantime
    with pytest.raises(SystemExit, match="begins"):
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


def test_another_encoder_is_opened_before_the_training(tmp_path, monkeypatch, capsys):
    """A name that does not exist or can't be downloaded, and a file that is no encoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.pth").write_text("no weights")
    Path("images").mkdir()
    monkeypatch.setattr(start, "write_recipe", lambda *_: sys.exit("begins"))
    for name in ("nothing", "nobody/nothing", "text.pth"):
        assert name in fails(capsys, monkeypatch, start, "images", "--against", name)
    assert not Path("runs").exists()


def test_a_complete_run_gets_the_rows_of_another_encoder(run_of_pictures, monkeypatch, capsys):
    monkeypatch.setattr(start, "is_complete", lambda *_: True)
    monkeypatch.setattr(start, "train", lambda *_: None)
    monkeypatch.setattr(start.answer, "open_encoder", lambda name: None)
    Path("runs/mine/report.html").touch()
    Path("runs/mine.yaml").write_text("data_path: images\nprocesses: 1\n")
    assert run_of_pictures() == []
    (words,) = run_of_pictures("--against", "owner/name")
    assert words[-2:] == ["--against", "owner/name"]
    Path("runs/mine/answer.json").write_text(json.dumps({"rows": {"owner/name": {}}}))
    assert run_of_pictures("--against", "owner/name") == []


@pytest.fixture
def run_of_pictures(tmp_path, monkeypatch):
    """`mae start` for a folder of 40 images on two cores, without the programs that it starts; returns their words."""
    called = []

    def start_run(*flags):
        called.clear()
        start.main(start.get_args_parser().parse_args(["images", "--output_dir", "runs/mine", *flags]))
        return [*called]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "call", lambda words, **_: called.append(words))
    monkeypatch.setattr(start.recipe, "this_machine", lambda can_cache: Machine(gpus=0, cores=2, cache_bytes=0))
    for folder in ("images", "runs/mine"):
        Path(folder).mkdir(parents=True)
    for number in range(40):
        Image.new("L", (8, 8), number).save(f"images/{number:02}.png")
    Path("runs/mine/environment.jsonl").write_text('{"processes": 1, "settings": {"data_path": "images"}}\n')
    return start_run


def write_state(images_done=0):
    """A checkpoint of the run, as far as `mae start` reads it."""
    images = fingerprint(open_source(DataSpec(data_path="images"), "train"), with_labels=False)
    progress = {"epoch": 1, "images_done": images_done, "images": images}
    checkpoint.write({"epoch": 0, "progress": progress}, Path("runs/mine/checkpoint-last.pth"))


def value_of(words, flag):
    return words[words.index(flag) + 1] if flag in words else None


def test_the_command_has_the_path_of_the_recipe_and_nothing_of_its_comments(run_of_pictures):
    """Also of a recipe that was copied, or that has moved; a run that has lost its recipe has its settings."""
    text = "#   torchrun --standalone --no-python touch PWNED --config runs/original.yaml --output_dir runs/original\n"
    Path("runs/mine.yaml").write_text(f"{text}data_path: images\nepochs: 7\nprocesses: 2\n")
    training, page = run_of_pictures()
    assert {"PWNED", "runs/original.yaml", "runs/original", "--no-python"}.isdisjoint(training)
    assert "--nproc_per_node=2" in training and "main_pretrain" in training
    assert [value_of(training, f"--{flag}") for flag in ("config", "output_dir", "resume")] == [
        "runs/mine.yaml", "runs/mine", "auto",
    ]  # fmt: skip
    assert "runs/mine" in page
    write_state()
    Path("runs/mine.yaml").rename("elsewhere.yaml")
    training, _ = run_of_pictures("--minutes", "7")
    assert value_of(training, "--config") is None and value_of(training, "--output_dir") == "runs/mine"
    assert "--nproc_per_node=1" in training and not Path("runs/mine.yaml").exists()


def test_the_number_of_processes_is_that_of_the_run_of_the_recipe_or_of_the_rules(run_of_pictures, capsys):
    """40 images have batches of 32, half of which is enough for a core. An impossible number is refused with both."""
    recipe, environment = Path("runs/mine.yaml"), Path("runs/mine/environment.jsonl")
    recipe.write_text("data_path: images\nbatch_size: 16\nblr: 0.01\n")
    assert "--nproc_per_node=2" in run_of_pictures()[0]
    output = capsys.readouterr().out
    assert "2 processes" in output and "32; learning rate 0.00125" in output
    for number, text in (
        ("3", "runs/mine.yaml has 3 processes.* 2 CPU cores"),
        ("0", "runs/mine.yaml.*processes=0"),
        ("x", "runs/mine.yaml"),
    ):
        recipe.write_text(f"data_path: images\nprocesses: {number}\n")
        with pytest.raises(ValueError, match=text):
            run_of_pictures()
    write_state()
    recipe.write_text("data_path: images\nprocesses: 2\n")
    assert "--nproc_per_node=1" in run_of_pictures()[0]
    for number, text in (
        ("64", "runs/mine has 64 processes.* 2 CPU cores"),
        ('"--no-python"', "runs/mine has --no-python processes"),
    ):
        environment.write_text(f'{{"processes": {number}, "settings": {{}}}}\n')
        with pytest.raises(ValueError, match=text):
            run_of_pictures()


@pytest.mark.parametrize("change", ["recipe", "images", "run"])
def test_a_run_is_complete_until_its_recipe_or_its_images_change(change, run_of_pictures, capsys):
    """Whatever the times of the files are."""
    recipe, page = Path("runs/mine.yaml"), Path("runs/mine/report.html")
    recipe.write_text("data_path: images\nprocesses: 1\n")
    assert len(run_of_pictures()) == 2
    page.touch()
    assert not run_of_pictures() and "page: runs/mine/report.html" in capsys.readouterr().out
    if change == "recipe":
        recipe.write_text("data_path: images\nprocesses: 2\n")
    elif change == "images":
        Path("images/00.png").rename("images/new.png")
    else:
        with Path("runs/mine/environment.jsonl").open("a") as file:
            file.write(json.dumps({"processes": 1, "settings": {"data_path": "images", "epochs": 8}}) + "\n")
    for path in (recipe, page, *Path("images").iterdir()):
        os.utime(path, (0, 0))
    assert len(run_of_pictures()) == 2
    assert not run_of_pictures()


def test_an_image_that_was_added_within_an_epoch_is_named(run_of_pictures):
    """When it is gone, or between two epochs, the run resumes."""
    Path("runs/mine.yaml").write_text("data_path: images\nprocesses: 1\n")
    write_state(images_done=8)
    names = "".join(f"{path.name}\0" for path in sorted(Path("images").iterdir()))
    run_directory.record_images(Path("runs/mine"), names.encode())
    Image.new("L", (8, 8)).save("images/new.png")
    with pytest.raises(ValueError, match=r"new\.png.*`output_dir`"):
        run_of_pictures()
    Path("images/new.png").unlink()
    assert len(run_of_pictures()) == 2
    Image.new("L", (8, 8)).save("images/new.png")
    write_state()
    assert len(run_of_pictures()) == 2
