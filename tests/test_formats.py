"""The formats of files of weights: a new one is one file."""

import importlib.util
import json

import pytest
import safetensors.torch
import torch
from mains import randomized

from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import get_model
from mae.weights import reading
from models_vit import vit_mini_patch4

SEVENTH = """
import json

from mae.weights.formats.format import Format, blocks, to_ours

PARTS = {"norm1": "n1", "attn.qkv": "att.in", "attn.proj": "att.out", "norm2": "n2", "mlp.fc1": "up", "mlp.fc2": "down"}
ROWS = [("cls_token", "token"), ("pos_embed", "positions"), ("patch_embed.proj.", "stem."), ("norm.", "last."),
        ("head.", "out."), *blocks("blocks", "stages", PARTS)]


def matches(record, names):
    return "stages.0.n1.weight" in names


def tensors(record, weights):
    return to_ours(weights, ROWS)


def settings(record, sizes):
    beside = json.loads(record.path.with_suffix(".json").read_text())
    return {"mean": beside["offset"], "std": beside["scale"], "crop_pct": beside["share"],
            "label_names": beside["words"]}


FORMAT = Format("seventh", matches, tensors, settings)
"""


def plant(folder, monkeypatch):
    """Writes the file of a format, and adds it to the formats."""
    (folder / "seventh.py").write_text(SEVENTH)
    spec = importlib.util.spec_from_file_location("seventh", folder / "seventh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(reading, "FORMATS", {"seventh": module.FORMAT, **reading.FORMATS})
    return module


@pytest.fixture
def seventh(tmp_path):
    """A file in the format, and the model that it has."""
    model = randomized(vit_mini_patch4(img_size=16, num_classes=2), 0.1)
    names = {"cls_token": "token", "pos_embed": "positions", "patch_embed.proj": "stem", "blocks": "stages",
             "norm1": "n1", "norm2": "n2", "attn.qkv": "att.in", "attn.proj": "att.out", "mlp.fc1": "up",
             "mlp.fc2": "down", "norm.": "last.", "head": "out"}  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = value
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    beside = {"offset": [0.1, 0.2, 0.3], "scale": [0.4, 0.5, 0.6], "share": 0.9, "words": ["ant", "bee"]}
    (tmp_path / "model.json").write_text(json.dumps(beside))
    return model, tmp_path / "model.safetensors"


def test_a_new_format_is_one_file(seventh, tmp_path, monkeypatch, caplog):
    """Tensors, classes and the settings of the images are read."""
    theirs, file = seventh
    with pytest.raises(CheckpointError, match=r"no patch_embed\.proj\.weight"):
        get_model(file)
    plant(tmp_path, monkeypatch)
    ours = get_model(file)
    imgs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours(imgs), theirs(imgs))
    assert (ours.settings["mean"], ours.settings["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert ours.settings["crop_pct"] == 0.9
    assert ours.classes == ["ant", "bee"]
    assert not caplog.records
    assert reading.read(file).format == "seventh"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda beside: beside.unlink(), "configuration"),
    (lambda beside: beside.write_text('{"offset": "red", "scale": 1, "share": 1, "words": []}'), "recorded mean"),
])  # fmt: skip
def test_an_error_of_a_format_names_the_file(damage, message, seventh, tmp_path, monkeypatch):
    _, file = seventh
    plant(tmp_path, monkeypatch)
    damage(file.with_suffix(".json"))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        get_model(file)


def test_other_files_have_their_formats(seventh, tmp_path, monkeypatch):
    plant(tmp_path, monkeypatch)
    state = vit_mini_patch4(img_size=16).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": state}, tmp_path / "published.pth")
    assert reading.read(tmp_path / "bare.pth").format == "timm"
    assert reading.read(tmp_path / "published.pth").format == "published"
