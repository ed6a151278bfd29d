"""What pip installs works in an empty folder, next to a folder `util` of the user's.

./run test-demo collects this file; ./run test does not.
"""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, torchrun
from test_dino import of_transformers

pytestmark = pytest.mark.xdist_group("install")
OWN = {
    "mae",
    *(file.name for pattern in ("engine", "main", "models", "submitit") for file in ROOT.glob(f"{pattern}_*.py")),
}
UTIL = "this is the user's util"
FLAGS = ["--device", "cpu", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "8"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with the files of this one, as they are now. Its folder has the name of the library."""
    folder = tmp_path_factory.mktemp("clone") / "mae"
    folder.mkdir()
    names = git("ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).rstrip("\0").split("\0")
    for name in filter(lambda name: (ROOT / name).exists(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git("init", "--quiet", cwd=folder)
    git("add", "--all", cwd=folder)
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message", "all", cwd=folder)
    return folder


def git(*arguments, cwd):
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def environment(folder, *requirement):
    """Makes a virtual environment that sees the packages of this one, and installs into it; returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    # A path in a .pth file adds the packages, but not what is installed there in editable mode: this repository.
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    if requirement:
        subprocess.run([*pip, "--no-build-isolation", *map(str, requirement)], check=True)
    return python


@pytest.fixture(scope="module", params=["git", "editable"])
def python(request, clone, tmp_path_factory):
    requirement = {"git": [f"git+file://{clone}"], "editable": ["--editable", clone]}[request.param]
    return environment(tmp_path_factory.mktemp(request.param), *requirement)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in a folder with nothing but the user's `util`, which prints a line; returns the output."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "util").mkdir()
    (tmp_path / "util/__init__.py").write_text(f"print({UTIL!r})\n")

    def run(python, *command):
        done = subprocess.run([str(python), *map(str, command)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


def test_the_scripts_run_by_name(python, run, clone, labelled, tmp_path):
    commit = git("rev-parse", "--short=12", "HEAD", cwd=clone).strip()
    data = ["--data_path", labelled]
    run(python, "-m", "main_pretrain", "--config", "pretrain_fashion_mnist", *data, *FLAGS, "--vis_every", 0,
        "--output_dir", "mae")  # fmt: skip
    launcher = [*torchrun(2)[1:], "-m", "main_finetune"]
    tuned = run(python, *launcher, "--config", "finetune_fashion_mnist", *data, *FLAGS, "--eval_every", 1,
                "--finetune", "mae/checkpoint-0.pth", "--output_dir", "tuned")  # fmt: skip
    assert "2 processes" in tuned
    image = next(labelled.glob("val/kind3/*.png"))
    model = ["--model", "tuned/checkpoint-best.pth"]
    predicted = run(python, "-m", "mae.inference.predict", image, *model, "--device", "cpu")
    assert "kind" in predicted
    assert UTIL not in tuned + predicted
    assert json.loads((tmp_path / "mae/environment.jsonl").read_text())["commit"] == commit


def test_the_functions_are_imported_beside_a_util_of_the_user(python, run):
    code = """
import util
from mae import get_model, inference_model, list_models
from importlib.util import find_spec
print(len(get_model("vit_mini_patch4").blocks), callable(inference_model), list_models("vit_mini*"))
print([name for name in ("recipes", "demo", "hubconf", "util.misc") if find_spec(name)])
"""
    assert run(python, "-c", code).splitlines() == [UTIL, "4 True ['vit_mini_patch4']", "[]"]


def test_the_folder_of_a_clone_does_not_hide_the_library(python, clone, monkeypatch):
    """Seen from its parent, a folder `mae` without __init__.py is a package for Python, too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "from mae import get_model; print(len(get_model('vit_mini_patch4').blocks))"
    done = subprocess.run([python, "-c", code], cwd=clone.parent, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_a_script_beside_a_util_of_a_fork(python, tmp_path, monkeypatch):
    """As in the published code, it has no __init__.py. The script has the library, too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "fork/util").mkdir(parents=True)
    (tmp_path / "fork/util/misc.py").write_text("NAME = 'of the fork'\n")
    script = tmp_path / "fork/train.py"
    script.write_text("import models_mae\nfrom mae import list_models\nfrom util import misc\nprint(misc.NAME)\n")
    done = subprocess.run([python, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "of the fork\n", done.stderr


def test_the_util_of_a_clone_runs_beside_a_script(python, clone, tmp_path, monkeypatch):
    """As docs/migrating.md says."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    shutil.copytree(clone / "util", tmp_path / "util")
    (tmp_path / "train.py").write_text("import util.misc, util.lr_sched\nprint(util.misc.is_main_process())\n")
    done = subprocess.run([python, tmp_path / "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("python", ["git"], indirect=True)
def test_a_job_runs_a_copy_of_what_is_installed(python, run, labelled, tmp_path):
    """And of nothing else in site-packages."""
    job = ["--cluster", "local", "--ngpus", 1, "--nodes", 1, "--wait", "--shared_dir", "jobs", "--output_dir", "mae"]
    output = run(python, "-m", "submitit_pretrain", "--config", "pretrain_fashion_mnist", "--data_path", labelled,
                 *FLAGS, *job)  # fmt: skip
    assert "succeeded" in output
    (copy,) = tmp_path.glob("jobs/code/*")
    written = {"__pycache__", "submitted.yaml"}  # the first one by the job
    assert {path.name for path in copy.iterdir()} | written == OWN | written
    assert (copy / "mae/recipes/loveda_palette.txt").exists()


def test_a_clone_comes_before_an_installed_copy(python, clone):
    code = "import importlib.util; print(importlib.util.find_spec('mae').origin)"
    done = subprocess.run([python, "-c", code], cwd=clone, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == clone / "mae/__init__.py"


# Each line is a command, python -m MODULE. One process runs them, because most of their time is that of imports.
OF_DINO = """
main_knn --data_path {data} --finetune dino --input_size 32 --k 3 --device cpu
main_linprobe --data_path {data} --finetune dino --input_size 32 --blr 1 {flags} --output_dir probe
main_finetune --data_path {data} --finetune dino --input_size 32 {flags} --output_dir full
main_finetune --data_path {data} --finetune dino --lora 4 --input_size 32 {flags} --output_dir lora
main_pretrain --data_path {data} --init_from dino --lora 4 --unfreeze_blocks 1 --input_size 32 --lr 1e-2 \
    --vis_every 0 {flags} --output_dir continued
main_knn --data_path {data} --finetune continued/checkpoint-0.pth --k 3 --device cpu
main_finetune --data_path {data} --finetune continued/checkpoint-0.pth {flags} --output_dir tuned
mae.inference.predict {image} --model lora/checkpoint-0.pth --device cpu
mae.inference.features {data}/val --model dino --device cpu --out start.npz
mae.inference.features {data}/val --model continued/checkpoint-0.pth --device cpu --out continued.npz
mae.inference.export --model continued/checkpoint-0.pth --to safetensors --out merged.safetensors
mae.inference.features {data}/val --model merged.safetensors --device cpu --out merged.npz
mae.inference.neighbors {data}/val --model merged.safetensors --device cpu --out neighbors.png
"""
RUN = """
import runpy, shlex, sys
for line in sys.stdin.read().replace("\\\n", "").splitlines():
    print("$", line, flush=True)
    sys.argv = shlex.split(line)
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, end
"""


@pytest.mark.parametrize("python", ["git"], indirect=True)
@pytest.mark.parametrize("layout", ["v2 registers", "v3"])
def test_a_released_encoder_is_used_by_its_folder(layout, python, labelled, tmp_path, monkeypatch):
    """In an empty folder. It is probed, fine-tuned, continued and exported; the file says which encoder it has."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    of_transformers(layout, tmp_path / "dino")
    image = next(labelled.glob("val/kind3/*.png"))
    commands = OF_DINO.strip().format(data=labelled, image=image, flags=" ".join([*FLAGS, "--amp", "off"]))
    done = subprocess.run([python, "-c", RUN], cwd=tmp_path, input=commands, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--encoder" not in commands and (tmp_path / "neighbors.png").stat().st_size > 5000
    start, continued, merged = (
        np.load(tmp_path / f"{name}.npz")["features"] for name in ("start", "continued", "merged")
    )
    np.testing.assert_allclose(merged, continued, rtol=1e-4, atol=1e-5)
    assert np.abs(continued - start).max() > 1e-3


def test_torch_hub_beside_a_util_of_the_user(run, clone, tmp_path_factory):
    """Nothing is installed."""
    code = f"""
import util
import torch
model = torch.hub.load({str(clone)!r}, "vit_mini_patch4", source="local", nb_classes=3)
pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
print(model.predict(pixels)["pred_scores"].shape, model.extract_feat([pixels]).shape, hasattr(util, "misc"))
"""
    lines = run(environment(tmp_path_factory.mktemp("bare")), "-c", code).splitlines()
    assert lines[:2] == [UTIL, "(3,) torch.Size([1, 128]) False"]
