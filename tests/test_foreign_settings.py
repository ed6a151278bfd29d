"""The settings in files of transformers, timm and mmpretrain take effect here, or the file is refused."""

import json

import pytest
import timm
import torch
import transformers
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

import main_finetune
import main_knn
from inference import get_model
from models_vit import vit_mini_patch4
from util.checkpoints.checkpoint import CheckpointError
from util.cli import entry_point
from util.weights import foreign_settings, loading

MINI = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
        "image_size": 16, "patch_size": 4}  # fmt: skip
DECODER = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
           "decoder_intermediate_size": 256}  # fmt: skip
NAMES = {"id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}}


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def saved(folder, config, **save):
    torch.manual_seed(1)
    kind = ViTMAEForPreTraining if isinstance(config, ViTMAEConfig) else ViTForImageClassification
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, **save)
    return model


@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_eps_of_layer_norm_takes_effect(eps, imgs, tmp_path):
    theirs = saved(tmp_path, ViTConfig(**MINI, **NAMES, layer_norm_eps=eps))
    ours = get_model(tmp_path)
    assert ours.norm.eps == eps
    torch.testing.assert_close(ours(imgs), theirs(imgs).logits, rtol=1e-5, atol=1e-5)


def test_mask_ratio_and_loss_of_an_autoencoder(imgs, tmp_path):
    saved(tmp_path, ViTMAEConfig(**MINI, **DECODER, mask_ratio=0.5, norm_pix_loss=False))
    ours = get_model(tmp_path)
    assert (ours.settings["mask_ratio"], ours.norm_pix_loss, ours.norm.eps) == (0.5, False, 1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ViTConfig(**{**MINI, "num_attention_heads": 8}), "has num_heads 8, and the model has 4"),
        (
            ViTMAEConfig(**MINI, **{**DECODER, "decoder_num_attention_heads": 4}),
            "has decoder_num_heads 4, and the model has 2",
        ),
        (ViTConfig(**MINI, hidden_act="relu"), "hidden_act is relu, and only gelu is supported"),
    ],
)
def test_what_our_models_do_not_compute_is_refused(config, message, tmp_path):
    saved(tmp_path, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        get_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_type_of_model_is_refused(tmp_path):
    transformers.SwinModel(
        transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type is swin, and only vit, vit_mae and pixio are supported"):
        loading.read(tmp_path)


def test_the_image_processor_takes_effect(imgs, tmp_path, caplog):
    """mean and std .5, as google's ViT have them; a crop of its own."""
    saved(tmp_path, ViTConfig(**MINI, **NAMES))
    size = {"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    ViTImageProcessor(**size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    ours = get_model(tmp_path)
    assert (ours.settings["mean"], ours.settings["std"], ours.classes) == ([0.5] * 3, [0.5] * 3, ["ant", "bee"])
    image = Image.effect_noise((39, 31), 80).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.prepare(image), theirs, rtol=0, atol=1e-6)
    assert not caplog.records


def test_a_processor_that_squeezes_is_warned_of(tmp_path, caplog):
    saved(tmp_path, ViTConfig(**MINI))
    ViTImageProcessor(size={"height": 16, "width": 16}, resample=2).save_pretrained(tmp_path)
    ours = get_model(tmp_path)
    assert ours.settings["crop_pct"] == 1.0
    (record,) = caplog.records
    assert "scales images to a square (this library crops the center) and has resample 2" in record.message


@pytest.mark.parametrize("sides", [(16, 32), (32, 16)])
def test_a_processor_with_a_crop_that_is_no_square_is_warned_of(sides, tmp_path, caplog):
    """Pictures of the aspect ratio of the crop have equal pixels."""
    saved(tmp_path, ViTConfig(**{**MINI, "image_size": sides}))
    crop = dict(zip(("height", "width"), sides, strict=True))
    ViTImageProcessor(size={"shortest_edge": 20}, do_center_crop=True, crop_size=crop, resample=3).save_pretrained(
        tmp_path
    )
    ours = get_model(tmp_path)
    assert f"crops {sides[0]} x {sides[1]} pixels of an image whose short side is 20 (this library" in caplog.text
    image = Image.effect_noise((3 * sides[1], 3 * sides[0]), 80).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.prepare(image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop", [16, 32, 96, 224, 384])
def test_the_crop_share_gives_back_every_edge(crop):
    for edge in range(crop, 2 * crop):
        assert int(crop / foreign_settings.crop_share(crop, edge)) == edge
    assert foreign_settings.crop_share(224, 256) == 0.875


def test_a_split_folder_with_a_pooler(imgs, tmp_path):
    torch.manual_seed(1)
    theirs = transformers.ViTModel(ViTConfig(**MINI), add_pooling_layer=True).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    expected = theirs(imgs).last_hidden_state
    torch.testing.assert_close(get_model(tmp_path).extract_feat(imgs, "tokens"), expected, rtol=1e-5, atol=1e-5)


def test_a_folder_of_timm(imgs, tmp_path):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=2, **shape).eval()
    config = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "crop_pct": 0.9,
        "input_size": [3, 16, 16],
        "label_names": ["a", "b"],
    }
    timm.models.save_for_hf(theirs, tmp_path, {"pretrained_cfg": config}, safe_serialization=True)
    written = json.loads((tmp_path / "config.json").read_text())
    written["pretrained_cfg"] |= config
    (tmp_path / "config.json").write_text(json.dumps(written))
    ours = get_model(tmp_path)
    torch.testing.assert_close(ours(imgs), theirs(imgs), rtol=1e-5, atol=1e-5)
    expected = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "input_size": 16, "label_names": ["a", "b"]}
    assert ours.settings.items() >= expected.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "avgmax"}, "global_pool is 'avgmax', and only token and avg are supported"),
        ({"global_pool": "max"}, "global_pool is 'max', and only token and avg are supported"),
        ({"global_pool": "avg", "fc_norm": False}, "fc_norm is False with global_pool avg, and only its default is"),
        ({"fc_norm": True}, "fc_norm is True with global_pool token, and only its default is supported"),
        ({"act_layer": "quick_gelu"}, "act_layer is quick_gelu, and only gelu is supported"),
        ({"global_pool": "avg", "fc_norm": True, "act_layer": "gelu"}, None),
        ({"global_pool": "token"}, None),
    ],
)
def test_arguments_of_timm_that_our_models_do_not_have(arguments, message, imgs, tmp_path):
    arguments = {**arguments, "img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments).eval()
    names = {"label_names": {"0": "ant", "1": "bee"}}
    timm.models.save_for_hf(theirs, tmp_path, names, model_args=arguments, safe_serialization=True)
    if message:
        with pytest.raises(CheckpointError, match=message):
            get_model(tmp_path)
        return
    ours = get_model(tmp_path)
    assert ours.classes == ["ant", "bee"]
    torch.testing.assert_close(ours(imgs), theirs(imgs), rtol=1e-5, atol=1e-5)


def test_images_of_mmpretrain_in_bgr_are_refused(tmp_path):
    cfg = "data_preprocessor = dict(\n    mean=[1, 2, 3],\n    std=[1, 1, 1],\n    to_rgb=False)\n"
    state = {"meta": {"cfg": cfg}, "state_dict": vit_mini_patch4(img_size=16).state_dict()}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m\.pth: data_preprocessor has to_rgb=False, .* images here are RGB"):
        loading.read(tmp_path / "m.pth")


def test_statistics_and_classes_of_mmpretrain(tmp_path):
    cfg = """data_preprocessor = dict(
    mean=[
        127.5,
        51,
        0.0,
    ],
    num_classes=2,
    std=[51, 51, 25.5],
    to_rgb=True)
model = dict(mean=[1])
"""
    model = vit_mini_patch4(img_size=16, num_classes=2, global_pool=True)
    state = {"meta": {"cfg": cfg, "dataset_meta": {"classes": ("ant", "bee")}}, "state_dict": model.state_dict()}
    torch.save(state, tmp_path / "m.pth")
    settings = loading.read(tmp_path / "m.pth").settings
    assert settings["label_names"] == ["ant", "bee"]
    assert settings["mean"] == pytest.approx([0.5, 0.2, 0])
    assert settings["std"] == pytest.approx([0.2, 0.2, 0.1])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("reg_token", r"has register tokens \(reg_token\), which this library does not"),
        ("dist_token", r"has a distillation token"),
    ],
)
def test_other_tokens_are_named(extra, message, tmp_path):
    state = {**vit_mini_patch4(img_size=16).state_dict(), extra: torch.zeros(1, 1, 128)}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        loading.read(tmp_path / "m.pth")


def test_a_swin_file_is_no_vision_transformer(tmp_path):
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=2
    )
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    with pytest.raises(CheckpointError, match=r"contains no weights of a Vision Transformer: .*layers\.0"):
        loading.read(tmp_path / "swin.pth")


def test_timms_models_without_a_position_of_the_class_token(imgs, tmp_path):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=2, no_embed_class=True, **shape).eval()
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    torch.testing.assert_close(get_model(tmp_path / "m.pth")(imgs), theirs(imgs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, [0.5] * 3, [0.2] * 3),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, [0.5] * 3, [0.25] * 3),
    ],
)
def test_the_pixels_of_other_processors(config, mean, std, tmp_path):
    saved(tmp_path, ViTConfig(**MINI, **NAMES))
    size = {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    ViTImageProcessor(**size, resample=3, **config).save_pretrained(tmp_path)
    ours = get_model(tmp_path)
    assert (ours.settings["mean"], ours.settings["std"]) == (pytest.approx(mean), pytest.approx(std))
    image = Image.effect_noise((20, 16), 80).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.prepare(image), theirs.float(), rtol=1e-5, atol=1e-5)


def test_a_foreign_eps_reaches_the_scripts(labelled, tmp_path, monkeypatch):
    names = [f"kind{number}" for number in range(6)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    saved(tmp_path, ViTConfig(**MINI, **labels, layer_norm_eps=0.1))
    models = []
    for name in ("load_classifier", "load_encoder"):
        original = getattr(loading, name)
        monkeypatch.setattr(loading, name, lambda model, *a, f=original, **k: models.append(model) or f(model, *a, **k))
    flags = ["--data_path", str(labelled), "--num_workers", "0", "--device", "cpu"]
    for script, more in (
        (main_finetune, ["--eval", "--resume", str(tmp_path)]),
        (main_knn, ["--finetune", str(tmp_path), "--k", "1"]),
    ):
        script.main(entry_point.parse(script.get_args_parser(), flags + more))
    assert [model.blocks[0].norm1.eps for model in models] == [0.1, 0.1]


def test_a_timm_model_of_another_interpolation_is_warned_of(tmp_path, caplog):
    config = {"pretrained_cfg": {"input_size": [3, 16, 16], "interpolation": "bilinear", "crop_mode": "squash"},
              "model_args": {"num_heads": 4}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert foreign_settings.read_folder(tmp_path)["num_heads"] == 4
    assert "was evaluated with interpolation bilinear and crop_mode squash" in caplog.text


def test_statistics_of_mmpretrain_reach_an_evaluation(caplog):
    file = loading.Weights(
        vit_mini_patch4(img_size=16).state_dict(), {"mean": [0.5] * 3, "std": [0.2] * 3}, "", "m.pth"
    )
    assert loading.statistics(file, 3, None, None) == ([0.5] * 3, [0.2] * 3)
    assert loading.statistics(file, 1, None, None) == (None, None)
    assert loading.statistics(file._replace(settings={}), 3, None, [0.1] * 3) == (None, [0.1] * 3)
    assert not caplog.text  # the statistics of a file that records none are not known
