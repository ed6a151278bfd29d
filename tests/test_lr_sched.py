"""The learning rate of each epoch, by hand."""

import argparse

import pytest
import torch

from mae.settings import OptimSpec
from mae.training.lr_sched import adjust_learning_rate, scaled_lr


@pytest.mark.parametrize(("settings", "expected"), [
    ({"warmup_epochs": 4, "epochs": 12}, {0: 0.0, 1: 0.5, 4: 2.0, 6: 0.5 + 1.5 * (1 + 2**-0.5) / 2, 8: 1.25, 12: 0.5}),
    ({"warmup_epochs": 2, "epochs": 10, "poly_power": 2}, {1: 1.0, 2: 2.0, 6: 0.5 + 1.5 / 4, 10: 0.5}),
])  # fmt: skip
def test_the_published_formula_and_polynomial_decay(settings, expected):
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr_scale": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for epoch, lr in expected.items():
        assert adjust_learning_rate(optimizer, epoch, OptimSpec(lr=2.0, min_lr=0.5, **settings)) == pytest.approx(lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 4])


def test_scripts_for_the_published_code_give_four_settings():
    args = argparse.Namespace(lr=2.0, min_lr=0.5, warmup_epochs=4, epochs=12)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for epoch, lr in ((1, 0.5), (8, 1.25), (12, 0.5)):
        assert adjust_learning_rate(optimizer, epoch, args) == pytest.approx(lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_linear_scaling():
    assert scaled_lr(None, 1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_lr(1e-2, 1.5e-4, 4096) == 1e-2
    assert scaled_lr(0.0, 1.5e-4, 4096) == 0.0
    assert scaled_lr(None, [0.1, 0.4, 0.2], 512) == pytest.approx(0.8)
