"""Random numbers of a batch, such as those of mixup and drop path, differ between batches, epochs and ranks."""

import random

import numpy as np
import pytest
import torch
from capture import capture, make_images, parse, seed_all
from timm.data import Mixup
from torch.nn import functional as F

import main_finetune
from util import dist


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("seeds"), train={"ant": 40, "bee": 20}, val={"ant": 1, "bee": 1})


def draw():
    """Returns random numbers as mixup (numpy), drop path (torch) and random erasing (random) use them."""
    return float(np.random.beta(0.8, 0.8)), torch.rand(1).item(), random.random()


def assert_all_differ(draws, count):
    assert [len(set(column)) for column in zip(*draws, strict=True)] == [count] * 3


@pytest.fixture
def batches(monkeypatch, data, tmp_path):
    def of(seed):
        run = capture(
            monkeypatch, main_finetune, data_path=data, output_dir=tmp_path, model="vit_mini_patch4", input_size=16,
            batch_size=10, seed=seed,
        )  # fmt: skip
        return run.batches

    return of


def test_seeds_depend_on_the_run_the_epoch_the_batch_and_the_rank(monkeypatch, batches):
    draws = {}
    for seed in (0, 1):
        loader = batches(seed)
        for rank in (0, 1):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            for epoch in (0, 1):
                loader.seek(epoch)
                for step in range(3):
                    loader.seed_iteration(step)
                    draws[seed, rank, epoch, step] = draw()
    assert_all_differ(draws.values(), 24)
    loader.seek(0)
    loader.seed_iteration(2)
    assert draw() == draws[1, 1, 0, 2]


def test_the_loop_seeds_every_batch(monkeypatch, data, tmp_path):
    """The random numbers of a batch do not depend on the previous state of the generators."""
    draws = []

    def mix(self, x, target):
        draws.append(draw())
        seed_all(0)
        return x, F.one_hot(target, 2).float()

    monkeypatch.setattr(Mixup, "__call__", mix)
    main_finetune.main(parse(
        main_finetune, data_path=data, output_dir=tmp_path / "run", device="cpu", num_workers=0, epochs=2,
        model="vit_mini_patch4", input_size=8, batch_size=20, mixup=0.8, warmup_epochs=1, eval_every=9, aa="none",
    ))  # fmt: skip
    assert_all_differ(draws, 6)
