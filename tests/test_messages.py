"""Errors and log lines of the library name settings as Python does; a command prints its flags."""

import logging
import subprocess
import sys

import pytest
from conftest import ROOT

import main_finetune
from mae.cli import messages
from mae.inference import predict


@pytest.mark.parametrize(("text", "expected"), [
    ("mask_ratio=0.99 leaves none visible", "mask_ratio=0.99 leaves none visible"),  # not of this script
    ("smoothing=0.10: no labels, give smoothing=0.", "--smoothing 0.10: no labels, give --smoothing 0."),
    ("input_size=[16, 32] and patch_size=(4, 8)", "--input_size 16 32 and --patch_size 4 8"),
    ("global_pool=False or global_pool=True", "--cls_token or --global_pool"),
    ("model='vit x': give `model`, not `name`", "--model vit x: give --model, not `name`"),
    ("saved runs/epochs=3/checkpoint-0.pth", "saved runs/epochs=3/checkpoint-0.pth"),  # a folder, and no setting
    ("give dataset='wds:s/*.tar' or resume=a/b.pth", "give --dataset wds:s/*.tar or --resume a/b.pth"),
    ("saved lr=0.1/checkpoint-0.pth", "saved lr=0.1/checkpoint-0.pth"),
    ("data_path=/a b: no folder", "--data_path /a b: no folder"),
    ('use get_model("base", input_size=(8, 8)) or input_size=8', 'use get_model("base", input_size=(8, 8)) or '
     "--input_size 8"),
])  # fmt: skip
def test_settings_become_flags(text, expected):
    assert messages.with_flags(text, main_finetune.get_args_parser()) == expected


def test_arguments_without_a_flag_have_their_name():
    text = messages.with_flags("images=a.png is damaged: omit it from `images`", predict.get_args_parser())
    assert text == "IMAGE a.png is damaged: omit it from IMAGE"


def test_a_command_prints_and_logs_flags():
    code = """
import logging
from mae.cli import entry_point
import main_finetune
def main(run):
    logging.getLogger("mae.x").warning("smoothing=0.1 has %s", "no effect")
    logging.getLogger("other").warning("smoothing=0.1")
    raise ValueError("epochs=3 are few")
entry_point.run_script(main, main_finetune.get_args_parser())
"""
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *logged, error = process.stderr.splitlines()
    assert logged[-2:] == ["--smoothing 0.1 has no effect", "smoothing=0.1"]
    assert error.endswith("error: --epochs 3 are few")
    assert process.returncode == 1
    assert logging.getLogRecordFactory() is logging.LogRecord  # of this process
