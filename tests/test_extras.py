"""Extra inputs of images: from datasets of the user's code and from columns of lists, to the model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import Stopped, assert_equal, in_processes, lines, parse, stop_after, weights
from PIL import Image

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from inference import get_model
from util.data.dataset_kinds import open_source

# The pixels are noise. The target, and the class, is determined by the extra input `level` alone.
CODE = """
import numpy as np
import torch
from models_mae import MaskedAutoencoderViT
from models_vit import Encoder

class Level(Encoder):
    def tokenize(self, imgs, level):
        return super().tokenize(imgs) + 3 * level[:, None, None] * self.cls_token.detach().sign()

class LevelTarget(MaskedAutoencoderViT):
    target_dim = 1

    def target(self, imgs, valid=None, level=None):
        return level[:, None, None].expand(-1, self.num_patches, 1)

def open_dataset(split, data_path):
    return Noise(split)

class Noise:
    def __init__(self, split):
        self.split = split
        self.labels = [number % 2 for number in range(len(self))]

    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = np.random.default_rng([index, self.split == "val"])
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return {"image": pixels, "label": index % 2, "level": float(2 * (index % 2) - 1)}
"""
DATA = {"dataset": "py:levels:open_dataset", "data_path": None}
OWN = {"encoder": "levels:Level", "model_class": "levels:LevelTarget"}
TRAIN = {"epochs": 12, "warmup_epochs": 1, "batch_size": 8, "blr": 0.1, "num_workers": 1}


@pytest.fixture
def levels(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "levels.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("levels", None)


def run_pretraining(out, **flags):
    settings = {"output_dir": out, "log_dir": out, "model": "mae_vit_mini_patch4", "input_size": 16, "device": "cpu",
                "amp": "off", "vis_every": 0, "dataset": DATA["dataset"]} | TRAIN | flags  # fmt: skip
    main_pretrain.main(parse(main_pretrain, **settings))
    return out


def test_a_target_that_only_the_extra_determines_is_learned_with_it_only(levels, tmp_path, monkeypatch):
    """The loss of a constant prediction is 1. The run resumes to the bit."""
    whole = run_pretraining(tmp_path / "whole", **OWN, save_minutes=0)
    blind = run_pretraining(tmp_path / "blind", model_class=OWN["model_class"])
    assert lines(whole)[-1]["train_loss"] < 0.05
    assert lines(blind)[-1]["train_loss"] > 0.8
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 10)
        run_pretraining(tmp_path / "parts", **OWN, save_minutes=0)
    parts = run_pretraining(tmp_path / "parts", **OWN, save_minutes=0, resume="auto")
    assert_equal(weights(whole, "checkpoint-11.pth"), weights(parts, "checkpoint-11.pth"))


def test_classifiers_and_probes_use_the_extra(levels, tmp_path, classify):
    flags = {"dataset": DATA["dataset"], "encoder": OWN["encoder"], "batch_size": 8}
    tuned = classify(main_finetune, "tuned", **flags, epochs=8, blr=0.05, mixup=0, cutmix=0, aa="none", reprob=0,
                     drop_path=0)  # fmt: skip
    assert lines(tuned)[-1]["test_acc1"] == 100
    evaluated = classify(main_finetune, **flags, eval=True, resume=tuned / "checkpoint-7.pth")
    assert evaluated.acc1 == 100
    assert classify(main_knn, **flags, k=3, finetune=tuned / "checkpoint-7.pth", global_pool=True)[3, 0.07] == 100
    probed = classify(main_linprobe, "probed", **flags, finetune=tuned / "checkpoint-7.pth", global_pool=True, epochs=3)
    assert lines(probed)[-1]["test_acc1"] > 50
    from levels import Level

    model = get_model(tuned / "checkpoint-7.pth", encoder=Level)
    pixels = np.zeros((16, 16, 3), np.uint8)
    labels = [model.predict(pixels, level=level)["pred_label"] for level in (-1.0, 1.0)]
    assert labels == [0, 1]
    assert [one["pred_label"] for one in model.predict([pixels] * 3, level=[1.0, -1.0, 1.0])] == [1, 0, 1]
    low, high = (model.extract_feat(pixels, level=level) for level in (-1.0, 1.0))
    assert (low - high).abs().max() > 0.1
    with pytest.raises(ValueError, match="needs the extra input level"):
        model.predict(pixels)
    with pytest.raises(ValueError, match="give a value for each of the 3 images"):
        model.predict([pixels] * 3, level=[1.0, -1.0])


def write_list(folder, rows):
    folder.mkdir(exist_ok=True)
    names = []
    for number in range(16):
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(folder / f"{number}.png")
        names.append(f"{number}.png,{number % 2},{rows(number)}")
    (folder / "list.csv").write_text("\n".join(["path,label,level", *names]) + "\n")
    return folder / "list.csv"


def test_two_processes_train_as_one_with_a_column_of_a_list(levels, tmp_path):
    listed = write_list(tmp_path / "images", lambda number: 2 * (number % 2) - 1)
    flags = ("--train_list", str(listed), "--extras", "level", "--encoder", "levels:Level", "--epochs", "1")
    environment = {"PYTHONPATH": str(levels)}
    for name, processes, size in (("one", 1, "4"), ("two", 2, "2")):
        in_processes(processes, listed.parent, tmp_path / name, "--batch_size", size, *flags, environment=environment)
    ours, theirs = (lines(tmp_path / name)[0]["train_loss"] for name in ("one", "two"))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("cell", "said"), [("", "empty"), ("far", "far"), ("nan", "nan")])
def test_a_missing_number_of_a_list_names_the_image(cell, said, tmp_path):
    listed = write_list(tmp_path / "images", lambda number: cell if number == 3 else 1)
    with pytest.raises(ValueError, match=rf"the level of 3.png is {said}; --extras are finite numbers"):
        open_source("train", file_list=str(listed), extras=["level"])
    with pytest.raises(ValueError, match=r"no column depth; give --extras of .*level"):
        open_source("train", file_list=str(listed), extras=["depth"])


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"site": "north"}, r"train\[0\]: its site is an object of type str"),
        ({"site": float("nan")}, r"its site is not finite"),
        ({"noise": 1.0}, "can't have the name 'noise'"),
        ([1.0], "its extras are an object of type list"),
    ],
)
def test_wrong_extras_are_errors_in_one_line(extras, message):
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        open_source("train", dataset="py:any:any", function=lambda split, data_path: [(image, 0, extras)])


def test_samples_with_other_extras_are_named():
    image = np.zeros((16, 16, 3), np.uint8)
    items = [(image, 0, {"gsd": 1.0}), (image, 0, {}), (image, 0, {"gsd": [1.0, 2.0]})]
    source = open_source("train", dataset="py:any:any", function=lambda split, data_path: items)
    assert source[0][0].extras == {"gsd": torch.tensor(1.0)}
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf"train\[{index}\]: its extra inputs have the shapes"):
            source[index]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "takes no extra input level"),
        ({"dataset": None, "data_path": "IMAGES", "encoder": "levels:Level"}, "needs the extra input level"),
    ],
)
def test_a_model_and_data_that_do_not_fit_stop_before_the_first_update(flags, message, levels, pictures, tmp_path):
    flags = {name: pictures if value == "IMAGES" else value for name, value in flags.items()}
    flags = {name: value for name, value in ({"dataset": DATA["dataset"]} | flags).items() if value is not None}
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "main_pretrain.py"), "--model", "mae_vit_mini_patch4", "--input_size", "16",
               "--device", "cpu", "--output_dir", str(out)]  # fmt: skip
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, cwd=levels, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]
    assert not (out / "log.txt").exists() or not json.loads((out / "log.txt").read_text() or "{}")
