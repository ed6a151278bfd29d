"""Defaults and recipes equal those in tests/golden, and the recipes have the published rates."""

import re

import pytest
from golden_settings import SCRIPTS, ZOO, present, recorded


@pytest.mark.parametrize("script", [*SCRIPTS, ZOO])
def test_settings_are_the_recorded_ones(script):
    assert {part: values for part, values in present(script).items() if values} == recorded(script)


def test_recipes_have_the_published_rates():
    """Of He et al. (2021), of mmpretrain, of efficient probing (arXiv 2506.10178) and of Pixio (arXiv 2512.15715)."""
    published = {r"pretrain_vit_.*": (4096, 2.4e-3), r"pretrain_pixio_.*": (8192, 8e-4),
                 r"finetune_(vit_base|inat|places).*": (1024, 2e-3), r"finetune_vit_(large|huge).*": (1024, 4e-3),
                 r"linprobe_vit_.*": (16384, 6.4), r"linprobe_attentive_vit_.*": (4096, 1.6)}  # fmt: skip
    for script in SCRIPTS[:3]:
        for name, settings in recorded(script)["recipes"].items():
            expected = [values for pattern, values in published.items() if re.fullmatch(pattern, name)]
            assert expected in ([], [(settings["effective_batch_size"], settings["peak_lr"])]), name
            assert expected or "fashion_mnist" in name
