"""Models from the settings of runs; heads of probes."""

import math

import pytest
import torch

import mae.build
import mae.probes
import models_vit
from mae.settings import specs
from mae.weights import model_settings
from mae.weights.loading import Weights
from mae.weights.model_zoo import CLASSIFIER
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, vit_mini_patch4

MINI = {"model": "vit_mini_patch4", "input_size": 16, "patch_size": None, "in_chans": 3, "nb_classes": 5,
        "global_pool": True}  # fmt: skip
MAE = {"model": "mae_vit_mini_patch4", "input_size": 16, "patch_size": None, "in_chans": 3, "norm_pix_loss": True}


def test_names_of_autoencoders():
    """test_updates.py has the other settings."""
    alias = MAE | {"model": "mae_vit_base_patch16_dec512d8b", "decoder_depth": None}
    named = mae.build.autoencoder_arguments(*specs(alias))
    assert (named["embed_dim"], named["decoder_depth"], named["decoder_embed_dim"]) == (768, 8, 512)


def test_every_setting_of_a_classifier():
    model = mae.build.classifier(*specs(MINI | {"drop_path": 0.3, "grad_checkpointing": True}))
    assert (model.head.out_features, model.global_pool, model.patch_embed.grid_size) == (5, True, (4, 4))
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert all(block.grad_checkpointing for block in model.blocks)
    model = mae.build.classifier(*specs(MINI | {"global_pool": False, "patch_size": 8, "in_chans": 1}))
    assert (model.global_pool, model.patch_embed.patch_size, model.patch_embed.in_chans) == (False, (8, 8), 1)
    assert not any(hasattr(block.drop_path, "drop_prob") or block.grad_checkpointing for block in model.blocks)


class OtherForward(models_vit.Block):
    def forward(self, x):
        return x + self.mlp(self.norm2(x))


class OtherCompute(models_vit.Block):
    compute = OtherForward.forward


@pytest.mark.parametrize("block", [torch.nn.Linear, OtherForward, OtherCompute])
def test_grad_checkpointing_names_the_blocks_that_it_does_not_reach(block, caplog):
    class Blocks(MaskedAutoencoderViT):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.blocks = torch.nn.ModuleList([block(128, 128 if block is torch.nn.Linear else 4) for _ in range(2)])

    passes = []
    model = mae.build.autoencoder(*specs(MAE | {"grad_checkpointing": True}), Blocks)
    inner = model.blocks[0].mlp if block is OtherCompute else model.blocks[0]
    inner.register_forward_pre_hook(lambda *_: passes.append(1))
    model(torch.randn(2, model.patch_embed.in_chans, *model.patch_embed.img_size))[0].backward()
    assert (len(passes) == 2) is (block is OtherCompute)  # recomputed
    assert (f"class {block.__name__}" in caplog.text) is (block is not OtherCompute)
    caplog.clear()
    mae.build.autoencoder(*specs(MAE), Blocks)
    mae.build.autoencoder(*specs(MAE | {"grad_checkpointing": True}))
    assert caplog.text == ""


def test_an_attentive_head_against_the_papers_definition():
    torch.manual_seed(3)
    head = mae.probes.attentive_head(6, 4, num_queries=3).double().eval()
    with torch.no_grad():
        head.pool.queries.mul_(50)  # else all weights are almost equal
    head[1].running_mean.normal_()
    head[1].running_var.uniform_(0.5, 2)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    pooled = []  # by each query: a part of the channels
    for query, rows in zip(head.pool.queries, head.pool.value.weight.chunk(3), strict=True):
        attention = (tokens @ query / math.sqrt(6)).softmax(dim=1)
        pooled.append((attention[:, :, None] * (tokens @ rows.T)).sum(dim=1))
    normalized = (torch.cat(pooled, dim=1) - head[1].running_mean) / (head[1].running_var + 1e-6).sqrt()
    expected = normalized @ head[2].weight.T + head[2].bias
    found = head(tokens)
    torch.testing.assert_close(found, expected)
    parameters, cotangent = list(head.parameters()), torch.randn(2, 4, dtype=torch.float64)
    assert len(parameters) == 4
    gradients = [torch.autograd.grad(result, parameters, cotangent) for result in (found, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(head.pool.maps(tokens).sum(dim=2), torch.ones(2, 3, dtype=torch.float64))


def test_an_attentive_probe_pools_the_normalized_patch_tokens():
    settings = MINI | {"global_pool": False, "probe": "attentive"}
    model = mae.build.probe(*specs(settings))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.pool.queries", "head.pool.value.weight", "head.1.weight", "head.1.bias",
    ]  # fmt: skip
    pool, norm, linear = model.head
    assert pool.queries.shape == (32, 128)
    assert pool.queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert (norm.eps, norm.affine) == (1e-6, False)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    images = torch.randn(2, 3, 16, 16)
    tokens = model.get_intermediate_layers(images)[0][:, 1:]  # without the class token
    torch.testing.assert_close(model.forward_features(images), tokens)
    torch.testing.assert_close(model.eval()(images), model.head(tokens))
    assert mae.build.probe(*specs(settings | {"num_queries": 8})).head.pool.queries.shape == (8, 128)


@pytest.mark.parametrize("count", [30, 200])
def test_queries_must_divide_the_width(count):
    settings = MINI | {"global_pool": False, "probe": "attentive", "num_queries": count}
    with pytest.raises(ValueError, match=f"num_queries={count}"):
        mae.build.probe(*specs(settings))


def test_the_recorded_probe_takes_precedence_over_shapes():
    """Another probe may have the tensors of a linear one. An unknown one is an error, not a linear one."""
    model = mae.build.probe(*specs(MINI))
    for recorded in ({}, {"probe": "linear"}, {"probe": True}):  # True: of an earlier version
        settings = model_settings.file_settings(weights(MINI | recorded, model, CLASSIFIER))
        assert mae.build.probe(*specs(settings)).state_dict().keys() == model.state_dict().keys()
    settings = model_settings.file_settings(weights(MINI | {"probe": "other"}, model, CLASSIFIER))
    with pytest.raises(ValueError, match="other"):
        mae.build.probe(*specs(settings))


def test_an_attentive_probe_needs_a_norm_of_tokens():
    with pytest.raises(ValueError, match="`global_pool`"):
        mae.build.probe(*specs(MINI | {"probe": "attentive"}))


@pytest.mark.parametrize("global_pool", [False, True])
def test_partial_fine_tuning(global_pool):
    last = {"fc_norm" if global_pool else "norm", "head"}
    for num_blocks in (0, 1, 4):
        model = vit_mini_patch4(img_size=16, global_pool=global_pool)
        mae.build.freeze_below(model, num_blocks)
        trained = {name.rsplit(".", 1)[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        blocks = {name.split(".")[1] for name in trained if name.startswith("blocks.")}
        assert blocks == {str(number) for number in range(4 - num_blocks, 4)}
        assert {name for name in trained if not name.startswith("blocks.")} == last
        assert sum(name.startswith("blocks.") for name in trained) == 6 * num_blocks
    for num_blocks in (-1, 5):
        with pytest.raises(ValueError, match=f"unfreeze_blocks={num_blocks}"):
            mae.build.freeze_below(model, num_blocks)


def weights(settings, model, kind):
    return Weights(model.state_dict(), settings, kind, "file.pth")


def test_a_file_without_settings_gives_those_of_its_shapes():
    model = vit_mini_patch4(img_size=16, num_classes=5, global_pool=True)
    file = weights({}, model, CLASSIFIER)
    expected = {"model": "vit_mini_patch4", "patch_size": None, "in_chans": 3, "input_size": 16, "global_pool": True}
    assert model_settings.classifier_settings(file).items() >= expected.items()
    named = model_settings.classifier_settings(file._replace(settings={"model": "mae_vit_huge_patch14_dec512d8b"}))
    assert named["model"] == "vit_huge_patch14"
    other = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    assert model_settings.classifier_settings(weights({}, other, CLASSIFIER)) == {}


@pytest.mark.parametrize(("patch_size", "name"), [(14, "vit_huge_patch14"), (16, "vit_huge_patch16")])
def test_sizes_that_differ_in_the_patch_size(patch_size, name):
    with torch.device("meta"):
        model = VisionTransformer(img_size=8 * patch_size, patch_size=patch_size, embed_dim=1280, depth=32,
                                  num_heads=16, num_cls_tokens=8)  # fmt: skip
    settings = model_settings.classifier_settings(weights({}, model, CLASSIFIER))
    assert (settings["model"], settings["num_cls_tokens"]) == (name, 8)
    assert settings["input_size"] == 8 * patch_size
