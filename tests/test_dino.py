"""Files of DINOv2 and DINOv3: features equal those of transformers and timm, also after a run and an export."""

import json
import re
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import transformers
from mains import lines, weights
from torch import nn
from transformers import Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig

import mae.build
import mae.settings
import main_finetune
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.inference import export, get_model, maps
from mae.position_tables import resize_pos_embed
from mae.weights.formats import dino
from mae.weights.formats.format import Record
from models_dino import DINOv2, DINOv3
from models_mae import MaskedAutoencoderViT
from models_vit import vit_mini_patch4

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
V2, REGISTERS, V3 = Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig
OF_V3 = {"num_register_tokens": 4, "intermediate_size": 512}
TRANSFORMERS = {
    "v2": (V2, {}),
    "v2 giant": (V2, {"use_swiglu_ffn": True}),
    "v2 registers": (REGISTERS, {"num_register_tokens": 4}),
    "v2 giant registers": (REGISTERS, {"num_register_tokens": 4, "use_swiglu_ffn": True}),
    "v3": (V3, OF_V3),
    "v3 plus": (V3, {**OF_V3, "use_gated_mlp": True, "hidden_act": "silu"}),
    "v3 heads": (V3, {**OF_V3, "num_attention_heads": 4}),
}
BARE = Record(Path("file.pth"))  # without settings
SMALL = {"embed_dim": 128, "depth": 2, "num_heads": 2}
TIMM = {  # side of the images
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_giant_patch14_dinov2": 56,
    "vit_giant_patch14_reg4_dinov2": 56,
    "vit_small_patch16_dinov3": 64,
    "vit_small_patch16_dinov3_qkvb": 64,
    "vit_small_plus_patch16_dinov3": 64,
}


def random(model):
    """Random weights, so that a mistake in any of them changes the features."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def of_transformers(name, folder, **sizes):
    config, own = TRANSFORMERS[name]
    model = transformers.AutoModel.from_config(config(**{**SIZES, **own, **sizes}))
    random(model).save_pretrained(folder)
    return model


def of_timm(name, path, **arguments):
    model = random(timm.create_model(name, num_classes=0, **arguments))
    torch.save(model.state_dict(), path)
    return model


def images(rows, columns, count=2):
    return torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(3))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_of_a_folder_equal_those_of_transformers(name, tmp_path, caplog):
    """At the size of the file, at other sizes, and in a model for another size."""
    caplog.set_level("INFO")
    theirs = of_transformers(name, tmp_path)
    ours = get_model(tmp_path)
    assert "embeddings.mask_token" in caplog.text
    for size in ((32, 32), (48, 24), (16, 16)):
        expected = theirs(images(*size)).last_hidden_state
        assert_same(ours.extract_feat(images(*size), "tokens"), expected)
    smaller = get_model(tmp_path, input_size=16)
    assert_same(smaller.extract_feat(images(16, 16), "tokens"), expected)
    assert_same(smaller.extract_feat(images(16, 16)), expected[:, 0])


def test_attention_beside_registers_is_that_of_the_class_token(tmp_path):
    """As the features are."""
    of_transformers("v2 registers", tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    weights = theirs(images(32, 32), output_attentions=True).attentions[-1]
    assert_same(maps.attention(get_model(tmp_path), images(32, 32)), weights[:, :, 0, 5:].unflatten(2, (4, 4)))


@pytest.mark.parametrize("name", ["v2", "v2 registers"])
def test_a_folder_that_a_loaded_encoder_wrote_is_read_as_it_is(name, tmp_path, caplog):
    """Its tensors have our names, and its settings are recorded: nothing is converted or assumed."""
    of_transformers(name, tmp_path / "theirs")
    model = get_model(str(tmp_path / "theirs")).eval()
    model.save_pretrained(tmp_path / "ours")
    caplog.clear()
    again = get_model(str(tmp_path / "ours")).eval()
    assert "ssumed" not in caplog.text
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["v2 giant registers", "v3 plus"])
def test_a_state_dict_in_memory_is_read(name, tmp_path):
    theirs = of_transformers(name, tmp_path / "folder")
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    ours = get_model(tmp_path / "file.pth")
    assert_same(ours.extract_feat(images(32, 32), "tokens"), theirs(images(32, 32)).last_hidden_state)


def test_other_rotations_are_refused(tmp_path):
    theirs = of_transformers("v3", tmp_path)
    theirs.config.rope_theta = 50.0
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="rope_theta is 50"):
        get_model(tmp_path)


@pytest.mark.parametrize("name", TIMM)
def test_features_of_a_file_equal_those_of_timm(name, tmp_path):
    side = TIMM[name]
    theirs = of_timm(name, tmp_path / "file.pth", img_size=side, **SMALL)
    ours = get_model(tmp_path / "file.pth")
    assert_same(ours.extract_feat(images(side, side), "tokens"), theirs.forward_features(images(side, side)))


def test_the_size_of_a_model_of_timm_may_differ_with_registers(tmp_path):
    """Both filter the position table."""
    name, arguments = "vit_small_patch14_reg4_dinov2", {"img_size": 56, "dynamic_img_size": True, **SMALL}
    theirs = of_timm(name, tmp_path / "file.pth", **arguments)
    ours = get_model(tmp_path / "file.pth", input_size=28)
    expected = theirs.forward_features(images(28, 28))
    assert_same(ours.extract_feat(images(28, 28), "tokens"), expected)


class Filtered(DINOv2):
    """DINOv2 whose position table is filtered when it is resized."""

    def resize_table(self, table, old_grid, new_grid):
        return resize_pos_embed(table, old_grid, new_grid, antialias=True)


@pytest.mark.parametrize("side", [28, 84])
def test_other_sizes_without_registers_are_those_of_transformers(side, tmp_path):
    """timm filters the position table, transformers does not: with equal weights, this is the only difference."""
    model = of_transformers("v2", tmp_path / "folder", patch_size=14, image_size=56)
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56, dynamic_img_size=True, **SMALL)
    theirs.eval().load_state_dict(dino.tensors(BARE, model.state_dict()))
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    assert_same(theirs.forward_features(images(56, 56)), model(images(56, 56)).last_hidden_state)
    expected = model(images(side, side)).last_hidden_state
    for file in (tmp_path / "folder", tmp_path / "file.pth"):
        for size in (56, side):
            ours = get_model(file, input_size=size)
            assert_same(ours.extract_feat(images(side, side), "tokens"), expected)
    of_timm = theirs.forward_features(images(side, side))
    assert (of_timm - expected).abs().max() > 1e-3
    filtered = get_model(tmp_path / "file.pth", encoder=Filtered, input_size=side)
    assert_same(filtered.extract_feat(images(side, side), "tokens"), of_timm)
    overlay = {"file": str(tmp_path / "file.pth")}
    resized = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=side, pretrained=True, pretrained_cfg_overlay=overlay,
        **SMALL,
    )  # fmt: skip
    assert_same(resized.eval().forward_features(images(side, side)), of_timm)


LARGE = {
    "vit_base_patch14_dinov2": DINOv2,
    "vit_large_patch14_dinov2": DINOv2,
    "vit_large_patch14_reg4_dinov2": DINOv2,
    "vit_giant_patch14_dinov2": DINOv2,
    "vit_giant_patch14_reg4_dinov2": DINOv2,
    "vit_base_patch16_dinov3": DINOv3,
    "vit_large_patch16_dinov3": DINOv3,
    "vit_huge_plus_patch16_dinov3": DINOv3,
    "vit_7b_patch16_dinov3": DINOv3,
}


@pytest.mark.parametrize("name", LARGE)
def test_larger_models_have_the_shapes_of_their_files(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        found = dino.tensors(BARE, theirs.state_dict())
        sizes = {key: tensor.shape for key, tensor in found.items()}
        settings = dino.settings(BARE, sizes)
        settings["input_size"] = [theirs.patch_embed.grid_size[0] * settings["patch_size"]] * 2
        model, image = mae.settings.specs(settings)
        ours = mae.build.classifier(model, image, LARGE[name])
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == sizes
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


RELEASED = {r"reg_token": "storage_tokens", r"gamma_([12])": r"ls\1.gamma", r"mlp\.fc1_g": "mlp.w1",
            r"mlp\.fc1_x": "mlp.w2", r"mlp\.fc2": "mlp.w3"}  # fmt: skip


def test_a_file_of_the_released_code_has_buffers_that_are_not_used(tmp_path, caplog):
    """The bias of the keys is masked, whatever its values are."""
    caplog.set_level("INFO")
    theirs = of_timm("vit_small_plus_patch16_dinov3_qkvb", tmp_path / "timm.pth", img_size=64, **SMALL)
    state = {}
    for name, value in theirs.state_dict().items():
        if name.endswith("q_bias"):
            prefix = name.removesuffix("q_bias")
            parts = value, torch.full((128,), 7.0), theirs.state_dict()[f"{prefix}v_bias"]
            state[f"{prefix}qkv.bias"] = torch.cat(parts)
            state[f"{prefix}qkv.bias_mask"] = torch.cat([torch.ones(128), torch.zeros(128), torch.ones(128)])
        elif not name.endswith("v_bias"):
            for ours, released in RELEASED.items():
                name = re.sub(ours, released, name)
            state[name] = value
    unused = {"mask_token": torch.zeros(1, 128), "rope_embed.periods": torch.ones(16),
              "local_cls_norm.weight": torch.ones(128)}  # fmt: skip
    torch.save(state | unused, tmp_path / "released.pth")
    ours = get_model(tmp_path / "released.pth")
    assert_same(ours.extract_feat(images(64, 64), "tokens"), theirs.forward_features(images(64, 64)))
    for name in (*unused, "blocks.#.attn.qkv.bias_mask"):
        assert name in caplog.text
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "nested.pth")
    nested = get_model(tmp_path / "nested.pth")
    assert torch.equal(nested.extract_feat(images(64, 64)), ours.extract_feat(images(64, 64)))


@pytest.mark.parametrize(("name", "encoder"), [("v2", "dinov2"), ("v3", "dinov3")])
def test_a_file_says_which_encoder_it_is(name, encoder, tmp_path, classify):
    """Another encoder is refused, also by the name of its class."""
    of_transformers(name, tmp_path)
    assert get_model(tmp_path).settings["encoder"] == encoder
    other = {"dinov2": DINOv3, "dinov3": DINOv2}[encoder]
    with pytest.raises((CheckpointError, ValueError)):
        get_model(tmp_path, encoder=other)


def test_a_checkpoint_of_a_training_with_chunks_of_blocks_is_read(tmp_path):
    """The file of a teacher in a training of DINOv2 on several nodes, with its head."""
    theirs = of_timm("vit_small_patch14_dinov2", tmp_path / "file.pth", img_size=56, **SMALL)
    state = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): value for name, value in theirs.state_dict().items()}
    state = {f"backbone.{name}": value for name, value in state.items()} | {"dino_head.mlp.0.weight": torch.zeros(4, 4)}
    torch.save({"teacher": state}, tmp_path / "teacher.pth")
    ours = get_model(tmp_path / "teacher.pth")
    assert_same(ours.extract_feat(images(56, 56), "tokens"), theirs.forward_features(images(56, 56)))


def test_other_weights_are_refused(tmp_path):
    state = of_timm("vit_small_patch14_dinov2", tmp_path / "file.pth", img_size=56, **SMALL).state_dict()
    torch.save({**state, "blocks.0.attn.relative_bias": torch.zeros(4)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(blocks\.0\.attn\.relative_bias\)"):
        get_model(tmp_path / "file.pth")
    torch.save(dict(vit_mini_patch4(img_size=16).state_dict()), tmp_path / "plain.pth")
    assert get_model(tmp_path / "plain.pth").settings.get("encoder") is None


def test_other_rotary_positions_are_refused(tmp_path):
    """Models of timm with layer scale, a position table and rotations have the names of DINOv2."""
    theirs = timm.create_model("vit_small_patch16_rope_ape_224", num_classes=0, img_size=64, **SMALL)
    timm.models.save_for_hf(theirs, tmp_path / "folder", model_args=SMALL, safe_serialization=True)
    with pytest.raises(CheckpointError, match="rope_ape"):
        get_model(tmp_path / "folder")
    learned = {**theirs.state_dict(), "rope.freqs": torch.zeros(2, 2, 4)}
    torch.save(learned, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(rope\.freqs\)"):
        get_model(tmp_path / "file.pth")


def test_what_a_file_of_tensors_does_not_show_is_named(tmp_path, caplog):
    theirs = of_transformers("v3 heads", tmp_path / "folder")
    get_model(tmp_path / "folder")
    assert "channels a head" not in caplog.text
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    get_model(tmp_path / "file.pth")
    assert "64 channels a head" in caplog.text


def test_a_training_does_not_take_the_crop_of_an_evaluation(tmp_path, classify):
    """Fine-tuning of a folder of timm, which records its crop."""
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56, **SMALL)
    theirs.pretrained_cfg["crop_pct"] = 0.6
    timm.models.save_for_hf(theirs, tmp_path / "folder", model_args={"img_size": 56, **SMALL}, safe_serialization=True)
    own = {"finetune": tmp_path / "folder"}
    assert get_model(tmp_path / "folder").settings["crop_pct"] == 0.6
    out = classify(main_finetune, **own, input_size=28, epochs=1)
    assert get_model(out / "checkpoint-0.pth").settings["crop_pct"] == 1


def test_visible_patches_are_rotated_by_their_own_positions():
    kind = mae.build.combined(DINOv3, MaskedAutoencoderViT)
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    model = random(kind(img_size=32, patch_size=8, num_cls_tokens=5, **SMALL, **decoder))
    noise = torch.rand(2, 16)
    latent, _, _ = model.forward_encoder(images(32, 32), 0.0, noise=noise)
    (tokens,) = model.get_intermediate_layers(images(32, 32))
    order = noise.argsort(dim=1)[:, :, None].expand(-1, -1, 128)
    assert_same(latent[:, 5:], tokens[:, 5:].gather(1, order))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2 registers", "v3 plus"])
def test_pre_training_starts_from_a_file(name, pretrain, tmp_path):
    """With a learning rate of 0, the checkpoint has the features of the file. The sizes need no flag.

    The pooling is that of the training of a file, whatever its encoder.
    """
    theirs = of_transformers(name, tmp_path / "file")
    own = {"init_from": tmp_path / "file", "input_size": 32}
    out = pretrain(**own, lr=0, epochs=1)
    ours = get_model(out / "checkpoint-0.pth")
    assert "DINO trains it" in str(get_model(tmp_path / "file").pooling)
    assert "the file does not tell" in str(ours.pooling)  # a masked autoencoder
    expected = theirs(images(32, 32)).last_hidden_state
    assert_same(ours.extract_feat(images(32, 32), "tokens"), expected)
    export.export(export.encoder_of(ours), "onnx", tmp_path / "m.onnx")
    pixels = images(32, 32) * ours.normalize.std + ours.normalize.mean
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"images": pixels.numpy()})
    assert_same(torch.from_numpy(found), expected[:, 0])
    trained = lines(pretrain("trained", **own))
    assert trained[1]["train_loss"] < trained[0]["train_loss"]


S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
FAMILIES = {
    "v2": (S, "vit_small_patch14_dinov2"),
    "v2 registers": (S, "vit_small_patch14_reg4_dinov2"),
    "v3": ({**S, "intermediate_size": 1536, "image_size": 64, "patch_size": 16}, "vit_small_patch16_dinov3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_size_s_are_the_same_after_a_run_and_an_export(name, library, pretrain, tmp_path):
    """A run with a learning rate of 0."""
    sizes, name_in_timm = FAMILIES[name]
    side = sizes["image_size"]
    if library == "timm":
        file = tmp_path / "file.pth"
        theirs = of_timm(name_in_timm, file, img_size=side)
        expected = theirs.forward_features(images(side, side))
    else:
        file = tmp_path / "folder"
        theirs = of_transformers(name, file, **sizes)
        expected = theirs(images(side, side)).last_hidden_state
    own = {"model": "mae_vit_small_patch16", "input_size": side}
    out = pretrain(init_from=file, **own, decoder_depth=1, lr=0, epochs=1, batch_size=24)
    ours = get_model(out / "checkpoint-0.pth")
    assert_same(ours.extract_feat(images(side, side), "tokens"), expected)
    export.export(export.encoder_of(ours), "safetensors", tmp_path / "model.safetensors")
    exported = get_model(tmp_path / "model.safetensors")
    assert_same(exported.extract_feat(images(side, side), "tokens"), expected)


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_fine_tuning_starts_from_a_file(name, classify, tmp_path):
    """Also at another size, and the checkpoint describes itself."""
    of_transformers(name, tmp_path / "file")
    out = classify(main_finetune, finetune=tmp_path / "file", input_size=16, lr=0, epochs=1)
    before, after = get_model(tmp_path / "file").state_dict(), weights(out, "checkpoint-0.pth")
    assert [key for key in before if key.startswith("blocks.") and not torch.equal(before[key], after[key])] == []
    recorded = checkpoint.read(out / "checkpoint-0.pth")["args"]
    assert {"embed_dim=128", "depth=2"} < set(recorded["encoder_args"])
    assert recorded["layer_norm_eps"] == json.loads((tmp_path / "file/config.json").read_text())["layer_norm_eps"]
    scores = classify(main_finetune, eval=True, resume=out / "checkpoint-0.pth")
    assert scores.acc1 == pytest.approx(lines(out)[-1]["test_acc1"])
