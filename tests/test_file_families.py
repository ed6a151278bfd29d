"""Weights in the wild: files in the layouts of docs/migrating.md's table are read with their settings, or refused."""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from conftest import ROOT
from mains import call, fails, randomized
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

import main_finetune
import main_knn
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import export, get_model, graphs
from mae.weights import foreign_settings, loading, model_settings, model_zoo
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4

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


SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}


def of_timm(name="vit_tiny_patch16_224", **arguments):
    torch.manual_seed(1)
    return timm.create_model(name, **{"num_classes": 2, **SHAPE, **arguments}).eval()


def save_processor(folder, **settings):
    """An image processor that crops the center of images, as our models do, unless the settings differ."""
    crop = {"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    ViTImageProcessor(**crop | {"resample": 3, **settings}).save_pretrained(folder)


def assert_same_pixels(model, folder, image):
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(model.prepare(image), theirs.float(), rtol=1e-5, atol=1e-5)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mask_ratio_and_loss_of_an_autoencoder(imgs, tmp_path):
    saved(tmp_path, ViTMAEConfig(**MINI, **DECODER, mask_ratio=0.5, norm_pix_loss=False))
    ours = get_model(tmp_path)
    assert (ours.settings["mask_ratio"], ours.norm_pix_loss, ours.norm.eps) == (0.5, False, 1e-12)


@pytest.mark.parametrize(("config", "message"), [
    (ViTConfig(**{**MINI, "num_attention_heads": 8}), "num_heads 8"),
    (ViTMAEConfig(**MINI, **{**DECODER, "decoder_num_attention_heads": 4}), "decoder_num_heads 4"),
    (ViTConfig(**MINI, hidden_act="relu"), "hidden_act"),
])  # fmt: skip
def test_what_our_models_do_not_compute_is_refused(config, message, tmp_path):
    saved(tmp_path, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        get_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_types_of_models_are_refused(tmp_path):
    """In folders, in a file of a folder, and in a file of timm."""
    swin = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)
    transformers.SwinModel(swin).save_pretrained(tmp_path / "swin")
    msn = transformers.ViTMSNForImageClassification(transformers.ViTMSNConfig(**MINI, **NAMES))
    msn.save_pretrained(tmp_path / "msn")
    tiny = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 2}
    timms = timm.create_model("swin_tiny_patch4_window7_224", **tiny)
    torch.save(timms.state_dict(), tmp_path / "swin.pth")
    for name, message in (("swin", "swin"), ("swin.pth", r"layers\.0"),
                          ("msn/model.safetensors", "vit_msn")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            loading.read(tmp_path / name)


def test_a_processor_that_squeezes_is_warned_of(tmp_path, caplog):
    saved(tmp_path, ViTConfig(**MINI))
    save_processor(tmp_path, size={"height": 16, "width": 16}, do_center_crop=False, resample=2)
    ours = get_model(tmp_path)
    assert ours.settings["crop_pct"] == 1.0
    (record,) = caplog.records
    assert "scales images to a square" in record.message and "resample 2" in record.message


@pytest.mark.parametrize("sides", [(16, 32), (32, 16)])
def test_a_processor_with_a_crop_that_is_no_square_is_warned_of(sides, tmp_path, caplog):
    """Pictures of the aspect ratio of the crop have equal pixels."""
    saved(tmp_path, ViTConfig(**{**MINI, "image_size": sides}))
    crop = dict(zip(("height", "width"), sides, strict=True))
    save_processor(tmp_path, size={"shortest_edge": 20}, crop_size=crop)
    ours = get_model(tmp_path)
    assert f"crops {sides[0]} x {sides[1]} pixels of an image whose short side is 20" in caplog.text
    assert_same_pixels(ours, tmp_path, Image.effect_noise((3 * sides[1], 3 * sides[0]), 80).convert("RGB"))


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
    assert_same(get_model(tmp_path).extract_feat(imgs, "tokens"), theirs(imgs).last_hidden_state)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"global_pool": "avgmax"}, "global_pool is 'avgmax'"),
    ({"global_pool": "max"}, "global_pool is 'max'"),
    ({"global_pool": "avg", "fc_norm": False}, "fc_norm is False"),
    ({"fc_norm": True}, "fc_norm is True"),
    ({"act_layer": "quick_gelu"}, "act_layer is 'quick_gelu'"),
    ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix is True"),
    ({"global_pool": "avg", "fc_norm": True, "act_layer": "gelu"}, None),
    ({"global_pool": "token"}, None),
])  # fmt: skip
def test_arguments_of_timm_that_our_models_do_not_have(arguments, message, imgs, tmp_path):
    theirs, names = of_timm(**arguments), {"label_names": {"0": "ant", "1": "bee"}}
    timm.models.save_for_hf(theirs, tmp_path, names, model_args={**SHAPE, **arguments}, safe_serialization=True)
    if message:
        with pytest.raises(CheckpointError, match=message):
            get_model(tmp_path)
        return
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 8, 8]  # as in folders of earlier versions, which changed img_size only
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = get_model(tmp_path)
    assert ours.classes == ["ant", "bee"]
    assert_same(ours(imgs), theirs(imgs))


OF_MMPRETRAIN = {
    "patch_embed.proj": "patch_embed.projection", "decoder_blocks": "neck.decoder_blocks", "decoder_norm": "neck.ln1",
    "blocks.": "layers.", "neck.decoder_layers": "neck.decoder_blocks", "norm1": "ln1", "norm2": "ln2",
    "fc_norm": "ln2", "norm.": "ln1.", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1", "head.": "head.fc.",
}  # fmt: skip


def mmpretrains(model):
    """The weights of a model under the names of mmpretrain."""
    result = {}
    for name, value in model.state_dict().items():
        for ours, theirs in OF_MMPRETRAIN.items():
            name = name.replace(ours, theirs)
        is_decoder = name.startswith(("decoder", "mask_token"))
        prefix = "" if name.startswith(("neck.", "head.")) else "neck." if is_decoder else "backbone."
        result[prefix + name] = value
    return result


def code_of_the_page(number):
    section = (ROOT / "docs/migrating.md").read_text().partition("## mmpretrain")[2].partition("\n## ")[0]
    return section.split("```python\n")[number].partition("```")[0]


RGB = "data_preprocessor = dict(mean=[10, 20, 30], std=[40, 50, 60], {}to_rgb=True)"


@pytest.mark.parametrize(
    "meta", [{}, {"cfg": RGB.format("")}, {"cfg": RGB.format("bgr_")}, {"cfg": "{'to_rgb': True}"}]
)
def test_a_private_file_of_mmpretrain_needs_its_statistics(meta, labelled, imgs, tmp_path, monkeypatch, caplog):
    theirs = randomized(vit_mini_patch4(img_size=16, num_classes=2, global_pool=True), 0.1)
    meta = meta | {"dataset_meta": {"classes": ("ant", "bee")}}
    torch.save({"meta": meta, "state_dict": mmpretrains(theirs)}, tmp_path / "private.pth")
    flags = {"data_path": labelled, "num_workers": 0, "device": "cpu"}
    file = tmp_path / "private.pth"
    for use in (lambda: get_model(file), lambda: get_model(file, mean=[0.5] * 3),
                lambda: call(main_knn, **flags, finetune=file, k=1)):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"private\.pth .*mean and std"):
            use()
    monkeypatch.chdir(tmp_path)
    exec(code_of_the_page(1), {})  # converts it
    (notice,) = {record.message for record in caplog.records}
    assert "the given mean and std" in notice and "heads" in notice
    ours = get_model("private.safetensors")
    assert (ours.settings["mean"], ours.settings["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert ours.classes == ["ant", "bee"]
    assert_same(ours(imgs), theirs(imgs))


@pytest.mark.parametrize(
    "config", ["data_preprocessor = dict(mean=[1])", "model = dict(to_rgb=False)", "{'to_rgb':None}"]
)
@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_a_model_of_mmpretrain_for_bgr_images_is_converted_by_the_page(kind, config, imgs, tmp_path, monkeypatch):
    """Then its outputs for RGB images are those of the model for BGR images."""
    is_classifier = kind == "classifier"
    theirs = vit_mini_patch4(img_size=16, num_classes=2) if is_classifier else mae_vit_mini_patch4(img_size=16)
    theirs = randomized(theirs, 0.1)
    torch.save({"meta": {"cfg": config}, "state_dict": mmpretrains(theirs)}, tmp_path / "bgr.pth")
    monkeypatch.chdir(tmp_path)
    statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    with pytest.raises(CheckpointError, match=r"bgr\.pth: .*BGR"):
        get_model("bgr.pth", **statistics)
    exec(code_of_the_page(2), {})
    ours = get_model("rgb.pth", **statistics)
    if is_classifier:
        assert_same(ours(imgs), theirs(imgs.flip(1)))
        return
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    found, right = (m.unpatchify(m(x, noise=noise)[1]) for m, x in ((ours, imgs), (theirs, imgs.flip(1))))
    assert_same(found, right.flip(1))


def test_a_published_file_of_mmpretrain_has_the_statistics_of_imagenet(tmp_path, caplog):
    """Also under its name on disk. Its configuration is not read."""
    meta, row = {"cfg": "model = dict()"}, model_zoo.TABLE["vit-base-p16_mae-1600e-pre_8xb128-coslr-100e_in1k"]
    file = tmp_path / Path(row.url).name
    state = mmpretrains(vit_mini_patch4(img_size=16, num_classes=2, global_pool=True))
    torch.save({"meta": meta, "state_dict": state}, file)
    assert graphs.description(get_model(file)).endswith(
        "mean 0.485 0.456 0.406 and divides by the std 0.229 0.224 0.225"
    )
    assert "Assumed" not in caplog.text


@pytest.mark.parametrize("eps", [1e-12, 0.1])
@pytest.mark.parametrize("read", ["", "model.safetensors", "model-00001*.safetensors"])
def test_a_folder_of_transformers_or_a_file_in_it(read, eps, imgs, tmp_path, caplog):
    """eps of layer norm, mean and std .5, as google's ViT have them, a crop and classes take effect."""
    size = {"max_shard_size": "200KB"} if "*" in read else {}
    theirs = saved(tmp_path, ViTConfig(**MINI, **NAMES, layer_norm_eps=eps), **size)
    save_processor(tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    ours = get_model(next(tmp_path.glob(read)) if read else tmp_path)
    assert (ours.settings["mean"], ours.settings["std"], ours.classes) == ([0.5] * 3, [0.5] * 3, ["ant", "bee"])
    assert ours.norm.eps == eps
    assert_same(ours(imgs), theirs(imgs).logits)
    assert_same_pixels(ours, tmp_path, Image.effect_noise((39, 31), 80).convert("RGB"))
    assert not caplog.records


def test_pytorch_model_bin_in_a_folder_of_transformers(imgs, tmp_path):
    """The file that the user gives, not the one that the folder stands for."""
    theirs = saved(tmp_path, ViTConfig(**MINI, **NAMES, layer_norm_eps=0.1))
    state = {name: 2 * value if name == "classifier.weight" else value for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    theirs.load_state_dict(state)
    assert_same(get_model(tmp_path / "pytorch_model.bin")(imgs), theirs(imgs).logits)


def test_a_file_with_settings_does_not_need_those_beside_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    ours = get_model("vit_mini_patch4", nb_classes=2, mean=[0.1, 0.2, 0.3])
    export.export(ours, "safetensors", tmp_path / "ours.safetensors")
    assert get_model(tmp_path / "ours.safetensors").settings["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("layout", ["bare.pth", "bare.safetensors", "state_dict.pth", "model.pth", "args.pth"])
def test_one_notice_of_what_a_file_without_settings_does_not_show(layout, tmp_path, caplog):
    state, file = of_timm().state_dict(), tmp_path / layout
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


def test_a_file_with_settings_but_without_mean_and_std_is_named(tmp_path, caplog):
    """Models of timm and transformers have others than ImageNet's by default."""
    args = argparse.Namespace(model="vit_mini", mean=None, std=None, crop_pct=None)
    torch.save({"state_dict": of_timm().state_dict(), "args": args}, tmp_path / "run.pth")
    saved(tmp_path / "folder", ViTConfig(**MINI, **NAMES))  # without an image processor
    for name in ("run.pth", "folder"):
        caplog.clear()
        loading.read(tmp_path / name)
        (notice,) = [record.message for record in caplog.records]
        assert f"{name} records no mean and std" in notice


def test_the_layout_in_memory_of_timms_training_is_none_of_arrays(tmp_path):
    """Its flag --channels-last has the name of ours."""
    args = argparse.Namespace(model="vit_mini", input_size=[3, 16, 16], channels_last=False)
    torch.save({"state_dict": of_timm().state_dict(), "args": args}, tmp_path / "run.pth")
    model = get_model(tmp_path / "run.pth")
    assert len(model.predict(np.zeros((20, 24, 3), np.uint8))["pred_scores"]) == 2


def test_heads_of_other_tasks(imgs, tmp_path):
    theirs = saved(tmp_path / "tags", ViTConfig(**MINI, **NAMES, problem_type="multi_label_classification"))
    ours = get_model(tmp_path / "tags")
    found = [one["pred_scores"] for one in ours.predict(list(imgs))]
    assert_same(torch.tensor(np.array(found)), theirs(imgs).logits.sigmoid())
    theirs = saved(tmp_path / "number", ViTConfig(**MINI, num_labels=1, problem_type="regression"))
    number = get_model(tmp_path / "number")
    assert_same(number(imgs), theirs(imgs).logits)
    assert number.extract_feat(imgs, "cls").shape == (len(imgs), 128)
    with pytest.raises(ValueError, match="target_mean"):
        number.predict(list(imgs))


@pytest.mark.parametrize(("task", "count"), [("regression", 1), ("multi_label_classification", 2)])
def test_heads_of_other_tasks_are_evaluated_if_their_outputs_are_known(task, count, labelled, tmp_path, capsys):
    saved(tmp_path / "folder", ViTConfig(**MINI, num_labels=count, problem_type=task))
    images = sorted(labelled.glob("val/*/*"))[:4]
    rows = "".join(f"{image},{number % 2},{number // 2}\n" for number, image in enumerate(images))
    (tmp_path / "val.csv").write_text("path,one,two\n" + rows)
    columns = "one two" if count == 2 else "one"
    flags = {"val_list": tmp_path / "val.csv", "label_columns": columns, "num_workers": 0, "device": "cpu"}
    flags |= {"eval": True, "resume": tmp_path / "folder"}
    if task == "regression":
        with pytest.raises(ValueError, match="target_mean"):
            call(main_finetune, **flags)
        return
    call(main_finetune, **flags)
    assert "average_precision" in capsys.readouterr().out


def test_labels_in_the_order_of_the_folders_are_named(labelled, tmp_path, capsys):
    labels = {"id2label": {n: f"name{n}" for n in range(6)}, "label2id": {f"name{n}": n for n in range(6)}}
    saved(tmp_path, ViTConfig(**MINI, **labels))
    call(main_finetune, data_path=labelled, num_workers=0, device="cpu", eval=True, resume=tmp_path)
    assert "order of the validation set, such as 'name0' for 'kind0'" in capsys.readouterr().out


@pytest.mark.parametrize("run", [{"gp": "avgmax"}, {"gp": None, "model_kwargs": {"act_layer": "quick_gelu"}},
                                 {"model_kwargs": {"num_heads": 8}}])  # fmt: skip
def test_a_checkpoint_of_timms_training_that_is_refused(run, tmp_path):
    state = vit_mini_patch4(img_size=16, num_classes=2).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(model="vit_mini", **run)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"avgmax|quick_gelu|num_heads 8"):
        get_model(tmp_path / "m.pth")


@pytest.mark.parametrize("form", ["folder", "file", "bare"])
def test_models_of_clip_are_refused(form, tmp_path):
    theirs = of_timm("vit_base_patch16_clip_quickgelu_224")
    timm.models.save_for_hf(theirs, tmp_path, model_args=SHAPE, safe_serialization=True)
    if form == "bare":
        (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.bias|norm_pre"):
        get_model(tmp_path if form == "folder" else tmp_path / "model.safetensors")


@pytest.mark.parametrize("arguments", [{"no_embed_class": True}, {"global_pool": "avg", "fc_norm": True}, {}])
def test_files_of_timm_without_settings(arguments, imgs, tmp_path):
    """The class token may have no position."""
    theirs = of_timm(**arguments)
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    assert_same(get_model(tmp_path / "m.pth")(imgs), theirs(imgs))


@pytest.mark.parametrize(("config", "mean", "std"), [
    ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
    ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, [0.5] * 3, [0.2] * 3),
    ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, [0.5] * 3, [0.25] * 3),
])  # fmt: skip
def test_the_pixels_of_other_processors(config, mean, std, tmp_path):
    saved(tmp_path, ViTConfig(**MINI, **NAMES))
    save_processor(tmp_path, size={"shortest_edge": 16}, **config)
    ours = get_model(tmp_path)
    assert (ours.settings["mean"], ours.settings["std"]) == (pytest.approx(mean), pytest.approx(std))
    assert_same_pixels(ours, tmp_path, Image.effect_noise((20, 16), 80).convert("RGB"))


def test_a_foreign_eps_reaches_the_scripts(labelled, tmp_path, monkeypatch):
    names = [f"kind{number}" for number in range(6)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    saved(tmp_path, ViTConfig(**MINI, **labels, layer_norm_eps=0.1))
    models, flags = [], {"data_path": labelled, "num_workers": 0, "device": "cpu"}
    for name in ("load_classifier", "load_encoder"):
        original = getattr(loading, name)
        monkeypatch.setattr(loading, name, lambda model, *a, f=original, **k: models.append(model) or f(model, *a, **k))
    call(main_finetune, **flags, eval=True, resume=tmp_path)
    call(main_knn, **flags, finetune=tmp_path, k=1)
    assert [model.blocks[0].norm1.eps for model in models] == [0.1, 0.1]


def test_a_timm_model_of_another_interpolation_is_warned_of(tmp_path, caplog):
    config = {"pretrained_cfg": {"input_size": [3, 16, 16], "interpolation": "bilinear", "crop_mode": "squash"},
              "model_args": {"num_heads": 4}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = foreign_settings.read_folder(tmp_path)
    assert (settings["num_heads"], settings["crop"]) == (4, "none")
    assert "interpolation bilinear" in caplog.text


@pytest.mark.parametrize(("crop_pct", "warns"), [(0.9, True), (1, False)])
def test_timm_squeezes_whole_images_or_is_warned_of(crop_pct, warns, tmp_path, caplog):
    """With a crop_pct below 1, timm crops the squeezed image."""
    pretrained = {"input_size": [3, 16, 16], "crop_mode": "squash", "crop_pct": crop_pct}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": pretrained}))
    assert foreign_settings.read_folder(tmp_path).get("crop") == (None if warns else "none")
    assert ("evaluated with crop_mode squash" in caplog.text) == warns


@pytest.mark.parametrize("third", ["1", "3"])
def test_label_names_of_timm_are_those_of_their_numbers(third, tmp_path):
    names = {"label_names": {"2": "ant", "0": "bee", third: "cat"}}
    timm.models.save_for_hf(of_timm(num_classes=3), tmp_path, names, model_args=SHAPE, safe_serialization=True)
    if third == "1":
        assert get_model(tmp_path).classes == ["bee", "cat", "ant"]
        return
    with pytest.raises(CheckpointError, match="configuration"):
        get_model(tmp_path)


def test_statistics_of_a_file_reach_an_evaluation(caplog):
    settings = {"mean": [0.5] * 3, "std": [0.2] * 3}
    file = loading.Weights(vit_mini_patch4(img_size=16).state_dict(), settings, "", "m.pth")
    assert model_settings.statistics(file, 3, None, None) == ([0.5] * 3, [0.2] * 3)
    assert model_settings.statistics(file, 1, None, None) == (None, None)
    assert model_settings.statistics(file._replace(settings={}), 3, None, [0.1] * 3) == (None, [0.1] * 3)
    assert not caplog.text  # the statistics of a file that records none are not known


def test_forks_of_the_papers_code_with_optimizer_and_settings(imgs, tmp_path):
    """RETFound and others: the whole checkpoint, with an argparse.Namespace whose model is a name of their own."""
    model = mae_vit_mini_patch4(img_size=16).eval()
    args = argparse.Namespace(model="RETFound_mae", input_size=16, nb_classes=5, output_dir="out", mask_ratio=0.75)
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "m.pth")
    assert_same(get_model(tmp_path / "m.pth").forward_features(imgs), model.forward_features(imgs))
    classifier = vit_mini_patch4(img_size=16, num_classes=7, global_pool=True)
    loading.load_encoder(classifier, loading.read(tmp_path / "m.pth"))
    assert torch.equal(classifier.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    args.task, args.nb_classes = "finetune_IDRiD", 7  # RETFound's name of a run
    torch.save({**content, "model": classifier.state_dict(), "args": args}, tmp_path / "m.pth")
    assert get_model(tmp_path / "m.pth").predict(imgs[0])["pred_label"] in range(7)


def test_the_encoder_alone_with_a_mask_token(tmp_path):
    state = mae_vit_mini_patch4(img_size=16).state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("decoder_")}, tmp_path / "m.pth")
    assert get_model(tmp_path / "m.pth").settings["nb_classes"] == 0


def test_spectrograms_of_audio_mae(tmp_path):
    """One channel, and a grid that is no square, which the file does not record."""
    model = vit_mini_patch4(img_size=(32, 16), in_chans=1, num_classes=0).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    ours, spectrogram = get_model(tmp_path / "m.pth", input_size=[32, 16]), torch.randn(1, 1, 32, 16)
    assert_same(ours.extract_feat(spectrogram, "cls"), model(spectrogram))


def groups_of_channels(state):
    """SatMAE: a patch projection for each group of channels, and an embedding of the groups."""
    weight, bias = state.pop("patch_embed.proj.weight"), state.pop("patch_embed.proj.bias")
    state |= {f"patch_embed.{group}.proj.{name}": value for group in (0, 1)
              for name, value in (("weight", weight), ("bias", bias))}  # fmt: skip
    return {"model": {**state, "channel_embed": torch.zeros(1, 2, 8)}}


def no_class_token(state):
    """I-JEPA and Hiera have neither a class token nor its position."""
    del state["cls_token"]
    return state


def tubelets(state):
    """VideoMAE: patches of two frames."""
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2).repeat(1, 1, 2, 1, 1)
    return {"model": state}


def layer_scale(state):
    """BEiT scales each branch, and has neither positions of tokens nor registers."""
    del state["pos_embed"]
    return {**state, "blocks.0.gamma_1": torch.ones(128), "blocks.0.gamma_2": torch.ones(128)}


@pytest.mark.parametrize(("layout", "message"), [
    (groups_of_channels, "patch_embed.proj.weight"),
    (no_class_token, "cls_token"),
    (tubelets, "patch_embed.proj.weight"),
    (layer_scale, "pos_embed"),
    (lambda state: {**state, "reg_token": torch.zeros(1, 1, 128)}, "reg_token"),
    (lambda state: {**state, "dist_token": torch.zeros(1, 1, 128)}, "dist_token"),
])  # fmt: skip
def test_other_architectures_are_refused_with_the_reason(layout, message, tmp_path):
    torch.save(layout(dict(vit_mini_patch4(img_size=16).state_dict())), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        get_model(tmp_path / "m.pth")
    assert "\n" not in str(caught.value)


def minis(count):
    """Models of equal shapes and different weights."""
    models = [randomized(vit_mini_patch4(img_size=16, num_classes=2), std=0.1).eval() for _ in range(count)]
    for number, model in enumerate(models):
        torch.nn.init.constant_(model.head.bias, number)
    return models


def below(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(("read", "other"), [
    ("model", "model_ema"), ("state_dict_ema", "state_dict"), ("teacher", "student"), ("state_dict", "callbacks.0"),
])  # fmt: skip
def test_one_of_several_models_in_a_file(read, other, imgs, tmp_path, caplog):
    """The choice is said, and a suffix of the path gives each. A path may contain its sign."""
    file, models = tmp_path / "epoch#3.pth", dict(zip((read, other), minis(2), strict=True))
    entries = {name: model.state_dict() for name, model in models.items()}
    if other == "callbacks.0":
        average = {"n_averaged": torch.tensor(3), **below("module.", entries.pop(other))}  # of PyTorch's AveragedModel
        entries["callbacks"] = [average]
    torch.save({**dict(reversed(entries.items())), "epoch": 3}, file)
    assert_same(get_model(file)(imgs), models[read](imgs))
    assert f"{file}#{other}" in caplog.text
    for name, model in models.items():
        assert_same(get_model(f"{file}#{name}")(imgs), model(imgs))
    with pytest.raises(ValueError, match=f"{read}.*{other}|{other}.*{read}"):
        get_model(f"{file}#averages")


def test_the_scripts_read_one_of_several_models(labelled, tmp_path):
    """For --resume of the published layout, `model` is the default."""
    model, average = (vit_mini_patch4(img_size=16, num_classes=6).state_dict() for _ in range(2))
    model["head.weight"].normal_()
    average["patch_embed.proj.weight"].zero_()  # all features are equal
    torch.save({"model": model, "model_ema": average}, tmp_path / "both.pth")
    flags = {"data_path": labelled, "num_workers": 0, "device": "cpu"}
    losses, scores = {}, {}
    for name, weights in (("both.pth", None), ("both.pth#model_ema", None), ("m.pth", model), ("a.pth", average)):
        if weights:
            torch.save({"model": weights}, tmp_path / name)
        losses[name] = call(main_finetune, **flags, eval=True, resume=tmp_path / name).loss
        scores[name] = call(main_knn, **flags, finetune=tmp_path / name, k=1)
    for found in (losses, scores):
        assert found["both.pth"] == found["m.pth"] != found["a.pth"] == found["both.pth#model_ema"]


def inside(wrapper, state):
    """The names of a model whose blocks are wrapped."""
    return {re.sub(r"(?<=blocks\.\d\.)", wrapper, name): value for name, value in state.items()}


def headless(state):
    return {name: value for name, value in state.items() if not name.startswith("head.")}


HEAD_OF_DINO = {"head.last_layer.weight": torch.ones(3, 8)}


@pytest.mark.parametrize(("layout", "said", "has_head"), [
    (lambda state: {"model": inside("_checkpoint_wrapped_module.", state)}, "_checkpoint_wrapped_module", True),
    (lambda state: {"model": below("_fsdp_wrapped_module.", inside("_orig_mod.module.", state))}, "_orig_mod", True),
    (lambda state: {"module": state}, "module", True),  # of DeepSpeed
    (lambda state: {"model_state_dict": below("module.", state), "epoch": 3}, "module", True),
    (lambda state: {"teacher": below("module.backbone.", state) | HEAD_OF_DINO}, "head.last_layer.weight", True),
    (lambda state: {"state_dict": below("model.", state) | {"criterion.weight": torch.ones(2)}}, "criterion", True),
    (lambda state: {"state_dict": below("net._orig_mod.", state), "loops": {}}, "state_dict.net", True),
    (lambda state: {"state_dict": {"classifier.weight": state["head.weight"], **below("encoder.", headless(state))}},
     "classifier.weight", False),
])  # fmt: skip
def test_prefixes_and_entries_of_other_trainers(layout, said, has_head, imgs, tmp_path, caplog):
    caplog.set_level("INFO")
    (model,) = minis(1)
    torch.save(layout(model.state_dict()), tmp_path / "m.pth")
    ours = get_model(tmp_path / "m.pth")
    assert_same(ours.extract_feat(imgs, "cls"), model.forward_features(imgs))
    assert said in caplog.text
    if has_head:
        assert_same(ours(imgs), model(imgs))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 343000000\n", "git lfs pull"),
    (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>\n", "web page"),
])  # fmt: skip
def test_a_text_in_place_of_weights_is_named(content, said, suffix, tmp_path, capsys, monkeypatch):
    file = tmp_path / f"m{suffix}"
    file.write_bytes(content)
    error = fails(capsys, monkeypatch, main_knn, "--data_path", tmp_path, "--finetune", file, "--device", "cpu")
    assert said in error


@pytest.mark.parametrize(("name", "remedy"), [
    ("facebook/vit-mae-base", "hf download facebook/vit-mae-base "),
    ("hf-hub:timm/vit_large_patch16_224.mae", "hf download timm/vit_large_patch16_224.mae "),
    ("vit_huge_patch14_224.mae", "hf download timm/vit_huge_patch14_224.mae "),
    ("https://huggingface.co/facebook/pixio-vitb16", "hf download facebook/pixio-vitb16 "),
    ("https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth", "mae_pretrain_vit_base"),
    ("mae_finetuned_vit_base.pth", "mae_finetuned_vit_base"),
    ("https://example.com/weights/mine.pth", "download it"),
    ("configs/mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py", "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k"),
    ("mae_vit-base-p16_8xb512-coslr-400e_in1k", "did you mean mae_vit-base-p16_8xb512-amp-coslr-400e_in1k"),
])  # fmt: skip
def test_public_names_of_weights_name_what_to_type(name, remedy):
    """In Python, and by the function that reads weights for the scripts."""
    for read in (get_model, loading.read, partial(get_model, "vit_base_patch16")):
        with pytest.raises(ValueError, match=remedy) as caught:
            read(name)
        assert "\n" not in str(caught.value)


def test_positions_that_an_autoencoder_does_not_read_are_named(tmp_path, caplog):
    """timm's no_embed_class: the table has no row for the class token."""
    torch.save({"model": of_timm(no_embed_class=True, num_classes=0).state_dict()}, tmp_path / "m.pth")
    model = mae_vit_mini_patch4(img_size=16)
    expected = model.pos_embed.clone()
    loading.init_mae(model, loading.read(tmp_path / "m.pth"))
    assert torch.equal(model.pos_embed, expected)
    assert "pos_embed" in caplog.text
