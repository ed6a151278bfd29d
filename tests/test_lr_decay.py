"""Groups of parameters. test_updates.py has the published rates and weight decay."""

import pytest
import timm
import torch

from mae.training.optimizers import param_groups_lrd
from models_mae import mae_vit_mini_patch4
from models_vit import vit_mini_patch4


def test_tokens_decay_without_the_list_and_frozen_parameters_are_in_no_group():
    model = vit_mini_patch4(img_size=16)
    model.blocks.requires_grad_(False)
    decay = {id(parameter): group["weight_decay"] for group in param_groups_lrd(model) for parameter in group["params"]}
    assert decay[id(model.cls_token)] == 0.05
    assert not any(id(parameter) in decay for parameter in model.blocks.parameters())


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_script_for_the_published_code_groups_the_parameters_of_its_model(is_ours):
    model = vit_mini_patch4() if is_ours else timm.create_model("vit_tiny_patch16_224", depth=4)
    if not is_ours:
        model.second_head = torch.nn.Linear(2, 2)
    groups = param_groups_lrd(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    lowest = {"cls_token": (0.5**5, 0), "pos_embed": (0.5**5, 0), "patch_embed.proj.weight": (0.5**5, 0.05)}
    expected = {**lowest, "blocks.3.mlp.fc1.weight": (0.5, 0.05), "norm.weight": (1, 0), "head.weight": (1, 0.05)}
    expected |= {} if is_ours else {"second_head.weight": (1, 0.05)}
    assert {name: found[id(model.get_parameter(name))] for name in expected} == expected


def test_decoder_and_mask_token_of_an_autoencoder_have_the_highest_rate():
    model = mae_vit_mini_patch4()
    scales = {id(p): group["lr_scale"] for group in param_groups_lrd(model, layer_decay=0.5) for p in group["params"]}
    expected = {"cls_token": 1 / 32, "patch_embed.proj.weight": 1 / 32, "blocks.0.norm1.weight": 1 / 16,
                "blocks.3.mlp.fc1.weight": 1 / 2, "norm.weight": 1, "mask_token": 1, "decoder_embed.weight": 1,
                "decoder_blocks.0.attn.qkv.weight": 1, "decoder_norm.bias": 1, "decoder_pred.weight": 1}  # fmt: skip
    assert {name: scales[id(model.get_parameter(name))] for name in expected} == expected
