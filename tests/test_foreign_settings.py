"""The settings in files of transformers, timm and mmpretrain take effect here, or the file is refused."""

import argparse
import json

import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

import main_finetune
import main_knn
from inference import export, get_model
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4
from util.checkpoints.checkpoint import CheckpointError
from util.cli import entry_point
from util.weights import foreign_settings, loading, reading

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
    with pytest.raises(CheckpointError, match=r"model_type is swin.* vit_mae .*pixio"):
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
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix is True"),
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


BGR = "mean=[10, 20, 30], std=[40, 50, 60]"


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ("data_preprocessor = dict({})", [30, 20, 10], [60, 50, 40]),  # to_rgb is False by default
        ("data_preprocessor = dict({}, to_rgb=False)", [30, 20, 10], [60, 50, 40]),
        ("model = dict(data_preprocessor=dict({}, to_rgb=False))", [30, 20, 10], [60, 50, 40]),
        ("data_preprocessor = dict(to_rgb=True)\nmodel = dict(data_preprocessor=dict({}))", [30, 20, 10], [60, 50, 40]),
        ("model = dict(type='ImageClassifier')", [0, 0, 0], [1, 1, 1]),  # not normalized
    ],
)
@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_a_model_of_mmpretrain_for_bgr_images(kind, preprocessor, mean, std, imgs, tmp_path):
    """The same outputs for RGB images here as for BGR images there."""
    is_classifier = kind == "classifier"
    theirs = vit_mini_patch4(img_size=16, num_classes=2) if is_classifier else mae_vit_mini_patch4(img_size=16)
    state = {"meta": {"cfg": preprocessor.format(BGR)}, "state_dict": theirs.state_dict()}
    torch.save(state, tmp_path / "m.pth")
    ours = get_model(tmp_path / "m.pth")
    assert ours.settings["mean"] == pytest.approx([value / 255 for value in mean])
    assert ours.settings["std"] == pytest.approx([value / 255 for value in std])
    if is_classifier:
        torch.testing.assert_close(ours(imgs), theirs.eval()(imgs.flip(1)), rtol=1e-5, atol=1e-5)
        return
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    found, expected = ours(imgs, noise=noise)[1], theirs.eval()(imgs.flip(1), noise=noise)[1]
    torch.testing.assert_close(ours.unpatchify(found), theirs.unpatchify(expected).flip(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("preprocessor", "mean"),
    [
        ("model = dict(data_preprocessor=dict({}, to_rgb=True))", [10, 20, 30]),
        ("data_preprocessor = dict({}, bgr_to_rgb=True)", [10, 20, 30]),  # mmselfsup
        ("data_preprocessor = {{'mean': [5], 'std': [1], 'to_rgb': True}}", [5, 5, 5]),
    ],
)
def test_a_model_of_mmpretrain_for_rgb_images(preprocessor, mean, tmp_path):
    theirs = vit_mini_patch4(img_size=16, num_classes=2)
    torch.save({"meta": {"cfg": preprocessor.format(BGR)}, "state_dict": theirs.state_dict()}, tmp_path / "m.pth")
    file = loading.read(tmp_path / "m.pth")
    assert file.settings["mean"] == pytest.approx([value / 255 for value in mean])
    assert torch.equal(file.tensors["patch_embed.proj.weight"], theirs.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("data_preprocessor = dict(to_rgb=RGB)", "to_rgb of its data_preprocessor"),
        ("data_preprocessor = dict(mean=numpy.zeros(3), std=[1])", "mean of its data_preprocessor"),
        ("data_preprocessor = Preprocessor()", "data_preprocessor is not"),
        ("data_preprocessor = dict(**base)", "data_preprocessor is not"),
        ("model = {**base}", "model of its configuration is not"),
        ("data_preprocessor = dict(", "its configuration can't be read"),
        ("model = " + 100_000 * "-" + "1", "its configuration can't be read"),
        ("model = dict()" + 1_000_000 * " ", "its configuration has 1000014 characters"),
        ("model = dict(backbone=dict(arch=dict(num_heads=8)), data_preprocessor=dict(to_rgb=True))", "num_heads 8"),
        ("model = dict(backbone=dict(layer_cfgs=dict(act_cfg=dict(type='QuickGELU'))))", "QuickGELU"),
        ("model = dict(type='MAE', neck=dict(norm_cfg=dict(type='LN')))", "1e-05 in its neck"),
    ],
)
def test_a_configuration_of_mmpretrain_that_is_refused(config, message, tmp_path):
    state = {"meta": {"cfg": config}, "state_dict": vit_mini_patch4(img_size=16, num_classes=2).state_dict()}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        get_model(tmp_path / "m.pth")
    assert "m.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_a_file_in_a_folder_of_transformers_is_read_as_the_folder(max_shard_size, imgs, tmp_path, caplog):
    theirs = saved(tmp_path, ViTConfig(**MINI, **NAMES, layer_norm_eps=0.1), max_shard_size=max_shard_size)
    size = {"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    ViTImageProcessor(**size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    ours = get_model(next(tmp_path.glob("model*.safetensors")))
    assert (ours.settings["mean"], ours.classes) == ([0.5] * 3, ["ant", "bee"])
    torch.testing.assert_close(ours(imgs), theirs(imgs).logits, rtol=1e-5, atol=1e-5)
    assert not caplog.records


def test_pytorch_model_bin_in_a_folder_of_transformers(imgs, tmp_path):
    """The file that the user gives, not the one that the folder stands for."""
    theirs = saved(tmp_path, ViTConfig(**MINI, **NAMES, layer_norm_eps=0.1))
    state = {name: 2 * value if name == "classifier.weight" else value for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    theirs.load_state_dict(state)
    found = get_model(tmp_path / "pytorch_model.bin")(imgs)
    torch.testing.assert_close(found, theirs(imgs).logits, rtol=1e-5, atol=1e-5)


def test_a_file_in_a_folder_that_is_refused(tmp_path):
    transformers.ViTMSNForImageClassification(transformers.ViTMSNConfig(**MINI, **NAMES)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type is vit_msn"):
        loading.read(tmp_path / "model.safetensors")


def test_a_file_with_settings_does_not_need_those_beside_it(of_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    export.export(of_folder, "safetensors", tmp_path / "ours.safetensors")
    assert get_model(tmp_path / "ours.safetensors").settings["mean"] == [0.1, 0.2, 0.3]


@pytest.fixture
def of_folder():
    return get_model("vit_mini_patch4", nb_classes=2, mean=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("layout", ["bare.pth", "bare.safetensors", "state_dict.pth", "model.pth", "args.pth"])
def test_one_notice_of_what_a_file_without_settings_does_not_show(layout, tmp_path, caplog):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=16, patch_size=4, embed_dim=128, depth=4,
                              num_heads=4).state_dict()  # fmt: skip
    file = tmp_path / layout
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    elif layout == "args.pth":
        torch.save({"state_dict": state, "args": {"mean": [0.5] * 3}}, file)
    else:
        torch.save(state if file.stem == "bare" else {file.stem: state}, file)
    for _ in range(2):
        loading.read(file)
    notices = [record.message for record in caplog.records]
    assert len(notices) == (layout not in ("model.pth", "args.pth"))
    for assumed in ("heads", "GELU", "fc_norm", "class token", "RGB", "mean"):
        assert all(assumed in notice for notice in notices)


@pytest.mark.parametrize(
    "run",
    [
        {"gp": "avgmax"},
        {"gp": None, "model_kwargs": {"act_layer": "quick_gelu"}},
        {"model_kwargs": {"num_heads": 8}},
    ],
)
def test_a_checkpoint_of_timms_training_that_is_refused(run, tmp_path):
    state = vit_mini_patch4(img_size=16, num_classes=2).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(model="vit_mini", **run)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"avgmax|quick_gelu|num_heads 8"):
        get_model(tmp_path / "m.pth")


@pytest.mark.parametrize("form", ["folder", "file", "bare"])
def test_models_of_clip_are_named(form, tmp_path):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    theirs = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=2, **shape)
    timm.models.save_for_hf(theirs, tmp_path, model_args=shape, safe_serialization=True)
    if form == "bare":
        (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="CLIP") as caught:
        get_model(tmp_path if form == "folder" else tmp_path / "model.safetensors")
    assert "norm_pre" in str(caught.value)


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
    with pytest.raises(CheckpointError, match=r"layers\.0"):
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
    settings = foreign_settings.read_folder(tmp_path)
    assert (settings["num_heads"], settings["crop"]) == (4, "none")
    assert "interpolation bilinear" in caplog.text


def test_statistics_of_mmpretrain_reach_an_evaluation(caplog):
    file = loading.Weights(
        vit_mini_patch4(img_size=16).state_dict(), {"mean": [0.5] * 3, "std": [0.2] * 3}, "", "m.pth"
    )
    assert reading.statistics(file, 3, None, None) == ([0.5] * 3, [0.2] * 3)
    assert reading.statistics(file, 1, None, None) == (None, None)
    assert reading.statistics(file._replace(settings={}), 3, None, [0.1] * 3) == (None, [0.1] * 3)
    assert not caplog.text  # the statistics of a file that records none are not known
