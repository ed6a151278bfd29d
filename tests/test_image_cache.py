"""--cache_images: the decoded images of a source in a file that processes share."""

import errno
import os
import pickle
import random
import shutil
from unittest import mock

import forks
import numpy as np
import pytest
import torch
from mains import Stopped, assert_equal, lines, open_source, stop_after, weights
from PIL import Image

import main_finetune
from mae.data import image_cache, loader, transforms
from mae.data import samples as samples_module
from mae.data.decode import decode, decode_item
from mae.data.item import Batch
from mae.data.kinds.shards import Shards
from mae.data.loader import TrainLoader
from mae.data.pixels import BadImage, PixelValues, to_tensor
from mae.data.samples import Samples
from mae.data.transforms import scaled_transform


def cached(source, num_workers=0, on_bad_image=None, **options):
    samples = Samples(source, scaled_transform(0), **{"in_chans": 3, "seed": 0, **options}, on_bad_image=on_bad_image)
    return image_cache.cached(samples, num_workers)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def mixed(pictures, tmp_path):
    """The pictures, a larger one, an image with 16 bits, and a file that is no image."""
    folder = tmp_path / "mixed"
    shutil.copytree(pictures / "train", folder)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (90, 80, 3), np.uint8)).save(folder / "cat" / "large.png")
    Image.fromarray(np.full((9, 7), 40_000, dtype=np.uint16)).save(folder / "cat" / "deep.png")
    (folder / "dog" / "text.jpg").write_text("text")
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """The number of images that this process decodes."""
    read = []
    monkeypatch.setattr(
        samples_module, "decode_item", lambda *args, **options: read.append(1) or decode_item(*args, **options)
    )
    return read


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("fast_jpeg", [False, True])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_images_are_those_of_the_source(mixed, in_chans, fast_jpeg, num_workers):
    """Also in a process that does not fork."""
    source = open_source("train", str(mixed))
    options = {"in_chans": in_chans, "fast_jpeg": fast_jpeg, "num_workers": num_workers}
    cache = cached(source, **options, on_bad_image="skip")
    assert (len(cache), cache.classes) == (27, ["cat", "dog"])
    cache, in_file = pickle.loads(pickle.dumps(cache)), 0
    for index in range(27):
        assert cache.name(index) == source.name(index)
        if source.name(index).endswith("text.jpg"):
            with pytest.raises(BadImage, match="not an image"):
                decode(cache[index][0], in_chans)
            continue
        (ours, label, *_), (theirs, expected, *_) = cache[index], source[index]
        pixels = [decode(data, in_chans, fast_jpeg=fast_jpeg) for data in (ours, theirs)]
        assert torch.equal(*map(to_tensor, pixels))
        if max(to_tensor(pixels[0]).shape[1:]) > 64:  # else a tensor is scaled with the same result
            assert type(pixels[0]) is type(pixels[1])
        assert label == expected
        in_file += isinstance(ours, torch.Tensor)
    assert in_file == 25


def test_a_file_is_used_again_while_its_pixels_are_the_same(mixed, folder, decoded):
    (mixed / "dog" / "text.jpg").unlink()

    def read(**options):
        decoded.clear()
        cached(open_source("train", str(mixed)), **options)
        return len(decoded)

    assert [read(), read(num_workers=0)] == [26, 0]
    assert [read(in_chans=1), read(fast_jpeg=True), read(exif=True), read(values=PixelValues("nan"))] == [26] * 4
    changed = next((mixed / "cat").glob("*.png"))
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
    assert [read(), read()] == [26, 0]
    changed.rename(changed.with_name("zz.png"))
    assert read() == 26
    assert len(list(folder.iterdir())) == 7


@pytest.mark.parametrize("kind", ["folder", "archive", "hf"])
def test_a_replaced_image_of_the_same_size_and_time_is_read(tmp_path, kind):
    """As `rsync -t` replaces a file."""
    images, packed = tmp_path / "images", tmp_path / "images.zip"
    images.mkdir()
    place = {"folder": {"data_path": str(images)}, "archive": {"data_path": str(packed)},
             "hf": {"dataset": f"hf:{images}"}}[kind]  # fmt: skip

    def first_pixel(brightness):
        for number in range(2):
            Image.new("L", (4, 4), brightness + number).save(images / f"{number}.bmp")
            os.utime(images / f"{number}.bmp", (10**9, 10**9))
        if kind == "archive":
            shutil.make_archive(str(images), "zip", images)
            os.utime(packed, (10**9, 10**9))
        file = packed if kind == "archive" else images / "0.bmp"
        pixels = cached(open_source("train", **place), in_chans=1)[0].image
        return file.stat().st_size, file.stat().st_mtime_ns, int(pixels.max())

    old, new = first_pixel(10), first_pixel(200)
    assert old[:2] == new[:2]
    assert (old[2], new[2]) == (10, 200)


def test_the_file_of_a_dataset_of_code_is_removed(folder):
    """Its images may depend on anything, such as a module that its own imports."""
    items = [(np.full((4, 4, 3), number, np.uint8), 0) for number in range(3)]
    for brightness in (0, 100):
        source = open_source("train", dataset="py:tests:none", function=lambda split, path: items)  # noqa: B023
        cache = cached(source)
        assert [int(cache[index][0].max()) for index in range(3)] == [brightness + number for number in range(3)]
        assert len(list(folder.iterdir())) == 1
        del cache
        assert not list(folder.iterdir())
        items = [(image + 100, label) for image, label in items]


OF_TWO = """
import sys
import numpy as np
from pathlib import Path
from test_image_cache import cached, open_source, samples_module
from mae import parallel

parallel.init("cpu")
read, decode = [], samples_module.decode_item
samples_module.decode_item = lambda *args, **options: read.append(1) or decode(*args, **options)
source = open_source("train", sys.argv[1])
try:
    cache = cached(source)
    same = all(np.array_equal(cache[n][0].numpy(), np.moveaxis(np.load(source.name(n)), 2, 0)) for n in range(40))
    Path(f"out{parallel.rank()}").write_text(f"{len(read)} {same}")
except ValueError as error:
    Path(f"out{parallel.rank()}").write_text(str(error))
parallel.barrier()
parallel.teardown()
"""


@pytest.mark.parametrize("bad", [False, True])
def test_one_process_of_a_machine_writes_the_file(tmp_path, bad):
    """The others read it, or have the same error."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        np.save(tmp_path / f"images/{number:02}.npy", np.full((5, 5, 3), number, dtype=np.uint8))
    if bad:
        (tmp_path / "images/30.npy").write_bytes(b"")
    forks.run_code(OF_TWO, tmp_path, tmp_path / "images", count=2)
    said = [(tmp_path / f"out{rank}").read_text() for rank in range(2)]
    assert all("30.npy: the file is empty" in text for text in said) if bad else said == ["40 True", "0 True"]


def test_too_many_images_are_an_error_before_all_are_decoded(tmp_path, folder, monkeypatch, decoded):
    """The folder is as before. A disk that is full later is an error, too."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        np.save(tmp_path / f"images/{number:02}.npy", np.zeros((10, 10, 3), dtype=np.uint8))
    source = open_source("train", str(tmp_path / "images"))
    monkeypatch.setattr(image_cache, "SAMPLE", 10)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"`cache_images`.*MAE_CACHE"):
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 300 * 24 - 1))
        cached(source)
    assert len(decoded) == image_cache.BATCH
    with monkeypatch.context() as patch, pytest.raises(OSError, match="images"):
        patch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        cached(source)
    assert not list(folder.iterdir())
    assert len(cached(source)) == 40


def test_shards_have_no_random_access():
    shards = object.__new__(Shards)
    shards.title = "wds:set.tar"
    with pytest.raises(ValueError, match="`cache_images`"):
        cached(shards)


def test_resuming_with_and_without_a_cache_is_exact(pretrain, mixed, monkeypatch, capsys):
    settings = {"data_path": mixed, "on_bad_image": "skip"}
    whole = pretrain("whole", **settings)
    assert "text.jpg: the file is not an image" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 3)
        pretrain("parts", **settings, save_minutes=0, cache_images=True, num_workers=1)
    said = capsys.readouterr().out
    assert "`cache_images`: 27 decoded images take" in said
    assert "text.jpg: the file is not an image" in said
    parts = pretrain("parts", **settings, resume="auto")
    assert_equal(weights(whole), weights(parts))
    assert lines(whole)[-1]["train_loss"] == lines(parts)[-1]["train_loss"]
    assert "--cache_images was" not in capsys.readouterr().out  # the flag may change without a warning


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_ends_a_run_before_the_others_are_decoded(mixed, folder, pretrain, num_workers, decoded):
    (mixed / "cat" / "00.png").write_text("text")  # the first file
    with pytest.raises(BadImage, match=r"cat/00.png"):
        pretrain("bad", data_path=mixed, cache_images=True, num_workers=num_workers)
    assert not list(folder.iterdir())
    assert num_workers or len(decoded) == 1


@pytest.mark.slow
def test_a_bad_validation_image_ends_a_run_before_it_trains(labelled, classify, tmp_path):
    folder = shutil.copytree(labelled, tmp_path / "images")
    (folder / "val/kind1/01.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"01.png"):
        classify(main_finetune, data_path=folder, cache_images=True, on_bad_image="skip")
    assert not list(tmp_path.glob("run/*.pth"))


def draw_noise():
    return torch.cat([torch.rand(10), torch.tensor([random.random(), np.random.rand()])])


@pytest.mark.parametrize(("transform", "is_whole_batch"), [
    (transforms.pretrain_transform((12, 16), crop="none", vflip=0.3), True),
    (transforms.WithValidPatches(transforms.pretrain_transform((12, 16), crop="none"), (4, 4), 0.5, 2), True),
    (transforms.eval_transform((12, 16), crop="none"), True),
    (transforms.pretrain_transform((12, 16)), False),
    (transforms.pretrain_transform((16, 12), crop="none"), False),
    (lambda item: transforms.eval_transform((12, 16), crop="none")(item), False),  # of a user
])  # fmt: skip
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_batch_of_equal_images_is_that_of_single_images(tmp_path, transform, is_whole_batch, in_chans):
    """Images, labels, noise, memory format, and the generators of the process. Repeated samples differ.

    The mask uses all generators, as that of a user may.
    """
    draw = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "images" / str(number % 2) / f"{number:02}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, draw.integers(0, 256, (12, 16, in_chans), dtype=np.uint8))
    source = open_source("train", str(tmp_path / "images"))
    options = {"in_chans": in_chans, "seed": 3, "draw_noise": draw_noise}
    cache = cached(source, in_chans=in_chans)

    def batches(images, repeats):
        samples = Samples(images, transform, **options)
        found = TrainLoader(samples, 6, 3, 0, False, repeats=repeats)
        found.seek(5)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        return [*found, draw_noise()]

    for repeats in (1, 3):
        ours, theirs = batches(cache, repeats), batches(source, repeats)
        assert torch.equal(ours.pop(), theirs.pop())
        assert len(ours) == len(theirs) == 2 * repeats
        for our, their in zip(ours, theirs, strict=True):
            assert ours[0].images.dtype == torch.uint8
            assert all(torch.equal(getattr(our, slot), getattr(their, slot)) for slot in ("images", "labels", "noise"))
            assert our.labels.dtype == their.labels.dtype
            assert our.images.stride() == their.images.stride() or not is_whole_batch
            assert our.valid is their.valid is None
    samples = Samples(cache, transform, **options)
    assert isinstance(samples.__getitems__([(0, 0), (0, 1)]), Batch) == is_whole_batch
    assert torch.equal(samples[5, 4].noise, Samples(source, transform, **options)[5, 4].noise)


def test_a_batch_has_the_labels_of_single_images():
    """Vectors. If one image has another size, all are read one by one."""
    items = [(np.full((8, 8, 3), number, np.uint8), np.array([number % 2, 1], np.float32)) for number in range(4)]
    for images, is_whole_batch in ((items, True), ([*items, (np.zeros((8, 9, 3), np.uint8), items[0][1])], False)):
        source = open_source("train", dataset="py:tests:none", function=lambda *_: images, task="multilabel")  # noqa: B023
        samples = Samples(cached(source), transforms.eval_transform(8, crop="none"), in_chans=3, seed=0)
        assert isinstance(samples.__getitems__([(0, 0)]), Batch) == is_whole_batch
        (batch, *_) = loader.eval_loader(samples, 4, 1, False)  # of a worker process
        (expected, *_) = loader.eval_loader(Samples(source, samples.transform, in_chans=3, seed=0), 4, 0, False)
        assert torch.equal(batch.labels, expected.labels)
        assert batch.labels.dtype == expected.labels.dtype
        assert batch.labels.shape == (4, 2)
        assert torch.equal(batch.images, expected.images)
        assert batch.noise is expected.noise is None


def test_the_splits_of_a_dataset_with_one_folder_have_files_of_their_own(tmp_path):
    """The samples of both have the same numbers, such as those of the 1,880 images of each split of DTD."""
    root = tmp_path / "dtd/dtd"
    for split, value in (("train", 0), ("val", 90), ("test", 180)):
        for label in range(2):
            file = root / f"images/kind{label}/{split}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), value + label, np.uint8)).save(file)
        (root / "labels").mkdir(exist_ok=True)
        (root / f"labels/{split}1.txt").write_text("".join(f"kind{label}/{split}.png\n" for label in range(2)))
    values = []
    for split in ("train", "val"):
        images = cached(open_source(split, str(tmp_path), dataset="DTD"))
        values.append(
            [int(to_tensor(decode_item(images[index], 3, values=PixelValues()).image).max()) for index in (0, 1)]
        )
    assert values == [[0, 1], [90, 91]]
