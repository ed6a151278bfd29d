"""mmpretrain itself, in both directions: its models' files are read here, and ours are read there.

    ./run test-mmpretrain

mmpretrain is not maintained for current versions of Python and PyTorch. The task installs version 1.2.0 with few of its
dependencies into a temporary folder, which it removes. With this folder in PYTHONPATH, `python
tests/mmpretrain_oracle.py` writes the files of fixtures/mmpretrain anew: tiny models, with their answers to an input.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mmpretrain.models
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint, save_checkpoint
from mmpretrain.registry import MODELS

import models_vit
from mae.inference import export, get_model
from mae.inference.model import Autoencoder, Classifier
from mae.weights import loading, model_zoo

assert mmpretrain.models  # registers them
MINI = {"embed_dims": 128, "num_layers": 4, "num_heads": 4, "feedforward_channels": 512}
SIZES = {"base": "b", "large": "l", "huge": "h"}
NAMES = [name for name, row in model_zoo.TABLE.items() if name.startswith(("vit-", "mae_vit-"))]


def backbone(out_type, arch=MINI, img_size=32, patch_size=4):
    return {"type": "VisionTransformer", "arch": arch, "img_size": img_size, "patch_size": patch_size,
            "out_type": out_type, "final_norm": out_type == "cls_token"}  # fmt: skip


def classifier(kind, num_classes=5, width=128, **size):
    """The model of mmpretrain's configurations for fine-tuning (pooled), for supervised training, and for probing."""
    head = {"type": "VisionTransformerClsHead", "num_classes": num_classes, "in_channels": width}
    model = {"type": "ImageClassifier", "backbone": backbone("cls_token", **size), "head": head}
    if kind == "pooled":
        model["backbone"] = backbone("avg_featmap", **size)
        head["type"] = "LinearClsHead"
    if kind == "probe":
        model["neck"] = {"type": "ClsBatchNormNeck", "input_features": width}
    return model


def autoencoder(arch=MINI, img_size=32, patch_size=4, width=128, decoder=(64, 1, 2)):
    decoder_width, depth, heads = decoder
    return {
        "type": "MAE",
        "backbone": {"type": "MAEViT", "arch": arch, "img_size": img_size, "patch_size": patch_size},
        "neck": {"type": "MAEPretrainDecoder", "num_patches": (img_size // patch_size) ** 2, "patch_size": patch_size,
                 "in_chans": 3, "embed_dim": width, "decoder_embed_dim": decoder_width, "decoder_depth": depth,
                 "decoder_num_heads": heads, "mlp_ratio": 4.0},
        "head": {"type": "MAEPretrainHead", "norm_pix": True, "patch_size": patch_size,
                 "loss": {"type": "PixelReconstructionLoss", "criterion": "L2"}},
    }  # fmt: skip


def randomized(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "pos_embed" not in name:
                value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def imgs():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["pooled", "token", "probe"])
def test_a_classifier_is_read(kind, imgs, tmp_path):
    theirs = randomized(MODELS.build(classifier(kind)))
    meta = {"dataset_meta": {"classes": ["ant", "bee", "cat", "dog", "elk"]}}
    save_checkpoint({"meta": meta, "state_dict": theirs.state_dict()}, str(tmp_path / "theirs.pth"))
    ours = get_model(tmp_path / "theirs.pth")
    with torch.no_grad():
        expected = theirs(imgs, mode="tensor")
    torch.testing.assert_close(ours(imgs), expected, rtol=1e-5, atol=1e-5)
    assert ours.classes == meta["dataset_meta"]["classes"]
    assert bool(ours.settings.get("probe")) == (kind == "probe")


STATISTICS = {"mean": [10, 20, 30], "std": [40, 50, 60]}


@pytest.mark.parametrize("place", ["in the model", "outside", "both"])
@pytest.mark.parametrize(
    "preprocessor",
    [{**STATISTICS, "to_rgb": True}, {**STATISTICS, "to_rgb": False}, STATISTICS, {"to_rgb": True}, {}],
    ids=["rgb", "bgr", "default order", "no statistics", "empty"],
)
def test_predictions_for_an_image_by_every_preprocessor(preprocessor, place, tmp_path):
    """mmpretrain gets an image as OpenCV decodes it, in BGR."""
    config = {"model": classifier("pooled")}
    if place != "outside":
        config["model"]["data_preprocessor"] = preprocessor
    if place != "in the model":
        config["data_preprocessor"] = preprocessor if place == "outside" else {"mean": [1], "std": [2], "to_rgb": True}
    config = Config(config)
    state = randomized(MODELS.build(classifier("pooled"))).state_dict()
    save_checkpoint({"meta": {"cfg": config.pretty_text}, "state_dict": state}, str(tmp_path / "theirs.pth"))
    theirs = mmpretrain.get_model(config, pretrained=str(tmp_path / "theirs.pth")).eval()
    pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(theirs.data_preprocessor({"inputs": pixels.flip(0)[None]})["inputs"], mode="tensor")
    ours = get_model(tmp_path / "theirs.pth")
    torch.testing.assert_close(ours(ours.normalize(pixels[None])), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def answer(theirs, imgs):
    """The mask, the order of patches, the prediction and the loss of their autoencoder."""
    latent, mask, ids_restore = theirs.backbone(imgs, mask=True)
    pred = theirs.neck(latent, ids_restore)
    return {"mask": mask, "ids_restore": ids_restore, "pred": pred, "mae_loss": theirs.head.loss(pred, imgs, mask)}


def their_autoencoder(model):
    theirs = MODELS.build(model)
    theirs.init_weights()
    return randomized(theirs)


@pytest.mark.parametrize("configured", [False, True])
def test_an_autoencoder_is_read(configured, imgs, tmp_path):
    model, meta = autoencoder(), {}
    if configured:
        for part in ("backbone", "neck"):
            model[part]["norm_cfg"] = {"type": "LN", "eps": 0.1}
        model["head"]["norm_pix"] = False
        model["data_preprocessor"] = {"to_rgb": True, **STATISTICS}
        meta = {"cfg": Config({"model": model}).pretty_text}
    theirs = their_autoencoder(model)
    save_checkpoint({"meta": meta, "state_dict": theirs.state_dict()}, str(tmp_path / "theirs.pth"))
    ours, expected = get_model(tmp_path / "theirs.pth"), answer(theirs, imgs)
    loss, pred, _ = ours(imgs, mask=expected["mask"])
    torch.testing.assert_close(pred, expected["pred"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected["mae_loss"], rtol=1e-5, atol=1e-5)
    if configured:
        assert (ours.norm_pix_loss, ours.norm.eps) == (False, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_the_model_of_its_configuration(name, tmp_path):
    """Names and shapes of all tensors, on the meta device."""
    row = model_zoo.TABLE[name]
    size = re.search("base|large|huge", name)[0]
    entry = models_vit.SIZES[row.model.removeprefix("mae_").removeprefix("vit_")]
    side = row.input_size
    options = {"arch": SIZES[size], "img_size": side, "patch_size": entry["patch_size"]}
    with torch.device("meta"):
        if row.model.startswith("mae_"):
            theirs = MODELS.build(autoencoder(**options, width=entry["embed_dim"], decoder=(512, 8, 16)))
        else:
            kind = "probe" if "-linear-" in name else "pooled"
            theirs = MODELS.build(classifier(kind, 1000, entry["embed_dim"], **options))
        ours = get_model(name, device="meta")
    expected = {key: value.shape for key, value in loading.to_ours(dict(theirs.state_dict())).items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected


@pytest.mark.parametrize("kind", ["pooled", "token", "probe", "pooled probe", "encoder", "gray", "autoencoder"])
def test_the_configuration_that_an_export_prints_builds_the_model(kind, tmp_path, caplog):
    caplog.set_level("INFO")
    channels = 1 if kind == "gray" else 3
    settings = {"mean": [0.5, 0.4, 0.3][:channels], "std": [0.1, 0.2, 0.3][:channels], "in_chans": channels,
                "layer_norm_eps": 1e-3}  # fmt: skip
    if kind == "autoencoder":
        base = {**get_model("mae_vit_mini_patch4").settings, **settings, "norm_pix_loss": True}
        ours = randomized(Autoencoder(base))
    else:
        probe = {"probe": "linear"} if "probe" in kind else {}
        base = {**get_model("vit_mini_patch4", nb_classes=0 if kind == "encoder" else 5).settings, **settings, **probe}
        ours = randomized(Classifier({**base, "global_pool": "pooled" in kind or kind == "gray"}))
    export.export(ours, "mmpretrain", tmp_path / "ours.pth")
    text = caplog.messages[-1].partition("model = ")
    (tmp_path / "config.py").write_text("".join(text[1:]))
    theirs = mmpretrain.get_model(str(tmp_path / "config.py"), pretrained=str(tmp_path / "ours.pth")).eval()
    load_checkpoint(theirs, str(tmp_path / "ours.pth"), map_location="cpu", strict=True)
    pixels = torch.randint(256, (channels, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = {"inputs": pixels.flip(0)[None]}  # OpenCV decodes to BGR
    with torch.no_grad():
        batch = theirs.data_preprocessor(data | ({"data_samples": []} if kind == "autoencoder" else {}))["inputs"]
        if kind == "autoencoder":
            wanted = answer(theirs, batch)
            loss, found, _ = ours(ours.normalize(pixels[None]), mask=wanted["mask"])
            torch.testing.assert_close(loss, wanted["mae_loss"], rtol=1e-4, atol=1e-4)
            expected = wanted["pred"]
        elif kind == "encoder":
            expected, found = theirs.extract_feat(batch)[-1], ours.compute_features(ours.normalize(pixels[None]))
        else:
            expected, found = theirs(batch, mode="tensor"), ours(ours.normalize(pixels[None]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def write_fixtures(folder):
    """Writes a tiny autoencoder and classifier as mmengine does, and the answers that test_conversion.py expects."""
    tiny = {"arch": {"embed_dims": 32, "num_layers": 2, "num_heads": 2, "feedforward_channels": 128}, "img_size": 16}
    imgs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mae = their_autoencoder(autoencoder(**tiny, width=32, decoder=(16, 2, 2)))
    pooled = randomized(MODELS.build(classifier("pooled", 7, 32, **tiny)))
    for name, model in (("mae", mae), ("classifier", pooled)):
        save_checkpoint({"meta": {"epoch": 1}, "state_dict": model.state_dict()}, str(folder / f"{name}.pth"))
    with torch.no_grad():
        logits = pooled(imgs, mode="tensor")
    torch.save({"imgs": imgs, "logits": logits, **answer(mae, imgs)}, folder / "answers.pth")


if __name__ == "__main__":
    write_fixtures(Path(__file__).parent / "fixtures" / "mmpretrain")
