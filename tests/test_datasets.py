"""Sources, samples and their order."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from util import datasets, dist, transforms
from util.datasets import EpochBatches, ImageFiles, Samples, open_source


def test_finds_train_nested_and_flat(pictures, tmp_path):
    assert len(open_source(str(pictures), "train")) == 24
    source = ImageFiles(pictures / "train")
    assert source.classes == ["cat", "dog"]
    assert Counter(source.labels) == {0: 12, 1: 12}
    assert source.paths == sorted(source.paths)
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "er" / "UPPER.JPG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    mixed = open_source(str(tmp_path), "train")
    assert len(mixed) == 4
    assert mixed.classes == []
    assert set(mixed.labels) == {-1}


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="--data_path is needed"):
        open_source(None, "train")
    with pytest.raises(ValueError, match="no folder"):
        open_source(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match=r"no images under .*\.jpg"):
        open_source(str(tmp_path), "train")


def make_samples(pictures, seed=0, num_noise=16):
    transform = transforms.pretrain_transform(16)
    return Samples(open_source(str(pictures), "train"), transform, in_chans=3, seed=seed, num_noise=num_noise)


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])


def test_a_sample_depends_on_seed_epoch_and_index_alone(pictures):
    samples = make_samples(pictures)
    first = samples[2, 5]
    assert first[0].dtype == torch.uint8
    assert first[0].shape == (3, 16, 16)
    assert first[2].shape == (16,)
    torch.rand(100)
    _ = samples[0, 3]
    assert equal(samples[2, 5], first)
    assert not equal(samples[3, 5], first)
    assert not torch.equal(samples[2, 6][2], first[2])
    assert not equal(make_samples(pictures, seed=1)[2, 5], first)


def test_sampling_leaves_the_processs_own_generators_alone(pictures):
    samples = make_samples(pictures)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _ = samples[0, 1]
    assert torch.equal(torch.rand(3), expected)


def test_noise_does_not_depend_on_the_augmentation(pictures):
    samples = make_samples(pictures)
    other = Samples(samples.source, transforms.eval_transform(16), in_chans=3, seed=0, num_noise=16)
    assert torch.equal(samples[1, 7][2], other[1, 7][2])


def test_noise_is_uniform_and_independent_between_neighbours():
    rows = []
    for index in range(4000):
        with datasets.seeded_for(0, 3, index):
            rows.append(torch.rand(16))
    noise = torch.stack(rows).double()
    assert noise.mean().item() == pytest.approx(0.5, abs=0.005)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.002)
    columns = torch.corrcoef(noise.T) - torch.eye(16)
    neighbours = torch.corrcoef(torch.cat([noise[:-1].T, noise[1:].T]))[:16, 16:]
    assert columns.abs().max() < 0.07  # four standard deviations of 4000 independent pairs
    assert neighbours.abs().max() < 0.07
    assert len(np.unique(noise[:, 0])) == 4000


def test_order_is_a_new_permutation_each_epoch():
    batches = EpochBatches(103, 10, seed=0)
    epochs = []
    for epoch in (0, 1):
        batches.seek(epoch)
        places = [place for batch in batches for place in batch]
        assert {e for e, _ in places} == {epoch}
        epochs.append([index for _, index in places])
    assert len(batches) == 10
    assert all(len(set(order)) == 100 for order in epochs)
    assert epochs[0] != epochs[1]
    again = EpochBatches(103, 10, seed=0)
    again.seek(1, first_step=4)
    assert [index for batch in again for _, index in batch] == epochs[1][40:]


def test_processes_share_a_batch(monkeypatch):
    whole = [sorted(i for _, i in batch) for batch in EpochBatches(50, 8, seed=3)]
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        halves.append([[i for _, i in batch] for batch in EpochBatches(50, 4, seed=3)])
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == whole


def test_fewer_images_than_a_batch():
    with pytest.raises(ValueError, match="lower --batch_size"):
        EpochBatches(7, 8, seed=0)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(pictures, workers, monkeypatch):
    monkeypatch.setattr(datasets.os, "sched_getaffinity", lambda pid: range(8))
    alone = list(datasets.train_loader(make_samples(pictures), 4, 0, 0, False))
    together = datasets.train_loader(make_samples(pictures), 4, 0, workers, False)
    assert together.num_workers == workers
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_persistent_workers_follow_the_epoch(pictures, monkeypatch):
    loader = datasets.train_loader(make_samples(pictures), 4, 0, 1, False)
    loader.batch_sampler.seek(0)
    first = next(iter(loader))
    loader.batch_sampler.seek(1)
    second = next(iter(loader))
    assert not torch.equal(first[2], second[2])


def test_examples_are_always_the_same(pictures):
    samples = make_samples(pictures)
    images, labels, noise = datasets.examples(samples, 8)
    assert images.shape[0] == labels.shape[0] == noise.shape[0] == 8
    assert torch.equal(datasets.examples(samples, 8)[0], images)
    assert datasets.examples(samples, 100)[0].shape[0] == 24
