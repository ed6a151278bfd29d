"""Suggestions of names: a typo has one, and an unrelated name has none."""

import pytest
from golden_settings import parser_of

from mae.suggestions import did_you_mean

FLAGS = [flag for flag in parser_of("main_pretrain")._option_string_actions if flag.startswith("--")]


def test_typos_have_a_suggestion():
    """A letter that is missing, doubled or exchanged with the next, in every flag with at least four letters."""
    for flag in FLAGS:
        name = flag.removeprefix("--")
        for i in range(len(name) - 1) if len(name) >= 4 else ():
            for typo in (
                name[:i] + name[i + 1 :],
                name[:i] + name[i] + name[i:],
                name[:i] + name[i + 1] + name[i] + name[i + 2 :],
            ):
                assert did_you_mean(f"--{typo}", FLAGS) != "" or f"--{typo}" in FLAGS, typo


@pytest.mark.parametrize(("name", "expected"), [
    ("--warmup", "--warmup_epochs"), ("--depth", "--decoder_depth"), ("--workers", "--num_workers"),
    ("--batchsize", "--batch_size"), ("--LR", "--lr"), ("--outdir", "--output_dir"),
])  # fmt: skip
def test_the_nearest_name(name, expected):
    assert did_you_mean(name, FLAGS) == f"; did you mean {expected}?"


@pytest.mark.parametrize("name", [
    "--foo_ratio", "--test_path", "--dropout", "--momentum", "--pretrained", "--teacher", "--use_wandb", "--gpu_ids",
    "--num_frames", "--local_crops_scale", "--ema_decay", "--x", "--",
])  # fmt: skip
def test_a_far_name_has_no_suggestion(name):
    assert did_you_mean(name, FLAGS) == ""
