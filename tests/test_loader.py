"""The order of samples, batches, and images that can't be read."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_samples
from mains import small_run, wait_until
from PIL import Image

from util import dist
from util.data import loader, transforms
from util.data.batches import up_to_cores
from util.data.decode import BadImage
from util.data.loader import EpochBatches, TrainLoader
from util.data.samples import Samples
from util.datasets import open_source
from util.training import feature_files


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
    again.seek(1, first_iteration=4)
    assert [index for batch in again for _, index in batch] == epochs[1][40:]


def test_processes_share_a_batch(monkeypatch):
    whole = [sorted(i for _, i in batch) for batch in EpochBatches(50, 8, seed=3)]
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        halves.append([[i for _, i in batch] for batch in EpochBatches(50, 4, seed=3)])
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == whole


def test_repeated_samples_stay_together(monkeypatch):
    alone = EpochBatches(25, 12, seed=1, repeats=3)
    batches = [[index for _, index in batch] for batch in alone]
    assert len(alone) == len(batches) == 6
    assert all(batch[::3] == batch[1::3] == batch[2::3] and len(set(batch)) == 4 for batch in batches)
    assert len({index for batch in batches for index in batch}) == 24
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        halves.append([[i for _, i in batch] for batch in EpochBatches(25, 6, seed=1, repeats=3)])
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in batches]
    with pytest.raises(ValueError, match=r"--batch_size 8 .*--repeated_sampling 3"):
        EpochBatches(25, 8, seed=1, repeats=3)


def places(epochs, **options):
    """The places of several epochs."""
    batches = EpochBatches(25, 4, seed=1, **options)
    result = []
    for epoch in epochs:
        batches.seek(epoch)
        assert len(list(batches)) == len(batches)
        result += [place for batch in batches for place in batch]
    return result


@pytest.mark.parametrize("updates", [1, 3, 13])
def test_epochs_of_a_number_of_updates_continue_through_the_images(updates):
    """Every pass is the permutation that an epoch has by default. An update may contain the end of a pass."""
    passes = [place for lap in range(4) for place in full_pass(lap)]
    epochs = range(100 // (4 * updates))
    mine = places(epochs, updates=updates)
    assert mine == passes[: len(mine)]
    assert len(mine) == len(epochs) * updates * 4
    accumulated = places(epochs[: len(epochs) // 2], updates=updates, accum_iter=2)
    assert accumulated == passes[: len(accumulated)]


def full_pass(lap):
    batches = EpochBatches(25, 1, seed=1)
    batches.seek(lap)
    return [place for batch in batches for place in batch]


def test_processes_and_positions_of_epochs_of_a_number_of_updates(monkeypatch):
    alone = EpochBatches(25, 12, seed=1, repeats=3, updates=5)
    alone.seek(2)
    batches = list(alone)
    alone.seek(2, 3)
    assert list(alone) == batches[3:]
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        half = EpochBatches(25, 6, seed=1, repeats=3, updates=5)
        half.seek(2)
        halves.append(list(half))
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in batches]


def test_a_pass_may_be_shorter_than_a_batch():
    batches = EpochBatches(3, 8, seed=0, updates=2)
    flat = [place for batch in batches for place in batch]
    assert [lap for lap, _ in flat] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5]
    assert len(set(flat)) == 16


@pytest.mark.parametrize(
    ("images", "batch_size", "accum_iter", "repeats", "processes", "message"),
    [
        (7, 8, 1, 1, 1, "has 7 images, fewer than one effective batch of 8 .*: give --batch_size 6 --accum_iter 1$"),
        (1, 8, 1, 1, 1, "give --batch_size 1 --accum_iter 1$"),
        (47, 12, 4, 1, 1, r"of 48 \(--batch_size 12 x --accum_iter 4 x 1 processes\): give --accum_iter 3$"),
        (47, 12, 2, 1, 2, "of 48 .* give --accum_iter 1$"),
        (20, 12, 2, 1, 2, "of 48 .* give --batch_size 10 --accum_iter 1$"),
        (11, 12, 4, 3, 1, "has 33 images, .* of 48 .* give --accum_iter 2$"),
        (3, 1, 1, 1, 4, "give at most 3 processes"),
    ],
)
def test_fewer_images_than_an_effective_batch_are_an_error(
    monkeypatch, images, batch_size, accum_iter, repeats, processes, message
):
    monkeypatch.setattr(dist, "world_size", lambda: processes)
    with pytest.raises(ValueError, match=message):
        EpochBatches(images, batch_size, 0, repeats, accum_iter)


def test_every_split_of_the_effective_batch_has_the_same_updates(monkeypatch):
    """1,000 images with an effective batch size of 48 are 20 updates with the same images."""

    def updates(batch_size, processes, accum_iter, repeats):
        parts = []
        with monkeypatch.context() as patch:
            patch.setattr(dist, "world_size", lambda: processes)
            for rank in range(processes):
                patch.setattr(dist, "rank", lambda rank=rank: rank)
                batches = EpochBatches(1000 // repeats, batch_size, 5, repeats, accum_iter)
                batches.seek(2)
                parts.append([index for batch in batches for _, index in batch])
        per_update = batch_size * accum_iter
        return [
            sorted(index for part in parts for index in part[start : start + per_update])
            for start in range(0, len(parts[0]), per_update)
        ]

    for repeats in (1, 2):
        whole = updates(48, 1, 1, repeats)
        assert len(whole) == 20
        for batch_size, processes, accum_iter in ((24, 1, 2), (16, 1, 3), (24, 2, 1), (12, 2, 2), (4, 3, 4)):
            assert updates(batch_size, processes, accum_iter, repeats) == whole


def test_an_epoch_that_leaves_out_much_warns(caplog):
    EpochBatches(100, 45, seed=0)
    assert not caplog.records
    EpochBatches(100, 44, seed=0)
    assert "each epoch leaves out 12 of 100 images, which do not fill an effective batch of 44" in caplog.text


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_has_no_effect(pictures, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    alone = list(TrainLoader(make_samples(pictures), 4, 0, 0, False))
    together = TrainLoader(make_samples(pictures), 4, 0, workers, False)
    assert together.batches.num_workers == workers
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def begin(pictures):
    """A loader of six batches, an iterator after the first batch, and its worker process."""
    others = set(multiprocessing.active_children())
    batches = TrainLoader(make_samples(pictures), 4, 0, 1, False)
    rest = iter(batches)
    next(rest)
    (worker,) = set(multiprocessing.active_children()) - others
    return batches, rest, worker


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_worker_processes_ignore_stop_signals_of_other_processes(pictures, method, monkeypatch):
    """A stop signal to all processes reaches worker processes too; a failing run ends them with SIGTERM."""
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context(method)
    )
    _batches, rest, worker = begin(pictures)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        sender = multiprocessing.get_context("fork").Process(target=os.kill, args=(worker.pid, signum))
        sender.start()  # another process, like a launcher: a worker process ends only on signals of its own run
        sender.join(20)
        assert sender.exitcode == 0
    assert len(list(rest)) == 5
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_killed_worker_process_raises_only_at_the_next_batch(pictures):
    _batches, rest, worker = begin(pictures)
    os.kill(worker.pid, signal.SIGKILL)
    status = Path(f"/proc/{worker.pid}/stat")
    wait_until(lambda: ") Z " in status.read_text())  # PyTorch would raise here
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed|exited)"):
        list(rest)


def test_persistent_workers_follow_the_epoch(pictures, monkeypatch):
    batches = TrainLoader(make_samples(pictures), 4, 0, 1, False)
    batches.seek(0)
    first = next(iter(batches))
    batches.seek(1)
    second = next(iter(batches))
    assert not torch.equal(first[2], second[2])


def test_examples_are_deterministic(pictures):
    samples = make_samples(pictures)
    images, labels, noise, _ = loader.examples(samples, 8)
    assert images.shape[0] == labels.shape[0] == noise.shape[0] == 8
    assert torch.equal(loader.examples(samples, 8)[0], images)
    _, labels, noise, _ = loader.examples(samples, 4)
    assert labels.tolist() == samples.source.labels[[0, 7, 15, 23]].tolist()  # spread over the dataset
    assert torch.equal(noise, torch.stack([samples[0, index].noise for index in (0, 7, 15, 23)]))
    assert loader.examples(samples, 100)[0].shape[0] == 24


# ------------------------------------------------------------------------------------------------------- bad images


@pytest.fixture
def half_bad(tmp_path):
    """40 small images with ordered names; three of them are bad, in different ways."""
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, size=(9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"")
    (tmp_path / "11.png").write_bytes((tmp_path / "12.png").read_bytes()[:-40])
    (tmp_path / "30.png").unlink()
    (tmp_path / "30.png").symlink_to(tmp_path / "nowhere.png")
    return tmp_path


def epoch_of(batches, epoch):
    batches.seek(epoch)
    return torch.cat([images for images, *_ in batches])


def test_bad_images_end_the_run_by_default(half_bad):
    """The message names the flag in training, where it exists."""
    training, evaluation = make_samples(half_bad, on_bad_image="error"), make_samples(half_bad)
    for index, message in (
        (7, "07.png: the file is empty"),
        (11, "11.png: can't be read"),
        (30, "30.png: No such file"),
    ):
        with pytest.raises(BadImage, match=f"{message}.*--on_bad_image skip"):
            _ = training[0, index]
        with pytest.raises(BadImage, match=f"{message}[^-]*$"):
            _ = evaluation[0, index]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_named_once_and_counted(half_bad, caplog, workers):
    batches = TrainLoader(make_samples(half_bad, on_bad_image="skip"), 8, 0, workers, False)
    first = epoch_of(batches, 0)
    assert len(first) == 40
    named = [
        r.message.partition(":")[0].rpartition("/")[2]
        for r in caplog.records
        if "another image replaces it" in r.message
    ]
    assert sorted(named) == ["07.png", "11.png", "30.png"]
    assert "3 of 40 images since the start or resume of this epoch can't be read" in caplog.text
    assert batches.counts() == {"bad_images": 3}
    caplog.clear()
    second = epoch_of(batches, 1)
    assert "another image replaces it" not in caplog.text
    assert "3 of 40 images since the start" in caplog.text
    assert not torch.equal(first, second)


def test_the_replacement_of_a_bad_image_is_deterministic(half_bad):
    one, two = (TrainLoader(make_samples(half_bad, on_bad_image="skip"), 8, 0, w, False) for w in (0, 2))
    assert torch.equal(epoch_of(one, 3), epoch_of(two, 3))


def test_more_than_a_tenth_bad_ends_the_run(half_bad):
    (half_bad / "00.png").write_bytes(b"")
    exactly_a_tenth = TrainLoader(make_samples(half_bad, on_bad_image="skip"), 8, 0, 0, False)
    epoch_of(exactly_a_tenth, 0)
    (half_bad / "01.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"5 of the 40 images .* 10%; .*png: "):
        epoch_of(TrainLoader(make_samples(half_bad, on_bad_image="skip"), 8, 0, 0, False), 0)


def test_a_dataset_of_bad_images_only_is_an_error(half_bad):
    for path in half_bad.iterdir():
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(BadImage, match="20 images in a row"):
        epoch_of(TrainLoader(make_samples(half_bad, on_bad_image="skip"), 8, 0, 0, False), 0)


def test_a_batch_may_mix_8_and_16_bit_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "b.png")
    source = open_source("train", str(tmp_path))
    samples = Samples(source, transforms.keeps_label(transforms.to_tensor), in_chans=1, seed=0)
    images, *_ = next(iter(TrainLoader(samples, 2, 0, 0, False)))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0], images[1])
    torch.testing.assert_close(images[0, 0], torch.from_numpy(pixels).float() / 255)


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_evaluation_uses_each_image_once(pictures, processes, monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: processes)
    contents, samples = [], make_samples(pictures)
    for rank in range(processes):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        found = []
        for images, labels, *_ in loader.eval_loader(samples, 7, 0, False):
            assert len(images) == len(labels) <= 7
            found += labels.tolist()
            contents += [image.numpy().tobytes() for image in images]
        assert found == samples.source.labels[rank::processes].tolist()  # in the order of the dataset
    assert len(contents) == len(set(contents)) == 24


def test_every_process_permutes_its_stored_features(monkeypatch):
    features, orders = torch.arange(12.0)[:, None].expand(-1, 3), set()
    for seed, epoch, rank in itertools.product((0, 1), repeat=3):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        batches = feature_files.FeatureBatches(features, 100 + torch.arange(12), 4, seed)
        batches.seek(epoch)
        values, labels, indices = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:3])
        assert torch.equal(labels, 100 + indices)
        assert torch.equal(values, features[indices])
        assert sorted(indices.tolist()) == list(range(12))
        batches.seek(epoch, 2)
        assert [batch[2].tolist() for batch in batches] == [indices[8:].tolist()]
        orders.add(tuple(indices.tolist()))
    assert len(orders) == 8


def test_random_numbers_of_a_batch_depend_on_its_position_only(pictures):
    """Drop path and mixup are the same in a run that resumes before this batch."""

    def draws(first_iteration):
        batches = TrainLoader(make_samples(pictures), 4, 0, 0, False)
        batches.seek(2, first_iteration)
        drawn = []
        for step, _ in enumerate(batches, start=first_iteration):
            batches.seed_iteration(step)
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
        return drawn

    whole = draws(0)
    torch.rand(17)
    assert draws(3) == whole[3:]
    assert len(set(whole)) == 6


def test_random_numbers_of_a_batch_differ_between_seeds_epochs_iterations_and_ranks(pictures, monkeypatch):
    """Otherwise mixup and drop path would repeat in every epoch, in every batch, or on every GPU."""

    def draw(seed, epoch, step, rank):
        monkeypatch.setattr(dist, "rank", lambda: rank)
        batches = TrainLoader(make_samples(pictures), 4, seed, 0, False)
        batches.seek(epoch)
        batches.seed_iteration(step)
        return torch.rand(1).item(), np.random.rand(), random.random()

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [draw(*place) for place in places]
    for generator in zip(*draws, strict=True):
        assert len(set(generator)) == len(places)
    assert [draw(*place) for place in places] == draws


def test_the_order_differs_between_seeds():
    orders = [[index for batch in EpochBatches(103, 10, seed) for _, index in batch] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_fewer_cores_than_workers_are_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    caplog.set_level("INFO")
    assert [up_to_cores(workers) for workers in (0, 2, 10)] == [0, 2, 2]
    assert caplog.messages == []
    assert [up_to_cores(77), up_to_cores(77)] == [2, 2]
    assert caplog.messages == ["--num_workers 77: this process has 2 CPU cores and uses 2 worker processes"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    for processes, workers in ((8, 4), (64, 1)):  # of a machine, which share its cores
        monkeypatch.setattr(dist, "processes_here", lambda processes=processes: processes)
        assert up_to_cores(10) == workers


@pytest.mark.parametrize(
    ("size", "flags"),
    [("300k", ["--cache_images"]), ("300k", []), ("4k", []), ("4k", ["--cache_images", "--num_workers", "0"])],
)
def test_a_full_shared_memory_is_an_error_in_one_line(size, flags, tmp_path):
    """Neither the semaphores of the queues fit into 4 KB nor a batch of images into 300 KB."""
    for number in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (400, 400)).save(tmp_path / "images" / f"{number}.png")
    command = [
        sys.executable,
        "main_pretrain.py",
        *small_run(tmp_path / "images", tmp_path / "run"),
        "--batch_size",
        "4",
    ]
    command += ["--input_size", "224", "--patch_size", "56", "--epochs", "1", "--num_workers", "1", *flags]
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a small /dev/shm")
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", mounted, "sh", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if "0" in flags:
        assert run.returncode == 0, run.stderr
        return
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert all(part in line for part in ("error: ", "/dev/shm", "--num_workers 0", "docker run --shm-size")), line
