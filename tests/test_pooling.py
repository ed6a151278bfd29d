"""The rule that says how an encoder is pooled, in every place where nothing chooses it."""

import numpy as np
import pytest
import torch
from mains import call, randomized

import main_knn
import main_linprobe
from mae.inference import features, get_model
from mae.pooling import pooling_of

SHAPE = {"input_size": 16, "patch_size": 8}


@pytest.mark.parametrize(("settings", "name", "tells"), [
    ({"model": "mae_vit_base_patch16"}, "cls", False),
    ({"model": "mae_vit_base_patch16", "uniformity": 0.0}, "cls", False),
    ({"model": "mae_vit_base_patch16", "uniformity": 0.1}, "cls", True),
    ({"model": "vit_small_patch14", "encoder": "models_dino:DINOv2"}, "cls", False),  # any training
    ({"model": "timm:vit_base_patch16_224"}, "timm", True),
    ({"model": "timm:vit_base_patch16_224", "probe": "linear", "nb_classes": 3}, "timm", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "global_pool": True}, "avg", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "uniformity": 0.1, "global_pool": True}, "avg", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "global_pool": False, "probe": "linear"}, "cls", True),
    ({"model": "vit_base_patch16", "nb_classes": 3, "probe": "attentive"}, "probe", True),
    ({"model": "vit_base_patch16", "nb_classes": 0, "global_pool": True}, "avg", True),
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
