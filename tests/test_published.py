"""The table of published weights, and files that are fetched and checked."""

import hashlib
from urllib.error import URLError

import pytest
import torch

import models_mae
import models_vit
from util import published, weights
from util.checkpoint import CheckpointError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder, and a network on which there is one file."""
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
    for name, row in published.TABLE.items():
        factories = models_mae if row.kind != published.CLASSIFIER else models_vit
        assert hasattr(factories, row.model), name


def test_the_names_of_both_implementations():
    names = published.TABLE.keys()
    assert {
        f"mae_{kind}_vit_{size}" for kind in ("pretrain", "finetuned") for size in ("base", "large", "huge")
    } < names
    theirs = [name for name, row in published.TABLE.items() if row.licence == "Apache-2.0"]
    assert len(theirs) == 24
    assert sum(published.TABLE[name].url is not None for name in theirs) == 11


def test_a_name_that_was_never_released():
    with pytest.raises(
        ValueError, match=r"announced and never released; released are vit-base-p16_mae-1600e-pre_8xb128"
    ):
        published.find("vit-base-p16_mae-300e-pre_8xb128-coslr-100e_in1k")


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"no file mae_pretrain_vit_bse, nor .*the nearest is mae_pretrain_vit_base$"):
        weights.read("mae_pretrain_vit_bse")
    with pytest.raises(CheckpointError, match=r"there is no file .*base.pth"):
        weights.read("runs/base.pth")


def test_without_a_network(hub):
    with pytest.raises(ValueError, match=r"can't download https://\S+/mae_pretrain_vit_base.pth .*put it at .*hub"):
        published.fetch("mae_pretrain_vit_base")


def test_a_published_digest_is_checked(hub, monkeypatch, tmp_path):
    url = published.TABLE["mae_pretrain_vit_base"].url
    hub[url] = b"the weights"
    with pytest.raises(ValueError, match="is not the published file, whose md5 starts with 8cad7c"):
        published.fetch("mae_pretrain_vit_base")
    row = published.TABLE["mae_pretrain_vit_base"]._replace(digest="md5:" + hashlib.md5(b"the weights").hexdigest()[:6])
    monkeypatch.setitem(published.TABLE, "mae_pretrain_vit_base", row)
    path = published.fetch("mae_pretrain_vit_base")
    assert path.read_bytes() == b"the weights"
    hub.clear()
    assert published.fetch("mae_pretrain_vit_base") == path  # without a network


def test_a_file_without_published_digest_is_remembered(hub, caplog):
    name = "mae_visualize_vit_large"
    hub[published.TABLE[name].url] = b"pixels"
    path = published.fetch(name)
    assert hashlib.sha256(b"pixels").hexdigest() in caplog.text
    caplog.clear()
    published.fetch(name)
    assert caplog.text == ""
    path.write_bytes(b"others")
    with pytest.raises(ValueError, match="has changed since it was first used"):
        published.fetch(name)
