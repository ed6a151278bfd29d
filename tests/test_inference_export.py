"""Export and import: the model of the other library gives the same outputs with exported weights."""

import json
import re
import sys

import forks
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from conftest import ROOT
from mains import parse, randomized
from PIL import Image

import hubconf
import models_vit
from mae.checkpoints import checkpoint
from mae.inference import export, get_model, graphs
from mae.inference.model import ARCHITECTURES, Autoencoder, Classifier
from mae.probes import probe_head

FORMATS = ["reference", "safetensors", "timm", "transformers"]
SIZES = {"embed_dim": 128, "depth": 4, "num_heads": 4, "img_size": 32, "patch_size": 4}


@pytest.fixture
def _two_blocks(monkeypatch):
    """Graphs of fewer blocks are written in less time."""
    monkeypatch.setitem(models_vit.SIZES, "mini_patch4", models_vit.SIZES["mini_patch4"] | {"depth": 2})


@pytest.fixture
def mae():
    return randomized(get_model("mae_vit_mini_patch4", norm_pix_loss=True), 0.1)


@pytest.fixture
def pooled():
    return randomized(get_model("vit_mini_patch4", nb_classes=7), 0.1)


@pytest.fixture
def of_token():
    return randomized(get_model("vit_mini_patch4", nb_classes=3, global_pool=False, classes=["cat", "dog", "owl"]), 0.1)


def exported(model, to, folder):
    out = folder / {"reference": "m.pth", "timm": "m.pth", "safetensors": "m.safetensors",
                    "transformers": "folder", "onnx": "m.onnx", "torch_export": "m.pt2"}[to]  # fmt: skip
    export.export(model, to, out)
    return out


@pytest.fixture
def imgs():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("to", ["reference", "safetensors", "transformers"])
def test_an_exported_autoencoder_loads_again(mae, to, imgs, tmp_path):
    again = get_model(exported(mae, to, tmp_path))
    assert isinstance(again, Autoencoder)
    assert again.state_dict().keys() == mae.state_dict().keys()
    noise = torch.rand(3, 64)
    for ours, theirs in zip(mae(imgs, noise=noise), again(imgs, noise=noise), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_probes_head_becomes_one_layer(imgs, tmp_path):
    probe = Classifier({**get_model("vit_mini_patch4", nb_classes=5, global_pool=False).settings, "probe": True})
    probe.head[0].running_mean.normal_()
    probe.head[0].running_var.uniform_(0.5, 2)
    for to in FORMATS:
        again = get_model(exported(probe, to, tmp_path))
        torch.testing.assert_close(again(imgs), probe(imgs), rtol=1e-4, atol=1e-5)
        is_probe = again.state_dict().keys() == probe.state_dict().keys()
        assert is_probe == (to not in ("timm", "transformers"))  # which have no such head
    assert isinstance(probe.head, type(probe_head(2, 2)))


def test_an_attentive_probe_is_exported_where_the_format_has_one(imgs, tmp_path):
    settings = get_model("vit_mini_patch4", nb_classes=5, global_pool=False).settings
    probe = Classifier({**settings, "probe": "attentive", "num_queries": 8})
    probe.head.pool.queries.data.mul_(50)
    probe.head[1].running_mean.normal_()
    torch.save(probe.state_dict(), tmp_path / "bare.pth")  # its tensors determine the kind of the probe
    torch.testing.assert_close(get_model(tmp_path / "bare.pth", global_pool=False)(imgs), probe(imgs))
    for to in ("reference", "safetensors"):
        again = get_model(exported(probe, to, tmp_path))
        assert (again.settings["probe"], again.settings["num_queries"]) == ("attentive", 8)
        torch.testing.assert_close(again(imgs), probe(imgs))
    program = torch.export.load(exported(probe, "torch_export", tmp_path))
    torch.testing.assert_close(program.module()(imgs), probe(probe.normalize(imgs)), rtol=1e-4, atol=1e-4)
    for to in ("timm", "transformers"):
        with pytest.raises(ValueError, match=f"to={to}: .*attentive"):
            exported(probe, to, tmp_path)
        encoder = get_model(exported(export.encoder_of(probe), to, tmp_path))
        torch.testing.assert_close(encoder(imgs), probe.extract_feat(imgs, "cls"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_transformers_autoencoder(norm_pix_loss, in_chans, imgs, tmp_path):
    settings = {"norm_pix_loss": norm_pix_loss, "in_chans": in_chans, "mask_ratio": 0.6}
    mae = randomized(get_model("mae_vit_mini_patch4", **settings), 0.1)
    theirs, output = transformers.ViTMAEForPreTraining.from_pretrained(
        exported(mae, "transformers", tmp_path), output_loading_info=True
    )
    assert not output["missing_keys"] and not output["unexpected_keys"]
    assert theirs.config.mask_ratio == 0.6
    imgs, noise = imgs[:, :in_chans], torch.rand(3, 64)
    loss, pred, mask = mae(imgs, 0.6, noise=noise)
    with torch.no_grad():
        found = theirs.eval()(imgs, noise=noise)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close((found.loss, found.logits), (loss, pred), rtol=1e-5, atol=1e-5)


def test_all_patches_by_the_code_that_the_export_to_transformers_prints(mae, imgs, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    exported(mae, "transformers", tmp_path)
    call = re.search(r"(AutoModel\.from_pretrained\(.*?\)).*(noise=.*)$", caplog.text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names = {"AutoModel": transformers.AutoModel, "images": imgs, "torch": torch}
    with torch.no_grad():
        found = eval(f"{call[1]}.eval()(images, {call[2]}).last_hidden_state", names)
    torch.testing.assert_close(found, mae.extract_feat(imgs, "tokens"), rtol=1e-5, atol=1e-5)


def test_transformers_encoder_in_its_pipeline(mae, tmp_path):
    folder = exported(export.encoder_of(mae), "transformers", tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = transformers.pipeline("image-feature-extraction", str(folder), image_processor=processor, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = torch.tensor(theirs(Image.fromarray(pixels)))
    torch.testing.assert_close(found, mae.extract_feat(Image.fromarray(pixels), "tokens"), rtol=1e-5, atol=1e-4)


def test_an_export_to_transformers_keeps_the_scaling_of_whole_pictures(tmp_path):
    """Spectrograms have no center. The read model scales pictures to its input, as the original does."""
    model = get_model("vit_mini_patch4", nb_classes=3, input_size=16, global_pool=False)
    model = randomized(type(model)({**model.settings, "crop": "none", "crop_pct": 1.0}), 0.1)
    picture = Image.effect_noise((60, 50), 80).convert("RGB")
    read = get_model(exported(model, "transformers", tmp_path))
    np.testing.assert_allclose(read.predict(picture)["pred_scores"], model.predict(picture)["pred_scores"], atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", None])
def test_exports_have_the_interpolation_of_the_model(mode, tmp_path):
    """A file of timm's train.py may have another one."""
    model = get_model("vit_mini_patch4", nb_classes=3, global_pool=False)
    model = type(model)({**model.settings, "interpolation": mode})
    processor = json.loads((exported(model, "transformers", tmp_path) / "preprocessor_config.json").read_text())
    assert processor["resample"] == (2 if mode else 3)
    export.export(model, "timm", tmp_path / "folder_of_timm")
    config = json.loads((tmp_path / "folder_of_timm/config.json").read_text())
    assert config["pretrained_cfg"]["interpolation"] == (mode or "bicubic")


@pytest.mark.parametrize(("input_size", "edge"), [(24, 27), (28, 32), (32, 36), (40, 45), (56, 64), (48, 54), (20, 22)])
def test_the_export_to_transformers_names_a_shifted_crop(input_size, edge, tmp_path, caplog):
    caplog.set_level("INFO")
    model = get_model("vit_mini_patch4", nb_classes=3, global_pool=False, input_size=input_size, crop_pct=0.875)
    folder = exported(model, "transformers", tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    def is_shifted(*size):
        image = Image.effect_noise(size, 80).convert("RGB")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        return not torch.allclose(pixels, model.prepare(image), atol=1e-6)

    assert f"transformers scales images to {edge} pixels, and its center crop of {input_size}" in caplog.text
    assert is_shifted(80, 80) == (input_size == 24) == ("3, 7, 11" not in caplog.text)
    assert is_shifted(edge, input_size + 19)


def test_models_without_an_equivalent_in_transformers_are_errors(pooled, tmp_path):
    with pytest.raises(ValueError, match="class token"):
        export.export(pooled, "transformers", tmp_path / "folder")
    for name in ("mae_vit_mini_patch4", "vit_mini_patch4"):
        wide = get_model(name, input_size=[32, 64], global_pool=False, nb_classes=3)
        with pytest.raises(ValueError, match="32 x 64"):
            export.export(wide, "transformers", tmp_path / "folder")


def test_transformers_reads_a_classifier_that_pools_patches_from_a_folder_of_timm(imgs, tmp_path):
    """The error of the export to transformers names this way."""
    model = randomized(get_model("vit_mini_patch4", nb_classes=3, classes=["cat", "dog", "owl"], mean=[0.4] * 3), 0.1)
    with pytest.raises(ValueError, match=r"to=timm.*AutoModelForImageClassification"):
        export.export(model, "transformers", tmp_path / "folder")
    export.export(model, "timm", tmp_path / "folder")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    torch.testing.assert_close(theirs(imgs).logits, model(imgs), rtol=1e-5, atol=1e-5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pipeline = transformers.pipeline("image-classification", str(tmp_path / "folder"), device="cpu")
    found = {entry["label"]: entry["score"] for entry in pipeline(image)}
    assert found == pytest.approx(dict(model.predict(image)["top"]), abs=1e-5)


def test_the_encoder_of_a_classifier_that_pools_patches(pooled, imgs, tmp_path):
    """It has no norm of single tokens. Its features are the pooled ones."""
    expected = pooled.extract_feat(imgs)
    for to in ("safetensors", "timm"):
        encoder = get_model(exported(export.encoder_of(pooled), to, tmp_path))
        torch.testing.assert_close(encoder.extract_feat(imgs), expected, rtol=1e-5, atol=1e-5)
    export.export(export.encoder_of(pooled), "timm", tmp_path / "encoder")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    torch.testing.assert_close(theirs(imgs).pooler_output, expected, rtol=1e-5, atol=1e-5)


def test_settings_that_transformers_does_not_have_survive_the_round_trip(tmp_path, caplog):
    """Images of another size interpolate learned positions; fixed positions are computed anew."""
    caplog.set_level("INFO")
    own = {"mask_block": 2, "value_range": [0, 4095], "nodata": 7, "exif": True}
    mae = get_model("mae_vit_mini_patch4", learned_pos_embed=True, **own)
    torch.nn.init.normal_(mae.pos_embed)
    torch.nn.init.normal_(mae.decoder_pos_embed)
    folder = exported(mae, "transformers", tmp_path)
    assert "transformers masks single patches, and this model has mask_block 2" in caplog.text
    assert "transformers does not apply value_range=[0, 4095] nodata=7" in caplog.text
    exported(mae, "reference", tmp_path)
    assert "the published code does not apply value_range=[0, 4095] nodata=7" in caplog.text
    again = get_model(folder)
    assert {name: again.settings[name] for name in own} == own
    imgs, noise = torch.randn(2, 3, 40, 40), torch.rand(2, 100)
    with torch.no_grad():
        for ours, theirs in zip(mae(imgs, noise=noise), again(imgs, noise=noise), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
        imgs, noise = imgs[..., :32, :32], noise[:, :64]
        torch.testing.assert_close(theirs(imgs, noise=noise).logits, mae(imgs, noise=noise)[1], rtol=1e-5, atol=1e-5)


def test_settings_of_a_folder_do_not_describe_what_transformers_trained(mae, tmp_path):
    """A classifier of transformers that starts from an exported encoder has its own head."""
    folder = exported(export.encoder_of(mae), "transformers", tmp_path)
    theirs = transformers.ViTForImageClassification.from_pretrained(folder, num_labels=5)
    theirs.save_pretrained(tmp_path / "trained")
    imgs = torch.randn(2, 3, 32, 32)
    ours = get_model(tmp_path / "trained")
    torch.testing.assert_close(ours(imgs), theirs.eval()(imgs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("pools", [True, False])
def test_the_call_of_timm_that_an_export_prints(suffix, pools, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    statistics = {"mean": [0.5, 0.4], "std": [0.1, 0.2], "in_chans": 2}
    ours = randomized(get_model("vit_mini_patch4", nb_classes=7, global_pool=pools, input_size=[16, 32], **statistics),
                      0.1)  # fmt: skip
    export.export(ours, "timm", tmp_path / f"m{suffix}")
    call = re.search(r"timm\.create_model\(.*\)", caplog.messages[-1])
    monkeypatch.chdir(tmp_path)
    theirs = eval(call[0]).eval()
    config = timm.data.resolve_model_data_config(theirs)
    assert (list(config["input_size"]), list(config["mean"]), config["crop_pct"]) == ([2, 16, 32], [0.5, 0.4], 1.0)
    images = torch.randn(2, 2, 16, 32)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)


def test_a_gray_classifier_by_the_code_that_its_export_prints(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    ours = randomized(get_model("vit_mini_patch4", nb_classes=3, global_pool=False, in_chans=1), 0.1)
    exported(ours, "transformers", tmp_path)
    (line,) = (message for message in caplog.messages if "pipeline" in message)
    monkeypatch.chdir(tmp_path)
    image = Image.effect_noise((39, 31), 80)
    *statements, expression = line[line.index("processor = ") :].split("; ")
    names = {"transformers": transformers, "image": image}
    exec("\n".join(statements), names)
    torch.testing.assert_close(eval(expression, names), ours(ours.prepare(image)), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_two_blocks")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pooled", "mae"])
def test_graphs_take_pixels(kind, tmp_path, request, caplog):
    caplog.set_level("INFO")
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, extra = request.getfixturevalue(kind), {"settings": ""}
    session = onnxruntime.InferenceSession(exported(model, "onnx", tmp_path))
    assert not [record for record in caplog.records if record.name.startswith("onnx")]
    graph = torch.export.load(exported(model, "torch_export", tmp_path), extra_files=extra).module()
    for batch in (pixels, pixels[:1]):
        noise = {"noise": torch.rand(len(batch), 64)} if kind == "mae" else {}
        inputs = {"images": batch, **noise}
        normalized = (batch - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / (
            torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        )
        outputs = [part.detach() for part in (model(normalized, **noise)[1:] if noise else [model(normalized)])]
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(list(map(torch.from_numpy, found)), outputs, rtol=1e-5, atol=1e-5)
        found = graph(*inputs.values())
        torch.testing.assert_close([found] if kind == "pooled" else [*found], outputs, rtol=1e-5, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["mean"]), json.loads(metadata["crop_pct"])) == ([0.485, 0.456, 0.406], 1.0)
    assert json.loads(extra["settings"])["std"] == [0.229, 0.224, 0.225]
    for text in (json.loads(metadata["images"]), json.loads(extra["settings"])["images"], caplog.text):
        assert "(B, 3, 32, 32), RGB, pixels of 0 to 1" in text


@pytest.mark.usefixtures("_two_blocks")
def test_a_graph_of_float_data_takes_its_units(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = {"in_chans": 2, "mean": [4000, -3], "std": [200, 0.01], "input_size": 16, "nodata": "nan"}
    model = randomized(get_model("vit_mini_patch4", nb_classes=3, classes=["a", "b", "c"], **settings), 0.1)
    values = np.random.default_rng(0).normal(settings["mean"], settings["std"], (16, 16, 2)).astype(np.float32)
    values[3, 5] = np.nan
    values[8:, :, 1] = np.nan  # a pixel is invalid in all channels
    extra = {"settings": ""}
    graph = torch.export.load(exported(model, "torch_export", tmp_path), extra_files=extra).module()
    scores = graph(torch.from_numpy(values).permute(2, 0, 1)[None]).softmax(1)[0].detach().numpy()
    np.testing.assert_allclose(scores, model.predict(values)["pred_scores"], atol=1e-5)
    metadata = json.loads(extra["settings"])
    assert (metadata["mean"], metadata["classes"]) == ([4000, -3], ["a", "b", "c"])
    assert "0 to 1" not in metadata["images"]
    exported(model, "timm", tmp_path)
    assert "timm divides pixels by 255" in caplog.text


@pytest.mark.usefixtures("_two_blocks")
@pytest.mark.slow
def test_a_new_setting_of_the_autoencoder_is_not_lost_in_transformers(mae, tmp_path, monkeypatch):
    """One that no writer translates, such as a second decoder. Its default is exported; timm has no decoder."""
    monkeypatch.setattr(export, "OF_AUTOENCODER", (*export.OF_AUTOENCODER, "mask_block"))
    export.export(mae, "transformers", tmp_path / "default")
    monkeypatch.setitem(mae.settings, "mask_block", 2)
    export.export(mae, "timm", tmp_path / "encoder")
    with pytest.raises(ValueError, match="mask_block=2"):
        export.export(mae, "transformers", tmp_path / "other")


def test_an_onnx_file_with_wrong_outputs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "CLOSE", -1.0)
    with pytest.raises(ValueError, match="outputs"):
        export.export(get_model("vit_mini_patch4", nb_classes=2, input_size=8), "onnx", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_two_blocks")
@pytest.mark.slow
def test_weights_in_bf16_are_exported_to_onnx_in_fp16(pooled, tmp_path):
    """As the error for bf16 says. The outputs are those of the same weights in fp32, up to the rounding of fp16."""
    model = pooled.bfloat16()
    with pytest.raises(ValueError, match=r"model\.half\(\)"):
        exported(model, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(exported(model.half(), "onnx", tmp_path))
    pixels = torch.rand(3, 3, 32, 32)
    (found,) = session.run(None, {"images": pixels.numpy()})
    expected = model.float()(model.normalize(pixels)).detach()
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=0.005 * float(expected.abs().max()))


@pytest.mark.parametrize("to", ["timm", "transformers", "safetensors", "onnx", "torch_export"])
def test_a_full_disk_leaves_no_file(of_token, to, small_disk):
    """The error is one line; torch.export.save would end the process."""
    with pytest.raises(OSError, match=r"/(m\.\w+|folder)"):
        exported(of_token, to, small_disk)
    assert list(small_disk.iterdir()) == []


def test_torch_hub(mae, tmp_path):
    file = exported(mae, "safetensors", tmp_path)
    names = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert names == set(ARCHITECTURES)  # as torch.hub.list lists them
    again = torch.hub.load(str(ROOT), "mae_vit_mini_patch4", source="local", pretrained=str(file), norm_pix_loss=True)
    assert torch.equal(again.decoder_pred.weight, mae.decoder_pred.weight)


def test_without_the_extra(pooled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="onnxscript"):
        export.export(pooled, "onnx", tmp_path / "m.onnx")


def test_the_encoder_alone_or_with_its_decoder(mae, tmp_path):
    export.export(mae, "safetensors", tmp_path / "m.safetensors")
    for flags, has_decoder in (({}, True), ({"encoder_only": True}, False)):
        export.main(parse(export, model=tmp_path / "m.safetensors", to="reference", out=tmp_path / "o.pth", **flags))
        names = checkpoint.read(tmp_path / "o.pth")["model"].keys()
        assert ("decoder_pred.weight" in names, "norm.weight" in names) == (has_decoder, True)


def test_the_command(mae, imgs, tmp_path):
    flags = ["--model", exported(mae, "safetensors", tmp_path), "--to", "timm", "--out", tmp_path / "t.pth"]
    forks.run("mae/inference/export.py", flags, tmp_path / "output")
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "t.pth"), num_classes=0, **SIZES)
    torch.testing.assert_close(theirs.eval()(imgs), mae.extract_feat(imgs, "cls"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"nb_classes": 5, "global_pool": True}, {"nb_classes": 0, "global_pool": False}])
def test_a_model_is_a_graph_of_fx_by_torch_export(settings):
    """docs/zoo.md names it in place of torch.fx.symbolic_trace."""
    model, images = get_model("vit_mini_patch4", **settings), torch.randn(2, 3, 32, 32)
    graph = torch.export.export(model, (images,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    torch.testing.assert_close(graph(images), model(images))


def test_a_graph_has_the_mask_ratio_of_its_run(tmp_path):
    model = randomized(get_model("mae_vit_mini_patch4", input_size=16, mask_ratio=0.5), 0.1)
    export.export(model, "torch_export", tmp_path / "m.pt2")
    graph = torch.export.load(tmp_path / "m.pt2").module()
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    for found, expected in zip(graph(images, noise), model(model.normalize(images), 0.5, noise=noise)[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
