"""Data: random numbers, order and parts of a dataset as functions of seed, epoch and rank."""

import io
import random
import shutil
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
import webdataset
from conftest import make_samples
from PIL import Image

from util import datasets, dist
from util.cli import entry_point
from util.data import decode, loader, resize, samples, sources, tiff_bounds
from util.data.folders import find_files
from util.data.loader import EpochBatches, FeatureBatches, TrainLoader
from util.data.transforms import Normalize
from util.data.webdataset_shards import Shards
from util.datasets import open_source
from util.evaluation import pictures

ROWS = np.random.default_rng(0).integers(0, 256, size=(24, 6, 6), dtype=np.uint8)


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def save(path, pixels=ROWS[0]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))


# ------------------------------------------------------------------------------------------------------------- order


def order_of(seed, epoch, **options):
    batches = EpochBatches(40, 8, seed, **options)
    batches.seek(epoch)
    return [index for batch in batches for _, index in batch]


def test_the_order_depends_on_the_seed_and_the_epoch():
    orders = [order_of(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert all(order != sorted(order) for order in orders)


def test_the_train_loader_passes_on_its_arguments(pictures):
    batches = TrainLoader(make_samples(pictures), 4, 7, 0, True, repeats=2, accum_iter=5)
    assert len(batches) == 10  # 24 images twice are 48 samples: 12 batches, 2 updates of 5
    assert batches.num_images == 48
    assert batches.images_per_iteration == 4
    assert batches.batches.pin_memory is True
    assert TrainLoader(make_samples(pictures), 4, 7, 0, False).batches.pin_memory is False
    assert (batches.order.seed, batches.order.repeats) == (7, 2)
    batches.seek(3, 8)
    assert len([index for batch in batches.order for index in batch]) == 8
    assert {epoch for batch in batches.order for epoch, _ in batch} == {3}


def test_random_numbers_of_a_batch_depend_on_seed_epoch_iteration_and_rank(pictures, monkeypatch):
    numbers = set()
    for seed in (0, 1):
        batches = TrainLoader(make_samples(pictures), 4, seed, 0, False)
        for epoch in (0, 1):
            batches.seek(epoch)
            for step in (0, 1):
                for rank in (0, 1):
                    monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
                    batches.seed_iteration(step)
                    numbers |= {torch.rand(1).item(), random.random(), np.random.rand()}
    assert len(numbers) == 3 * 16
    batches.seed_iteration(1)
    assert {torch.rand(1).item(), random.random(), np.random.rand()} < numbers  # repeated


def test_every_split_of_features_has_its_own_order(monkeypatch):
    features = torch.arange(12.0)[:, None].expand(-1, 3)
    orders = []
    for seed in (0, 1):
        for epoch in (0, 1):
            for rank in (0, 1):
                monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
                batches = FeatureBatches(features, 100 + torch.arange(12), 4, seed)
                batches.seek(epoch)
                epoch_batches = list(batches)
                for values, labels, indices in epoch_batches:
                    assert torch.equal(labels, 100 + indices)
                    assert torch.equal(values, features[indices])
                orders.append(tuple(torch.cat([indices for _, _, indices in epoch_batches]).tolist()))
                assert sorted(orders[-1]) == list(range(12))
                batches.seek(epoch, 2)
                assert [tuple(indices.tolist()) for _, _, indices in batches] == [orders[-1][8:]]
    assert len(set(orders)) == 8


def test_evaluation_keeps_the_order_of_the_data_set(pictures, monkeypatch):
    source = make_samples(pictures)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        batches = loader.eval_loader(source, 5, 0, pin_memory=True)
        assert batches.pin_memory is True
        images, labels, _ = (torch.cat(values) for values in zip(*batches, strict=True))
        assert torch.equal(labels, torch.from_numpy(source.source.labels[rank::2].copy()))
        assert torch.equal(images, torch.stack([source[0, index].image for index in range(rank, 24, 2)]))


def test_examples_are_spread_over_the_data_set(pictures):
    source = make_samples(pictures)
    _, labels, noise = loader.examples(source, 4)
    assert labels.tolist() == source.source.labels[[0, 7, 15, 23]].tolist()
    assert torch.equal(noise, torch.stack([source[0, index].noise for index in (0, 7, 15, 23)]))


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(loader, "_cores", lambda: 32)
    monkeypatch.setattr(dist, "processes_here", lambda: 8)
    assert loader.up_to_cores(10) == 4
    monkeypatch.setattr(dist, "processes_here", lambda: 64)
    assert loader.up_to_cores(10) == 1


# ------------------------------------------------------------------------------------------------- random numbers


def test_the_three_generators_continue_after_a_sample(pictures):
    source = make_samples(pictures)

    def draws(between):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        between()
        return torch.rand(1).item(), random.random(), np.random.rand()

    assert draws(lambda: source[0, 1]) == draws(lambda: None)


def test_the_replacement_of_a_bad_image_depends_on_seed_and_epoch(pictures):
    def replacements(seed, epoch, index):
        candidates = make_samples(pictures, seed)._candidates(epoch, index)
        return tuple(next(candidates) for _ in range(8))

    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (4, 5)]
    sequences = [replacements(*key) for key in keys]
    assert [numbers[0] for numbers in sequences] == [4, 5] * 4
    assert len({numbers[1:] for numbers in sequences}) == 8
    assert all(0 <= number < 24 for numbers in sequences for number in numbers)


@pytest.fixture
def shards(tmp_path):
    """Three shards of eight images."""
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for number in range(8 * shard, 8 * shard + 8):
                writer.write({"__key__": f"{number:02}", "png": png(ROWS[number])})
    return tmp_path


def streamed(source, seed, epoch=0, part=0, parts=1, laps=1):
    stream = source.stream(seed, part, parts, lambda *_: False, epoch * len(source), laps)
    return [int(name.rpartition(": ")[2]) for _, name, _, _ in stream]


def test_the_order_of_a_stream_depends_on_the_epoch(shards, monkeypatch):
    """The order in a shard, and the order of shards if samples are not shuffled."""
    one = Shards(f"{shards}/0.tar", None)
    assert len({tuple(streamed(one, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    monkeypatch.setattr(webdataset, "shuffle", lambda *_, **__: lambda items: items)
    several = Shards(f"{shards}/{{0..2}}.tar", None)
    assert len({tuple(streamed(several, 0, epoch)[::8]) for epoch in range(12)}) > 3
    assert len({tuple(streamed(several, seed)[::8]) for seed in range(12)}) > 3


def test_the_parts_of_a_stream_are_disjoint_and_take_turns(shards):
    several = Shards(f"{shards}/{{0..2}}.tar", None)
    parts = [set(streamed(several, 0, 0, part, 3)) for part in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(24))
    # With three shards and two parts, a part has two shards in one lap and one shard in the next.
    assert [len(streamed(several, 0, 0, 0, 2, laps)) for laps in (1, 2, 3)] == [16, 24, 40]


def test_ranks_stream_different_images(shards, monkeypatch):
    source = make_samples_of(Shards(f"{shards}/{{0..2}}.tar", None))
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    images = []
    for rank in range(3):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        stream = samples.StreamedSamples(source, source.source)
        stream.seek(0, 2, 4)
        images += [sample.image.numpy().tobytes() for sample in stream]
    assert len(set(images)) == len(images) == 24


def make_samples_of(source, seed=0):
    return samples.Samples(source, torch_of, in_chans=1, seed=seed, draw_noise=partial(torch.rand, 3))


def torch_of(picture):
    return torch.from_numpy(np.array(picture))[None]


def test_noise_and_order_of_streamed_images_depend_on_seed_and_epoch(shards):
    source = Shards(f"{shards}/0.tar", None)
    noise, orders = set(), set()
    for seed in (0, 1):
        for epoch in (0, 1):
            stream = samples.StreamedSamples(make_samples_of(source, seed), source)
            stream.seek(8 * epoch, 1, 8)
            epoch_samples = list(stream)
            noise |= {tuple(sample.noise.tolist()) for sample in epoch_samples}
            orders.add(tuple(sample.image.numpy().tobytes() for sample in epoch_samples))
    assert len(noise) == 32
    assert len(orders) == 4


def test_num_images_sets_the_number_of_images_in_shards(shards):
    assert len(open_source("train", dataset=f"wds:{shards}/0.tar", num_images=5)) == 5
    assert len(open_source("train", dataset=f"wds:{shards}/0.tar")) == 8


# ------------------------------------------------------------------------------------------------------ parts, classes


def test_suffixes_of_the_published_data_sets_are_images(tmp_path):
    names = [
        f"n01440764/n01440764_1.{suffix}" for suffix in ("JPEG", "JPG", "bmp", "jpeg", "jpg", "png", "tif", "webp")
    ]
    for name in names:
        save(tmp_path / name)
    assert [find_files(tmp_path).names[index] for index in range(len(names))] == sorted(names)


def test_classes_have_the_order_of_torchvisions_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b", "A", "c10", "c9", "Z", "_"):
        save(tmp_path / name / "1.png")
    assert find_files(tmp_path).classes == ImageFolder(tmp_path).classes == ["A", "Z", "_", "b", "c10", "c9"]


def test_an_archive_contributes_the_given_split(tmp_path):
    save(tmp_path / "set/train/a/1.png", ROWS[1])
    save(tmp_path / "set/val/a/2.png", ROWS[2])
    for kind in ("zip", "tar"):
        packed = shutil.make_archive(str(tmp_path / "set"), kind, tmp_path / "set")
        for split, number in (("train", 1), ("val", 2)):
            source = open_source(split, packed)
            assert (len(source), source.classes) == (1, ["a"])
            assert source[0] == (png(ROWS[number]), 0)


def test_an_archive_with_only_a_validation_split_is_not_used_for_training(tmp_path):
    save(tmp_path / "set/val/a/2.png")
    with pytest.raises(ValueError, match="there is no folder train/ in it"):
        open_source("train", shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set"))


def test_the_validation_part_is_preferred_to_the_test_part(tmp_path):
    assert sources.VALIDATION.index("test") == 4
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("707\n")
    for part, name in (("train", "a"), ("val", "b"), ("trainval", "ab"), ("test", "d")):
        (data / f"images_variant_{part}.txt").write_text("".join(f"{letter} 707\n" for letter in name))
    for number, name in enumerate("abcd"):
        Image.fromarray(ROWS[number]).convert("RGB").save(data / "images" / f"{name}.jpg", quality=100)
    content = open_source("val", str(tmp_path), dataset="FGVCAircraft")[0][0]
    assert content == (data / "images" / "b.jpg").read_bytes()


def test_the_check_of_a_data_set_takes_the_list_of_its_part(tmp_path, capsys):
    for number in range(3):
        save(tmp_path / f"{number}.png")
    (tmp_path / "train.txt").write_text("0.png\n")
    (tmp_path / "val.txt").write_text("1.png\n2.png\n")
    lists = ["--train_list", str(tmp_path / "train.txt"), "--val_list", str(tmp_path / "val.txt"), "--num_workers", "0"]
    for split, count in (("train", 1), ("val", 2)):
        datasets.main(entry_point.parse(datasets.get_args_parser(), [*lists, "--split", split]))
        assert f"images      {count}\n" in capsys.readouterr().out


def test_deep_images_need_both_statistics(tmp_path, caplog):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    source = open_source("train", str(tmp_path))
    for mean, std, warned in (([0.5], [0.5], 0), ([0.5], None, 1), (None, [0.5], 1), (None, None, 1)):
        caplog.clear()
        datasets.suggest_statistics(source, 1, mean, std)
        assert caplog.text.count("more than 8 bits") == warned


# -------------------------------------------------------------------------------------------------------------- pixels


def test_exif_orientation_is_ignored_by_default():
    """As in training and evaluation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(stream, "PNG", exif=exif)
    assert decode.decode(stream.getvalue(), 1).size == (4, 3)
    assert decode.decode(stream.getvalue(), 1, upright=True).size == (3, 4)


def test_images_above_178_million_pixels_are_refused():
    assert decode.MAX_PIXELS == 178_956_970
    assert decode.VALUES_PER_PIXEL == 4


def test_a_tile_may_be_as_large_as_its_picture(monkeypatch):
    monkeypatch.setattr(tiff_bounds, "MAX_TILE_VALUES", 16)
    pixels = np.random.default_rng(0).integers(0, 65536, size=(10, 12), dtype=np.uint16)
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, compression="zlib")
    np.testing.assert_allclose(decode.decode(stream.getvalue(), 1)[0] * 65535, pixels, atol=0.01)


def test_resize_copies_images_with_a_small_short_side():
    assert resize.scale(png(np.zeros((90, 150, 3), np.uint8)), 100, 90) is None
    assert resize.scale(png(np.zeros((100, 150, 3), np.uint8)), 100, 90) is None
    with Image.open(io.BytesIO(resize.scale(png(np.zeros((150, 300, 3), np.uint8)), 100, 90))) as picture:
        assert picture.size == (200, 100)


def test_a_resized_jpeg_has_the_given_quality():
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, size=(200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", quality=100)
    expected = Image.open(io.BytesIO(stream.getvalue())).resize((100, 100), Image.Resampling.BICUBIC)
    for quality in (40, 90):
        expected_file = io.BytesIO()
        expected.save(expected_file, "JPEG", quality=quality)
        assert resize.scale(stream.getvalue(), 100, quality) == expected_file.getvalue()


def test_pictures_have_a_white_background(mini_mae):
    black = torch.zeros(2, 3, 4, 5)
    picture = pictures.tile([black, black], lambda x: x)
    assert (picture[:4, 5:7] == 255).all()  # between two pictures of a row
    assert (picture[4:6] == 255).all()  # between two rows
    assert (picture[:4, :5] == 0).all()


def test_pictures_use_the_given_mask_ratio(mini_mae):
    noise = torch.arange(16.0)[None] / 16
    picture = pictures.reconstruction(
        mini_mae, torch.full((1, 1, 16, 16), 200, dtype=torch.uint8), noise, Normalize([0.4], [0.3]), 0.25
    )
    original, masked = picture[:16, :16, 0], picture[:16, 18:34, 0]
    assert (original == masked).sum() == 12 * 16
