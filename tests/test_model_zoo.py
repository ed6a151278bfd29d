"""The table of published weights, and the download and verification of files."""

import hashlib
from urllib.error import URLError

import pytest
import torch

import models_mae
import models_vit
from mae.checkpoints.checkpoint import CheckpointError
from mae.weights import loading, model_zoo, reading


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of torch.hub, and a fake network with one file."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    served = {}

    def download(url, path, progress):
        if url not in served:
            raise URLError("no network")
        with open(path, "wb") as file:
            file.write(served[url])

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return served


def test_every_row_has_a_model_of_ours():
    for name, row in model_zoo.TABLE.items():
        factories = models_mae if row.kind != model_zoo.CLASSIFIER else models_vit
        assert hasattr(factories, row.model), name


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="did you mean mae_pretrain_vit_base"):
        loading.read("mae_pretrain_vit_bse")
    with pytest.raises(CheckpointError, match=r"base.pth"):
        loading.read("runs/base.pth")


def test_a_missing_network_is_a_one_line_error(hub):
    with pytest.raises(ValueError, match=r"mae_pretrain_vit_base.pth"):
        model_zoo.fetch("mae_pretrain_vit_base")


def test_a_published_digest_is_checked(hub, monkeypatch, tmp_path):
    url = model_zoo.TABLE["mae_pretrain_vit_base"].url
    hub[url] = b"the weights"
    with pytest.raises(ValueError, match=r"md5 .*8cad7c"):
        model_zoo.fetch("mae_pretrain_vit_base")
    row = model_zoo.TABLE["mae_pretrain_vit_base"]._replace(digest="md5:" + hashlib.md5(b"the weights").hexdigest()[:6])
    monkeypatch.setitem(model_zoo.TABLE, "mae_pretrain_vit_base", row)
    path = model_zoo.fetch("mae_pretrain_vit_base")
    assert path.read_bytes() == b"the weights"
    hub.clear()
    assert model_zoo.fetch("mae_pretrain_vit_base") == path  # without a network


def test_a_file_without_published_digest_is_remembered(hub, caplog):
    name = "mae_visualize_vit_large"
    hub[model_zoo.TABLE[name].url] = b"pixels"
    path = model_zoo.fetch(name)
    assert hashlib.sha256(b"pixels").hexdigest() in caplog.text
    caplog.clear()
    model_zoo.fetch(name)
    assert caplog.text == ""
    path.write_bytes(b"others")
    with pytest.raises(ValueError, match="changed"):
        model_zoo.fetch(name)


@pytest.mark.parametrize("name", ["mae_pretrain_vit_base", "mae_visualize_vit_large"])
def test_weights_in_a_read_only_folder_are_used(name, hub, monkeypatch):
    def read_only(path, text):
        raise OSError(f"can't write {path} (Read-only file system): write to another folder")

    row = model_zoo.TABLE[name]
    hub[row.url] = b"pixels"
    digest = row.digest and "md5:" + hashlib.md5(b"pixels").hexdigest()[:6]
    monkeypatch.setitem(model_zoo.TABLE, name, row._replace(digest=digest))
    monkeypatch.setattr(model_zoo.atomic, "write_text", read_only)
    path = model_zoo.fetch(name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_other_processes_wait_for_a_download_as_long_as_it_takes(monkeypatch, tmp_path):
    """Each exchange of `from_rank_0` ends before --dist_timeout. A plain barrier does not."""
    waited = []
    fetched = []
    torch.save(models_vit.vit_mini_patch4(img_size=16, num_classes=0).state_dict(), tmp_path / "m.pth")
    monkeypatch.setattr(reading.parallel, "from_rank_0", lambda compute: waited.append(True) or compute())
    monkeypatch.setattr(model_zoo, "fetch", lambda name: fetched.append(name) or tmp_path / "m.pth")
    loading.read("mae_pretrain_vit_base")
    assert waited == [True] and fetched == ["mae_pretrain_vit_base"]


def test_the_name_of_a_folder_does_not_make_a_classifier_a_linear_probe():
    published = "vit-base-p16_mae-300e-pre_8xb2048-linear-coslr-90e_in1k"
    assert model_zoo.row_settings(published)["probe"] == "linear"
    assert "probe" not in model_zoo.row_settings("of-linear-runs/mae_finetuned_vit_base.pth")


def test_a_name_without_its_owner():
    with pytest.raises(
        ValueError, match=r"named dinov2-small; a released encoder of this name is facebook/dinov2-small"
    ):
        model_zoo.fetch("dinov2-small")


def test_a_checkpoint_that_a_run_does_not_have(tmp_path):
    for epoch in (7, 68):
        (tmp_path / f"checkpoint-{epoch}.pth").touch()
    advice = model_zoo.advice(str(tmp_path / "checkpoint-last.pth"))
    assert advice == f"; the newest checkpoint there is {tmp_path / 'checkpoint-68.pth'}"
    assert model_zoo.advice(str(tmp_path / "other/checkpoint-last.pth")) == ""
