"""Weight decay and layer-wise learning-rate decay: the published groups, compared with timm's."""

import pytest
import torch
from timm.optim import param_groups_layer_decay
from timm.optim import param_groups_weight_decay as timm_groups_weight_decay

from models_vit import vit_mini_patch4
from util.lr_decay import get_layer_id_for_vit, param_groups_lrd, param_groups_weight_decay

FREE = ["pos_embed", "cls_token"]


@pytest.fixture
def model():
    return vit_mini_patch4(img_size=16, num_classes=5, global_pool=True)


def settings_of(groups, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_without_the_list_tokens_decay(model):
    assert settings_of(param_groups_lrd(model), model)["cls_token"][1] == 0.05


def test_agrees_with_timm(model):
    import timm

    twin = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=5,
        global_pool="avg", class_token=True, fc_norm=True,
    )  # fmt: skip
    theirs = settings_of(param_groups_layer_decay(twin, 0.05, FREE, layer_decay=0.65), twin)
    ours = settings_of(param_groups_lrd(model, 0.05, FREE, layer_decay=0.65), model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name]), name


def test_frozen_parameters_are_in_no_group(model):
    model.blocks.requires_grad_(False)
    assert not any(name.startswith("blocks") for name in settings_of(param_groups_lrd(model), model))


def test_groups_train(model):
    optimizer = torch.optim.AdamW(param_groups_lrd(model), lr=0.1)
    assert len(optimizer.param_groups) == 2 * 6
    assert get_layer_id_for_vit("head.weight", 5) == 5


def test_weight_decay_groups_equal_timms(mini_mae):
    mini_mae.mask_token.requires_grad_(False)
    for ours, theirs in zip(
        param_groups_weight_decay(mini_mae, 0.05), timm_groups_weight_decay(mini_mae, 0.05), strict=True
    ):
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert [id(parameter) for parameter in ours["params"]] == [id(parameter) for parameter in theirs["params"]]
