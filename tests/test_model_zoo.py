"""The table of published weights, and the download and verification of files."""

import hashlib
from urllib.error import URLError

import pytest
import torch

import models_mae
import models_vit
from util.checkpoints.checkpoint import CheckpointError
from util.weights import loading, model_zoo


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


def test_the_names_of_both_implementations():
    names = model_zoo.TABLE.keys()
    assert {
        f"mae_{kind}_vit_{size}" for kind in ("pretrain", "finetuned") for size in ("base", "large", "huge")
    } < names
    theirs = [name for name, row in model_zoo.TABLE.items() if row.license == "Apache-2.0"]
    assert len(theirs) == 24
    assert sum(model_zoo.TABLE[name].url is not None for name in theirs) == 11


META, MM = "https://dl.fbaipublicfiles.com/mae", "https://download.openmmlab.com/mmselfsup/1.x/mae"
# Top-1 accuracy of the fine-tuned model, and the start of the md5 of the encoder and of the classifier.
PAPER = {
    "base": (16, 83.664, "8cad7c", "1b25e9"),
    "large": (16, 85.952, "b8b06e", "51f550"),
    "huge": (14, 86.928, "9bdbb0", "2541f2"),
}


def test_the_papers_files():
    expected = {}
    for size, (patch, top1, encoder, classifier) in PAPER.items():
        mae, vit = f"mae_vit_{size}_patch{patch}", f"vit_{size}_patch{patch}"
        url = f"{META}/pretrain/mae_pretrain_vit_{size}"
        tuned = f"{META}/finetune/mae_finetuned_vit_{size}.pth"
        expected[f"mae_pretrain_vit_{size}"] = (mae, "encoder", 1600, top1, f"{url}.pth", f"md5:{encoder}", True)
        expected[f"mae_pretrain_vit_{size}_full"] = (
            mae, "encoder and decoder", 1600, top1, f"{url}_full.pth", None, True,
        )  # fmt: skip
        expected[f"mae_finetuned_vit_{size}"] = (vit, "classifier", 1600, top1, tuned, f"md5:{classifier}", True)
    for name in ("mae_visualize_vit_large", "mae_visualize_vit_large_ganloss"):
        url = f"{META}/visualize/{name}.pth"
        expected[name] = ("mae_vit_large_patch16", "encoder and decoder", None, None, url, None, False)
    found = {name: row for name, row in model_zoo.TABLE.items() if row.license == "CC-BY-NC 4.0"}
    assert {name: (*row[:6], row.norm_pix_loss) for name, row in found.items()} == expected
    assert {row.input_size for row in found.values()} == {224}


# Epochs of pre-training: top-1 accuracy fine-tuned, and of a linear probe; the start of the sha256 of the
# autoencoder and of the classifier.
MMPRETRAIN = {
    ("base", 300): (83.1, 60.8, "20220829-c2cf66ba", None),
    ("base", 400): (83.3, 62.5, "20220825-bc79e40b", None),
    ("base", 800): (83.3, 65.1, "20220825-5d81fbc4", None),
    ("base", 1600): (83.5, 67.1, "20220825-f7569ca2", "20220825-cf70aa21"),
    ("large", 400): (85.2, 70.7, "20220825-b11d0425", None),
    ("large", 800): (85.4, 73.7, "20220825-df72726a", None),
    ("large", 1600): (85.7, 75.5, "20220825-cc7e98c9", None),
    ("huge", 1600): (86.9, None, "20220916-ff848775", "20220916-0bfc9bfd"),
}


def test_the_files_of_mmpretrain():
    expected = {}
    for (size, epochs), (tuned, probed, mae, classifier) in MMPRETRAIN.items():
        name = f"mae_vit-{size}-p16_8xb512-amp-coslr-{epochs}e_in1k"
        expected[name] = (tuned, epochs, mae)
        patch, length = {"base": (16, 100), "large": (16, 50), "huge": (14, 50)}[size]
        start = f"vit-{size}-p{patch}_mae-{epochs}e-pre"
        expected[f"{start}_8xb128-coslr-{length}e_in1k"] = (tuned, epochs, classifier)
        if probed:
            expected[f"{start}_8xb2048-linear-coslr-90e_in1k"] = (probed, epochs, None)
    expected["vit-huge-p14_mae-1600e-pre_32xb8-coslr-50e_in1k-448px"] = (87.3, 1600, "20220916-95b6a0ce")
    found = {name: row for name, row in model_zoo.TABLE.items() if row.license == "Apache-2.0"}
    assert len(expected) == 24
    assert {name: (row.top1, row.epochs) for name, row in found.items()} == {
        name: (top1, epochs) for name, (top1, epochs, _) in expected.items()
    }
    for name, (_, epochs, ending) in expected.items():
        row = found[name]
        size = name.split("-")[1]
        assert row.kind == ("encoder and decoder" if name.startswith("mae_") else "classifier")
        assert row.model == f"{'mae_' * name.startswith('mae_')}vit_{size}_patch{14 if size == 'huge' else 16}"
        assert row.input_size == (448 if "448px" in name else 224)
        if ending is None:
            assert (row.url, row.digest) == (None, None)
        else:
            assert row.url.startswith(f"{MM}/mae_vit-{size}-p16_8xb512-fp16-coslr-{epochs}e_in1k/")
            assert row.url.endswith(f"_{ending}.pth")
            assert row.digest == f"sha256:{ending[-8:]}"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (
            "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k",
            "mae_vit-base-p16_8xb512-coslr-300e-fp16_in1k_20220829-c2cf66ba",
        ),
        (
            "mae_vit-huge-p16_8xb512-amp-coslr-1600e_in1k",
            "mae_vit-huge-p16_8xb512-fp16-coslr-1600e_in1k_20220916-ff848775",
        ),
        (
            "vit-base-p16_mae-1600e-pre_8xb128-coslr-100e_in1k",
            "vit-base-p16_ft-8xb128-coslr-100e_in1k/vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21",
        ),
        (
            "vit-huge-p14_mae-1600e-pre_32xb8-coslr-50e_in1k-448px",
            "vit-huge-p16_ft-32xb8-coslr-50e_in1k-448/vit-huge-p16_ft-32xb8-coslr-50e_in1k-448_20220916-95b6a0ce",
        ),
    ],
)
def test_urls_in_full(name, file):
    size, epochs = name.split("-")[1], 300 if "300e" in name else 1600
    folder = f"{MM}/mae_vit-{size}-p16_8xb512-fp16-coslr-{epochs}e_in1k"
    assert model_zoo.TABLE[name].url == f"{folder}/{file}.pth"


def test_an_unreleased_name_is_an_error():
    with pytest.raises(ValueError, match=r"never released; .*vit-base-p16_mae-1600e-pre_8xb128"):
        model_zoo.find("vit-base-p16_mae-300e-pre_8xb128-coslr-100e_in1k")


def test_an_unknown_name_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"mae_pretrain_vit_bse; did you mean mae_pretrain_vit_base[?]$",
    ):
        loading.read("mae_pretrain_vit_bse")
    with pytest.raises(CheckpointError, match=r"there is no file .*base.pth"):
        loading.read("runs/base.pth")


def test_a_missing_network_is_a_one_line_error(hub):
    with pytest.raises(ValueError, match=r"https://\S+/mae_pretrain_vit_base.pth .*hub"):
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
    calls = []
    torch.save(models_vit.vit_mini_patch4(img_size=16, num_classes=0).state_dict(), tmp_path / "m.pth")
    monkeypatch.setattr(loading.dist, "from_rank_0", lambda compute: calls.append(compute()))
    monkeypatch.setattr(model_zoo, "fetch", lambda name: tmp_path / "m.pth")
    loading.read("mae_pretrain_vit_base")
    assert calls == [tmp_path / "m.pth"]
