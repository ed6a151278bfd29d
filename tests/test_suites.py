"""main_finetune.py --eval --suite on folders with the published layouts."""

import json
import os
import shutil
from importlib import resources

import forks
import numpy as np
import painted
import pytest
import torch
from mains import argv_of, fails, parse
from painted import class_folders, wrong_in_ten
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from timm.data import RealLabelsImagenet

import main_finetune
from mae.data.pixels import to_tensor
from mae.evaluate import suites
from mae.evaluate.imagenet import imagenet_classes, require_imagenet, synsets
from mae.evaluate.suites import SEVERITIES, classes_of, corruption_errors, open_suite
from mae.files import locks
from mae.inference import get_model

ALEXNET = {  # Hendrycks & Dietterich (2019): top-1 errors of AlexNet
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
REAL_LABELS = RealLabelsImagenet([""] * 50_000).real_labels
ALL_BUT_C = "imagenet-a imagenet-r imagenet-sketch imagenet-v2 imagenet-real"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """ImageNet's val/, and a folder for each suite. In imagenet-c, severity s has 10 s % errors, fog 10 (s - 1) %."""
    root = tmp_path_factory.mktemp("imagenet")
    trees = [class_folders(root / f"tree{n}", synsets(), "a.JPEG", wrong_in_ten(n)) for n in range(6)]
    (root / "imagenet-sketch").symlink_to(trees[3])
    for number, name in enumerate(ALEXNET):
        folder = root / "imagenet-c" / ("noise" if number < 3 else "") / name  # some unpacked into a folder
        folder.mkdir(parents=True)
        for severity in SEVERITIES:
            (folder / str(severity)).symlink_to(trees[severity - (name == "fog")])
    for suite in ("imagenet-a", "imagenet-r"):
        class_folders(root / suite, classes_of(suite), "a.jpg", lambda label: label + label % 2)
    for number in range(11):
        painted.paint(root / "imagenet-r" / classes_of("imagenet-r")[-1], f"{number}.jpg", number)
    for errors, name in enumerate(("matched-frequency", "top-images"), start=1):
        folder = root / "imagenet-v2" / f"imagenetv2-{name}-format-val"
        class_folders(folder, classes_of("imagenet-v2"), "a.jpeg", wrong_in_ten(errors))
    for number in range(1, 101):
        file = f"ILSVRC2012_val_{number:08d}.JPEG"
        painted.paint(root / "val" / synsets()[number], file, (REAL_LABELS[file] or [number])[-1] + number % 2)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return painted.reader(tmp_path_factory.mktemp("model") / "reader.pth")


def flags_of(data, model, out, suite, **flags):
    paths = {"data_path": data, "resume": model, "output_dir": out}
    return {"eval": True, "suite": suite, **paths, "num_workers": 0, "device": "cpu", **flags}


def run(*given, **flags):
    return main_finetune.main(parse(main_finetune, **flags_of(*given, **flags)))


def results_in(out):
    return {key.split()[0]: value for key, value in json.loads((out / "suites.json").read_text()).items()}


@pytest.fixture(scope="module")
def complete(data, model, tmp_path_factory):
    """The results of all suites by name; imagenet-c with ten images of a folder."""
    out = tmp_path_factory.mktemp("complete")
    run(data, model, out, ALL_BUT_C)
    run(data, model, out, "imagenet-c", subset=10)
    return out, results_in(out)


def accuracies(complete, suite):
    return {title: scores["acc1"] for title, scores in complete[1][suite]["scores"].items()}


@pytest.mark.slow
def test_accuracies_among_all_classes(complete):
    assert accuracies(complete, "imagenet-sketch") == {"imagenet-sketch": 70.0}
    expected = {"imagenet-v2 matched-frequency": 90.0, "imagenet-v2 top": 80.0}
    assert accuracies(complete, "imagenet-v2") == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["imagenet-a", "imagenet-r"])
def test_predictions_are_restricted_to_the_classes_of_the_suite(suite, data, model, complete):
    file = resources.files("timm.data") / "_info" / f"{suite.replace('-', '_')}_indices.txt"
    columns = [int(line) for line in file.read_text().split()]
    files = [(label, path) for label, column in enumerate(columns)
             for path in sorted((data / suite / synsets()[column]).iterdir())]  # fmt: skip
    labels, classifier = np.array([label for label, _ in files]), get_model(model)
    images = torch.stack([to_tensor(Image.open(path).resize((16, 16))) for _, path in files])
    with torch.no_grad():
        logits = classifier(classifier.normalize(images))
    predictions = logits[:, columns].argmax(dim=1).numpy()
    assert not np.array_equal(np.array(columns)[predictions], logits.argmax(dim=1).numpy())
    found = complete[1][suite]["scores"][suite]
    assert found["acc1"] == pytest.approx(100 * (labels == predictions).mean())
    if suite == "imagenet-r":  # imbalanced
        assert found["balanced_acc"] == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
        assert found["acc1"] < found["balanced_acc"] - 1


@pytest.mark.slow
def test_any_of_the_real_labels_is_right(complete):
    """Images without a label are left out. Odd images have the color of the next class."""
    labels = {number: REAL_LABELS[f"ILSVRC2012_val_{number:08d}.JPEG"] for number in range(1, 101)}
    right = [answers[-1] + number % 2 in answers for number, answers in labels.items() if answers]
    assert len(right) < 100
    assert accuracies(complete, "imagenet-real") == {"imagenet-real": pytest.approx(100 * np.mean(right))}
    assert complete[1]["imagenet-real"]["settings"]["images"] == {"imagenet-real": len(right)}


@pytest.mark.slow
def test_the_mean_corruption_error_is_relative_to_alexnet(complete):
    """Mean errors are 30 %, of fog 20 %."""
    errors = {name: (20 if name == "fog" else 30) / alexnet for name, alexnet in ALEXNET.items()}
    found = complete[1]["imagenet-c"]
    assert found["corruption_errors"] == pytest.approx(errors)
    assert found["mce"] == pytest.approx(sum(errors.values()) / 15)
    assert found["settings"]["crop_pct"] == 1.0  # the images are center crops
    five = {f"{name}/{s}": {"acc1": 100 - 2.0 * n * s} for n, name in enumerate(ALEXNET) for s in SEVERITIES}
    mce = np.mean([2.0 * n * 15 / (5 * alexnet) for n, alexnet in enumerate(ALEXNET.values())])
    assert corruption_errors(five)["mce"] == pytest.approx(mce)


@pytest.mark.slow
def test_finished_suites_are_not_evaluated_again(data, model, complete, monkeypatch, capsys, tmp_path):
    """The table has the published numbers. Other settings are other results."""
    evaluated, evaluate = [], main_finetune.evaluate_model
    monkeypatch.setattr(main_finetune, "evaluate_model", lambda *a, **k: evaluated.append(a) or evaluate(*a, **k))
    out = shutil.copytree(complete[0], tmp_path / "out")
    run(data, model, out, ALL_BUT_C)
    assert not evaluated
    output = capsys.readouterr().out
    assert "| imagenet-sketch | 1,000 | Acc@1 | 70.0 | 34.5 | 45.3 | 49.6 | 50.9 |" in output
    assert "imagenet-a: 200 images, but 7,500 were published" in output
    with locks.locked(out, "suites.lock"), pytest.raises(ValueError, match=str(out)):
        run(data, model, out, "imagenet-a")
    run(data, model, out, "imagenet-a imagenet-r", crop_pct=0.5)
    run(data, painted.reader(tmp_path / "other.pth", qk_norm="layer"), out, "imagenet-a")
    assert len(evaluated) == 3
    assert len(json.loads((out / "suites.json").read_text())) == 9
    os.utime(next((data / "imagenet-a").glob("*/*")), (0, 0))  # another file of this name
    run(data, model, out, "imagenet-a")
    assert len(evaluated) == 4


@pytest.mark.slow
def test_processes_agree(data, model, complete, tmp_path):
    """One of two processes has an image more than the other."""
    flags = flags_of(data, model, tmp_path / "out", "imagenet-r imagenet-real")
    assert "| imagenet-real |" in forks.run("main_finetune.py", argv_of(flags), tmp_path / "output", 2)
    for suite, result in results_in(tmp_path / "out").items():
        assert result["scores"] == complete[1][suite]["scores"]
        assert sum(result["settings"]["images"].values()) % 2 == (suite == "imagenet-r")


def test_wrong_commands_are_one_line(data, model, capsys, monkeypatch, tmp_path):
    """A suite whose folder is wrong is found before the others are evaluated."""
    monkeypatch.setattr(main_finetune, "evaluate_model", lambda *_, **__: pytest.fail("a suite is evaluated"))
    painted.paint(tmp_path / "more" / "n01440764", "a.JPEG", 0)
    painted.paint(tmp_path / "more" / "goldfish", "b.JPEG", 1)
    shutil.copytree(data / "imagenet-c", tmp_path / "c", symlinks=True)
    (tmp_path / "c" / "snow" / "5").unlink()
    (tmp_path / "c" / "noise" / "shot_noise" / "2").unlink()
    for name in ("imagenetv2-top-images", "imagenetv2-top-224"):
        (tmp_path / "twice" / name).mkdir(parents=True)
    for entry, words in (
        ("imagenet-b", "did you mean imagenet-"), ("imagenet-a=nowhere", "there is no "),
        (f"imagenet-c={tmp_path / 'c'}", "2 of the 75 folders"),
        (f"imagenet-c={tmp_path / 'c'}", "shot_noise/2, snow/5"),
        (f"imagenet-v2={tmp_path / 'twice'}", "same variant"), (f"imagenet-v2={tmp_path / 'c'}", "imagenetv2-matched"),
        (f"imagenet-sketch={tmp_path / 'more'}", "unknown are goldfish, and missing or empty n01443537"),
        (f"imagenet-a={data / 'imagenet-r'}", "200 of imagenet-a"),
        (f"imagenet-real={tmp_path / 'more'}", "2 files in"),
    ):  # fmt: skip
        flags = flags_of(data, model, tmp_path, "imagenet-a")
        line = fails(capsys, monkeypatch, main_finetune, *argv_of(flags), "--suite", entry)
        assert f"suite={entry.partition('=')[0]}" in line
        assert words in line
    line = fails(capsys, monkeypatch, main_finetune, "--suite", "imagenet-a", "--data_path", data)
    assert "suite" in line
    assert "eval" in line
    assert "subset" in fails(capsys, monkeypatch, main_finetune, "--eval", "--subset", 5, "--data_path", data)


def test_archives_and_single_variants(data, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "a"), "tar", data, "imagenet-a")
    source = open_suite(f"imagenet-a={archive}", None).sources["imagenet-a"]
    assert source.labels.tolist() == list(range(200))
    assert open_suite(f"imagenet-a={archive}", None, 5).sources["imagenet-a"].labels.tolist() == [0, 49, 99, 149, 199]
    variant = data / "imagenet-v2" / "imagenetv2-top-images-format-val"
    assert [*open_suite(f"imagenet-v2={variant}", None).sources] == ["imagenet-v2 top"]


def test_a_classifier_needs_the_classes_of_imagenet():
    names = [name.partition(",")[0] for name in imagenet_classes()]
    for settings in ({}, {"classes": synsets()}, {"classes": [str(n) for n in range(1000)]}, {"label_names": names}):
        require_imagenet(settings, 1000, "file")
    for settings, count in (
        ({"classes": ["cat", "dog"]}, 2), ({"task": "multilabel"}, 1000), ({"classes": sorted(names)}, 1000),
        ({"label_names": [f"kind{n}" for n in range(1000)]}, 1000),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="ImageNet-1K"):
            require_imagenet(settings, count, "file")


def test_the_published_numbers():
    counts = {"imagenet-a": 7_500, "imagenet-r": 30_000, "imagenet-sketch": 50_889, "imagenet-v2": 10_000,
              "imagenet-c": 50_000, "imagenet-real": sum(map(bool, REAL_LABELS.values()))}  # fmt: skip
    assert counts == suites.IMAGES
    assert suites.PUBLISHED == {
        "imagenet-c": (51.7, 41.8, 33.8, 36.8), "imagenet-a": (35.9, 57.1, 68.2, 76.7),
        "imagenet-r": (48.3, 59.9, 64.4, 66.5), "imagenet-sketch": (34.5, 45.3, 49.6, 50.9),
    }  # fmt: skip
    assert suites.ALEXNET == ALEXNET
