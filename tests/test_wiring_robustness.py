"""Arguments of the evaluation of classifiers on the robustness test sets of ImageNet."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from capture import parse, recorder
from painted import class_folders
from timm.data import RealLabelsImagenet

import main_robustness
from engine_finetune import Evaluation
from util import dist
from util.data import loader
from util.evaluation import robustness
from util.files import locks

DEFAULTS = {"subset": None, "crop_pct": None, "output_dir": "runs/robustness", "batch_size": 128, "num_workers": 10}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script with one image per class. Three of four predictions of each cell are correct."""

    def evaluate(model, batches, *, normalize, precision):
        calls.evaluated.append({"model": model, "normalize": normalize, "precision": precision})
        labels = np.concatenate([labels.numpy() for _, labels, _ in batches])
        return Evaluation(labels, np.where(np.arange(len(labels)) % 4, labels, labels + 1), len(labels) - 1, 0.5)

    calls = SimpleNamespace(evaluated=[])
    monkeypatch.setattr(main_robustness, "evaluate", evaluate)

    def start(suite, **flags):
        with monkeypatch.context() as patch:
            calls.joined = recorder(patch, dist, "init")
            calls.loaded = recorder(patch, main_robustness, "load")
            calls.loaders = recorder(patch, loader, "eval_loader")
            calls.compiled = recorder(patch, main_robustness, "compile_model", call=False)
            patch.setattr(loader, "up_to_cores", lambda num_workers: 0)
            settings = {"data_path": tmp_path / suite, "output_dir": tmp_path / "out", "device": "cpu",
                        "model": "timm:reads_colors"}  # fmt: skip
            calls.table = main_robustness.main(parse(main_robustness, suite=suite, **(settings | flags)))
        calls.results = json.loads((settings | flags)["output_dir"].joinpath(f"{suite}.json").read_text())
        return calls

    return start


def test_the_defaults():
    args = vars(parse(main_robustness, suite="imagenet-a", data_path="a", model="m"))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_compile_applies_to_the_model_with_the_classes_of_the_suite(run, tmp_path):
    class_folders(tmp_path / "imagenet-a", robustness.subset("imagenet-a"), "a.jpg", lambda label: label)
    assert run("imagenet-a", output_dir=tmp_path / "eager").compiled == []
    calls = run("imagenet-a", compile=True)
    (compiled,) = calls.compiled
    assert compiled["model"] is calls.evaluated[-1]["model"]
    assert compiled["freeze_weights"]


def test_the_classes_of_a_suite_are_answered(run, tmp_path):
    class_folders(tmp_path / "imagenet-a", robustness.subset("imagenet-a"), "a.jpg", lambda label: label)
    calls = run("imagenet-a")
    (evaluated,) = calls.evaluated
    labels = [robustness.synsets().index(folder) for folder in robustness.subset("imagenet-a")]
    assert (len(labels), evaluated["model"].classes.tolist()) == (200, labels)
    images = evaluated["normalize"](torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert images.unique().tolist() == [-1.0]  # the model's mean and std are .5
    assert calls.results["cells"] == {"imagenet-a": {"images": 200, "acc1": 75.0, "acc5": 99.5}}
    assert calls.loaded[0]["crop_pct"] is None
    (batches,) = calls.loaders
    assert (batches["batch_size"], batches["num_workers"], len(batches["samples"])) == (128, 10, 200)
    assert batches["samples"][0, 0].image.shape == (3, 32, 32)
    assert "| imagenet-a | 200 | 75.000 | 99.500 |" in calls.table
    settings = {name: calls.results["settings"][name] for name in ("model", "subset", "amp", "data_path")}
    assert settings == {"model": "timm:reads_colors", "subset": None, "amp": "fp32",
                        "data_path": str(tmp_path / "imagenet-a")}  # fmt: skip


def test_every_flag_reaches_its_place(run, tmp_path):
    class_folders(tmp_path / "imagenet-r", robustness.subset("imagenet-r"), "a.jpg", lambda label: label)
    calls = run("imagenet-r", subset=7, crop_pct=0.5, batch_size=3, num_workers=2, amp="bf16", dist_url="tcp://x",
                dist_timeout=9, dist_backend="gloo")  # fmt: skip
    assert calls.loaded[0] == {"name": "timm:reads_colors", "crop_pct": 0.5, "device": torch.device("cpu")}
    (batches,) = calls.loaders
    assert (batches["batch_size"], batches["num_workers"], len(batches["samples"])) == (3, 2, 7)
    assert calls.evaluated[0]["precision"].dtype is torch.bfloat16
    assert calls.joined == [{"device_name": "cpu", "dist_url": "tcp://x", "timeout": 9, "backend": "gloo"}]
    assert (calls.results["settings"]["subset"], calls.results["settings"]["amp"]) == (7, "bf16")
    assert "a subset of 7 images per cell" in calls.table


def test_two_models_at_once_do_not_write_one_file(run, tmp_path):
    """The second would overwrite the scores of the first. Two suites may be evaluated at once."""
    for suite in ("imagenet-a", "imagenet-r"):
        class_folders(tmp_path / suite, robustness.subset(suite), "a.jpg", lambda label: label)
    with locks.locked(tmp_path / "out", "imagenet-a.lock"):
        with pytest.raises(ValueError, match="out is being written to by another process"):
            run("imagenet-a")
        run("imagenet-r")


def test_corrupted_images_are_evaluated_without_a_crop(run, tmp_path, monkeypatch):
    images = class_folders(tmp_path / "images", robustness.synsets(), "a.jpg", lambda label: label)
    for name in robustness.CORRUPTIONS:
        (tmp_path / "imagenet-c" / name).mkdir(parents=True)
        for severity in range(1, 6):
            (tmp_path / "imagenet-c" / name / str(severity)).symlink_to(images)
    files = robustness.find_files(images)
    monkeypatch.setattr(robustness, "find_files", lambda path: files)
    calls = run("imagenet-c", subset=4)
    assert calls.loaded[0]["crop_pct"] == 1.0
    assert len(calls.evaluated) == len(calls.results["cells"]) == 75
    assert all(cell == {"images": 4, "acc1": 75.0, "acc5": 75.0} for cell in calls.results["cells"].values())
    mce = 25 / 15 * sum(1 / error for error in ALEXNET.values())
    assert f"**mCE {mce:.1f}**" in calls.table


# Hendrycks & Dietterich (2019): top-1 errors of AlexNet.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip


def test_alexnets_errors_equal_the_published_ones():
    assert robustness.CORRUPTIONS == ALEXNET
    assert {family: len(errors) for family, errors in robustness.ALEXNET.items()} == {
        "noise": 3, "blur": 4, "weather": 4, "digital": 4,
    }  # fmt: skip


def test_the_published_numbers_of_images():
    labels = RealLabelsImagenet([""] * 50_000).real_labels
    assert sum(map(bool, labels.values())) == robustness.IMAGES["imagenet-real"] == 46_837
    assert robustness.IMAGES["imagenet-a"] == 7_500
    assert robustness.IMAGES["imagenet-r"] == 30_000
    assert robustness.IMAGES["imagenet-sketch"] == 50_889
    assert robustness.IMAGES["imagenet-v2"] == 10_000
    assert robustness.IMAGES["imagenet-c"] == 50_000


@pytest.mark.parametrize("name", ALEXNET)
def test_each_corruption_is_normalized_by_its_own_error(name):
    """CE = sum of the five severities' errors / (5 x AlexNet's); mCE = the mean of the 15."""
    errors = {f"{other}/{severity}": 0.0 for other in ALEXNET for severity in range(1, 6)}
    errors |= {f"{name}/{severity}": float(error) for severity, error in enumerate((10, 20, 40, 50, 80), start=1)}
    summary = robustness.corruption_errors(errors)
    assert summary.mean[name] == pytest.approx(40)
    assert summary.normalized[name] == pytest.approx((10 + 20 + 40 + 50 + 80) / (5 * ALEXNET[name]))
    assert summary.mce == pytest.approx(200 / (5 * ALEXNET[name]) / 15)
    assert summary.unnormalized == pytest.approx(40 / 15)


@pytest.mark.parametrize(
    ("suite", "published"),
    [
        ("imagenet-c", [51.7, 41.8, 33.8, 36.8]),
        ("imagenet-a", [35.9, 57.1, 68.2, 76.7]),
        ("imagenet-r", [48.3, 59.9, 64.4, 66.5]),
        ("imagenet-sketch", [34.5, 45.3, 49.6, 50.9]),
    ],
)
def test_the_published_scores_are_printed(suite, published):
    models = ["ViT-B/16", "ViT-L/16", "ViT-H/14", "ViT-H/14, 448"]
    assert robustness.PUBLISHED[suite] == dict(zip(models, published, strict=True))
