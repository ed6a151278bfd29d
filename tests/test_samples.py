"""Samples depend only on the seed, the epoch and their index. test_updates.py has their random numbers."""

import random

import numpy as np
import torch
from conftest import make_samples

from mae.data import transforms
from mae.data.samples import Samples


def equal(a, b):
    return torch.equal(a.item.image, b.item.image) and torch.equal(a.noise, b.noise)


def test_a_sample_depends_only_on_seed_epoch_and_index(pictures):
    samples = make_samples(pictures)
    first = samples[2, 5]
    assert (first.item.image.dtype, first.item.image.shape) == (torch.uint8, (3, 16, 16))
    assert first.noise.shape == (16,)
    torch.rand(100)
    _ = samples[0, 3]
    assert equal(samples[2, 5], first)
    assert equal(make_samples(pictures, on_bad_image="skip")[2, 5], first)
    assert not equal(samples[3, 5], first)
    assert not torch.equal(samples[2, 6].noise, first.noise)
    assert not equal(make_samples(pictures, seed=1)[2, 5], first)
    full = transforms.eval_transform(16)  # another augmentation has the same noise
    other = Samples(samples.source, full, in_chans=3, seed=0, draw_noise=samples.draw_noise)
    assert torch.equal(other[2, 5].noise, first.noise)


def test_sampling_does_not_change_global_generators(pictures):
    samples = make_samples(pictures)

    def draws(between):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        between()
        return torch.rand(1).item(), random.random(), np.random.rand()

    assert draws(lambda: samples[0, 1]) == draws(lambda: None)


def test_an_image_that_is_repeated_is_read_once(pictures, monkeypatch):
    samples = make_samples(pictures)
    reads = []
    original = type(samples.source).__getitem__
    monkeypatch.setattr(type(samples.source), "__getitem__", lambda *key: reads.append(key[1]) or original(*key))
    batch = samples.__getitems__([(2, 5)] * 3 + [(2, 6)] * 3)
    assert reads == [5, 6]
    monkeypatch.undo()
    assert equal(batch[0], samples[2, 5])
    assert equal(batch[3], samples[2, 6])
    assert len({tuple(sample.noise.tolist()) for sample in batch}) == 6
    assert not torch.equal(batch[0].item.image, batch[1].item.image)
