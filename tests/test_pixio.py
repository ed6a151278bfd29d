"""Models with several class tokens, from pre-training to heads and exports; Pixio of transformers is the oracle."""

import logging

import pytest
import timm
import torch
import transformers
from mains import assert_equal, lines, randomized
from safetensors.torch import load_file, save_file

import main_finetune
import main_knn
import main_linprobe
import models_mae
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import export, get_model, maps
from mae.weights import loading

TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 256, "patch_size": 16,
        "n_cls_tokens": 8}  # fmt: skip
SETTINGS = {"model": "mae_vit_mini_patch4", "input_size": 16, "patch_size": 4, "in_chans": 3, "norm_pix_loss": True,
            "mask_ratio": 0.75, "num_cls_tokens": 3, "learned_pos_embed": True}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    return randomized(transformers.PixioModel(transformers.PixioConfig(**TINY)), 0.05)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("pixio")
    theirs.save_pretrained(path)
    return path


@pytest.fixture
def mae_file(tmp_path):
    model = randomized(models_mae.mae_vit_mini_patch4(img_size=16, num_cls_tokens=3, learned_pos_embed=True), 0.05)
    torch.save({"model": model.state_dict(), "args": SETTINGS}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


@pytest.mark.parametrize("side", [256, 320])
def test_every_token_equals_that_of_transformers(theirs, folder, side):
    model = get_model(folder)
    assert (model.settings["model"], model.num_prefix_tokens) == ("vit_tiny_patch16", 8)
    imgs = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(imgs)
    tokens = model.extract_feat(imgs, "tokens")
    assert tokens.shape == (2, 8 + (side // 16) ** 2, 192)
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.extract_feat(imgs), expected.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(imgs), expected.pooler_output, rtol=0, atol=1e-5)


def test_every_layout_of_transformers_is_read(theirs, folder, tmp_path):
    written = load_file(folder / "model.safetensors")
    assert "encoder.layer.0.norm1.weight" in written
    mlp = {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    earlier = {}
    for name, value in written.items():
        for new, old in mlp.items():
            if f".{new}." in name and "attention" not in name:
                name = name.replace(new, old)
        earlier[name] = value
    assert earlier.keys() != written.keys()
    save_file(earlier, tmp_path / "earlier.safetensors")
    save_file(theirs.state_dict(), tmp_path / "memory.safetensors")
    expected = loading.read(folder).tensors
    for name in ("earlier", "memory"):
        assert_equal(loading.read(tmp_path / f"{name}.safetensors").tensors, expected)


def test_round_trip_through_the_layout_of_the_published_code(tmp_path):
    """The file has neither settings nor a model name; shapes determine the model."""
    model = randomized(models_mae.mae_vit_mini_patch4(num_cls_tokens=8, learned_pos_embed=True, decoder_depth=3), 0.05)
    torch.save({"model": model.state_dict()}, tmp_path / "original.pth")
    ours = get_model(tmp_path / "original.pth")
    assert (ours.learned_pos_embed, ours.num_prefix_tokens, len(ours.decoder_blocks)) == (True, 8, 3)
    export.export(ours, "reference", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth")["model"]
    assert_equal(back, model.state_dict())
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    again = get_model(tmp_path / "back.pth")
    assert torch.equal(again(imgs, noise=noise)[0], ours(imgs, noise=noise)[0])


def test_formats_that_can_not_have_several_class_tokens(mae_file, tmp_path):
    model = get_model(mae_file)
    for to, message in (("timm", "3 class tokens"), ("transformers", "`encoder_only`")):
        with pytest.raises(ValueError, match=message):
            export.export(model, to, tmp_path / to)
    export.export(export.encoder_of(model), "transformers", tmp_path / "encoder")
    imgs = torch.randn(2, 3, 16, 16)
    twin = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert isinstance(twin, transformers.PixioModel) and twin.config.n_cls_tokens == 3
    with torch.no_grad():
        expected = twin(imgs).last_hidden_state
    torch.testing.assert_close(model.extract_feat(imgs, "tokens"), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "onnx", "torch_export"])
def test_graphs_and_files_of_several_class_tokens(mae_file, tmp_path, to):
    encoder = export.encoder_of(get_model(mae_file))
    export.export(encoder, to, tmp_path / f"encoder{export.SUFFIXES[to][0]}")  # graphs are compared with the model
    if to == "safetensors":
        imgs = torch.randn(2, 3, 16, 16)
        assert torch.equal(get_model(tmp_path / "encoder.safetensors")(imgs), encoder(imgs))


def test_a_classifier_that_pools_patches_has_register_tokens_in_timm(tmp_path):
    model = randomized(get_model("vit_mini_patch4", num_cls_tokens=3, nb_classes=5, input_size=16), 0.05)
    export.export(model, "timm", tmp_path / "folder")
    twin = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    assert twin.reg_token.shape == (1, 2, 128)
    imgs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin(imgs), model(imgs), rtol=0, atol=1e-5)
    back = get_model(tmp_path / "folder")
    assert torch.equal(back(imgs), model(imgs))


@pytest.mark.parametrize("class_token", [True, False])
def test_register_tokens_of_timm_are_read_where_the_head_pools_patches(tmp_path, class_token):
    settings = {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 4, "img_size": 16, "num_classes": 5,
                "reg_tokens": 4, "no_embed_class": True}  # fmt: skip
    pooled = randomized(timm.models.VisionTransformer(**settings, class_token=class_token, global_pool="avg"), 0.05)
    torch.save(pooled.state_dict(), tmp_path / "pooled.pth")
    model = get_model(tmp_path / "pooled.pth", input_size=16)
    assert model.num_prefix_tokens == 4 + class_token
    imgs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(imgs), pooled(imgs), rtol=0, atol=1e-5)
    token = timm.models.VisionTransformer(**settings)
    torch.save(token.state_dict(), tmp_path / "token.pth")
    with pytest.raises(CheckpointError, match="reg_token"):
        get_model(tmp_path / "token.pth", input_size=16)


def test_maps_of_several_class_tokens(mae_file):
    model = get_model(mae_file)
    imgs = torch.randn(2, 3, 16, 16)
    tokens, (weights,) = model.get_intermediate_layers(imgs, return_attention=True)
    expected = weights[:, :, :3, 3:].mean(dim=2).unflatten(2, (4, 4))
    torch.testing.assert_close(maps.attention(model, imgs), expected)
    features = maps.dense(model, imgs, layers=1)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[0][:, 3:])
    assert maps.components(model, imgs).shape == (2, 4, 4, 3)


def test_other_numbers_of_class_tokens_are_errors(mae_file):
    one = models_mae.mae_vit_mini_patch4(img_size=16)
    with pytest.raises(CheckpointError, match="num_cls_tokens=3"):
        loading.init_mae(one, loading.read(mae_file))
    fixed = models_mae.mae_vit_mini_patch4(img_size=16, num_cls_tokens=3)
    with pytest.raises(CheckpointError, match="learned_pos_embed=true"):
        loading.init_mae(fixed, loading.read(mae_file))


@pytest.fixture
def run_dir(pretrain):
    return pretrain("mae", num_cls_tokens=3, learned_pos_embed=True, mask_block=2, drop_path=0.2, epochs=1,
                    warmup_epochs=0)  # fmt: skip


def test_a_run_records_what_rebuilds_its_model(run_dir, pretrain, tmp_path):
    model = get_model(run_dir / "checkpoint-0.pth")
    assert (model.num_prefix_tokens, model.learned_pos_embed) == (3, True)
    assert model.settings["mask_ratio"] == 0.75
    table = model.pos_embed
    assert table.requires_grad
    pretrain("more", init_from=run_dir / "checkpoint-0.pth", num_cls_tokens=3, learned_pos_embed=True, epochs=1,
             warmup_epochs=0, blr=0)  # fmt: skip
    assert torch.equal(get_model(tmp_path / "more" / "checkpoint-0.pth").pos_embed, table)
    with pytest.raises(CheckpointError, match="num_cls_tokens=3"):
        pretrain("mae", resume="auto", epochs=2, num_cls_tokens=2)


def test_other_runs_take_the_class_tokens_of_the_file(run_dir, classify, caplog):
    file, imgs = run_dir / "checkpoint-0.pth", torch.randn(2, 3, 16, 16)
    for pool in ("cls_token", "global_pool"):
        out = classify(main_finetune, pool, finetune=file, epochs=1, warmup_epochs=0, **{pool: True})
        model = get_model(out / "checkpoint-0.pth")
        scores = classify(main_finetune, eval=True, resume=out / "checkpoint-0.pth")
        assert scores.acc1 == lines(out)[0]["test_acc1"]
        tokens = model.get_intermediate_layers(imgs, norm=False)[0]
        pooled = model.fc_norm(tokens[:, 3:].mean(1)) if pool == "global_pool" else model.norm(tokens)[:, :3].mean(1)
        torch.testing.assert_close(model(imgs), model.head(pooled))
    for probe in ("linear", "attentive"):
        out = classify(main_linprobe, probe, finetune=file, probe=probe, epochs=1, warmup_epochs=0)
        assert get_model(out / "checkpoint-0.pth").extract_feat(imgs, "tokens").shape == (2, 19, 128)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert classify(main_knn, finetune=file, k=3)
    assert "num_cls_tokens" not in caplog.text


def test_round_trip_through_transformers(folder, theirs, tmp_path):
    model = get_model(folder)
    export.export(model, "transformers", tmp_path / "back")
    back = transformers.AutoModel.from_pretrained(tmp_path / "back")
    assert isinstance(back, transformers.PixioModel)
    assert back.config.n_cls_tokens == 8
    assert_equal(back.state_dict(), theirs.state_dict())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back", backend="pil")
    assert processor.crop_size["height"] == 256
