"""--cache_images: the decoded images of a source in memory that worker processes share."""

import multiprocessing
import shutil
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from mains import Stopped, assert_equal, lines, stop_after, weights
from PIL import Image

import main_finetune
from mae.data import image_cache
from mae.data import samples as samples_module
from mae.data.decode import BadImage, decode, to_tensor
from mae.data.open import open_source
from mae.data.webdataset_shards import Shards

OPTIONS = {"in_chans": 3, "fast_jpeg": False, "num_workers": 0}


@pytest.fixture
def mixed(pictures, tmp_path):
    """The pictures, an image with 16 bits, and a file that is no image."""
    folder = tmp_path / "mixed"
    shutil.copytree(pictures / "train", folder)
    Image.fromarray(np.full((9, 7), 40_000, dtype=np.uint16)).save(folder / "cat" / "deep.png")
    (folder / "dog" / "text.jpg").write_text("text")
    return folder


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("fast_jpeg", [False, True])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_images_are_those_of_the_source(mixed, in_chans, fast_jpeg, num_workers):
    source = open_source("train", str(mixed))
    options = {"in_chans": in_chans, "fast_jpeg": fast_jpeg, "num_workers": num_workers}
    (cache,) = image_cache.cached([source], **options, on_bad_image=["skip"])
    assert (len(cache), cache.classes) == (26, ["cat", "dog"])
    in_memory = 0
    for index in range(26):
        assert cache.name(index) == source.name(index)
        if source.name(index).endswith("text.jpg"):
            with pytest.raises(BadImage, match="not an image"):
                decode(cache[index][0], in_chans)
            continue
        (ours, label), (theirs, expected) = cache[index], source[index]
        pixels = [decode(data, in_chans, fast_jpeg=fast_jpeg) for data in (ours, theirs)]
        assert torch.equal(*map(to_tensor, pixels))
        assert label == expected
        in_memory += isinstance(ours, torch.Tensor)
    assert in_memory == 24


def private_bytes() -> int:
    """Bytes of memory of this process that no other process shares."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Clean:", "Private_Dirty:")))


def test_worker_processes_share_the_memory(tmp_path):
    for number in range(40):
        np.save(tmp_path / f"{number}.npy", np.full((1000, 1000, 2), number, dtype=np.uint8))
    (cache,) = image_cache.cached([open_source("train", str(tmp_path))], **{**OPTIONS, "in_chans": 2})
    assert cache.num_bytes == 80_000_000
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def read_all():
        before = private_bytes()
        total = sum(int(cache[index][0][0, ::50].sum()) for index in range(40))
        queue.put((total, private_bytes() - before))

    shutil.rmtree(tmp_path)  # the files are read once
    process = context.Process(target=read_all)
    process.start()
    total, growth = queue.get()
    process.join()
    assert total == sum(range(40)) * 20 * 1000
    assert growth < 10_000_000


OF_TWO = """
import ctypes, sys
import numpy as np
from pathlib import Path
from test_image_cache import OPTIONS, image_cache, open_source, private_bytes
from mae import parallel

parallel.init("cpu")
source = open_source("train", sys.argv[1])
for _ in range(2):  # the first imports modules
    cache = None
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
    before = private_bytes()
    (cache,) = image_cache.cached([source], **OPTIONS)
    same = all(
        np.array_equal(cache[index][0].numpy(), np.moveaxis(np.load(source.name(index)), 2, 0)) for index in range(400)
    )
    parallel.barrier()
    ctypes.CDLL(None).malloc_trim(0)
Path(f"out{parallel.rank()}").write_text(f"{len(cache)} {cache.num_bytes} {same} {private_bytes() - before}")
parallel.barrier()
parallel.teardown()
"""


def test_the_processes_of_a_machine_share_the_memory(tmp_path):
    """Each decodes half of the images, and has little memory of its own; the images take 300 MB."""
    for number in range(400):
        pixels = np.full((500, 500, 3), number % 250, dtype=np.uint8)
        pixels[number // 2, number // 3] = 255
        np.save(tmp_path / f"{number}.npy", pixels)
    forks.run_code(OF_TWO, tmp_path, tmp_path, count=2)
    for rank in range(2):
        *same, growth = (tmp_path / f"out{rank}").read_text().split()
        assert same == ["400", "300000000", "True"]
        assert int(growth) < 10_000_000


def test_too_many_images_are_an_error_before_all_are_decoded(tmp_path, monkeypatch):
    for number in range(40):
        np.save(tmp_path / f"{number:02}.npy", np.zeros((10, 10, 3), dtype=np.uint8))
    (tmp_path / "05.npy").unlink()
    source = open_source("train", str(tmp_path))
    monkeypatch.setattr(image_cache, "memory_bytes", lambda: 2 * (300 * 39))
    assert len(image_cache.cached([source], **OPTIONS)) == 1
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"`cache_images`: 39 images"):
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setattr(image_cache, "CAN_SHARE", False)  # each process has its own images
        image_cache.cached([source], **OPTIONS)
    monkeypatch.setattr(image_cache, "memory_bytes", lambda: 2 * (2 * 300 * 39) - 2)
    with pytest.raises(ValueError, match=r"`cache_images`: 39 images .*resize_folder"):
        image_cache.cached([source, source], **OPTIONS)
    monkeypatch.setattr(image_cache, "memory_bytes", lambda: 300 * 39)
    monkeypatch.setattr(image_cache, "SAMPLE", 10)
    read = []
    monkeypatch.setattr(samples_module, "decode", lambda *args, **options: read.append(1) or decode(*args, **options))
    with pytest.raises(ValueError, match=r"`cache_images`"):
        image_cache.cached([source], **OPTIONS)
    assert len(read) < 39


@pytest.mark.parametrize(("group", "file", "limit"), [
    ("0::/job/step", "job/memory.max", "1000"),
    ("0::/job/step", "memory.max", "1000"),
    ("4:memory:/job", "memory/job/memory.limit_in_bytes", "1000"),
    ("0::/job/step", "job/memory.max", "max"),
    ("4:cpuset:/job", "job/memory.max", "1000"),
])  # fmt: skip
def test_the_limit_of_a_container_or_job_counts(group, file, limit, tmp_path, monkeypatch):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(limit + "\n")
    (tmp_path / "groups").write_text(f"{group}\n1:name=systemd:/\n")
    monkeypatch.setattr(image_cache, "GROUPS", tmp_path)
    monkeypatch.setattr(image_cache, "PROCESS_GROUPS", tmp_path / "groups")
    total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    assert image_cache.memory_bytes() == (1000 if limit == "1000" and "cpuset" not in group else total)


def test_shards_have_no_random_access():
    shards = object.__new__(Shards)
    shards.title = "wds:set.tar"
    with pytest.raises(ValueError, match=r"wds:set.tar: .* without `cache_images`"):
        image_cache.cached([shards], **OPTIONS)


def test_resuming_with_and_without_a_cache_is_exact(pretrain, mixed, monkeypatch, capsys):
    settings = {"data_path": mixed, "save_minutes": 0, "on_bad_image": "skip"}
    whole = pretrain("whole", **settings)
    assert "text.jpg: the file is not an image" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 3)
        pretrain("parts", **settings, cache_images=True, num_workers=1)
    said = capsys.readouterr().out
    assert "`cache_images`: 26 images are decoded and take" in said
    assert "text.jpg: the file is not an image" in said
    parts = pretrain("parts", **settings, resume="auto")
    assert_equal(weights(whole), weights(parts))
    assert lines(whole)[-1]["train_loss"] == lines(parts)[-1]["train_loss"]
    assert "--cache_images was" not in capsys.readouterr().out  # the flag may change without a warning


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_ends_a_run_before_the_others_are_decoded(mixed, pretrain, capsys, num_workers, monkeypatch):
    read = []
    monkeypatch.setattr(samples_module, "decode", lambda *args, **options: read.append(1) or decode(*args, **options))
    monkeypatch.setattr(image_cache, "BATCH", 2)
    (mixed / "cat" / "00.png").write_text("text")  # the first file
    with pytest.raises(BadImage, match=r"cat/00.png: .*on_bad_image=skip"):
        pretrain("bad", data_path=mixed, cache_images=True, num_workers=num_workers)
    assert "are decoded" not in capsys.readouterr().out
    assert num_workers or len(read) < 3


def test_a_bad_validation_image_ends_a_run_before_it_trains(labelled, classify, tmp_path):
    folder = shutil.copytree(labelled, tmp_path / "images")
    (folder / "val/kind1/01.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"01.png: the file is empty$"):
        classify(main_finetune, data_path=folder, cache_images=True, on_bad_image="skip")
    assert not list(tmp_path.glob("run/*.pth"))
