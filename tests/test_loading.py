"""Weights of files into models."""

import argparse
import json
import time

import pytest
import torch

from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import get_model
from mae.position_tables import resize_pos_embed
from mae.weights import loading
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4


def saved(path, model, drop=lambda name: False):
    torch.save({"model": {k: v for k, v in model.state_dict().items() if not drop(k)}}, path)
    return path


def test_all_weights_also_for_another_image_size(tmp_path, mini_mae):
    other = mae_vit_mini_patch4(img_size=32, in_chans=1)
    loading.init_mae(mini_mae, loading.read(saved(tmp_path / "full.pth", other)))
    for name, value in mini_mae.state_dict().items():
        if name not in loading.TABLES:
            assert torch.equal(value, other.state_dict()[name])
    assert mini_mae.pos_embed.shape[1] == 17


@pytest.mark.slow
def test_the_header_of_a_safetensors_file_has_a_limit(tmp_path):
    """The library takes seconds for each megabyte of names, and reads up to 100 MB."""
    entries = {f"{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"a.safetensors"):
        loading.read(tmp_path / "a.safetensors")
    assert time.perf_counter() - start < 1


def test_weights_are_regular_files(tmp_path):
    index = {"weight_map": {"cls_token": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part.safetensors").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "part.safetensors"):
        with pytest.raises(CheckpointError, match=r"part.safetensors"):
            loading.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, mini_mae, value):
    mini_mae.blocks[2].mlp.fc1.weight.data[3, 4] = value
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        path = saved(tmp_path / f"{number}.pth", mini_mae.to(dtype))
        with pytest.raises(CheckpointError, match=r"blocks.2.mlp.fc1.weight"):
            loading.read(path)


def test_an_encoder_alone_leaves_the_decoder_untrained(tmp_path, mini_mae, caplog):
    other = mae_vit_mini_patch4(img_size=16, in_chans=1)
    decoder = mini_mae.decoder_pred.weight.clone()
    path = saved(tmp_path / "encoder.pth", other, lambda name: "decoder" in name or name == "mask_token")
    loading.init_mae(mini_mae, loading.read(path))
    assert "encoder only" in caplog.text
    assert torch.equal(mini_mae.decoder_pred.weight, decoder)
    assert torch.equal(mini_mae.cls_token, other.cls_token)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("norm.weight"), "norm.weight"), (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    (lambda s: s.update(cls_token=torch.zeros(1, 1, 5)), "cls_token")
])  # fmt: skip
def test_files_that_do_not_fit_are_errors(tmp_path, mini_mae, change, message):
    state = mae_vit_mini_patch4(img_size=16, in_chans=1).state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        loading.init_mae(mini_mae, loading.read(tmp_path / "file.pth"))


def test_a_position_table_of_a_file_is_loaded_if_it_fits(tmp_path, mini_mae):
    other = mae_vit_mini_patch4(img_size=16, in_chans=1)
    other.pos_embed.data.add_(1)
    loading.init_mae(mini_mae, loading.read(saved(tmp_path / "moved.pth", other)))
    assert torch.equal(mini_mae.pos_embed, other.pos_embed)
    settings = {"input_size": [8, 32], "patch_size": 4}
    torch.save({"model": other.state_dict(), "args": settings}, tmp_path / "flat.pth")  # as many patches, other places
    fresh = mae_vit_mini_patch4(img_size=16, in_chans=1)
    loading.init_mae(fresh, loading.read(tmp_path / "flat.pth"))
    assert not torch.equal(fresh.pos_embed, other.pos_embed)
    torch.save({"model": other.state_dict()}, tmp_path / "square.pth")  # without settings, as published files
    flat = mae_vit_mini_patch4(img_size=(8, 32), in_chans=1)
    before = flat.pos_embed.clone()
    torch.save({"model": flat.state_dict()}, tmp_path / "own.pth")
    loading.init_mae(flat, loading.read(tmp_path / "square.pth"))
    assert torch.equal(flat.pos_embed, resize_pos_embed(other.pos_embed, (4, 4), (2, 8)))
    loading.init_mae(flat, loading.read(tmp_path / "own.pth"))
    assert torch.equal(flat.pos_embed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["paper", "mmpretrain", "learned"])
def test_positions_of_a_file_at_another_image_size(kind, dtype, tmp_path):
    """mmpretrain encodes the row first. Models of timm learned theirs."""
    small, large = (mae_vit_mini_patch4(img_size=size, in_chans=1).eval() for size in (16, (16, 24)))
    expected = {name: getattr(large, name).clone() for name in loading.TABLES}
    for name in loading.TABLES:
        table = getattr(small, name).data
        if kind == "mmpretrain":
            table, expected[name] = (one.roll(one.shape[2] // 2, -1) for one in (table, expected[name]))
        elif kind == "learned":
            table = torch.randn_like(table).to(dtype).float()
            expected[name] = resize_pos_embed(table, (4, 4), (4, 6))
        getattr(small, name).data = table
    file = loading.read(saved(tmp_path / "m.pth", small.to(dtype)))
    models = mae_vit_mini_patch4(img_size=16, in_chans=1).eval(), large
    imgs, noise = torch.randn(1, 1, 16, 24), torch.rand(1, 24)
    for model in models:
        loading.init_mae(model, file)
    for name, value in expected.items():
        assert torch.equal(getattr(large, name), value)
    assert torch.equal(*(model(imgs, noise=noise)[1] for model in models))


@pytest.mark.parametrize("load", [loading.load_encoder, loading.load_classifier])
def test_a_table_that_fits_two_grids_needs_the_recorded_size(load, tmp_path):
    """A grid of 2 x 2 and its class token have as many positions as a grid of 1 x 5 without it."""
    square, wide = vit_mini_patch4(img_size=8, num_classes=0), vit_mini_patch4(img_size=(4, 20), num_classes=0)
    torch.nn.init.normal_(square.pos_embed)
    with pytest.raises(CheckpointError, match="input_size"):
        load(wide, loading.read(saved(tmp_path / "m.pth", square)))
    torch.save({"model": square.state_dict(), "args": {"input_size": [8, 8]}}, tmp_path / "m.pth")
    load(wide, loading.read(tmp_path / "m.pth"))
    torch.testing.assert_close(wide.pos_embed, resize_pos_embed(square.pos_embed, (2, 2), (1, 5)))


def vit(**options):
    return vit_mini_patch4(**{"img_size": 16, "in_chans": 1, "num_classes": 5} | options)


def test_files_that_do_not_fit_a_classifier_are_errors(tmp_path, mini_mae):
    lacking = saved(tmp_path / "lacking.pth", mini_mae, lambda name: name == "blocks.2.norm1.weight")
    with pytest.raises(CheckpointError, match=r"blocks.2.norm1.weight"):
        loading.load_encoder(vit(), loading.read(lacking))
    pooled = saved(tmp_path / "pooled.pth", vit(global_pool=True))
    with pytest.raises(CheckpointError, match="global_pool=true"):
        loading.load_encoder(vit(), loading.read(pooled))
    with pytest.raises(CheckpointError, match="global_pool=false"):
        loading.load_classifier(vit(global_pool=True), loading.read_classifier(saved(tmp_path / "cls.pth", vit())))
    with pytest.raises(CheckpointError, match=r"mae.pth"):
        loading.read_classifier(saved(tmp_path / "mae.pth", mini_mae))


@pytest.mark.parametrize("key", ["classes", "label_names"])
def test_the_head_of_classes_in_another_order_is_not_loaded(key, tmp_path):
    ours = ["ant", "bee", "cat", "dog", "elk"]
    for names, is_loaded in ((ours, True), (ours[::-1], False)):
        state = {"model": vit().state_dict(), "args": {key: names, "model": "vit_mini_patch4"}}
        torch.save(state, tmp_path / "file.pth")
        assert loading.load_encoder(vit(), loading.read(tmp_path / "file.pth"), classes=ours) == is_loaded


def test_other_channels_require_adapt_input(tmp_path):
    rgb = vit(in_chans=3)
    path = saved(tmp_path / "rgb.pth", rgb)
    kernel = rgb.patch_embed.proj.weight
    with pytest.raises(CheckpointError, match="adapt_input=mean"):
        loading.load_encoder(vit(in_chans=5), loading.read(path))
    mean, repeat, skip, gray = vit(in_chans=5), vit(in_chans=5), vit(in_chans=5), vit(in_chans=1)
    untrained = skip.patch_embed.proj.weight.clone()
    for model, how in ((mean, "mean"), (repeat, "repeat"), (skip, "skip"), (gray, "mean")):
        loading.load_encoder(model, loading.read(path), how)
    torch.testing.assert_close(mean.patch_embed.proj.weight, kernel.mean(1, keepdim=True).expand(-1, 5, -1, -1) * 3 / 5)
    torch.testing.assert_close(repeat.patch_embed.proj.weight, kernel[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert torch.equal(skip.patch_embed.proj.weight, untrained)
    torch.testing.assert_close(gray.patch_embed.proj.weight, kernel.sum(1, keepdim=True))
    picture = torch.rand(1, 1, 16, 16)
    expected = rgb.forward_features(picture.expand(-1, 3, -1, -1))
    torch.testing.assert_close(gray.forward_features(picture), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "uneven"), [(5, True), (6, False)])
def test_channels_that_count_more_than_others_have_a_warning(channels, uneven, tmp_path, caplog):
    path = saved(tmp_path / "rgb.pth", vit(in_chans=3))
    loading.load_encoder(vit(in_chans=channels), loading.read(path), "repeat")
    assert ("count more than others" in caplog.text) == uneven


@pytest.mark.parametrize(("load", "build", "setting", "heads"), [
    (loading.load_classifier, vit_mini_patch4, "num_heads", 4), (loading.load_encoder, vit_mini_patch4, "num_heads", 4),
    (loading.init_mae, mae_vit_mini_patch4, "decoder_num_heads", 2),
])  # fmt: skip
def test_another_number_of_heads_is_an_error(load, build, setting, heads):
    """Shapes do not show it, and predictions would be wrong."""
    model = build(img_size=16)
    kind = "classifier" if build is vit_mini_patch4 else "encoder and decoder"
    with pytest.raises(CheckpointError, match=rf"file\.pth .*{setting} 8"):
        load(model, loading.Weights(model.state_dict(), {setting: 8}, kind, "file.pth"))


@pytest.mark.parametrize("load", [loading.load_encoder, loading.load_classifier])
@pytest.mark.parametrize("settings", [{}, {"input_size": 16}])
def test_a_table_without_class_positions_is_interpolated(load, settings):
    """timm's no_embed_class, for images of another size."""
    model, other = (vit_mini_patch4(img_size=size, num_classes=0) for size in (32, 16))
    torch.nn.init.normal_(other.pos_embed)
    expected = resize_pos_embed(other.pos_embed, (4, 4), (8, 8))[:, 1:]
    weights = {**other.state_dict(), "pos_embed": other.pos_embed.detach()[:, 1:]}
    load(model, loading.Weights(weights, settings, "encoder", "file.pth"))
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    assert not model.pos_embed[:, 0].any()


@pytest.mark.parametrize("load", [loading.load_encoder, loading.load_classifier])
@pytest.mark.parametrize(("size", "recorded", "old", "new"), [
    (16, {}, (4, 4), (8, 8)),
    ((8, 12), {"input_size": [8, 12]}, (2, 3), (4, 6)),
    (32, {"input_size": 16}, (8, 8), (4, 4)),  # a recorded size that does not fit the table is ignored
    # A grid of 6 x 8 and its class token have as many positions as a grid of 7 x 7.
    ((24, 32), {"input_size": [24, 32], "patch_size": 4}, (6, 8), (7, 7)),
    # Runs without --patch_size do not record it. A grid of 2 x 8 has as many patches as one of 4 x 4.
    ((8, 32), {"input_size": [8, 32], "patch_size": None}, (2, 8), (2, 8)),
])  # fmt: skip
def test_positions_are_interpolated(load, size, recorded, old, new):
    model, other = (vit(img_size=size, num_classes=0) for size in ((4 * new[0], 4 * new[1]), size))
    torch.nn.init.normal_(other.pos_embed)
    load(model, loading.Weights(other.state_dict(), recorded, "encoder", "file.pth"))
    torch.testing.assert_close(model.pos_embed, resize_pos_embed(other.pos_embed, old, new))


@pytest.mark.parametrize(("recorded", "shape"), [(None, (16, 16)), ([3, 16, 24], (16, 24)), ((3, 16, 16), (16, 16))])
def test_a_checkpoint_of_timms_train_script(recorded, shape, tmp_path):
    """Its settings are None where the flags were not given. Its input_size is (channels, height, width)."""
    theirs = vit_mini_patch4(img_size=shape, num_classes=2)
    args = argparse.Namespace(model="vit_tiny_patch16_224", input_size=recorded, in_chans=None, mean=None)
    state = {"epoch": 3, "arch": args.model, "state_dict": theirs.state_dict(), "args": args}
    torch.save(state, tmp_path / "m.pth")
    ours = get_model(tmp_path / "m.pth")
    assert ours.settings["input_size"] == (list(shape) if shape[0] != shape[1] else 16)
    x = torch.randn(1, 3, *shape)
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    averaged = vit_mini_patch4(img_size=shape, num_classes=2)
    torch.save({**state, "state_dict_ema": averaged.state_dict()}, tmp_path / "m.pth")
    torch.testing.assert_close(get_model(tmp_path / "m.pth")(x), averaged.eval()(x))


@pytest.mark.parametrize("names", [["a", "b"], list("abcdef")])
def test_as_many_names_as_classes(names, tmp_path):
    settings = {"model": "vit_mini_patch4", "input_size": 16, "classes": names}
    weights = vit_mini_patch4(img_size=16, num_classes=4).state_dict()
    torch.save({"model": weights, "args": settings}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=f"m.pth: {len(names)} .* 4 "):
        get_model(tmp_path / "m.pth")
    assert get_model(tmp_path / "m.pth", classes=list("abcd")).classes == list("abcd")


class HistoryBuffer:
    """An object in the checkpoints of mmengine."""


def test_a_checkpoint_of_mmengine_is_refused_with_the_remedy(tmp_path):
    weights = vit_mini_patch4(img_size=16, num_classes=4).state_dict()
    torch.save({"meta": {}, "state_dict": weights, "message_hub": {"loss": HistoryBuffer()}}, tmp_path / "epoch_1.pth")
    with pytest.raises(CheckpointError, match="HistoryBuffer"):
        loading.read(tmp_path / "epoch_1.pth")
