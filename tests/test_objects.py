"""Datasets of the user's code: --dataset py:module:function, and main(args, source=function)."""

import io
import os
import pickle
import re
import subprocess
import sys
from functools import partial

import h5py
import lmdb
import numpy as np
import pytest
import torch
import zarr
from mains import assert_equal, call, in_processes, lines, open_source, parse, run_section, stop_and_resume, weights
from PIL import Image
from segments import make_scenes
from test_decode import saved

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from mae.checkpoints import checkpoint
from mae.data.decode import decode
from mae.data.pixels import BadImage, to_tensor
from mae.data.samples import Samples
from mae.data.transforms import scaled_transform
from mae.recommend import check as datasets

BLACK = np.zeros((16, 16, 3), np.uint8)
OWN = "import numpy as np\nBLACK = np.zeros((16, 16, 3), np.uint8)\ndef open_dataset(split, data_path):\n    "


@pytest.fixture(scope="module")
def samples(labelled):
    """Pixels (H, W, 3) and labels of each split of a folder, in its order."""
    found = {}
    for split in ("train", "val"):
        source = open_source(split, str(labelled))
        files = [source[index] for index in range(len(source))]
        found[split] = [(np.array(Image.open(io.BytesIO(data))), label) for data, label, *_ in files]
    return found


def write_hdf5(folder, samples):
    for split, items in samples.items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            pixels, labels = (np.array(part) for part in zip(*items, strict=True))
            file.create_dataset("images", data=pixels, chunks=(8, *pixels.shape[1:]), compression="gzip")
            file["labels"] = labels


def write_lmdb(folder, samples):
    for split, items in samples.items():
        with lmdb.open(str(folder / split), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
            for number, (pixels, label) in enumerate(items):
                value = int(label).to_bytes(8, "little", signed=True) + saved(pixels, "PNG")
                writer.put(str(number).encode(), value)


def write_zarr(folder, samples):
    for split, items in samples.items():
        pixels, labels = (np.array(part) for part in zip(*items, strict=True))
        group = zarr.create_group(folder / split)
        group.create_array("images", data=np.moveaxis(pixels, 3, 1) / np.float32(255))
        group.create_array("labels", data=labels)


WRITE = {"hdf5": write_hdf5, "lmdb": write_lmdb, "zarr": write_zarr}


def example(kind):
    return f"py:examples.data_{kind}:open_dataset"


ONE_EPOCH = {"num_workers": 1, "crop_scale": ".5 1", "epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(pretrain_once, labelled):
    return pretrain_once("folder", **ONE_EPOCH, data_path=labelled)


@pytest.mark.parametrize("kind", WRITE)
def test_the_examples_train_as_a_folder_and_resume_exactly(kind, pretrain, folder, samples, tmp_path, monkeypatch):
    """In a worker process, within an epoch. Float images are scaled with other rounding."""
    WRITE[kind](tmp_path, samples)
    own = {**ONE_EPOCH, "dataset": example(kind), "data_path": tmp_path}
    whole = pretrain("whole", **own)
    if kind == "zarr":
        assert lines(whole)[0]["train_loss"] == pytest.approx(lines(folder)[0]["train_loss"], rel=0.02)
    else:
        assert_equal(weights(whole, "checkpoint-0.pth"), weights(folder, "checkpoint-0.pth"))
    parts = stop_and_resume(monkeypatch, pretrain, 3, **own)
    assert_equal(weights(whole, "checkpoint-0.pth"), weights(parts, "checkpoint-0.pth"))
    assert checkpoint.read(parts / "checkpoint-0.pth")["args"]["dataset"] == example(kind)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), [
    (main_finetune, {"train_per_class": 4, "mixup": 0.8}),
    (main_finetune, {"val_fraction": 0.3, "cache_images": True, "batch_size": 4}),
    (main_linprobe, {"cache_features": True, "probe": "attentive", "blr": "0.1 1"}),
])  # fmt: skip
def test_classifiers_have_the_results_of_the_folder(script, flags, classify, samples, tmp_path):
    """LMDB lists no labels: all items are read once."""
    write_lmdb(tmp_path, samples)
    own = {"dataset": example("lmdb"), "data_path": tmp_path}
    ours, theirs = (lines(classify(script, name, epochs=1, warmup_epochs=0, num_workers=1, **flags, **source))[0]
                    for name, source in (("own", own), ("folder", {})))  # fmt: skip
    assert (ours["test_acc1"], ours["train_loss"]) == (theirs["test_acc1"], theirs["train_loss"])


def test_neighbors_and_the_report_are_those_of_the_folder(classify, samples, labelled, tmp_path, capsys):
    write_hdf5(tmp_path, samples)
    own = {"dataset": example("hdf5"), "data_path": tmp_path}
    assert classify(main_knn, k="3 5", **own) == classify(main_knn, k="3 5")
    reports = []
    for flags in ([tmp_path, "--dataset", own["dataset"]], [labelled]):
        capsys.readouterr()
        call(datasets, *flags, num_workers=1)
        report = capsys.readouterr().out
        of_images = report[report.index("images      48") : report.index("speed")]
        reports.append(re.sub("(classes .*):.*", r"\1", of_images))  # without names, which the files have not
    assert reports[0] == reports[1]
    assert "classes     6" in reports[0]


def scenes(root, split):
    """Images and masks of a folder: masks are arrays, Pillow images, tensors and paths."""
    name, items = {"train": "training", "val": "validation"}[split], []
    for number, mask in enumerate(sorted((root / "annotations" / name).iterdir())):
        picture = Image.open(mask)
        array = np.array(picture).astype(np.int64)
        label = (mask, picture, array, torch.from_numpy(array))[number % 4]
        items.append({"image": root / "images" / name / f"{mask.stem}.jpg", "label": label})
    return items


def test_masks_of_a_dataset(tmp_path):
    root = make_scenes(tmp_path / "scenes")
    flags = {"model": "vit_mini_patch4", "input_size": 16, "nb_classes": 3, "epochs": 1, "batch_size": 4, "lr": 0.01,
             "warmup_epochs": 0, "device": "cpu", "amp": "off"}  # fmt: skip

    def train(name, workers, source=None, **own):
        args = parse(main_segment, **flags, **own, num_workers=workers, output_dir=tmp_path / name)
        main_segment.main(args, source=source)
        return lines(tmp_path / name)[0]["test_miou"]

    assert train("folder", 1, data_path=root) == train("own", 1, lambda split, data_path: scenes(root, split))
    for mask, message in (
        (np.full((16, 16), 3), r"item \d .*mask.*`nb_classes`"),
        (np.zeros((16, 16, 3), np.uint8), r"item \d .*mask.*\(16, 16, 3\)"),
        (np.full((16, 16), 300), r"item \d .*mask"),
    ):
        with pytest.raises(BadImage, match=message):
            train("bad", 0, lambda split, data_path, mask=mask: [(BLACK, mask)] * 4)


@pytest.mark.slow
def test_a_comparison_of_a_dataset(samples, tmp_path, forked):
    write_hdf5(tmp_path, samples)
    flags = {"data_path": tmp_path, "model": "vit_mini_patch4", "amp": "off", "input_size": 16, "device": "cpu",
             "encoders": "scratch", "protocols": "knn", "labels": 24, "draws": 1,
             "output_dir": tmp_path / "o"}  # fmt: skip
    assert "| scratch (k-NN) |" in main_compare.main(parse(main_compare, **flags, dataset=example("hdf5")))
    with pytest.raises(ValueError, match="source="):
        main_compare.main(parse(main_compare, **flags), source=lambda split, data_path: samples[split])


@pytest.mark.slow
def test_the_page_runs_in_a_working_directory(tmp_path, classify, monkeypatch):
    assert "images      300\nclasses     3" in run_section("docs/data.md", "## Your own dataset", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    out = classify(main_finetune, dataset="py:blobs:open_dataset", input_size=32, batch_size=20, epochs=3, lr=2e-3,
                   hflip=0, aa="none", crop_scale="0.9 1", reprob=0, layer_decay=1, num_workers=1)  # fmt: skip
    assert lines(out)[-1]["test_acc1"] > 70


def test_a_function_in_place_of_its_name(tmp_path, samples):
    def source(split, data_path):
        assert data_path is None
        return samples[split]  # a list is a dataset, too

    flags = {"output_dir": tmp_path / "run", "model": "mae_vit_mini_patch4", "input_size": 16, "batch_size": 8,
             "epochs": 1, "warmup_epochs": 0, "num_workers": 1, "device": "cpu", "amp": "off"}  # fmt: skip
    main_pretrain.main(parse(main_pretrain, **flags), source=source)
    resumed = {"output_dir": tmp_path / "run", "resume": "auto", "epochs": 2}
    with pytest.raises(ValueError, match=r"dataset=.?py:"):  # which no flag can import
        main_pretrain.main(parse(main_pretrain, **resumed))
    main_pretrain.main(parse(main_pretrain, **resumed), source=source)
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [0, 1]
    with pytest.raises(ValueError, match="CIFAR10"):
        main_pretrain.main(parse(main_pretrain, **resumed, dataset="CIFAR10"), source=source)


def test_neither_a_checkpoint_nor_a_recipe_imports_code(pretrain, classify, own_module, tmp_path, capsys):
    own_module("mine", OWN + "return [(BLACK, 0)] * 8\n")
    out = pretrain(dataset="py:mine:open_dataset", epochs=1)
    del sys.modules["mine"]
    own_module("mine", "raise SystemExit('imported')\n")
    file = out / "checkpoint-0.pth"
    for resume in ("auto", file):
        with pytest.raises(ValueError, match="dataset=py:mine:open_dataset"):
            main_pretrain.main(parse(main_pretrain, resume=resume, output_dir=out))
    for script in (main_finetune, main_linprobe, main_knn):
        flags = {"finetune": file, "device": "cpu", **({} if script is main_knn else {"output_dir": tmp_path / "b"})}
        with pytest.raises(ValueError, match="dataset=py:mine:open_dataset"):
            script.main(parse(script, **flags))
    (tmp_path / "recipe.yaml").write_text("dataset: py:mine:open_dataset\n")
    (tmp_path / "optimizer.yaml").write_text("optimizer: mine:open_dataset\n")
    for script in (main_pretrain, main_segment):
        for name, flag in (
            ("recipe", "--dataset py:mine:open_dataset"),
            ("optimizer", "--optimizer mine:open_dataset"),
        ):
            with pytest.raises(SystemExit):
                parse(script, config=tmp_path / f"{name}.yaml")
            assert flag in capsys.readouterr().err


def opened(images, split="train", data_path=None, **attributes):
    """A list of items as a source; attributes of the dataset by name."""
    dataset = type("Own", (list,), attributes)(images)
    return open_source(split, data_path, dataset="py:any:any", function=lambda split, data_path: dataset)


def test_images_of_every_kind(tmp_path):
    """A path, bytes, a Pillow image, arrays with their channels last or first, and a tensor have the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), data, memoryview(data), Image.fromarray(pixels), pixels,
             np.moveaxis(pixels, 2, 0), torch.from_numpy(pixels).permute(2, 0, 1)]  # fmt: skip
    source = opened([(kind, None) for kind in kinds])
    for index in range(len(source)):
        assert torch.equal(to_tensor(decode(source[index][0], 3)), torch.from_numpy(pixels).permute(2, 0, 1))


def test_values_beyond_8_bits_are_not_clipped():
    """Float values of arrays, tensors and Pillow images stay as they are; 16 bits are scaled to 0 to 1."""
    values = np.linspace(-3, 500, 8 * 9, dtype=np.float32).reshape(8, 9)
    deep = np.linspace(0, 65535, 8 * 9).astype(np.uint16).reshape(8, 9)
    items = [values, Image.fromarray(values), torch.from_numpy(values)[None].double(), deep, Image.fromarray(deep)]
    found = [decode(image, 1) for image, *_ in opened([(image, 0) for image in items])]
    assert all(torch.equal(one[0], torch.from_numpy(values)) for one in found[:3])
    assert all(np.allclose(one[0], deep / 65535) for one in found[3:])
    assert torch.equal(decode(torch.full((2, 8, 9), 7.5, requires_grad=True), 2), torch.full((2, 8, 9), 7.5))


def test_labels_classes_and_names():
    images = [(BLACK, 0), {"image": BLACK, "label": torch.tensor(2)}, [BLACK, np.int64(1)], (BLACK, True)]
    assert opened(images).classes == ["0", "1", "2"]
    source = opened(images, classes=("a", "b", "c", "d"), name=lambda self, index: f"scan {index}")
    assert (source.labels.tolist(), source.classes, source.name(3)) == ([0, 2, 1, 1], ["a", "b", "c", "d"], "scan 3")
    assert opened([(BLACK, None)] * 2).classes == []
    source = opened([(BLACK, 0), (BLACK, 0)], labels=torch.tensor([0, 1]))
    assert (source.classes, source[0][1]) == (["0", "1"], 0)
    with pytest.raises(ValueError, match=r"item 1 of .* 0, .* 1"):
        source[1]


@pytest.mark.parametrize(("images", "attributes", "message"), [
    ([], {}, "empty"),
    ([1, 2], {}, "item 0 .*int"),
    ([(3, 0)], {}, "item 0 .*image"),
    ([(BLACK, float("nan"))], {}, "item 0 .*nan"),
    ([(BLACK, [0, 1])], {}, "item 0 "),
    ([(BLACK, "cat")], {}, "item 0 .*cat"),
    ([(BLACK, 0)], {"labels": [0, 1]}, "labels"),
    ([(BLACK, 0)], {"labels": [0.5]}, "labels"),
    ([(BLACK, 5)], {"classes": ["a", "b"]}, "classes"),
    ([(BLACK, 1)], {"classes": ["a", "a"]}, "classes"),
])  # fmt: skip
def test_items_that_are_no_samples_are_one_line(images, attributes, message):
    with pytest.raises(ValueError, match=message) as raised:
        source = opened(images, **attributes)
        _ = source.classes, source[0]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("label", [np.array([1]), 1.0])
def test_a_label_that_differs_in_kind_from_the_listed_class_is_refused(label):
    """It would count as no label, and its image as one of the last class."""
    with pytest.raises(ValueError, match="item 0"):
        opened([(BLACK, label)], labels=[1])[0]


@pytest.mark.parametrize(("labels", "attributes"), [
    ([0.5, 1.5], {}), ([[0, 1], [1, 1]], {}), ([0, 1.5], {}), ([0, 1], {"labels": [0.0, 1.0]}),
    ([0, 1], {"labels": [[0, 1], [1, 1]]}),
])  # fmt: skip
def test_the_check_ignores_labels_that_are_no_classes(labels, attributes, capsys):
    dataset = type("Own", (list,), attributes)([(BLACK, label) for label in labels])
    datasets.main(parse(datasets, num_workers=0), source=lambda split, data_path: dataset)
    output = capsys.readouterr().out
    assert "images      2\n" in output and "classes     none" in output


LOSSY = (
    "import numpy as np\nfrom mae.data.pixels import BadImage\nclass Lossy(list):\n    def __getitem__(self, index):\n"
    "        if index == {bad}:\n            {code}\n        return super().__getitem__(index)\n"
    "def open_dataset(split, data_path):\n    return Lossy([(np.zeros((16, 16, 3), np.uint8), 0)] * 20)\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("code", ["raise OSError('lost')", "raise BadImage('lost')", "return '/nowhere/lost', 0"])
def test_unreadable_items_are_replaced(pretrain, own_module, code, capsys):
    """Their labels are unknown, unless the dataset lists or returns them."""
    own_module("lossy", LOSSY.format(bad=3, code=code))
    flags = {"dataset": "py:lossy:open_dataset", "num_workers": 1, "epochs": 1, "warmup_epochs": 0}
    for name, own in (("skip", {}), ("cached", {"cache_images": True})):
        assert lines(pretrain(name, **flags, **own, on_bad_image="skip"))[0]["bad_images"] == 1
    with pytest.raises(BadImage, match=r"item 3 .*lost"):
        pretrain("error", **flags)
    capsys.readouterr()
    unknown = "return" not in code
    assert open_source("train", dataset=flags["dataset"]).labels.tolist() == [0] * 3 + [-unknown] + [0] * 16
    assert ("item 3 of" in capsys.readouterr().out) == unknown


@pytest.mark.parametrize("code", ["next(iter([]))", "raise RuntimeError('mine')", "{}['key']"])
def test_mistakes_of_the_code_keep_their_traceback(own_module, code, tmp_path):
    """In a worker process and in the training process, of a script that would replace unreadable images."""
    modules = own_module("wrong", LOSSY.format(bad=3, code=code))
    flags = ["--dataset", "py:wrong:open_dataset", "--epochs", 1, "--on_bad_image", "skip", "--num_workers", 1]
    with pytest.raises(subprocess.CalledProcessError) as raised:
        in_processes(1, tmp_path, tmp_path / "o", *flags, "--batch_size", 4, environment={"PYTHONPATH": str(modules)})
    assert f'{modules}/wrong.py", line 6' in raised.value.output
    assert "num_workers" not in raised.value.output.splitlines()[-1]
    source = open_source("train", dataset="py:wrong:open_dataset")
    with pytest.raises((RuntimeError, KeyError)):
        source[3]


@pytest.mark.slow
def test_random_numbers_of_items_do_not_depend_on_workers_or_interruptions(pretrain, own_module, monkeypatch):
    own_module(
        "noisy",
        "import random\nimport numpy as np\nimport torch\nclass Noisy(list):\n    def __getitem__(self, index):\n"
        "        number = random.randrange(9) + np.random.randint(9)\n"
        "        return 25 * number + torch.rand(3, 16, 16), 0\n"
        "def open_dataset(split, data_path):\n    return Noisy(range(16))\n",
    )
    settings = {"dataset": "py:noisy:open_dataset"}

    def run(name, **flags):
        return pretrain(name, **settings, **flags, num_workers=2 if "resume" in flags else 0)

    assert_equal(weights(run("whole")), weights(stop_and_resume(monkeypatch, run, 3)))
    cached = (pretrain(f"c{count}", **settings, cache_images=True, num_workers=count) for count in (0, 2))
    assert_equal(*map(weights, cached))


def test_a_random_split_is_the_same_in_each_process(classify, own_module, capsys):
    """The usual idiom: disjoint parts, whose labels are those of the images. Without a seed, it is an error."""
    own_module(
        "parts",
        "import random\nimport numpy as np\nimport torch\n"
        "ITEMS = [(np.full((16, 16, 3), 2 * n, np.uint8), n % 2) for n in range(96)]\n"
        "def open_dataset(split, data_path):\n"
        "    return torch.utils.data.random_split(ITEMS, [64, 32])[split == 'val']\n"
        "def unseeded(split, data_path):\n    return random.SystemRandom().sample(ITEMS, 64)\n",
    )
    train, val = (open_source(split, dataset="py:parts:open_dataset") for split in ("train", "val"))
    values = [{int(source[index][0][0, 0, 0]) for index in range(len(source))} for source in (train, val)]
    assert (len(values[0]), len(values[1]), values[0] & values[1]) == (64, 32, set())
    state = torch.get_rng_state()
    open_source("train", dataset="py:parts:open_dataset")
    assert torch.equal(state, torch.get_rng_state())
    classify(main_knn, dataset="py:parts:open_dataset", num_workers=2, k=1)  # labels are compared in the workers
    with pytest.raises(ValueError, match="dataset"):
        classify(main_knn, dataset="py:parts:unseeded", num_workers=2, k=1)


@pytest.mark.slow
def test_random_numbers_of_items_are_not_those_of_the_mask(own_module):
    own_module(
        "coins", "import numpy as np\nimport torch\nclass Coins(list):\n    def __getitem__(self, index):\n"
        "        return np.zeros((4, 4, 3), np.uint8), 0, {'coin': torch.rand(()).item()}\n"
        "def open_dataset(split, data_path):\n    return Coins(range(64))\n",
    )  # fmt: skip
    source, noise = open_source("train", dataset="py:coins:open_dataset"), partial(torch.rand, 1)
    samples = Samples(source, scaled_transform(0), in_chans=3, seed=0, draw_noise=noise)
    pairs = torch.tensor(
        [(sample.item.inputs["coin"], sample.noise.item()) for sample in (samples[0, n] for n in range(64))]
    )
    assert torch.corrcoef(pairs.T)[0, 1].abs() < 0.5


def test_images_in_memory_are_not_those_of_a_dataset_that_augments(pretrain, own_module):
    """One image shows it, and not the first."""
    own_module(
        "changing", "import numpy as np\nclass Changing(list):\n    def __getitem__(self, index):\n"
        "        return np.full((16, 16, 3), np.random.randint(256) * (index == 9), np.uint8), 0\n"
        "def open_dataset(split, data_path):\n    return Changing(range(16))\n",
    )  # fmt: skip
    with pytest.raises(ValueError, match="`cache_images`"):
        pretrain(dataset="py:changing:open_dataset", cache_images=True)


def test_a_dataset_is_opened_again_in_other_processes(tmp_path, samples):
    """Also if processes do not fork; a dataset that is another one then is an error."""
    write_hdf5(tmp_path, samples)
    source = pickle.loads(pickle.dumps(open_source("train", str(tmp_path), dataset=example("hdf5"))))
    assert np.array_equal(source[5][0], samples["train"][5][0])
    lengths = iter((4, 5))
    shrinking = open_source(
        "train", dataset="py:any:any", function=lambda split, data_path: [(BLACK, 0)] * next(lengths)
    )
    with pytest.raises(ValueError, match=r"4 samples.* 5"):
        list(torch.utils.data.DataLoader(shrinking, batch_size=None, num_workers=1))


def test_stored_features_notice_changed_samples(own_module, caplog):
    """By the code and the files of data_path; without data_path, features of an earlier start are not reused."""
    modules = own_module("constant", OWN + "return [(BLACK, 0)] * 4\n")
    (modules / "data").mkdir()

    def version(data_path=str(modules / "data"), **options):
        return open_source("train", data_path, dataset="py:constant:open_dataset", **options).version(0)

    before = version()
    assert version() == before
    assert "`data_path`" not in caplog.text
    (modules / "data/file").write_text("new")
    changed = version()
    assert changed != before
    os.utime(modules / "constant.py", (1, 1))
    assert version() != changed
    assert version(None) != version(None)
    assert "`data_path`" in caplog.text
    assert version(function=partial(lambda label, split, data_path: [(BLACK, label)], 0))  # without code of its own
    assert opened([(BLACK, 0)], version=lambda self, index: f"v{index}").version(7) == "v7"
