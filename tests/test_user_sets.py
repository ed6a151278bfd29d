"""Datasets of the user's code: --dataset py:module:function, and main(args, source=function). DATA.md has the code."""

import io
import re
import subprocess

import h5py
import lmdb
import numpy as np
import pytest
import torch
import zarr
from conftest import ROOT
from mains import Stopped, assert_equal, in_processes, lines, parse, stop_after, weights
from PIL import Image
from segments import make_scenes

import main_compare
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from util.checkpoints import checkpoint
from util.cli import entry_point
from util.data.dataset_kinds import open_source
from util.data.decode import decode, to_tensor

OWN = "import numpy as np\ndef open_dataset(split, data_path):\n    "


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The modules of DATA.md, in a folder on Python's path."""
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "DATA.md").read_text(), flags=re.DOTALL):
        (tmp_path / code.split()[1]).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def samples(labelled):
    """Pixels (H, W, 3) and labels of each split of a folder, in its order."""
    found = {}
    for split in ("train", "val"):
        source = open_source(split, str(labelled))
        files = [source[index] for index in range(len(source))]
        found[split] = [(np.array(Image.open(io.BytesIO(data))), label) for data, label in files]
    return found


def write_hdf5(folder, samples):
    for split, items in samples.items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["images"], file["labels"] = (np.array(part) for part in zip(*items, strict=True))


def write_lmdb(folder, samples):
    for split, items in samples.items():
        with lmdb.open(str(folder / split), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
            writer.put(b"labels", np.array([label for _, label in items], dtype=np.int64).tobytes())
            for number, (pixels, _) in enumerate(items):
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                writer.put(str(number).encode(), stream.getvalue())


def write_zarr(folder, samples):
    for split, items in samples.items():
        pixels, labels = (np.array(part) for part in zip(*items, strict=True))
        zarr.create_array(folder / split / "images", data=np.moveaxis(pixels, 3, 1) / np.float32(255))
        zarr.create_array(folder / split / "labels", data=labels)


WRITE = {"hdf5_images": write_hdf5, "lmdb_images": write_lmdb, "zarr_images": write_zarr}


@pytest.mark.parametrize("module", WRITE)
def test_files_that_hold_many_images_train_as_a_folder(module, modules, samples, labelled, tmp_path):
    """With a worker process, and resumed. Float images are scaled with other rounding."""
    WRITE[module](tmp_path, samples)
    own = ["--dataset", f"py:{module}:open_dataset"]
    few = ["--batch_size", 8, "--num_workers", 1, "--crop_scale", ".5", "1"]
    environment = {"PYTHONPATH": str(modules)}
    in_processes(1, labelled, tmp_path / "folder", *few, "--epochs", 2)
    in_processes(1, tmp_path, tmp_path / "own", *few, *own, "--epochs", 1, environment=environment)
    resumed = [*few, *own, "--epochs", 2, "--resume", "auto"]
    in_processes(1, tmp_path, tmp_path / "own", *resumed, environment=environment)
    losses = [[line["train_loss"] for line in lines(tmp_path / name)] for name in ("own", "folder")]
    if module == "zarr_images":
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    else:
        assert losses[0][0] == losses[1][0]  # the first run had another learning rate after its warm-up
        assert losses[0][1] == pytest.approx(losses[1][1], rel=0.1)


def test_a_run_resumes_to_the_bit(pretrain, modules, samples, monkeypatch):
    write_hdf5(modules, samples)
    settings = {"dataset": "py:hdf5_images:open_dataset", "data_path": modules, "save_minutes": 0, "num_workers": 1}
    whole = pretrain("whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 5)
        pretrain("parts", **settings)
    assert_equal(weights(whole), weights(pretrain("parts", **settings, resume="auto")))


def test_every_script_has_the_results_of_the_folder(classify, pretrain, modules, samples, labelled, tmp_path):
    write_lmdb(tmp_path, samples)
    encoder = pretrain(data_path=labelled) / "checkpoint-1.pth"
    own = {"dataset": "py:lmdb_images:open_dataset", "data_path": tmp_path}
    shared = {"finetune": encoder, "num_workers": 1}
    for script, flags in (
        (main_finetune, {"train_per_class": 4, "mixup": 0.8}),
        (main_finetune, {"val_fraction": 0.3, "cache_images": True, "batch_size": 4}),
        (main_linprobe, {"cache_features": True, "probe": "attentive", "blr": "0.1 1"}),
    ):
        runs = [classify(script, f"{name}{len(flags)}{script.__name__}", **shared, **flags, **(own if name else {}))
                for name in ("", "own")]  # fmt: skip
        assert lines(runs[0])[-1]["test_acc1"] == lines(runs[1])[-1]["test_acc1"]
        assert lines(runs[0])[-1]["train_loss"] == lines(runs[1])[-1]["train_loss"]
    knn = [classify(main_knn, finetune=encoder, k="3 5", **flags) for flags in ({}, own)]
    assert knn[0] == knn[1]
    args = checkpoint.read(runs[1] / "checkpoint-1.pth")["args"]
    assert args["dataset"] == "py:lmdb_images:open_dataset"


def test_two_processes_train_as_one(modules, samples, tmp_path):
    write_hdf5(tmp_path, samples)
    own = ["--dataset", "py:hdf5_images:open_dataset", "--epochs", 2, "--num_workers", 1]
    environment = {"PYTHONPATH": str(modules)}
    in_processes(1, tmp_path, tmp_path / "one", *own, "--batch_size", 8, environment=environment)
    in_processes(2, tmp_path, tmp_path / "two", *own, "--batch_size", 4, "--cache_images", environment=environment)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)


class Scenes:
    """Images and masks of a folder."""

    def __init__(self, root, split):
        names = {"train": "training", "val": "validation"}
        self.images = sorted((root / "images" / names[split]).iterdir())
        self.masks = sorted((root / "annotations" / names[split]).iterdir())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        mask = np.array(Image.open(self.masks[index])).astype(np.int64)
        return {"image": self.images[index], "label": mask if index % 2 else self.masks[index]}


def test_masks_of_a_dataset(tmp_path):
    root = make_scenes(tmp_path / "scenes")
    flags = {"model": "vit_mini_patch4", "input_size": 16, "nb_classes": 3, "epochs": 1, "batch_size": 4, "lr": 0.01,
             "warmup_epochs": 0, "num_workers": 1, "device": "cpu", "amp": "off"}  # fmt: skip
    folder = {**flags, "output_dir": tmp_path / "folder", "data_path": root}
    main_segment.main(parse(main_segment, **folder))
    args = parse(main_segment, **{**flags, "output_dir": tmp_path / "own"})
    main_segment.main(args, source=lambda split, data_path: Scenes(root, split))
    assert lines(tmp_path / "folder")[0]["test_miou"] == lines(tmp_path / "own")[0]["test_miou"]


def test_a_function_in_place_of_its_name(tmp_path, samples):
    def source(split, data_path):
        assert data_path is None
        return samples[split]  # a list is a dataset, too

    flags = {"output_dir": tmp_path / "run", "model": "mae_vit_mini_patch4", "input_size": 16, "batch_size": 8,
             "epochs": 1, "warmup_epochs": 0, "num_workers": 1, "device": "cpu", "amp": "off"}  # fmt: skip
    main_pretrain.main(parse(main_pretrain, **flags), source=source)
    resumed = {"output_dir": tmp_path / "run", "resume": "auto", "epochs": 2}
    with pytest.raises(ValueError, match="--dataset"):  # which the command line can't import
        main_pretrain.main(parse(main_pretrain, **resumed))
    main_pretrain.main(parse(main_pretrain, **resumed), source=source)
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [0, 1]


def test_neither_a_checkpoint_nor_a_recipe_imports_code(pretrain, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(OWN + "return [(np.zeros((16, 16, 3), np.uint8), 0)] * 8\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = pretrain(dataset="py:mine:open_dataset", epochs=1)
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.delitem(__import__("sys").modules, "mine")
    with pytest.raises(ValueError, match=r"--dataset '?py:mine:open_dataset"):
        main_pretrain.main(parse(main_pretrain, resume="auto", output_dir=out))
    (tmp_path / "recipe.yaml").write_text("dataset: py:mine:open_dataset\n")
    with pytest.raises(SystemExit):
        entry_point.parse(main_pretrain.get_args_parser(), ["--config", str(tmp_path / "recipe.yaml")])
    assert "--dataset py:mine:open_dataset" in capsys.readouterr().err


def test_a_comparison_of_a_dataset(modules, samples, tmp_path):
    write_hdf5(tmp_path, samples)
    flags = {"dataset": "py:hdf5_images:open_dataset", "data_path": tmp_path, "model": "vit_mini_patch4", "amp": "off",
             "input_size": 16, "encoders": "scratch pixels", "protocols": "knn", "labels": 24, "draws": 1,
             "device": "cpu", "output_dir": tmp_path / "out"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(modules))
        text = main_compare.main(parse(main_compare, **flags))
    assert "| scratch (k-NN) |" in text


def test_the_report_of_a_dataset(modules, samples, labelled, tmp_path):
    write_lmdb(tmp_path, samples)
    reports = []
    for flags in (["--dataset", "py:lmdb_images:open_dataset", tmp_path], [labelled]):
        command = [ROOT / ".venv/bin/python", "-m", "util.datasets", *map(str, flags), "--num_workers", "1"]
        done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(modules)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        reports.append([line for line in done.stdout.splitlines() if line.startswith(("images", "--", "sizes"))])
    assert reports[0] == reports[1]


def test_unreadable_images_are_replaced(pretrain, tmp_path, monkeypatch):
    (tmp_path / "lossy.py").write_text(
        "import numpy as np\nclass Mine(list):\n    def __getitem__(self, index):\n"
        "        if index == 3:\n            raise OSError('lost')\n        return super().__getitem__(index)\n"
        "def open_dataset(split, data_path):\n    return Mine([(np.zeros((16, 16, 3), np.uint8), None)] * 20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"dataset": "py:lossy:open_dataset", "num_workers": 1}
    out = pretrain("skip", **flags, on_bad_image="skip")
    assert [line["bad_images"] for line in lines(out)] == [1, 1]
    with pytest.raises(ValueError, match=r"\[3\]: lost .*--on_bad_image skip"):
        pretrain("error", **flags)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 5", "--dataset py:mine0:open_dataset returned a int"),
        ("return [1, 2]", r"train\[0\] is a int"),
        ("return []", "--dataset py:mine2:open_dataset: .* empty"),
        ("return [(np.zeros((16, 16, 3), np.uint8), float('nan'))] * 4", "--dataset py:mine3:open_dataset: .* nan"),
        ("return [(np.zeros((16, 16, 3), np.uint8), [0, 1])] * 4", r"--dataset py:mine4:open_dataset: .* \(2,\)"),
        ("return [(np.zeros((16, 16), np.int16), 0)] * 4", r"\[\d\].*int16"),
        ("return [(torch.zeros(16, 16), 0)] * 4", r"\[\d\].*\(16, 16\)"),
    ],
)
def test_errors_are_one_line(classify, tmp_path, monkeypatch, request, body, message):
    number = request.node.callspec.indices["body"]
    (tmp_path / f"mine{number}.py").write_text("import torch\n" + OWN + body + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        classify(main_finetune, dataset=f"py:mine{number}:open_dataset", batch_size=4)
    assert len(str(raised.value).splitlines()) == 1 or "Original Traceback" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere:open_dataset", "nowhere"), ("present:open_datase", "did you mean open_dataset"),
     ("present", "package.module:name"), ("needs:open_dataset", "absent_package")],
)  # fmt: skip
def test_names_that_can_not_be_imported(tmp_path, monkeypatch, name, message):
    (tmp_path / "present.py").write_text(OWN + "return []\n")
    (tmp_path / "needs.py").write_text("import absent_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"--dataset py:{name}.*{message}"):
        open_source("train", dataset=f"py:{name}")


def test_stored_features_notice_changed_samples(tmp_path, monkeypatch):
    """By the code and the files of data_path; without data_path, features of an earlier start are not reused."""
    (tmp_path / "constant.py").write_text(OWN + "return [(np.zeros((16, 16, 3), np.uint8), 0)] * 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data").mkdir()

    def version(data_path):
        return open_source("train", data_path, dataset="py:constant:open_dataset").version(0)

    before = version(str(tmp_path / "data"))
    assert version(str(tmp_path / "data")) == before
    (tmp_path / "data/file").write_text("new")
    assert version(str(tmp_path / "data")) != before
    assert version(None) != version(None)


def test_images_of_every_kind(tmp_path):
    """A path, bytes, a Pillow image, arrays with their channels last or first, and a tensor have the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), Image.fromarray(pixels),
             pixels, np.moveaxis(pixels, 2, 0), torch.from_numpy(pixels).permute(2, 0, 1)]  # fmt: skip
    source = open_source("train", dataset="py:any:any", function=lambda split, data_path: [(k, 0) for k in kinds])
    for index in range(len(source)):
        assert torch.equal(to_tensor(decode(source[index][0], 3)), torch.from_numpy(pixels).permute(2, 0, 1))
    floats = torch.linspace(-3, 500, 8 * 9 * 2, dtype=torch.float64).view(2, 8, 9)
    assert torch.equal(decode(floats, 2), floats.float())


def test_labels_that_contradict_the_list_are_an_error(tmp_path):
    class Mine(list):
        labels = (0, 1)

    image = np.zeros((8, 8, 3), np.uint8)
    source = open_source(
        "train", dataset="py:any:any", function=lambda split, data_path: Mine([(image, 0), (image, 0)])
    )
    assert source.classes == ["0", "1"]
    assert source[0][1] == 0
    with pytest.raises(ValueError, match=r"\[1\]"):
        source[1]


def test_a_dataset_that_changes_between_processes_is_an_error():
    lengths = iter((8, 7))
    image = np.zeros((8, 8, 3), np.uint8)
    source = open_source("train", dataset="py:any:any", function=lambda *of: [(image, 0)] * next(lengths))
    assert len(source) == 8
    source.close()  # as before a fork
    with pytest.raises(ValueError, match=r"8 samples.* 7 "):
        source[0]


def test_a_function_and_another_dataset_exclude_each_other(tmp_path):
    args = parse(main_pretrain, dataset="CIFAR10", output_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"--dataset CIFAR10 .*write_hdf5"):
        main_pretrain.main(args, source=write_hdf5)


def test_random_numbers_of_a_dataset_do_not_depend_on_worker_processes(pretrain, tmp_path, monkeypatch):
    (tmp_path / "augmented.py").write_text(
        "import random, numpy as np, torch\nclass Augmented:\n    def __len__(self):\n        return 12\n"
        "    def __getitem__(self, index):\n        shift = random.randrange(40) + int(torch.randint(40, ()))\n"
        "        return np.random.randint(0, 100, (16, 16, 3)).astype(np.uint8) + np.uint8(shift), None\n"
        "def open_dataset(split, data_path):\n    return Augmented()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"dataset": "py:augmented:open_dataset", "epochs": 1}
    assert_equal(*(weights(pretrain(f"w{count}", **flags, num_workers=count), "checkpoint-0.pth") for count in (0, 2)))


def test_pillow_images_of_more_than_8_bits_keep_their_values():
    values = np.arange(0, 65_000, 650, dtype=np.uint16).reshape(10, 10)
    for picture, expected in (
        (Image.fromarray(values), values / np.float32(65535)),
        (Image.fromarray(values.astype(np.float32) - 300), values.astype(np.float32) - 300),
    ):
        assert torch.equal(to_tensor(decode(picture, 1))[0], torch.from_numpy(expected))


def test_a_mask_of_colors_is_an_error(tmp_path):
    items = [(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8))] * 4
    flags = {"model": "vit_mini_patch4", "input_size": 16, "nb_classes": 3, "epochs": 1, "batch_size": 4,
             "warmup_epochs": 0, "device": "cpu", "num_workers": 0, "output_dir": tmp_path / "run"}  # fmt: skip
    with pytest.raises(ValueError, match=r"\(16, 16, 3\)"):
        main_segment.main(parse(main_segment, **flags), source=lambda *of: items)


def test_the_example_of_the_page_is_learned(modules, classify):
    """Three classes: a bright stripe at one of three places."""
    flags = {"dataset": "py:blobs:open_dataset", "input_size": 32, "batch_size": 20, "epochs": 3, "lr": 2e-3,
             "hflip": 0, "aa": "none", "crop_scale": "0.9 1", "reprob": 0, "layer_decay": 1}  # fmt: skip
    out = classify(main_finetune, **flags, num_workers=1)
    assert lines(out)[-1]["test_acc1"] > 70
