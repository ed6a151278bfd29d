"""The notebook, executed as Jupyter would. ./run test-demo collects this file; ./run test does not."""

import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from inference import export, get_model

NOTEBOOK = ROOT / "demo" / "mae_visualize.ipynb"
PICTURES = 6  # one of each section's last cell


def execute(monkeypatch, folder, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o["data"]["image/png"] for o in outputs if "data" in o], "".join(o.get("text", "") for o in outputs)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_notebook_runs_from_its_folder(tmp_path, monkeypatch, norm_pix_loss):
    torch.manual_seed(0)
    model = get_model("mae_vit_mini_patch4", norm_pix_loss=norm_pix_loss)
    export.export(model, "safetensors", tmp_path / "mae.safetensors")
    pictures, text = execute(monkeypatch, NOTEBOOK.parent, MAE_MODEL=tmp_path / "mae.safetensors")
    assert len(pictures) == PICTURES
    assert len(set(pictures)) == PICTURES
    assert "8 x 8 patches, 3 images" in text


def test_without_a_clone_the_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(CellExecutionError, match="put the repository's address into REPOSITORY"):
        execute(monkeypatch, tmp_path)


def test_the_committed_notebook_was_executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    assert not any(output.output_type == "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 300_000


def test_the_first_cell_clones_the_repository(tmp_path):
    """As on Colab: an empty folder, and the address of the repository; packages are here already."""
    cell = nbformat.read(NOTEBOOK, as_version=4).cells[1].source
    cell = cell.replace('REPOSITORY = ""', f"REPOSITORY = {str(ROOT)!r}").replace('"--depth", "1", ', "")
    script = f"{cell}\nfrom inference import list_models\nprint(os.getcwd(), len(list_models()))"
    script = script.replace('[sys.executable, "-m", "pip", "install"', '["echo", "pip", "install"')
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/masked-autoencoders" in done.stdout
