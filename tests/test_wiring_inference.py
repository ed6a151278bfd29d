"""Use of trained models: precedence of settings, and the arguments that commands pass."""

import json
import math

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from capture import recorder
from conftest import ROOT
from PIL import Image
from torchvision import transforms as T

from inference import export, features, get_model, imagenet, inference_model, maps, predict, reconstruct
from inference.model import _published_for, _settings, imagenet_classes, open_image
from models_mae import Reconstruction
from util.checkpoints import checkpoint
from util.cli import entry_point
from util.weights import loading

PHOTOS = sorted((ROOT / "demo" / "photos").glob("*.jpg"))


def saved(model, path, **settings):
    torch.save({"model": model.state_dict(), **({"args": settings} if settings else {})}, path)
    return path


def run(module, *argv):
    return module.main(entry_point.parse(module.get_args_parser(), [str(part) for part in argv]))


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return get_model("mae_vit_mini_patch4", input_size=16)


# ------------------------------------------------------------------------------------------------------------ settings


def test_architectures_have_the_published_settings():
    for name, pooled in (("mae_vit_base_patch16", False), ("vit_base_patch16", True), ("vit_mini_patch4", True)):
        settings = _settings(name, {})
        assert settings == {
            "model": name, "input_size": 32 if "mini" in name else 224, "patch_size": None, "in_chans": 3,
            "norm_pix_loss": False, "global_pool": pooled, "nb_classes": 1000, "mask_ratio": 0.75,
        }  # fmt: skip
    other = _settings("vit_base_patch16", {"input_size": 448, "nb_classes": 7, "lr": 3})
    assert (other["input_size"], other["nb_classes"], "lr" in other) == (448, 7, False)


def test_weights_of_an_architecture_are_the_published_ones():
    """With decoder for mae_vit_*, fine-tuned for vit_*."""
    for size in ("base", "large"):
        assert _published_for(f"mae_vit_{size}_patch16") == f"mae_pretrain_vit_{size}_full"
        assert _published_for(f"vit_{size}_patch16") == f"mae_finetuned_vit_{size}"
    assert _published_for("mae_visualize_vit_large") == "mae_visualize_vit_large"


def test_names_of_imagenets_classes():
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert [classes[label] for label in (281, 999)] == [
        "tabby, tabby cat",
        "toilet tissue, toilet paper, bathroom tissue",
    ]
    assert classes[0].startswith("tench")


def test_recorded_settings_take_precedence_over_inferred_ones(mae, tmp_path):
    """Images with 16 patches may have 8 x 32 pixels. Without recorded settings, images are assumed to be square."""
    wide = get_model("mae_vit_mini_patch4", input_size=[8, 32])
    bare = get_model(saved(mae, tmp_path / "bare.pth"))
    assert (bare.settings["input_size"], bare.norm_pix_loss) == (16, True)
    recorded = get_model(saved(wide, tmp_path / "wide.pth", input_size=[8, 32], patch_size=4, norm_pix_loss=False,
                               mask_ratio=0.5, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], in_chans=3))  # fmt: skip
    assert recorded.grid_size == (2, 8)
    assert (recorded.norm_pix_loss, recorded.settings["mask_ratio"]) == (False, 0.5)
    assert recorded.normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert recorded.normalize.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    overridden = get_model(tmp_path / "wide.pth", mean=[0.5, 0.5, 0.5])
    assert overridden.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert not recorded.training


def test_pooling_is_that_of_the_tensors(tmp_path):
    for pooled in (True, False):
        model = get_model("vit_mini_patch4", nb_classes=3, global_pool=pooled, input_size=16)
        loaded = get_model(saved(model, tmp_path / "bare.pth"))
        assert loaded.settings["global_pool"] is pooled
        images = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(loaded(images), model(images))
        torch.testing.assert_close(loaded.extract_feat(images), model.forward_features(images))


def test_names_of_classes_are_those_of_the_head(tmp_path):
    model = get_model("vit_mini_patch4", nb_classes=3, input_size=16)
    file = saved(model, tmp_path / "m.pth", classes=["cat", "dog", "owl"], label_names=["a", "b", "c"])
    assert get_model(file).classes == ["cat", "dog", "owl"]
    assert get_model(file, nb_classes=3).classes == ["cat", "dog", "owl"]
    assert get_model(file, nb_classes=5).classes is None


def test_the_crop_of_an_evaluation_is_the_recorded_one(tmp_path):
    picture = Image.open(PHOTOS[0])
    for crop_pct, scaled in ((None, 32), (1.0, 32), (0.5, 64)):
        model = get_model("vit_mini_patch4", nb_classes=3, crop_pct=crop_pct)
        expected = T.Compose([T.Resize(scaled, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.PILToTensor()])
        assert torch.equal(model.transform(picture), expected(picture))


def test_exif_orientation_of_opened_images_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png", 3).size == (30, 40)
    with Image.open(tmp_path / "a.png") as picture:
        assert open_image(picture, 3).size == (30, 40)


def test_topk_sets_the_number_of_classes():
    model = get_model("vit_mini_patch4", nb_classes=9)
    image = np.zeros((32, 32, 3), np.uint8)
    assert len(inference_model(model, image)["top"]) == 5
    assert len(inference_model(model, image, topk=7)["top"]) == 7
    assert model.predict(image, 2)["pred_scores"].sum() == pytest.approx(1)


def test_a_transformers_folder_records_its_loss(mae, tmp_path):
    for norm_pix_loss in (True, False):
        model = get_model("mae_vit_mini_patch4", input_size=16, norm_pix_loss=norm_pix_loss)
        export.export(model, "transformers", tmp_path / str(norm_pix_loss))
        settings = loading.read(tmp_path / str(norm_pix_loss)).settings
        assert (settings["norm_pix_loss"], settings["input_size"], settings["in_chans"]) == (norm_pix_loss, 16, 3)


# ------------------------------------------------------------------------------------------------------------ commands


def test_each_photograph_has_its_own_prediction(tmp_path):
    torch.manual_seed(0)
    model = get_model("vit_mini_patch4", nb_classes=6)
    with torch.no_grad():
        model.head.weight.normal_()
    predictions = run(predict, *PHOTOS, "--model", saved(model, tmp_path / "m.pth", crop_pct=1.0), "--topk", 3)
    for path, prediction in zip(PHOTOS, predictions, strict=True):
        np.testing.assert_allclose(prediction["pred_scores"], model.predict(path)["pred_scores"], rtol=1e-5)
        assert len(prediction["top"]) == 3
    assert len({float(prediction["pred_scores"][0]) for prediction in predictions}) == len(PHOTOS)


@pytest.mark.parametrize("pool", [None, "cls", "avg", "tokens"])
def test_features_use_the_given_pooling(mae, labelled, tmp_path, pool):
    flags = ["--pool", pool] if pool else []
    file = saved(mae, tmp_path / "m.pth")
    run(features, labelled, "--model", file, "--out", tmp_path / "f.npz", "--split", "val", "--num_workers", 0, *flags)
    contents = np.load(tmp_path / "f.npz")
    names = contents["names"].tolist()
    with torch.no_grad():
        expected = mae.extract_feat(names, pool or "cls").numpy()
    np.testing.assert_allclose(contents["features"], expected, rtol=1e-4, atol=1e-5)
    assert [contents["classes"][label] in name for label, name in zip(contents["labels"], names, strict=True)] == [
        True
    ] * 23


def test_compile_applies_to_features(mae, labelled, tmp_path, monkeypatch):
    calls = recorder(monkeypatch, features, "compile_model", call=False)
    file = saved(mae, tmp_path / "m.pth")
    for flags in ([], ["--compile"]):
        run(features, labelled, "--model", file, "--out", tmp_path / "f.npz", "--num_workers", 0, *flags)
    assert [(type(call["model"]), call["freeze_weights"]) for call in calls] == [(features.Extractor, True)]


def test_the_command_reconstructs_the_given_images(mae, tmp_path, monkeypatch):
    calls, original = [], reconstruct.reconstruct
    monkeypatch.setattr(reconstruct, "reconstruct", lambda model, *args: calls.append(args) or original(model, *args))
    flags = ["--model", saved(mae, tmp_path / "m.pth"), "--out", tmp_path / "o.png"]
    run(reconstruct, PHOTOS[0], *flags)
    run(
        reconstruct, PHOTOS[1], *flags, "--mask_ratio", 0.5, "--seed", 4, "--mask_box", 1, 2, 30, 40, "--short_side", 24
    )
    assert calls == [(str(PHOTOS[0]), 0.75, 0, None, None), (str(PHOTOS[1]), 0.5, 4, [[1, 2, 30, 40]], 24)]


def test_the_mask_depends_on_seed_and_ratio(mae):
    masks = {tuple(reconstruct.reconstruct(mae, PHOTOS[0], 0.25, seed).mask[0].tolist()) for seed in range(6)}
    assert len(masks) == 6
    assert {sum(mask) for mask in masks} == {4}


def test_a_model_that_was_trained_with_blocks_reconstructs_blocks(pretrain, tmp_path):
    """The picture has 4 x 6 patches: 6 blocks, of which one is visible."""
    model = get_model(pretrain("blocks", mask_block=2, mask_ratio=0.5, epochs=1) / "checkpoint-0.pth")
    masks = set()
    for seed in range(8):
        mask = reconstruct.reconstruct(model, Image.new("RGB", (96, 64)), 0.75, seed).mask.view(2, 2, 3, 2)
        blocks = mask.float().mean(dim=(1, 3))
        assert sorted(blocks.flatten().tolist()) == [0, 1, 1, 1, 1, 1]
        masks.add(tuple(blocks.flatten().tolist()))
    assert len(masks) > 2


def test_rectangles_are_left_top_width_height():
    mask = reconstruct.boxes_to_mask([(10, 40, 20, 30)], (100, 200), (50, 100), (50, 100))
    expected = torch.zeros(50, 100)
    expected[20:35, 5:15] = 1
    assert torch.equal(mask, expected)
    scaled = reconstruct.boxes_to_mask([(10, 40, 20, 30)], (100, 200), (100, 100), (100, 100))  # half the width
    expected = torch.zeros(100, 100)
    expected[40:70, 5:15] = 1
    assert torch.equal(scaled, expected)


def test_a_rectangle_masks_every_pixel_that_it_touches():
    """Of an image of 300 x 100 pixels, scaled to 30 x 10; 24 x 8 of them are covered, between margins of 3 and 1."""
    for box, rows, columns in (
        ((130, 50, 1, 1), (4, 5), (10, 11)),
        ((130, 50, 10, 10), (4, 5), (10, 11)),
        ((130, 50, 11, 11), (4, 6), (10, 12)),
        ((129, 49, 2, 2), (3, 5), (9, 11)),
        ((0, 0, 31, 11), (0, 1), (0, 1)),  # ends in the first covered pixel
        ((269, 89, 900, 900), (7, 8), (23, 24)),
    ):
        expected = torch.zeros(8, 24)
        expected[slice(*rows), slice(*columns)] = 1
        assert torch.equal(reconstruct.boxes_to_mask([box], (100, 300), (10, 30), (8, 24)), expected), box
    for box in ((0, 0, 30, 100), (270, 0, 30, 100), (0, 0, 300, 10), (130, 50, 0, 5), (-9, 0, 9, 100), (300, 0, 9, 9)):
        with pytest.raises(ValueError, match="touches no patch: the image has 300 x 100 pixels"):
            reconstruct.boxes_to_mask([box], (100, 300), (10, 30), (8, 24))


def test_a_rectangle_is_where_the_image_shows_it(mae):
    """A white rectangle on black: the mask is that of the patches that are not black, also beside cropped margins."""
    for size, box in (((100, 64), (2, 3, 5, 5)), ((73, 130), (60, 100, 5, 6)), ((64, 103), (20, 50, 9, 30))):
        pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
        left, top, width, height = box
        pixels[top : top + height, left : left + width] = 255
        result = reconstruct.reconstruct(mae, Image.fromarray(pixels), mask_boxes=[box])
        bright = mae.patchify(mae.normalize.inverse(result.original)).amax(dim=2) > 0.5
        assert result.mask[bright].all() and bright.any()
        assert result.mask.sum() <= bright.sum() + 3


def test_psnr_is_of_the_masked_pixels(mae):
    """A quarter of the pixels is masked and has an error of 0.1: 20 dB."""
    original = mae.normalize(torch.full((1, 3, 16, 16), 0.5))
    pasted = original.clone()
    pasted[:, :, :8, :8] = mae.normalize(torch.full((1, 3, 8, 8), 0.6))
    mask = torch.zeros(1, 16)
    mask[0, [0, 1, 4, 5]] = 1
    reconstruction = Reconstruction(*[original] * len(Reconstruction._fields))._replace(
        pasted=pasted, mask=mask, prediction=torch.zeros_like(original)
    )
    assert reconstruct.psnr(mae, reconstruction) == pytest.approx(20.0, abs=1e-3)


def test_uncropped_images_are_scaled_to_the_short_side_of_the_model():
    for patch, width in ((1, 51), (4, 48)):  # 50.67 is rounded
        square = get_model("mae_vit_mini_patch4", input_size=32, patch_size=patch)
        assert reconstruct.uncropped_input(square, Image.new("RGB", (95, 60))).shape == (1, 3, 32, width)
    wide = get_model("mae_vit_mini_patch4", input_size=[16, 32])
    assert reconstruct.uncropped_input(wide, Image.new("RGB", (90, 60))).shape == (1, 3, 16, 24)
    assert reconstruct.uncropped_input(wide, Image.new("RGB", (90, 60)), 20).shape == (1, 3, 20, 28)


def test_models_of_whole_images_reconstruct_them_at_the_input_size():
    model = get_model("mae_vit_mini_patch4", input_size=[16, 32], crop="none")
    assert reconstruct.uncropped_input(model, Image.new("RGB", (60, 90))).shape == (1, 3, 16, 32)
    assert reconstruct.uncropped_input(model, Image.new("RGB", (90, 60)), 20).shape == (1, 3, 20, 28)
    result = reconstruct.reconstruct(model, Image.new("RGB", (60, 90)), mask_boxes=[(30, 0, 30, 90)])
    assert result.mask.reshape(4, 8).tolist() == [[0] * 4 + [1] * 4] * 4


def test_features_of_several_blocks_are_in_order(mae):
    images = torch.randn(2, 3, 16, 32)
    several, last = maps.dense(mae, images, 3), maps.dense(mae, images, 1)
    assert several.shape == (2, 3 * 128, 4, 8)
    torch.testing.assert_close(several[:, -128:], last)
    assert not torch.allclose(several[:, :128], last)
    tokens = mae.get_intermediate_layers(images, n=1)[0][:, 1:]
    torch.testing.assert_close(last[1, :, 2, 5], tokens[1, 2 * 8 + 5])


# ------------------------------------------------------------------------------------------------------------- exports


def test_a_transformers_folder_has_the_models_settings(tmp_path):
    model = get_model(
        "mae_vit_mini_patch4", norm_pix_loss=True, mask_ratio=0.6, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]
    )
    export.export(model, "transformers", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in {
        "mask_ratio": 0.6, "norm_pix_loss": True, "layer_norm_eps": 1e-6, "image_size": 32, "patch_size": 4,
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
        "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 256, "num_channels": 3,
    }.items():  # fmt: skip
        assert config[name] == value, name
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.image_mean == pytest.approx([0.1, 0.2, 0.3])
    assert processor.image_std == pytest.approx([0.4, 0.5, 0.6])
    assert (processor.size["shortest_edge"], int(processor.resample)) == (32, 3)
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (32, 32)


def test_an_encoder_returns_the_class_token(mae):
    encoder = export.encoder_of(mae)
    images = torch.randn(2, 3, 16, 16)
    assert (encoder.settings["model"], encoder.settings["global_pool"]) == ("vit_mini_patch4", False)
    torch.testing.assert_close(encoder(images), mae.forward_features(images)[:, 0])


def test_the_export_command_can_omit_the_decoder(mae, tmp_path):
    file = saved(mae, tmp_path / "m.pth")
    for flags, has_decoder in (([], True), (["--encoder"], False)):
        run(export, "--model", file, "--to", "reference", "--out", tmp_path / "o.pth", *flags)
        names = checkpoint.read(tmp_path / "o.pth")["model"].keys()
        assert ("decoder_pred.weight" in names) is has_decoder
        assert "norm.weight" in names


def test_an_onnx_file_records_pixels_and_classes(tmp_path, monkeypatch):
    model = get_model("vit_mini_patch4", nb_classes=2, classes=["cat", "dog"], input_size=8, mean=[0.5, 0.25, 0.125])
    export.export(model, "onnx", tmp_path / "m.onnx")
    metadata = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["cat", "dog"]
    assert json.loads(metadata["mean"]) == [0.5, 0.25, 0.125]
    assert json.loads(metadata["std"]) == pytest.approx([0.229, 0.224, 0.225])
    assert export.CLOSE == 1e-4


def test_an_onnx_file_with_wrong_outputs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CLOSE", -1.0)
    with pytest.raises(ValueError, match="is not written: its outputs differ from the model's"):
        export.export(get_model("vit_mini_patch4", nb_classes=2, input_size=8), "onnx", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- classifiers of ImageNet


def test_predictions_can_be_restricted_to_classes():
    scores = torch.arange(12.0).view(2, 6)
    assert imagenet.RestrictedClassifier(torch.nn.Identity(), [4, 1])(scores).tolist() == [[4, 1], [10, 7]]


@pytest.mark.parametrize(("crop_pct", "scaled"), [(None, 40), (0.5, 64)])
def test_crops_of_our_classifiers(tmp_path, crop_pct, scaled):
    file = saved(get_model("vit_mini_patch4"), tmp_path / "m.pth", crop_pct=0.8, input_size=32, in_chans=3)
    classifier = imagenet.load(str(file), crop_pct, torch.device("cpu"))
    picture = Image.open(PHOTOS[0])
    expected = T.Compose([T.Resize(scaled, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.PILToTensor()])
    assert torch.equal(classifier.transform(picture), expected(picture))
    assert (classifier.data_config["crop_pct"], classifier.recorded["crop_pct"]) == (crop_pct or 0.8, 0.8)


@pytest.mark.parametrize(("crop_pct", "scaled"), [(None, 40), (0.5, 64)])
def test_crops_and_statistics_of_timms_classifiers(monkeypatch, crop_pct, scaled):
    timm_model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    timm_model.pretrained_cfg |= {
        "input_size": (3, 32, 32), "crop_pct": 0.8, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        "interpolation": "bicubic",
    }  # fmt: skip
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: timm_model)
    classifier = imagenet.load("timm:any", crop_pct, torch.device("cpu"))
    assert classifier.normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert classifier.normalize.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    picture = Image.open(PHOTOS[0])
    expected = T.Compose([T.Resize(scaled, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.PILToTensor()])
    assert torch.equal(torch.as_tensor(np.asarray(classifier.transform(picture))), expected(picture))
    assert classifier.recorded == {}


def test_classes_in_another_order_are_refused(tmp_path):
    names = imagenet_classes()
    imagenet._check_order("m", names)
    imagenet._check_order("m", [name.partition(",")[0].upper() for name in names])
    imagenet._check_order("m", [*names[:90], *["other"] * 100, *names[190:]])
    for classes in (names[::-1], sorted(names), [*names[:899], *["other"] * 101]):
        with pytest.raises(ValueError, match="not trained on the classes of ImageNet-1K, or on another order"):
            imagenet._check_order("m", classes)
    assert math.isclose(imagenet.ALIKE, 0.9)
