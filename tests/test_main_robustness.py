"""main_robustness.py on folders with the published layouts."""

import csv
import itertools
import json
from pathlib import Path

import forks
import numpy as np
import painted
import pytest
import timm
import torch
from mains import argv_of, parse
from painted import class_folders, wrong_in_ten
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from timm.data import RealLabelsImagenet, create_dataset, create_loader, resolve_model_data_config
from timm.models import save_for_hf
from torchvision.transforms.functional import pil_to_tensor

import main_robustness
from mae.evaluate import robustness
from mae.evaluate.robustness import CORRUPTIONS, SEVERITIES, imagenet_classes
from mae.files import locks
from mae.inference import get_model


def run(suite, data, out, model="timm:reads_colors", **flags):
    return main_robustness.main(parse(main_robustness, **flags_of(suite, data, out, model) | flags))


def flags_of(suite, data, out, model):
    return {"suite": suite, "data_path": data, "model": model, "output_dir": out, "num_workers": 0, "device": "cpu"}


def in_processes(count, *given):
    return forks.run("main_robustness.py", argv_of(flags_of(*given)), given[2].with_suffix(".output"), count)


def scores(out, suite, part="cells"):
    return json.loads((out / f"{suite}.json").read_text())[part]


@pytest.fixture(scope="session")
def corrupted(tmp_path_factory):
    """ImageNet-C, unpacked into the folders of families; severity s has 10 s % errors, of fog 10 (s - 1) %."""
    root = tmp_path_factory.mktemp("corrupted")
    trees = [root / ".." / f"tree{errors}" for errors in range(6)]
    for errors, tree in enumerate(trees):
        class_folders(tree, robustness.synsets(), "ILSVRC2012_val_00000293.JPEG", wrong_in_ten(errors))
    for family, corruptions in robustness.ALEXNET.items():
        for corruption in corruptions:
            (root / family / corruption).mkdir(parents=True)
            for severity in SEVERITIES:
                (root / family / corruption / str(severity)).symlink_to(trees[severity - (corruption == "fog")])
    return root


@pytest.mark.parametrize("suite", ["imagenet-a", "imagenet-r"])
def test_predictions_are_restricted_to_the_classes_of_the_suite(suite, tmp_path):
    """Of each class a picture of itself, and one of the next class: the reader, who thinks the class below the
    likelier neighbor, is right where the next class is none of the suite's."""
    folders = robustness.subset(suite)
    class_folders(tmp_path / "data", folders, "0.000116_digital clock _ digital clock_0.8.jpg", lambda label: label)
    class_folders(tmp_path / "data", folders, "0.01_fly _ bee_0.3.jpg", lambda label: label + 1)
    labels = {robustness.synsets().index(folder) for folder in folders}
    followed = sum(label + 1 in labels for label in labels)
    assert 0 < followed < 200
    run(suite, tmp_path / "data", tmp_path)
    found = scores(tmp_path, suite)[suite]
    assert found == {
        "images": 400,
        "folder": "data",
        "acc1": pytest.approx(100 * (400 - followed) / 400),
        "acc5": 100.0,
    }


def test_two_models_at_once_do_not_write_one_file(tmp_path):
    """The second would overwrite the scores of the first. Two suites may be evaluated at once."""
    for suite in ("imagenet-a", "imagenet-r"):
        class_folders(tmp_path / suite, robustness.subset(suite), "a.jpg", lambda label: label)
    with locks.locked(tmp_path / "out", "imagenet-a.lock"):
        with pytest.raises(ValueError, match="out is being written"):
            run("imagenet-a", tmp_path / "imagenet-a", tmp_path / "out")
        table = run("imagenet-r", tmp_path / "imagenet-r", tmp_path / "out", subset=7, amp="bf16")
    assert "a subset of 7 images per cell" in table
    settings = scores(tmp_path / "out", "imagenet-r", "settings")
    assert (settings["subset"], settings["amp"], settings["model"]) == (7, "bf16", "timm:reads_colors")


def test_imagenet_sketch_among_all_classes(tmp_path):
    class_folders(tmp_path / "data", robustness.synsets(), "sketch_0.JPEG", wrong_in_ten(3))
    table = run("imagenet-sketch", tmp_path / "data", tmp_path)
    assert "| imagenet-sketch | 1000 | 70.000 | 70.000 |" in table
    assert "ViT-B/16 34.5, ViT-L/16 45.3, ViT-H/14 49.6, ViT-H/14, 448 50.9" in table  # of the paper
    assert Image.open(tmp_path / "imagenet-sketch.png").width > 300


def test_imagenet_v2_has_three_variants(tmp_path, monkeypatch):
    for errors, name in enumerate(("matched-frequency", "threshold0.7", "top-images"), start=1):
        folder, file = tmp_path / f"imagenetv2-{name}-format-val", "0af3f1b55de791c4144e2fb6d7dfe96dfc22d3fc.jpeg"
        class_folders(folder, [str(n) for n in range(1000)], file, wrong_in_ten(errors))
    run("imagenet-v2", tmp_path, tmp_path / "out")
    found = {name: cell["acc1"] for name, cell in scores(tmp_path / "out", "imagenet-v2").items()}
    assert found == pytest.approx({"matched-frequency": 90.0, "threshold": 80.0, "top": 70.0})
    other = tmp_path / "imagenetv2-top-images-format-val-224"
    class_folders(other, [str(n) for n in range(1000)], file, wrong_in_ten(9))
    run("imagenet-v2", other, tmp_path / "out")
    assert scores(tmp_path / "out", "imagenet-v2")["top"]["acc1"] == pytest.approx(10)
    with pytest.raises(ValueError, match=r"top-images-format-val and .*-224 are of the same variant"):
        run("imagenet-v2", tmp_path, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "imagenetv2-top-images-format-val")
    assert list(robustness.find("imagenet-v2", Path(".")).cells) == ["top"]


def test_imagenet_c(corrupted, tmp_path):
    """Mean errors are 30 %, for fog 20 %, so the mCE is known. Of every ten classes, the images have each once."""
    table = run("imagenet-c", corrupted, tmp_path, subset=10)
    mean = {name: 20.0 if name == "fog" else 30.0 for name in CORRUPTIONS}
    mce = sum(mean[name] / error for name, error in CORRUPTIONS.items()) / 15
    assert f"**mCE {mce:.1f}**" in table
    assert "| snow | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 30.0 | 86.7 | 34.6 |" in table
    assert "| fog | 0.0 | 10.0 | 20.0 | 30.0 | 40.0 | 20.0 | 81.9 | 24.4 |" in table
    rows = list(csv.reader((tmp_path / "imagenet-c.csv").open()))
    assert rows[-1][:7] == ["mean", "9.3", "19.3", "29.3", "39.3", "49.3", "29.3"]
    assert (tmp_path / "imagenet-c.md").read_text() == table
    assert Image.open(tmp_path / "imagenet-c.png").width > 900


def test_imbalanced_classes_of_imagenet_c_have_a_balanced_error(tmp_path):
    """Half of the 40 images are of the first class; severity 5 has all others wrong, the other severities none."""
    root, synsets = tmp_path / "imagenet-c", robustness.synsets()
    class_folders(tmp_path / "right", synsets, "a.JPEG", lambda label: label)
    class_folders(tmp_path / "wrong", synsets, "a.JPEG", lambda label: label and label % 999 + 1)
    for number in range(999):
        for tree in ("right", "wrong"):
            painted.paint(tmp_path / tree / synsets[0], f"{number}.JPEG", 0)
    for name, severity in itertools.product(CORRUPTIONS, SEVERITIES):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / str(severity)).symlink_to(tmp_path / ("right" if severity < 5 else "wrong"))
    rows = [row.split(" | ") for row in run("imagenet-c", root, tmp_path / "out", subset=40).splitlines() if "|" in row]
    labels = np.maximum(0, np.arange(40) - 19)
    mean = (100 - 100 * balanced_accuracy_score(labels, np.where(labels, labels % 20 + 1, 0))) / len(SEVERITIES)
    assert [row[-1] for row in rows] == ["balanced mean |", rows[1][-1], *[f"{mean:.1f} |"] * 16]
    assert rows[2][1:6] == ["0.0"] * 4 + ["50.0"]


def test_an_interrupted_suite_resumes(corrupted, tmp_path, monkeypatch, capsys):
    whole = run("imagenet-c", corrupted, tmp_path / "whole", subset=10)
    original, evaluated = main_robustness.evaluate, []

    def stopping(*given, **settings):
        if len(evaluated) == 40:
            raise KeyboardInterrupt
        evaluated.append(given)
        return original(*given, **settings)

    monkeypatch.setattr(main_robustness, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("imagenet-c", corrupted, tmp_path / "out", subset=10)
    assert len(scores(tmp_path / "out", "imagenet-c")) == 40
    monkeypatch.setattr(main_robustness, "evaluate", lambda *a, **kw: evaluated.append(a) or original(*a, **kw))
    capsys.readouterr()
    assert run("imagenet-c", corrupted, tmp_path / "out", subset=10) == whole
    assert len(evaluated) == 75
    assert capsys.readouterr().out.count("scores reused from") == 40
    for change, message in (("subset", "10 and is 1"), ("crop_pct", "1.0 and is 0.5")):
        with pytest.raises(ValueError, match=rf"\({change} was {message}\); .*`output_dir`"):
            run("imagenet-c", corrupted, tmp_path / "out", **({"subset": 10} | {change: message.split()[-1]}))
    for damage in ("{", '{"settings": [1], "cells": {}}'):
        (tmp_path / "out" / "imagenet-c.json").write_text(damage)
        with pytest.raises(ValueError, match="can't be read"):
            run("imagenet-c", corrupted, tmp_path / "out", subset=10)


def test_a_folder_with_more_images_is_evaluated_again(tmp_path, capsys):
    data = class_folders(tmp_path / "a", robustness.subset("imagenet-a"), "a.jpg", wrong_in_ten(0))
    output = run("imagenet-a", data, tmp_path / "out")
    assert "timm:reads_colors: 200 images of the 7,500 published" in output
    assert "imagenet-a: 200 images, but 7,500 were published" in capsys.readouterr().out
    class_folders(data, robustness.subset("imagenet-a"), "b.jpg", lambda label: label + 10)
    for expected in ("Acc@1 5", "scores reused from"):
        run("imagenet-a", data, tmp_path / "out")
        assert expected in capsys.readouterr().out
    assert scores(tmp_path / "out", "imagenet-a")["imagenet-a"]["images"] == 400
    run("imagenet-a", data, tmp_path / "turned", exif=True)
    with pytest.raises(ValueError, match=r"\(exif was True and is False\)"):
        run("imagenet-a", data, tmp_path / "turned")


@pytest.fixture(scope="session")
def timm_model(tmp_path_factory):
    """A small network of timm, as its hub has them, that knows each class's color: by the nearest features.

    It is tested on larger images than it was trained on, as many of timm's are.
    """
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"test_input_size": (3, 192, 192)}).eval()
    sketches = class_folders(tmp_path_factory.mktemp("colors"), robustness.synsets(), "a.JPEG", lambda label: label)
    batches = timm_loader(sketches, model)
    with torch.no_grad():
        features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in batches])
        model.get_classifier().weight.copy_(2 * features)
        model.get_classifier().bias.copy_(-features.square().sum(dim=1))
    folder = tmp_path_factory.mktemp("network")
    save_for_hf(model, str(folder))
    return model, f"timm:local-dir:{folder}"


def timm_loader(folder, model):
    data, config = create_dataset("", root=str(folder)), resolve_model_data_config(model, use_test_size=True)
    return create_loader(data, batch_size=64, is_training=False, use_prefetcher=False, num_workers=0,
                         device=torch.device("cpu"), **config)  # fmt: skip


def test_scores_of_a_timm_model_equal_timms(timm_model, tmp_path):
    model, name = timm_model
    folder = class_folders(tmp_path / "a", robustness.subset("imagenet-a"), "a.jpg", wrong_in_ten(5))
    run("imagenet-a", folder, tmp_path, name)
    columns = robustness.find("imagenet-a", folder).columns
    with torch.no_grad():
        found = [(model(x)[:, columns], labels) for x, labels in timm_loader(folder, model)]
    accuracies = timm.utils.accuracy(*map(torch.cat, zip(*found, strict=True)), topk=(1, 5))
    acc1, acc5 = (pytest.approx(float(accuracy), abs=1e-4) for accuracy in accuracies)
    assert scores(tmp_path, "imagenet-a")["imagenet-a"] == {"images": 200, "folder": "a", "acc1": acc1, "acc5": acc5}
    assert 10 < accuracies[0] < 90


def test_imagenet_c_is_evaluated_without_a_center_crop(timm_model, corrupted, tmp_path):
    """The images are published as center crops."""
    run("imagenet-c", corrupted, tmp_path, timm_model[1], subset=2)
    assert scores(tmp_path, "imagenet-c", "settings")["crop_pct"] == 1.0
    for name, side in ((timm_model[1], 192), (save_ours(tmp_path / "ours.pth", input_size=160), 160)):
        picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
        whole, cut = (main_robustness.load(str(name), share, torch.device("cpu")).transform for share in (1.0, None))
        assert torch.equal(whole(picture), pil_to_tensor(picture))
        assert cut(picture).shape == whole(picture).shape
        assert not torch.equal(cut(picture), pil_to_tensor(picture))


def test_imbalanced_classes_have_a_balanced_accuracy(timm_model, tmp_path):
    """In one process and in two; exact by scikit-learn."""
    model, name = timm_model
    data = class_folders(tmp_path / "r", robustness.subset("imagenet-r"), "art_0.jpg", wrong_in_ten(5))
    for number in range(1, 12):
        painted.paint(data / robustness.subset("imagenet-r")[-1], f"art_{number}.jpg", number)
    batches, columns = timm_loader(data, model), robustness.find("imagenet-r", data).columns
    with torch.no_grad():
        found = [(labels, model(x)[:, columns].argmax(dim=1)) for x, labels in batches]
    labels, predictions = (torch.cat(column) for column in zip(*found, strict=True))
    accuracy, balanced = (100 * f(labels, predictions) for f in (accuracy_score, balanced_accuracy_score))
    assert accuracy < balanced - 1
    for count in (1, 2):
        output = in_processes(count, "imagenet-r", data, tmp_path / str(count), name)
        assert f"imagenet-r: Acc@1 {accuracy:.3f} balanced accuracy {balanced:.3f} (211 images" in output
        assert f" | {balanced:.3f} |" in output
        cell = scores(tmp_path / str(count), "imagenet-r")["imagenet-r"]
        assert (cell["acc1"], cell["balanced_acc"]) == pytest.approx((accuracy, balanced))


def test_real_accuracy_equals_timms(timm_model, tmp_path):
    """Any of the labels of an image is right. One of two processes has one more image than the other."""
    model, name = timm_model
    real = RealLabelsImagenet([""] * 50_000)
    for number in range(1, 201):
        file = f"ILSVRC2012_val_{number:08d}.JPEG"
        label = (real.real_labels[file] or [number])[-1]
        painted.paint(tmp_path / "val" / robustness.synsets()[number], file, label + number % 2)
    run("imagenet-real", tmp_path, tmp_path / "out", name)
    batches = timm_loader(tmp_path / "val", model)
    real.filenames = batches.dataset.filenames(basename=True)
    with torch.no_grad():
        for x, _ in batches:
            real.add_result(model(x))
    found = scores(tmp_path / "out", "imagenet-real")["imagenet-real"]
    assert found["acc1"] == pytest.approx(real.get_accuracy(1))
    assert 0 < found["acc1"] < 90
    assert found["images"] % 2
    in_processes(2, "imagenet-real", tmp_path, tmp_path / "two", name)
    assert scores(tmp_path / "two", "imagenet-real")["imagenet-real"] == found


def save_ours(path, **settings):
    model = get_model("vit_mini_patch4", **({"input_size": 16} | settings))
    torch.save({"model": model.state_dict(), "args": model.settings}, path)
    return path


def test_recorded_crops_are_the_defaults(tmp_path, capsys):
    data = class_folders(tmp_path / "r", robustness.subset("imagenet-r"), "art_0.jpg", lambda label: label)
    own = save_ours(tmp_path / "own.pth", crop_pct=0.9)
    run("imagenet-r", data, tmp_path / "own", own)
    assert scores(tmp_path / "own", "imagenet-r", "settings")["crop_pct"] == 0.9
    assert "crop_pct" not in capsys.readouterr().out
    run("imagenet-r", data, tmp_path / "whole", own, crop_pct=1)
    warning = f"warning: crop_pct=1.0 is used, and {own} was made with crop_pct=0.9"
    assert capsys.readouterr().out.count(warning) == 1
    assert scores(tmp_path / "whole", "imagenet-r", "settings")["crop_pct"] == 1.0


def test_what_the_scores_depend_on_is_compared(tmp_path, own_module):
    """Weights do not show the arguments of an encoder. A model for whole images has no crop."""
    own_module(
        "gains",
        """
from models_vit import Encoder
class Gain(Encoder):
    def __init__(self, *, gain=1, **arguments):
        super().__init__(**arguments)
        self.gain = gain
    def tokenize(self, imgs, **context):
        return self.gain * super().tokenize(imgs, **context)
""",
    )
    data = class_folders(tmp_path / "r", robustness.subset("imagenet-r"), "art_0.jpg", lambda label: label)
    file = save_ours(tmp_path / "own.pth", crop="none")
    run("imagenet-r", data, tmp_path / "out", file, encoder="gains:Gain", encoder_args="gain=1")
    with pytest.raises(ValueError, match=r"another run \(encoder_args was \['gain=1'\] and is \['gain=2'\]\)"):
        run("imagenet-r", data, tmp_path / "out", file, encoder="gains:Gain", encoder_args="gain=2")
    with pytest.raises(ValueError, match=r"--crop_pct 0.5: .* --crop none"):
        run("imagenet-r", data, tmp_path / "crop", file, crop_pct=0.5)


def test_the_recorded_range_of_values_is_applied(tmp_path):
    """The model finds the last class by its brightness, which is above the mean with the recorded range only."""
    folders = robustness.subset("imagenet-r")
    for folder in folders:
        (tmp_path / "r" / folder).mkdir(parents=True)
        gray = Image.new("RGB", (20, 20), (100 if folder == folders[-1] else 10,) * 3)
        gray.save(tmp_path / "r" / folder / "art_0.jpg")
    for name, value_range, accuracy in (("bytes", None, 0.5), ("range", [0, 128], 1.0)):
        model = get_model("vit_mini_patch4", input_size=16, nb_classes=1000, value_range=value_range)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.patch_embed.proj.weight[0] = 1 / 48
            model.fc_norm.weight.fill_(1)
            model.head.weight[robustness.synsets().index(folders[-1]), 0] = 1
        torch.save({"model": model.state_dict(), "args": model.settings}, tmp_path / f"{name}.pth")
        run("imagenet-r", tmp_path / "r", tmp_path / name, tmp_path / f"{name}.pth")
        assert scores(tmp_path / name, "imagenet-r")["imagenet-r"]["acc1"] == accuracy


def test_our_models_are_evaluated_and_invalid_models_are_errors(tmp_path):
    data = class_folders(tmp_path / "r", robustness.subset("imagenet-r"), "art_0.jpg", lambda label: label)
    for name, classes in (
        ("good", None), ("known", robustness.synsets()), ("numbers", [str(n) for n in range(1000)]),
        ("names", [name.partition(",")[0] for name in imagenet_classes()]),
    ):  # fmt: skip
        file = save_ours(tmp_path / f"{name}.pth", **({"nb_classes": 1000, "classes": classes} if classes else {}))
        run("imagenet-r", data, tmp_path / name, file)
        assert scores(tmp_path / name, "imagenet-r")["imagenet-r"]["images"] == 200
    other, renamed, order = ["cat", "dog"], [f"kind{n}" for n in range(1000)], sorted(imagenet_classes())
    for number, (settings, message) in enumerate((
        ({"nb_classes": 2, "classes": other}, "has 2 classes; .* the 1000 classes of ImageNet-1K"),
        ({"nb_classes": 1000, "classes": renamed}, "not trained on .* ImageNet-1K.* kind0, and not n01440764"),
        ({"nb_classes": 1000, "label_names": order}, "another order of them"),
        ({"nb_classes": 1000, "classes": order}, "another order of them: its first class is Afghan hound.*or tench"),
        ({"nb_classes": 0}, "is not a classifier"), ({"in_chans": 1}, "1 channels, but got 3"),
    )):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=message):
            run("imagenet-r", data, tmp_path / "wrong", save_ours(tmp_path / f"{number}.pth", **settings))
    for name, message in (("timm:no_such_model", "model=timm:no_such_model"), ("nothing", " nothing")):
        with pytest.raises(ValueError, match=message):
            run("imagenet-r", data, tmp_path, name)
