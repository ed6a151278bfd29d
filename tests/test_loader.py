"""The order of samples, batches, and images that can't be read."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT, make_samples
from mains import open_source, parse, small_run, wait_until
from PIL import Image

import main_pretrain
from mae import parallel
from mae.data import loader, transforms
from mae.data.batches import up_to_cores
from mae.data.loader import TrainLoader
from mae.data.pixels import BadImage
from mae.data.sampler import EpochBatches
from mae.data.samples import Samples
from mae.training import feature_files


def batches_of(*args, epoch=0, first_iteration=0, **options):
    """The batches of an epoch: lists of (pass, index)."""
    batches = EpochBatches(*args, **options)
    batches.seek(epoch, first_iteration)
    found = list(batches)
    assert first_iteration or len(found) == len(batches)
    return found


def of_ranks(monkeypatch, count, make):
    """What a function returns in each of several processes."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: count)
        for rank in range(count):
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            found.append(make())
    return found


def test_order_is_a_new_permutation_for_each_epoch_and_seed():
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = batches_of(103, 10, seed, epoch=epoch)
        order = tuple(index for batch in batches for _, index in batch)
        assert (len(batches), len(order), len(set(order))) == (10, 100, 100)
        assert {number for batch in batches for number, _ in batch} == {epoch}
        assert batches_of(103, 10, seed, epoch=epoch, first_iteration=4) == batches[4:]
        orders.add(order)
    assert len(orders) == 3


def test_repeated_samples_stay_together():
    batches = [[index for _, index in batch] for batch in batches_of(25, 12, seed=1, repeats=3)]
    assert len(batches) == 6
    assert all(batch[::3] == batch[1::3] == batch[2::3] and len(set(batch)) == 4 for batch in batches)
    assert len({index for batch in batches for index in batch}) == 24
    with pytest.raises(ValueError, match="repeated_sampling=3"):
        EpochBatches(25, 8, seed=1, repeats=3)


@pytest.mark.parametrize("updates", [1, 3, 13])
def test_epochs_of_a_number_of_updates_continue_through_the_images(updates):
    """Every pass is the permutation that an epoch has by default. An update may contain the end of a pass."""
    passes = [place for number in range(4) for (place,) in batches_of(25, 1, 1, epoch=number)]
    for accum_iter in (1, 2):
        options = {"updates": updates, "accum_iter": accum_iter}
        epochs = [batches_of(25, 4, 1, epoch=epoch, **options) for epoch in range(25 // (updates * accum_iter))]
        found = [place for batches in epochs for batch in batches for place in batch]
        assert found == passes[: 4 * len(epochs) * updates * accum_iter]


def test_processes_and_positions_of_epochs_of_a_number_of_updates(monkeypatch):
    options = {"seed": 1, "repeats": 3, "updates": 5, "epoch": 2}
    batches = batches_of(25, 12, **options)
    assert batches_of(25, 12, **options, first_iteration=3) == batches[3:]
    halves = of_ranks(monkeypatch, 2, lambda: batches_of(25, 6, **options))
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in batches]


def test_a_pass_may_be_shorter_than_a_batch():
    found = [place for batch in batches_of(3, 8, seed=0, updates=2) for place in batch]
    assert [number for number, _ in found] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5]
    assert len(set(found)) == 16


@pytest.mark.parametrize(("images", "batch_size", "accum_iter", "repeats", "processes", "message"), [
    (7, 8, 1, 1, 1, "batch_size=6 accum_iter=1"), (1, 8, 1, 1, 1, "batch_size=1 accum_iter=1"),
    (47, 12, 4, 1, 1, "accum_iter=3"), (47, 12, 2, 1, 2, "accum_iter=1"),
    (20, 12, 2, 1, 2, "batch_size=10 accum_iter=1"), (11, 12, 4, 3, 1, "accum_iter=2"), (3, 1, 1, 1, 4, "3 processes"),
])  # fmt: skip
def test_fewer_images_than_an_effective_batch_are_an_error(
    monkeypatch, images, batch_size, accum_iter, repeats, processes, message
):
    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    with pytest.raises(ValueError, match=f"{message}$" if "=" in message else message):
        EpochBatches(images, batch_size, 0, repeats, accum_iter)


def test_every_split_of_the_effective_batch_has_the_same_updates(monkeypatch):
    """1,000 images with an effective batch size of 48 are 20 updates with the same images."""

    def updates(batch_size, processes, accum_iter, repeats):
        parts = of_ranks(monkeypatch, processes, lambda: [index for batch in batches_of(
            1000 // repeats, batch_size, 5, repeats, accum_iter, epoch=2) for _, index in batch])  # fmt: skip
        size = batch_size * accum_iter
        starts = range(0, len(parts[0]), size)
        return [sorted(index for part in parts for index in part[start : start + size]) for start in starts]

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
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    _batches, rest, worker = begin(pictures)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        # Another process, like a launcher: a worker process ends only on signals of its own run.
        subprocess.run(["kill", f"-{signum.value}", str(worker.pid)], check=True)
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


def test_examples_are_deterministic(pictures):
    samples = make_samples(pictures)
    images, labels, *_, noise = loader.examples(samples, 4)
    assert torch.equal(loader.examples(samples, 4)[0], images)
    spread = (0, 7, 15, 23)  # over the dataset
    assert labels.tolist() == samples.source.labels[[*spread]].tolist()
    assert torch.equal(noise, torch.stack([samples[0, index].noise for index in spread]))
    assert loader.examples(samples, 100)[0].shape[0] == 24


@pytest.fixture
def half_bad(tmp_path):
    """40 small images with ordered names; three of them are bad, in different ways."""
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, size=(9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"")
    (tmp_path / "11.png").write_bytes((tmp_path / "12.png").read_bytes()[:-40])
    (tmp_path / "30.png").unlink()
    (tmp_path / "30.png").symlink_to(tmp_path / "nowhere.png")
    return tmp_path


def skipping(folder, workers=0):
    return TrainLoader(make_samples(folder, on_bad_image="skip"), 8, 0, workers, False)


def epoch_of(batches, epoch):
    batches.seek(epoch)
    return torch.cat([images for images, *_ in batches])


def test_bad_images_end_the_run_by_default(half_bad):
    """The message names the flag in training, where it exists."""
    training, evaluation = make_samples(half_bad, on_bad_image="error"), make_samples(half_bad)
    messages = {7: "07.png", 11: "11.png", 30: "30.png"}
    for index, message in messages.items():
        with pytest.raises(BadImage, match=message):
            _ = training[0, index]
        with pytest.raises(BadImage, match=f"{message}[^-]*$"):
            _ = evaluation[0, index]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_named_once_and_counted(half_bad, caplog, workers):
    batches = skipping(half_bad, workers)
    first = epoch_of(batches, 0)
    assert len(first) == 40
    named = [message.partition(":")[0] for message in caplog.messages if "another image replaces it" in message]
    assert sorted(named) == [str(half_bad / name) for name in ("07.png", "11.png", "30.png")]
    assert "3 of 40 images since the start or resume of this epoch can't be read" in caplog.text
    assert batches.counts() == {"bad_images": 3}
    caplog.clear()
    second = epoch_of(batches, 1)
    assert "another image replaces it" not in caplog.text
    assert "3 of 40 images since the start" in caplog.text
    assert not torch.equal(first, second)
    assert torch.equal(epoch_of(skipping(half_bad), 1), second)  # the same images replace the bad ones


def test_a_resumed_epoch_counts_the_images_that_it_read(half_bad, caplog):
    batches = skipping(half_bad)
    batches.seek(0, first_iteration=1)
    assert sum(len(images) for images, *_ in batches) == 32
    assert f"{batches.counts()['bad_images']} of 32 images since the start or resume" in caplog.text


def test_a_dataset_of_bad_images_only_is_an_error(half_bad):
    for path in half_bad.iterdir():
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(BadImage, match="20 images in a row"):
        epoch_of(skipping(half_bad), 0)


def test_a_batch_may_mix_8_and_16_bit_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "b.png")
    source = open_source("train", str(tmp_path))
    samples = Samples(source, transforms.scaled_transform(0), in_chans=1, seed=0)
    images, *_ = next(iter(TrainLoader(samples, 2, 0, 0, False)))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0], images[1])
    torch.testing.assert_close(images[0, 0], torch.from_numpy(pixels).float() / 255)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_evaluation_uses_each_image_once(pictures, processes, monkeypatch):
    """In the order of the dataset."""
    samples = make_samples(pictures)
    parts = of_ranks(monkeypatch, processes, lambda: list(loader.eval_loader(samples, 7, 0, False)))
    contents = [image.numpy().tobytes() for part in parts for images, *_ in part for image in images]
    assert len(contents) == len(set(contents)) == 24
    for rank, part in enumerate(parts):
        assert all(len(images) == len(labels) <= 7 for images, labels, *_ in part)
        assert [n for _, labels, *_ in part for n in labels.tolist()] == samples.source.labels[rank::processes].tolist()


def test_every_process_permutes_its_stored_features(monkeypatch):
    features, orders = torch.arange(12.0)[:, None].expand(-1, 3), set()
    for seed, epoch, rank in itertools.product((0, 1), repeat=3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        batches = feature_files.FeatureBatches(features, 100 + torch.arange(12), 4, seed)
        batches.seek(epoch)
        parts = [(batch.images, batch.labels, batch.noise) for batch in batches]
        values, labels, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(labels, 100 + indices)
        assert torch.equal(values, features[indices])
        assert sorted(indices.tolist()) == list(range(12))
        batches.seek(epoch, 2)
        assert [batch.noise.tolist() for batch in batches] == [indices[8:].tolist()]
        orders.add(tuple(indices.tolist()))
    assert len(orders) == 8


def test_random_numbers_of_a_batch_depend_on_its_position_only(pictures, monkeypatch):
    """Drop path and mixup are the same in a run that resumes before this batch, and differ between seeds, epochs,
    batches and GPUs."""

    def draws(seed=0, epoch=0, rank=0, first_iteration=0):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: 1 + rank)
        batches = TrainLoader(make_samples(pictures), 4, seed, 0, False)
        batches.seek(epoch, first_iteration)
        drawn = []
        for number, _ in enumerate(batches, start=first_iteration):
            batches.seed_iteration(number)
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
        return drawn

    runs = [draws(), draws(seed=1), draws(epoch=1), draws(rank=1)]
    assert [len(run) for run in runs] == [6, 6, 6, 3]
    torch.rand(17)
    assert draws(first_iteration=3) == runs[0][3:]
    for numbers in zip(*itertools.chain(*runs), strict=True):
        assert len(set(numbers)) == 21


@pytest.mark.parametrize(("cores", "environment", "workers"), [
    (16, {}, 16), (192, {}, 32),  # each holds batches in memory
    (96, {"LOCAL_WORLD_SIZE": "8"}, 12), (4, {"LOCAL_WORLD_SIZE": "8"}, 1),  # processes of a machine share its cores
    # srun gives each of the 8 tasks of a node its cores, torchrun in a task of all cores does not.
    (12, {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "12"}, 12),
    (96, {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "12"}, 12),
    (96, {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "96",
          "TORCHELASTIC_RUN_ID": "none"}, 12),
])  # fmt: skip
def test_the_default_number_of_workers_is_the_number_of_cores_of_the_process(monkeypatch, cores, environment, workers):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert up_to_cores(parse(main_pretrain).data.num_workers) == workers


SMALL_SHM = f"""
import ctypes, runpy, subprocess, sys
assert ctypes.CDLL(None).unshare(0x20000) == 0  # mounts of its own
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + sys.argv.pop(1), "tmpfs", "/dev/shm"], check=True)
sys.argv[0] = "{ROOT}/main_pretrain.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("size", "flags"), [
    ("300k", ["--cache_images"]), ("300k", []), ("4k", []), ("4k", ["--cache_images", "--num_workers", "0"]),
])  # fmt: skip
def test_a_full_shared_memory_is_an_error_in_one_line(size, flags, tmp_path):
    """Neither the semaphores of the queues fit into 4 KB nor a batch of images into 300 KB."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a small /dev/shm")
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (400, 400)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "small.py").write_text(SMALL_SHM)
    own = ["--batch_size", 4, "--input_size", 224, "--patch_size", 56, "--epochs", 1, "--num_workers", 1, *flags]
    argv, errors = [size, *small_run(tmp_path / "images", tmp_path / "run", *own)], tmp_path / "errors"
    (code,) = forks.Forks(tmp_path / "small.py", argv, tmp_path / "output", errors=errors).wait(60)
    if "0" in flags:
        assert code == 0, errors.read_text()
        return
    assert code == 1
    (line,) = errors.read_text().splitlines()
    assert all(part in line for part in ("error: ", "/dev/shm", "num_workers", "docker run --shm-size")), line
