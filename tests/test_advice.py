"""Settings as arguments and in messages. The help of a script names only its own flags."""

import re

import pytest
from golden_settings import SCRIPTS, parser_of

import main_finetune
from mae.cli import entry_point
from mae.settings.arguments import advice, arguments

FLAG = r"(?<![\w-])--(?=[a-z])[\w-]+"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_flags_of_the_script(script):
    actions = parser_of(script)._actions
    others = SCRIPTS if script == "mae.recommend.check" else []  # it has their flags of the data
    everything = [action for name in [script, *others] for action in parser_of(name)._actions]
    known = {flag for action in everything for flag in [*action.option_strings, f"--{action.dest}"]}
    for action in actions:
        text = re.sub(rf"\w+\.py {FLAG}", "", action.help or "")  # a flag of the script that is named
        assert set(re.findall(FLAG, text)) <= known, action.dest


def test_settings_are_formatted_as_on_the_command_line():
    settings = {"model": "vit_mini_patch4", "patch_size": [7, 7], "in_chans": 1, "global_pool": False, "pin_mem": False}
    typed = "--model vit_mini_patch4 --patch_size 7 7 --in_chans 1 --cls_token --no_pin_mem"
    assert arguments(settings) == typed.split()
    args = entry_point.parse(main_finetune.get_args_parser(), typed.split()).record()
    assert {name: args[name] for name in settings} == settings
    omitting = {"unfreeze_blocks": None, "norm_pix_loss": True}
    assert advice(omitting) == "give norm_pix_loss=true and omit `unfreeze_blocks`"
    assert advice({"unfreeze_blocks": None}) == "omit `unfreeze_blocks`"
    settings = {"global_pool": False, "k": [5, 20], "mean": None, "pin_mem": False, "config": "my recipe.yaml"}
    assert arguments(settings) == ["--cls_token", "--k", "5", "20", "--no_pin_mem", "--config", "my recipe.yaml"]
