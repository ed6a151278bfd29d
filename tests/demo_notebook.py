"""The notebook, executed as Jupyter would. ./run test-demo collects this file; ./run test does not."""

import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from mae.inference import export, get_model

NOTEBOOK = ROOT / "demo" / "mae_visualize.ipynb"
PICTURES = 8  # one of each section but the first


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """The cache of published weights is empty, and downloads fail."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("MAE_MODEL", raising=False)


def execute(folder, inserted=""):
    """Runs the notebook in a folder, with a cell after the one that loads the model; returns pictures and text."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (loads,) = (number for number, cell in enumerate(notebook.cells) if "model, trained = load(name)" in cell.source)
    notebook.cells.insert(loads + 1, nbformat.v4.new_code_cell(inserted))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o["data"]["image/png"] for o in outputs if "data" in o], "".join(o.get("text", "") for o in outputs)


@pytest.mark.parametrize(
    ("name", "settings", "text", "has_14_rows"),
    [
        ("mae_vit_mini_patch4", {"norm_pix_loss": True}, "8 x 8 patches of 4 x 4 pixels; images of photographs", False),
        ("mae_vit_mini_patch4", {"input_size": 28, "patch_size": 7, "in_chans": 1},
         "7 x 7 pixels; images of clothes", False),
        ("mae_vit_tiny_patch16", {}, "14 x 14 patches of 16 x 16 pixels; images of photographs", True),
    ],
)  # fmt: skip
def test_the_notebook_runs_from_its_folder(tmp_path, monkeypatch, name, settings, text, has_14_rows):
    export.export(get_model(name, **settings), "safetensors", tmp_path / "mae.safetensors")
    monkeypatch.setenv("MAE_MODEL", str(tmp_path / "mae.safetensors"))
    pictures, output = execute(NOTEBOOK.parent)
    assert len(pictures) == len(set(pictures)) == PICTURES
    assert text in output
    assert ("untrained weights, masks only" in output) != has_14_rows


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_notebook_runs_with_images_of_ones_own(tmp_path, monkeypatch, in_chans):
    """The instruction of the last cell, followed."""
    model = get_model("mae_vit_mini_patch4", in_chans=in_chans)
    export.export(model, "safetensors", tmp_path / "mae.safetensors")
    monkeypatch.setenv("MAE_MODEL", str(tmp_path / "mae.safetensors"))
    for name, size in (("red", (90, 60)), ("green", (60, 90)), ("blue", (64, 64))):
        Image.new("RGB", size, name).save(tmp_path / f"{name}.jpg")
    last = nbformat.read(NOTEBOOK, as_version=4).cells[-1].source
    (instruction,) = (line for line in last.splitlines() if line.startswith("| use your own images here |"))
    code = "\n".join(re.findall(r"`([^`]*)`", instruction)).replace("FOLDER", str(tmp_path))
    pictures, output = execute(NOTEBOOK.parent, f"{code}\nprint(*names, len(images))")
    assert "blue green red 3" in output
    assert len(pictures) == PICTURES


def test_without_a_trained_model_the_notebook_shows_masks(tmp_path):
    """In a clone without the output of ./run demo."""
    for path in (*ROOT.iterdir(), *ROOT.joinpath("demo").iterdir()):
        if path.name not in ("demo", "output"):
            target = tmp_path / "clone" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    pictures, output = execute(tmp_path / "clone")
    assert len(pictures) == PICTURES - 3
    assert "an untrained model: 14 x 14 patches of 16 x 16 pixels; images of photographs\n" in output
    for start in (
        "mae_visualize_vit_large is neither in the cache nor",
        "attention needs",
        "features need",
        "neighbors need",
    ):
        assert [line for line in output.splitlines() if line.startswith(start) and "type ./run demo" in line]


def test_a_model_without_decoder_is_rejected(tmp_path, monkeypatch):
    export.export(get_model("vit_mini_patch4"), "safetensors", tmp_path / "encoder.safetensors")
    monkeypatch.setenv("MAE_MODEL", str(tmp_path / "encoder.safetensors"))
    with pytest.raises(CellExecutionError, match=r"encoder\.safetensors .*MAE_MODEL"):
        execute(NOTEBOOK.parent)


def test_without_a_clone_the_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(CellExecutionError, match="REPOSITORY"):
        execute(tmp_path)


def test_the_committed_notebook_was_executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    assert not any(output.output_type == "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 450_000


def test_the_first_cell_clones_the_repository(tmp_path):
    """As on Colab: an empty folder, and the address of the repository; packages are here already."""
    cell = nbformat.read(NOTEBOOK, as_version=4).cells[1].source
    cell = cell.replace('REPOSITORY = ""', f"REPOSITORY = {str(ROOT)!r}").replace('"--depth", "1", ', "")
    script = f"{cell}\nfrom mae import list_models\nprint(os.getcwd(), len(list_models()))"
    script = script.replace('[sys.executable, "-m", "pip", "install"', '["echo", "pip", "install"')
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/masked-autoencoders" in done.stdout
