"""Datasets of torchvision, Hugging Face and WebDataset, written by these libraries or in their layout."""

import gzip
import io
import itertools
import json
import multiprocessing
import os
import shutil
import struct
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import datasets as hugging_face
import numpy as np
import pytest
import torch
import torchvision
import webdataset
from mains import call, open_source, weights
from PIL import Image
from test_decode import saved

import main_finetune
import main_knn
from mae import parallel
from mae.checkpoints import checkpoint
from mae.data import loader, transforms
from mae.data import open as opening
from mae.data.decode import decode
from mae.data.item import Item
from mae.data.kinds.shards import Shards
from mae.data.pixels import BadImage
from mae.data.samples import Samples
from mae.recommend import check
from models_vit import vit_mini_patch4

PIXELS = np.random.default_rng(0).integers(0, 256, size=(40, 9, 9), dtype=np.uint8)
NUMBERS = {pixels.tobytes(): number for number, pixels in enumerate(PIXELS)}

png = partial(saved, kind="PNG")


def save(path: Path, color=(0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)


def write_idx(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def fashion(tmp_path):
    """FashionMNIST's own file format, with 30 images to train and 10 to test."""
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, pixels in (("train", PIXELS[:30]), ("t10k", PIXELS[30:])):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(pixels), dtype=np.uint8) % 10)
    return tmp_path


def test_datasets_with_and_without_a_train_argument(fashion):
    source = open_source("train", str(fashion), dataset="FashionMNIST")
    assert (len(source), source.classes[0], source.name(13)) == (30, "T-shirt/top", "FashionMNIST[13]")
    image, label, *_ = source[13]
    assert label == 3
    assert np.array_equal(decode(image, 1), PIXELS[13])
    assert [len(open_source(name, str(fashion), dataset="FashionMNIST")) for name in ("val", "test")] == [10, 10]
    with pytest.raises(ValueError, match="tset"):
        open_source("tset", str(fashion), dataset="FashionMNIST")
    assert len(open_source("train", dataset="FakeData")) == 1000


def test_a_dataset_with_named_splits(tmp_path):
    """The files are decoded by `mae.data.decode`; `val` is the most similar split."""
    food = tmp_path / "food-101"
    (food / "meta").mkdir(parents=True)
    for split, pies, waffles in (("train", ["apple_pie/1"], ["waffles/2", "waffles/3"]), ("test", [], ["waffles/4"])):
        (food / "meta" / f"{split}.json").write_text(json.dumps({"apple_pie": pies, "waffles": waffles}))
        for name in (*pies, *waffles):
            save(food / "images" / f"{name}.jpg")
    source = open_source("train", str(tmp_path), dataset="Food101")
    assert [source[index][1] for index in range(3)] == [0, 1, 1]
    assert source[0][0] == (food / "images/apple_pie/1.jpg").read_bytes()
    assert source.classes == ["apple_pie", "waffles"]
    assert len(open_source("val", str(tmp_path), dataset="Food101")) == 1
    (food / "images/apple_pie/1.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        _ = source[0]


def test_an_explicit_split_is_used(tmp_path):
    for folder in ("2017/Plants/leaf", "2021_train_mini/00000_a_b_c_d_e_f_g"):
        save(tmp_path / folder / "1.jpg")
    source = open_source("train", str(tmp_path), dataset="INaturalist:2021_train_mini")
    assert (len(source), source[0][1]) == (1, 0)


@pytest.fixture
def aircraft(tmp_path):
    """FGVCAircraft's own file format; its default split is `trainval`, which contains `val`."""
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for number, name in enumerate("abcdefg"):
        save(data / "images" / f"{name}.jpg", (40 * number, 0, 0))
    (data / "variants.txt").write_text("707\n747\n")
    for part, names in (("train", "ab"), ("val", "cd"), ("trainval", "abcd"), ("test", "efg")):
        listed = zip(names, itertools.cycle(("707", "747")), strict=False)
        (data / f"images_variant_{part}.txt").write_text("".join(f"{name} {kind}\n" for name, kind in listed))
    return tmp_path


def test_parts_for_training_and_validation_do_not_overlap(aircraft, caplog):
    """A part that is named is read, and not `val` in its place."""
    name_of = {file.read_bytes(): file.stem for file in aircraft.rglob("*.jpg")}

    def names(split, part=""):
        images = open_source(split, str(aircraft), dataset=f"FGVCAircraft{part}")
        return "".join(name_of[images[index][0]] for index in range(len(images)))

    assert [names(split) for split in ("train", "val", "test")] == ["ab", "cd", "efg"]
    assert [names("val", part) for part in (":train", ":val", ":test")] == ["cd", "cd", "efg"]
    caplog.set_level("INFO")
    assert [names(split, ":trainval") for split in ("train", "val")] == ["abcd", "efg"]
    assert "the val images are those of split=test" in caplog.text
    with pytest.raises(ValueError, match=r"FGVCAircraft: .*tset"):
        names("tset")


def test_an_evaluation_reads_the_part_that_is_named_and_no_run_trains_on_it(aircraft, classify, tmp_path):
    model = vit_mini_patch4(img_size=8, num_classes=2, global_pool=True)
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    flags = {"data_path": aircraft, "input_size": 8}
    evaluation = {"eval": True, "resume": tmp_path / "bare.pth", **flags}
    assert classify(main_finetune, dataset="FGVCAircraft:test", **evaluation).labels.tolist() == [0, 1, 0]
    for script in (main_finetune, main_knn):
        with pytest.raises(ValueError, match=r"FGVCAircraft:test: .*give dataset=FGVCAircraft$"):
            classify(script, dataset="FGVCAircraft:test", **flags)


def test_splits_are_no_classes_of_an_image_folder(pictures, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(pictures / "train", tmp_path / "set" / split)
    with pytest.raises(ValueError, match=r"train, val are splits.*omit `dataset`"):
        open_source("train", str(tmp_path / "set"), dataset="ImageFolder")
    assert open_source("train", str(pictures / "train"), dataset="ImageFolder").classes == ["cat", "dog"]


def test_download_is_passed_to_classes_with_keyword_arguments(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets.EMNIST, "download", lambda self: asked.append(self.root))
    with pytest.raises(ValueError, match="EMNIST:letters"):
        open_source("train", str(tmp_path), dataset="EMNIST:letters", download=True)
    assert asked == [str(tmp_path)]


@pytest.mark.parametrize(("name", "path"), [
    ("CIFAR11", "here"), ("os", "here"), ("CIFAR10", "here"), ("Food101:nowhere", "here"), ("CIFAR10:extra", "here"),
])  # fmt: skip
def test_unknown_dataset_names_are_errors(name, path, tmp_path):
    with pytest.raises(ValueError, match=f"dataset={name}"):
        open_source("train", path and str(tmp_path), dataset=name)


def test_a_dataset_without_validation_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="EuroSAT"):
        open_source("val", str(tmp_path), dataset="EuroSAT")


@pytest.fixture
def table():
    kinds = hugging_face.ClassLabel(names=["shirt", "shoe"])
    features = {"note": hugging_face.Value("string"), "picture": hugging_face.Image(), "kind": kinds}
    rows = {"note": ["x"] * 30, "picture": [{"bytes": png(p), "path": None} for p in PIXELS[:30]],
            "kind": [n % 2 for n in range(30)]}  # fmt: skip
    return hugging_face.Dataset.from_dict(rows, features=hugging_face.Features(features))


def test_parquet_in_a_folder(table, tmp_path):
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    source = open_source("train", dataset=f"hf:{tmp_path}")
    assert (len(source), source.classes, source.name(5)) == (30, ["shirt", "shoe"], f"hf:{tmp_path}[5]")
    assert source[5] == Item(png(PIXELS[5]), 1)
    with pytest.raises(ValueError, match="val"):
        open_source("val", dataset=f"hf:{tmp_path}")


def test_saved_datasets_and_image_folders_are_read(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    parts = {"train": table, "valid": table.select(range(20)), "test": table.select(range(10))}
    hugging_face.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    for folder in ("saved", "parts"):
        assert open_source("train", dataset=f"hf:{tmp_path / folder}")[5] == Item(png(PIXELS[5]), 1)
    assert [len(open_source(split, dataset=f"hf:{tmp_path / 'parts'}")) for split in ("val", "test")] == [20, 10]
    with pytest.raises(ValueError, match="validation"):
        open_source("validation", dataset=f"hf:{tmp_path / 'parts'}")
    files = [tmp_path / "images/train" / name for name in ("a/1.png", "b/2.png")]
    for number, file in enumerate(files):
        save(file, (number, 0, 0))
    source = open_source("train", dataset=f"hf:{tmp_path / 'images'}")
    assert [source[0], source[1]] == [Item(file.read_bytes(), label) for label, file in enumerate(files)]


@pytest.mark.parametrize("kind", ["torchvision", "saved", "parquet", "images"])
def test_the_version_of_a_sample_changes_with_the_files_of_its_library(kind, table, fashion, tmp_path):
    folder = tmp_path / kind

    def write(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "torchvision":
            write_idx(fashion / "FashionMNIST/raw/train-images-idx3-ubyte", np.roll(PIXELS[:30], count))
        elif kind == "saved":
            table.select(range(count, 30)).save_to_disk(folder)
        elif kind == "parquet":
            table.select(range(count, 30)).to_parquet(folder / "train-00000-of-00001.parquet")
        else:
            (folder / "1.png").write_bytes(png(PIXELS[count]))

    def version():
        dataset = "FashionMNIST" if kind == "torchvision" else f"hf:{folder}"
        return open_source("train", str(fashion) if kind == "torchvision" else None, dataset=dataset).version(0)

    write(0)
    first, again = version(), version()
    time.sleep(0.01)  # the clock of a file system may have steps of 4 ms
    write(1)
    assert (again == first, version() == first) == (True, False)


def test_datasets_without_images_are_errors(table, tmp_path):
    table.remove_columns("picture").to_parquet(tmp_path / "a" / "train.parquet")
    for folder in ("a", "nowhere"):
        with pytest.raises(ValueError, match=f"dataset=hf:.*{folder}"):
            open_source("train", dataset=f"hf:{tmp_path / folder}")
    table.add_item({"note": "", "picture": None, "kind": 0}).to_parquet(tmp_path / "b" / "train.parquet")
    with pytest.raises(BadImage, match=r"\[30\]|row"):
        _ = open_source("train", dataset=f"hf:{tmp_path / 'b'}")[30]


CLASSES = {"coarse": ["clothes"], "fine": ["b", "a"]}


@pytest.fixture
def many_columns(tmp_path):
    """Writes a dataset of two splits with masks, an id and two kinds of labels; returns its value of --dataset."""

    def write(**columns):
        kinds = {name: hugging_face.ClassLabel(names=names) for name, names in CLASSES.items() if name not in columns}
        images = {"mask": 255 - PIXELS[:30], "picture": PIXELS[:30]}
        rows = {"coarse": [0] * 30, "fine": [n % 2 for n in range(30)], "id": [7 + n for n in range(30)], **columns}
        table = hugging_face.Dataset.from_dict({name: column for name, column in rows.items() if column is not None})
        for name, kind in kinds.items():
            table = table.cast_column(name, kind)
        for name, pixels in images.items():
            files = [{"bytes": png(p), "path": None} for p in pixels]
            table = table.add_column(name, files, feature=hugging_face.Image())
        parts = {"train": table, "validation": table.select(range(20))}
        hugging_face.DatasetDict(parts).save_to_disk(tmp_path / "set")
        return f"hf:{tmp_path / 'set'}"

    return write


def test_one_of_several_columns_of_images_or_labels_must_be_named(many_columns, pretrain, classify):
    dataset, settings = many_columns(), {"data_path": None, "in_chans": 1, "input_size": 8}
    with pytest.raises(ValueError, match=f"{dataset}#.*mask, picture"):
        pretrain(**settings, dataset=dataset)
    pretrain(**settings, dataset=f"{dataset}#picture", epochs=1)  # it needs no labels
    with pytest.raises(ValueError, match=f"{dataset}#picture,.*coarse, fine"):
        classify(main_knn, **settings, dataset=f"{dataset}#picture")
    source = open_source("train", dataset=f"{dataset}#picture,fine")
    assert (source.classes, source.labels[5], source[5]) == (["b", "a"], 1, Item(png(PIXELS[5]), 1))
    assert open_source("train", dataset=f"{dataset}#mask,coarse")[5] == Item(png(255 - PIXELS[5]), 0)
    for columns in ("photo", "picture,nothing", "fine,picture"):
        with pytest.raises(ValueError, match="give hf:"):
            open_source("train", dataset=f"{dataset}#{columns}")


@pytest.mark.parametrize("names", [["1", "0"], ["1", "2"], ["b", "a"]])
def test_numbers_of_class_labels_count_the_outputs_of_a_head_without_names(
    names, many_columns, classify, tmp_path, monkeypatch
):
    """The names may be integers, too, such as stars."""
    monkeypatch.setitem(CLASSES, "fine", names)
    model = vit_mini_patch4(img_size=8, in_chans=1, num_classes=2, global_pool=True)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 1.0])
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    dataset = f"{many_columns(coarse=None)}#picture,fine"
    flags = {"data_path": None, "in_chans": 1, "input_size": 8}
    found = classify(main_finetune, eval=True, resume=tmp_path / "bare.pth", dataset=dataset, **flags)
    assert found.labels.tolist() == [n % 2 for n in range(20)]
    assert found.predictions.tolist() == [1] * 20


def test_integers_and_texts_are_labels_and_an_id_is_none(many_columns, classify):
    numbers = [2 * (n % 3) for n in range(30)]
    for column in (numbers, [f"kind {n}" for n in numbers]):
        dataset = many_columns(coarse=None, fine=None, label=column)
        source = open_source("train", dataset=f"{dataset}#picture")
        assert [source.classes[label] for label in source.labels] == [str(value) for value in column]
        assert source[4][1] == source.labels[4]
    dataset = many_columns(coarse=None, fine=None, kind=["x"] * 30)
    with pytest.raises(ValueError, match=f"{dataset}#picture,.*id, kind"):
        classify(main_knn, data_path=None, dataset=f"{dataset}#picture")
    assert open_source("train", dataset=f"{dataset}#picture,kind").classes == ["x"]


def write_shards(writer, bad=()):
    with writer:
        for number, pixels in enumerate(PIXELS):
            data = b"" if number in bad else png(pixels)
            writer.write({"__key__": f"{number:03}", "png": data, "cls": number % 10, "json": {"number": number}})


@pytest.fixture
def shards(tmp_path):
    """40 images in 4 shards; one image is bad."""
    write_shards(webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=10, verbose=0), bad=(17,))
    return tmp_path


@pytest.mark.parametrize(("num_shards", "readers"), [(1, 2), (1, 5), (4, 2), (4, 8)])
def test_images_of_shards_are_read_equally_often(shards, num_shards, readers):
    """A reader goes on where it has stopped, in the order in which it has read, so that it repeats no image."""
    source = open_source("train", dataset=f"wds:{shards}/set-00{{0..{num_shards - 1}}}.tar")
    share = len(source) // readers
    found = Counter()
    for epoch, part in itertools.product(range(10), range(readers)):
        stream = source.stream(0, part, readers, lambda *_: None, start=epoch * len(source))
        found.update(name for _, name, *_ in itertools.islice(stream, share))
    assert len(found) == len(source) and {*found.values()} == {10}


def batches_of(shards, num_workers=0, on_bad_image="skip", batch_size=8, pattern="set-{000..003}.tar", seed=0, **own):
    source = open_source("train", dataset=f"wds:{shards}/{pattern}")
    samples = Samples(
        source, transforms.scaled_transform(0), in_chans=1, seed=seed, draw_noise=partial(torch.rand, 4),
        on_bad_image=on_bad_image,
    )  # fmt: skip
    return loader.TrainLoader(samples, batch_size, seed, num_workers, False, **own)


def images_of(batches, epoch, first_iteration=0) -> list[int]:
    """The images of an epoch, by their numbers."""
    batches.seek(epoch, first_iteration)
    return [NUMBERS[image.numpy().tobytes()] for images, *_ in batches for image in images]


@pytest.mark.parametrize("pattern", ["set-{000..003}.tar", "set-*.tar"])
def test_an_epoch_streams_every_image_once(shards, pattern):
    batches = batches_of(shards, batch_size=13, pattern=pattern)
    assert len(batches) == 3
    first, second = images_of(batches, 0), images_of(batches, 1)
    assert sorted(first) == sorted(set(range(40)) - {17})
    assert sorted(first) == sorted(second)
    assert first != second
    assert images_of(batches, 0) == first


def test_the_order_of_a_stream_depends_on_seed_and_epoch(shards):
    """Within a shard, too. The noise differs between epochs; --num_images limits an epoch."""
    orders, noise = set(), set()
    for seed, epoch in itertools.product((0, 1), repeat=2):
        batches = batches_of(shards, batch_size=10, pattern="set-000.tar", seed=seed)
        orders.add(tuple(images_of(batches, epoch)))
        noise |= {row.numpy().tobytes() for batch in batches for row in batch.noise}
    assert (len(orders), len(noise)) == (4, 40)
    begun, resumed = (batches_of(shards, updates=2) for _ in range(2))
    assert [images_of(begun, epoch) for epoch in range(2)][1] == images_of(resumed, 1)
    assert len(open_source("train", dataset=f"wds:{shards}/set-000.tar", num_images=5)) == 5


@pytest.mark.parametrize(("pattern", "workers"), [("all.tar", 0), ("set-*.tar", 0), ("set-*.tar", 2)])
def test_epochs_of_a_number_of_updates_continue_through_the_shards(tmp_path, pattern, workers, monkeypatch):
    """Without a shuffle buffer, three passes over the 40 images of one or four shards are 10 epochs of 12 images."""
    write_shards(webdataset.TarWriter(str(tmp_path / "all.tar")))
    write_shards(webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=10, verbose=0))
    monkeypatch.setattr(webdataset, "shuffle", lambda *_, **__: lambda items: items)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    batches = batches_of(tmp_path, workers, batch_size=3, pattern=pattern, updates=4)
    epochs = [images_of(batches, epoch) for epoch in range(10)]
    assert Counter(number for epoch in epochs for number in epoch) == dict.fromkeys(range(40), 3)
    if not workers:  # a resumed run continues, also within an epoch
        resumed = batches_of(tmp_path, batch_size=3, pattern=pattern, updates=4)
        assert images_of(resumed, 7, first_iteration=3) == epochs[7][9:]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_share_the_stream(shards, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    batches = batches_of(shards, workers, batch_size=5)
    for epoch in (0, 1):
        assert len(images_of(batches, epoch)) == 40
        assert len(set(images_of(batches, epoch))) > 20
    assert len(images_of(batches, 2, first_iteration=5)) == 15


@pytest.fixture
def spawned():
    """Worker processes are not forked, as in Python 3.14, and do not inherit the process group."""
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.slow
def test_processes_share_the_stream_if_their_worker_processes_are_not_forked(shards, monkeypatch, spawned):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(images_of(batches_of(shards, num_workers=1), 0))
    assert parts[0] and parts[1] and not {*parts[0]} & {*parts[1]}


def test_labels_and_noise_belong_to_the_image(shards):
    batches, other = batches_of(shards), batches_of(shards, batch_size=3)
    batches.seek(0)
    noise_of = {}
    for batch in batches:
        for image, label, own in zip(batch.images, batch.labels, batch.noise, strict=True):
            number = NUMBERS[image.numpy().tobytes()]
            assert label == number % 10
            noise_of[number] = own
    other.seek(0)
    image, *_, noise = next(iter(other))
    assert torch.equal(noise[0], noise_of[NUMBERS[image[0].numpy().tobytes()]])


def test_a_bad_image_and_a_damaged_shard_of_a_stream_are_named(shards, caplog):
    images_of(batches_of(shards), 0)
    assert "set-001.tar: 017: the file is empty; another image replaces it" in caplog.text
    assert "1 of 40 images since the start or resume of this epoch can't be read" in caplog.text
    with pytest.raises(BadImage, match=r"set-001.tar: 017"):
        images_of(batches_of(shards, on_bad_image="error"), 0)
    batches = batches_of(shards)
    os.truncate(shards / "set-002.tar", (shards / "set-002.tar").stat().st_size // 2 + 100)
    with (shards / "set-003.tar").open("r+b") as file:
        file.seek(10 * 512)  # tarfile takes a damaged header for the end of the archive
        assert file.read(8).startswith(b"03")
        file.seek(-8, os.SEEK_CUR)
        file.write(b"damage")
    assert set(images_of(batches, 0)) < set(range(40))
    for number in (2, 3):
        assert f"set-00{number}.tar: the shard can't be read to its end" in caplog.text
    with pytest.raises(ValueError, match=r"set-002.tar"):
        batches_of(shards)


def write_shard(path, names=("000.jpg", "001.jpg", "n01.x.png")):
    """A shard of files that can't be decoded."""
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))


def streamed(pattern, num_images=None):
    return list(Shards(str(pattern), num_images).stream(0, 0, 1, lambda *_: False, passes=1))


def test_samples_are_counted_as_in_webdataset(tmp_path):
    write_shard(tmp_path / "a.tar")
    assert len(Shards(f"{tmp_path}/a.tar", None)) == 3
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"b.tar.gz"):
        Shards(f"{tmp_path}/b.tar.gz", None)
    assert len(streamed(tmp_path / "b.tar.gz", 3)) == 3


@pytest.mark.parametrize("names", [[*"bcd", "a.jpg", "a.png"], [f"a.{number}.jpg" for number in range(6)]])
@pytest.mark.parametrize("num_images", [None, 12])
def test_no_image_of_a_sample_of_several_is_dropped(tmp_path, pretrain, names, num_images):
    """With --num_images, too, so that the count and the reading agree."""
    write_shard(tmp_path / "set.tar", [name if "." in name else f"{name}.jpg" for name in names])
    given = {"num_images": num_images} if num_images else {}
    with pytest.raises(ValueError, match=r"set.tar: a "):
        pretrain(data_path=None, dataset=f"wds:{tmp_path}/set.tar", on_bad_image="skip", **given)


def test_a_file_is_never_a_command(tmp_path, monkeypatch):
    """webdataset runs `pipe:COMMAND`. A pattern finds files, also with such a name, and in any folder."""
    folder = tmp_path / "set [1]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_shard(folder / "pipe:touch proof;#.tar")
    for pattern in ("*.tar", f"{folder}/*.tar"):
        assert len(streamed(pattern)) == 3
    assert not (folder / "proof").exists()


def test_files_of_macos_are_neither_counted_nor_streamed(tmp_path):
    write_shard(tmp_path / "a.tar", ("._000.jpg", "000.jpg", "__MACOSX/001.jpg", "001.jpg"))
    assert sorted(name.rpartition(": ")[2] for _, name, *_ in streamed(tmp_path / "a.tar")) == ["000", "001"]
    assert len(Shards(f"{tmp_path}/a.tar", None)) == 2


def test_non_numeric_labels_are_ignored(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, label in (("a", b"cat"), ("b", b"7")):
            writer.write({"__key__": key, "png": png(PIXELS[0]), "cls": label})
    assert sorted(label for *_, label in streamed(tmp_path / "a.tar")) == [-1, 7]


def test_examples_of_a_stream(shards):
    samples = batches_of(shards).batches.dataset.samples
    (images, *_, noise), again = loader.examples(samples, 6), loader.examples(samples, 6)
    assert (images.shape, noise.shape) == ((6, 1, 9, 9), (6, 4))
    assert torch.equal(again[0], images)


def test_invalid_shards_are_errors(tmp_path):
    for shards, message in (
        (f"{tmp_path}/a-{{000..003}}.tar", r"a-000\.tar"),
        (f"{tmp_path}/a*.tar", r"a\*\.tar"),
        ("https://example.org/{000..003}.tar", "num_images="),
    ):
        with pytest.raises(ValueError, match=message):
            Shards(shards, None)
    assert len(Shards("https://example.org/{000..003}.tar", 1000)) == 1000


@pytest.mark.parametrize(("entry", "name"), opening.LAYOUTS.items())
def test_the_warning_of_stored_datasets_names_a_class_of_torchvision(tmp_path, entry, name):
    (tmp_path / entry).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / entry).touch()
    assert opening.dataset_in(tmp_path) == name
    assert issubclass(getattr(torchvision.datasets, name), torch.utils.data.Dataset)


@pytest.fixture
def letters(tmp_path):
    """EMNIST's letters a, b and z, whose labels count from 1; torchvision calls the class 0 N/A."""
    for part in ("train", "test"):
        raw = tmp_path / "EMNIST/raw"
        labels = np.array([1, 2, 26] * 4, dtype=np.uint8)
        pixels = np.stack([np.full((28, 28), 8 * label, np.uint8) for label in labels])
        write_idx(raw / f"emnist-letters-{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"emnist-letters-{part}-labels-idx1-ubyte", labels)
    return {"data_path": tmp_path, "dataset": "EMNIST:letters", "in_chans": 1, "batch_size": 4, "aa": "none"}


def test_a_class_that_keeps_a_number_free_has_no_output(letters, classify, capsys, tmp_path):
    alphabet = list("abcdefghijklmnopqrstuvwxyz")
    out = classify(main_finetune, **letters, epochs=1)
    assert (len(weights(out, "checkpoint-0.pth")["head.bias"]), classes_of(out)) == (26, alphabet)
    call(check, str(tmp_path), dataset="EMNIST:letters", num_workers=0)
    assert "classes     26, of 0 to 4 images" in capsys.readouterr().out
    scores = classify(main_finetune, **letters, eval=True, resume=out / "checkpoint-0.pth")
    assert set(scores.labels.tolist()) == {0, 1, 25}
    state = checkpoint.read(out / "checkpoint-0.pth")
    state["args"] = {name: value for name, value in state["args"].items() if name != "classes"}
    checkpoint.write(state, tmp_path / "nameless.pth")
    nameless = classify(main_finetune, **letters, eval=True, finetune=tmp_path / "nameless.pth")
    assert nameless.scores() == scores.scores()


def test_a_head_with_an_output_for_it_stays(letters, classify, tmp_path):
    """As in files of earlier versions, and in files without names: it is evaluated, resumed, and fine-tuned."""
    flags = {**letters, "nb_classes": 27, "warmup_epochs": 0}
    out = classify(main_finetune, **flags, epochs=1)
    assert classes_of(out)[:2] == ["N/A", "a"]
    del flags["nb_classes"]
    state = checkpoint.read(out / "checkpoint-0.pth")
    expected = classify(main_finetune, **flags, eval=True, resume=out / "checkpoint-0.pth")
    assert set(expected.labels.tolist()) == {1, 2, 26}
    state["args"] = {name: value for name, value in state["args"].items() if name != "classes"}
    checkpoint.write(state, tmp_path / "nameless.pth")
    for model in (out / "checkpoint-0.pth", tmp_path / "nameless.pth"):
        found = classify(main_finetune, **flags, eval=True, finetune=model)
        assert (found.scores(), found.labels.tolist()) == (expected.scores(), expected.labels.tolist())
    classify(main_finetune, **flags, epochs=2, resume="auto")
    assert classes_of(out, "checkpoint-1.pth")[:2] == ["N/A", "a"]
    still = {"epochs": 1, "lr": 0, "min_lr": 0}
    again = classify(main_finetune, "again", **flags, **still, nb_classes=27, finetune=out / "checkpoint-0.pth")
    assert torch.equal(weights(again, "checkpoint-0.pth")["head.weight"], state["model"]["head.weight"])


def classes_of(out, name="checkpoint-0.pth"):
    return checkpoint.read(out / name)["args"]["classes"]
