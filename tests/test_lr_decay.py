"""Groups of parameters. test_updates.py has the published rates and weight decay."""

from models_vit import vit_mini_patch4
from util.lr_decay import param_groups_lrd


def test_tokens_decay_without_the_list_and_frozen_parameters_are_in_no_group():
    model = vit_mini_patch4(img_size=16)
    model.blocks.requires_grad_(False)
    decay = {id(parameter): group["weight_decay"] for group in param_groups_lrd(model) for parameter in group["params"]}
    assert decay[id(model.cls_token)] == 0.05
    assert not any(id(parameter) in decay for parameter in model.blocks.parameters())
