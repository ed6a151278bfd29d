"""The rule that says how an encoder is pooled, in every place where nothing chooses it."""

import numpy as np
import pytest
import torch
from mains import call, randomized

import main_knn
import main_linprobe
from mae.inference import export, features, get_model
from mae.pooling import pooling_of
from mae.training import log

SHAPE = {"input_size": 16, "patch_size": 8}


@pytest.mark.parametrize(("settings", "name", "tells"), [
    ({"model": "mae_vit_base_patch16"}, "cls", False),
    ({"model": "mae_vit_base_patch16", "uniformity": 0.0}, "cls", False),
    ({"model": "mae_vit_base_patch16", "uniformity": 0.1}, "both", True),
    ({"model": "vit_small_patch14", "encoder": "models_dino:DINOv2"}, "cls", False),  # any training
    ({"model": "timm:vit_base_patch16_224"}, "timm", True),
    ({"model": "timm:vit_base_patch16_224", "probe": "linear", "nb_classes": 3}, "timm", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "global_pool": True}, "avg", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "uniformity": 0.1, "global_pool": True}, "avg", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "global_pool": False, "probe": "linear"}, "cls", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "probe": "attentive"}, "probe", True),
    ({"model": "vit_base_patch16", "nb_classes": 0, "global_pool": True}, "avg", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "probe": "linear", "pool": "both"}, "both", True),
])  # fmt: skip
def test_what_an_encoder_was_trained_for_says_its_pooling(settings, name, tells):
    found = pooling_of(settings)
    assert (found.name, bool(found.reason)) == (name, tells)
    assert ("the file does not tell" in str(found)) is not tells


@pytest.mark.parametrize("pools", [True, False])
def test_every_use_of_a_classifier_has_its_pooling(labelled, tmp_path, pools, capsys):
    """k-NN, features and a linear probe of its file, without a flag."""
    model = randomized(get_model("vit_mini_patch4", **SHAPE, nb_classes=6, global_pool=pools), 0.05)
    file, title = tmp_path / "tuned.pth", "mean of the patches" if pools else "class token"
    torch.save({"model": model.state_dict(), "args": model.settings}, file)
    shared = {"data_path": labelled, "finetune": file, "num_workers": 0, "device": "cpu"}
    call(main_knn, **shared, k=5)
    assert f"features: {title} (" in capsys.readouterr().out
    call(main_linprobe, **shared, epochs=1, warmup_epochs=0, batch_size=16, output_dir=tmp_path / "probed")
    assert f"features: {title} (" in capsys.readouterr().out
    probe = get_model(tmp_path / "probed/checkpoint-0.pth")
    out = tmp_path / "features.npz"
    call(features, labelled, model=file, out=out, device="cpu", num_workers=0, amp="off")
    assert f"features: {title} (" in capsys.readouterr().out
    images = [str(path) for path in sorted(labelled.glob("train/*/*"))]
    np.testing.assert_allclose(features.read(out), get_model(file).extract_feat(images).numpy(), atol=1e-5)
    inputs = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(probe.compute_features(inputs), model.forward_features(inputs))


def both_of(model, inputs):
    """Returns class token and mean of the patches of a model (n, 2 D), each of unit length, by NumPy."""
    with torch.no_grad():
        tokens = model.get_intermediate_layers(inputs)[0].numpy()
    parts = tokens[:, 0], tokens[:, 1:].mean(axis=1)
    return np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], axis=1)


def test_class_token_and_patches_together(labelled, noisy, tmp_path, capsys):
    """Features, k-NN, a linear probe and exports of an autoencoder with `pool=both`."""
    model = randomized(get_model("mae_vit_mini_patch4", **SHAPE), 0.05)
    file = tmp_path / "mine.pth"
    torch.save({"model": model.state_dict(), "args": model.settings}, file)
    inputs = torch.rand(3, 3, 16, 16)
    expected = both_of(model, inputs)
    with torch.no_grad():
        np.testing.assert_allclose(model.compute_features(inputs, "both").numpy(), expected, atol=1e-6)

    shared = {"data_path": labelled, "finetune": file, "num_workers": 0, "device": "cpu"}
    of_knn = shared | {"data_path": noisy, "k": "1 3 5"}
    ways = {pool: call(main_knn, **of_knn, pool=pool) for pool in ("cls", "avg", "both")}
    assert ways["both"] not in (ways["cls"], ways["avg"])
    assert ways["cls"] == call(main_knn, **of_knn, cls_token=True)
    assert ways["avg"] == call(main_knn, **of_knn, global_pool=True)

    probe = tmp_path / "probed"
    capsys.readouterr()
    call(main_linprobe, **shared, pool="both", epochs=2, warmup_epochs=0, batch_size=16, output_dir=probe)
    assert "features: class token and mean of the patches (as given)" in capsys.readouterr().out
    tuned = get_model(probe / "checkpoint-1.pth")
    assert tuned.head[1].in_features == 2 * model.cls_token.shape[2]
    with torch.no_grad():
        np.testing.assert_allclose(tuned.compute_features(inputs).numpy(), expected, atol=1e-6)
        torch.testing.assert_close(tuned(inputs), tuned.head(torch.from_numpy(expected)), atol=1e-5, rtol=1e-5)
    call(main_linprobe, data_path=labelled, resume=probe / "checkpoint-1.pth", eval=True, num_workers=0, device="cpu")
    call(main_knn, **shared | {"finetune": probe / "checkpoint-1.pth"}, k=5)
    assert "features: class token and mean of the patches (the file records it)" in capsys.readouterr().out

    out = tmp_path / "both.safetensors"
    call(export, model=file, to="safetensors", out=out, encoder_only=True, pool="both")
    with torch.no_grad():
        np.testing.assert_allclose(get_model(out)(inputs).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("pool", "width"), [(None, 2), ("cls", 1)])
def test_an_export_keeps_the_pooling_of_its_run(pool, width, tmp_path):
    """The encoder of a run with --uniformity, in formats with any pooling; `--pool cls` chooses the class token."""
    model = randomized(get_model("mae_vit_mini_patch4", **SHAPE), 0.05)
    file = tmp_path / "mine.pth"
    torch.save({"model": model.state_dict(), "args": {**model.settings, "uniformity": 0.1}}, file)
    inputs = torch.rand(2, 3, 16, 16)
    expected = both_of(model, model.normalize(inputs)) if width == 2 else None
    flags = {"model": file, "encoder_only": True} | ({"pool": pool} if pool else {})
    call(export, **flags, to="torch_export", out=tmp_path / "encoder.pt2")
    graph = torch.export.load(tmp_path / "encoder.pt2").module()(inputs).detach().numpy()
    call(export, **flags, to="safetensors", out=tmp_path / "encoder.safetensors")
    encoder = get_model(tmp_path / "encoder.safetensors")
    with torch.no_grad():
        if expected is None:
            expected = model.compute_features(model.normalize(inputs), "cls").numpy()
        np.testing.assert_allclose(encoder(encoder.normalize(inputs)).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(graph, expected, atol=1e-5)
    assert encoder.pooling.name == ("both" if width == 2 else "cls")


def test_the_encoder_of_an_attentive_probe_is_exported_with_a_pooling_that_is_given(tmp_path, capsys):
    """Its own features are those of the probe: an index of them has no neighbors of the class token."""
    model = get_model("vit_mini_patch4", **SHAPE, nb_classes=3, global_pool=False, probe="attentive", num_queries=8)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "probe.pth")
    flags = {"model": tmp_path / "probe.pth", "encoder_only": True, "to": "torch_export", "out": tmp_path / "out.pt2"}
    with pytest.raises(ValueError, match=r"probe\.pth: .* give pool=cls or pool=both, or omit `encoder_only`"):
        call(export, **flags)
    call(export, **flags, pool="cls")
    assert "features: class token\n" in capsys.readouterr().out
    inputs = torch.rand(2, 3, 16, 16)
    found = torch.export.load(tmp_path / "out.pt2").module()(inputs)
    torch.testing.assert_close(found, model.extract_feat(model.normalize(inputs), "cls"), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_the_patches_has_no_features_of_its_class_token():
    """No norm was trained for it."""
    model = get_model("vit_mini_patch4", **SHAPE, nb_classes=3, global_pool=True)
    for pool in ("cls", "both"):
        with pytest.raises(ValueError, match="global_pool"):
            model.extract_feat(torch.rand(2, 3, 16, 16), pool)


@pytest.mark.parametrize("flags", [{"pool": "both"}, {"pool": "avg"}, {"pool": "cls"}, {}])
def test_a_probe_resumes_with_its_pooling(flags, labelled, tmp_path):
    """The flag may be given again. Without one, the pooling is that of a run with --uniformity."""
    model = randomized(get_model("mae_vit_mini_patch4", **SHAPE), 0.05)
    torch.save({"model": model.state_dict(), "args": {**model.settings, "uniformity": 0.1}}, tmp_path / "mine.pth")
    probe = {"data_path": labelled, "finetune": tmp_path / "mine.pth", "num_workers": 0, "device": "cpu",
             "warmup_epochs": 0, "batch_size": 16, "output_dir": tmp_path / "probe", "resume": "auto"}  # fmt: skip
    call(main_linprobe, **probe, **flags, epochs=1)
    call(main_linprobe, **probe, **flags, epochs=2)
    call(main_linprobe, **probe, epochs=3)
    assert len(log.read(tmp_path / "probe")) == 3
    assert get_model(tmp_path / "probe/checkpoint-2.pth").pooling.name == flags.get("pool", "both")


def test_an_export_of_the_whole_run_keeps_its_pooling(tmp_path):
    model = get_model("mae_vit_mini_patch4", **SHAPE)
    torch.save({"model": model.state_dict(), "args": {**model.settings, "uniformity": 0.1}}, tmp_path / "mine.pth")
    call(export, model=tmp_path / "mine.pth", to="safetensors", out=tmp_path / "all.safetensors")
    assert get_model(tmp_path / "all.safetensors").pooling.name == "both"
    get_model(tmp_path / "mine.pth").save_pretrained(tmp_path / "folder")
    assert get_model(tmp_path / "folder").pooling.name == "both"


def test_an_export_of_low_rank_updates_keeps_its_pooling(tmp_path):
    model = get_model("mae_vit_mini_patch4", **SHAPE, lora=2)
    torch.save({"model": model.state_dict(), "args": {**model.settings, "uniformity": 0.1}}, tmp_path / "mine.pth")
    call(export, model=tmp_path / "mine.pth", to="safetensors", out=tmp_path / "merged.safetensors")
    assert get_model(tmp_path / "merged.safetensors").pooling.name == "both"


def test_an_encoder_returns_the_features_of_its_run(tmp_path):
    """`get_model` of a classifier's architecture, without classes, on the file of a run with --uniformity."""
    model = randomized(get_model("mae_vit_mini_patch4", **SHAPE), 0.05)
    torch.save({"model": model.state_dict(), "args": {**model.settings, "uniformity": 0.1}}, tmp_path / "mine.pth")
    encoder = get_model("vit_mini_patch4", pretrained=tmp_path / "mine.pth", nb_classes=0)
    inputs = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(encoder(inputs).numpy(), both_of(model, inputs), atol=1e-5)


@pytest.mark.parametrize(("script", "flags", "message"), [
    (main_knn, {"pool": "both", "global_pool": True}, "one setting"),
    (main_linprobe, {"pool": "both", "probe": "attentive"}, "omit `pool`"),
    (export, {"pool": "both", "to": "safetensors", "out": "x.safetensors"}, "encoder_only"),
    (export, {"pool": "both", "encoder_only": True, "to": "timm", "out": "folder"}, "class token and patches together"),
])  # fmt: skip
def test_a_pooling_without_meaning_is_refused(script, flags, message, labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = get_model("mae_vit_mini_patch4", **SHAPE)
    torch.save({"model": model.state_dict(), "args": model.settings}, "mine.pth")
    of_script = {"model": "mine.pth"} if script is export else {"finetune": "mine.pth", "data_path": labelled}
    with pytest.raises(ValueError, match=message):
        call(script, **of_script, **flags)


def test_patches_of_a_classifier_without_class_token_do_not_count_together(labelled, tmp_path):
    """A classifier that pools patches has no norm of its class token."""
    model = get_model("vit_mini_patch4", **SHAPE, nb_classes=6, global_pool=True)
    torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / "tuned.pth")
    with pytest.raises(ValueError, match="global_pool"):
        call(main_knn, data_path=labelled, finetune=tmp_path / "tuned.pth", pool="both")
