"""ImageNet's robustness test sets: folders, classes, labels, and mean corruption errors."""

import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from painted import class_folders, paint
from timm.data import RealLabelsImagenet

from util.evaluation import robustness, robustness_report
from util.evaluation.robustness import CORRUPTIONS, SEVERITIES, corruption_errors, find, open_cell


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_the_classes_equal_timms(name, tmp_path):
    file = resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_indices.txt"
    suite = find(name, tmp_path)
    assert suite.columns == [int(line) for line in file.read_text().split()]
    assert len(suite.columns) == len(set(suite.folders)) == 200
    assert [robustness.synsets()[label] for label in suite.columns] == suite.folders


def test_the_normalized_errors_of_alexnet_are_100():
    errors = {f"{name}/{severity}": 100 * error for name, error in CORRUPTIONS.items() for severity in SEVERITIES}
    found = corruption_errors(errors)
    assert found.mce == pytest.approx(100.0, abs=1e-9)
    assert list(found.normalized.values()) == pytest.approx([100.0] * 15)


def test_errors_by_hand():
    """Errors of fog are 10 to 50 %, all others 0: the mean of fog is 30, and AlexNet's 81.9324."""
    errors = {f"{name}/{five}": 10.0 * five * (name == "fog") for name in CORRUPTIONS for five in SEVERITIES}
    found = corruption_errors(errors)
    assert found.mean["fog"] == pytest.approx(30.0)
    assert found.normalized["fog"] == pytest.approx(100 * 30 / 81.9324)
    assert found.mce == pytest.approx(100 * 30 / 81.9324 / 15)
    assert found.unnormalized == pytest.approx(2.0)


# Hendrycks & Dietterich (2019): top-1 errors of AlexNet.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip


def test_each_corruption_is_normalized_by_the_published_error_of_alexnet():
    """CE = sum of the five severities' errors / (5 x AlexNet's); mCE = the mean of the 15."""
    errors = {f"{name}/{five}": 2.0 * number * five for number, name in enumerate(ALEXNET) for five in SEVERITIES}
    found = corruption_errors(errors)
    expected = {name: 2.0 * number * 15 / (5 * ALEXNET[name]) for number, name in enumerate(ALEXNET)}
    assert found.normalized == pytest.approx(expected)
    assert found.mce == pytest.approx(sum(expected.values()) / 15)
    assert [len(errors) for errors in robustness.ALEXNET.values()] == [3, 4, 4, 4]


def test_the_published_numbers_of_images_and_scores():
    labels = RealLabelsImagenet([""] * 50_000).real_labels
    assert sum(map(bool, labels.values())) == robustness.IMAGES["imagenet-real"] == 46_837
    counts = {"imagenet-a": 7_500, "imagenet-r": 30_000, "imagenet-sketch": 50_889, "imagenet-v2": 10_000,
              "imagenet-c": 50_000}  # fmt: skip
    assert {suite: robustness.IMAGES[suite] for suite in counts} == counts
    scores = {"imagenet-c": [51.7, 41.8, 33.8, 36.8], "imagenet-a": [35.9, 57.1, 68.2, 76.7],
              "imagenet-r": [48.3, 59.9, 64.4, 66.5], "imagenet-sketch": [34.5, 45.3, 49.6, 50.9]}  # fmt: skip
    assert {suite: list(published.values()) for suite, published in robustness.PUBLISHED.items()} == scores
    for published in robustness.PUBLISHED.values():
        assert list(published) == ["ViT-B/16", "ViT-L/16", "ViT-H/14", "ViT-H/14, 448"]


def test_names_of_models_are_no_formulas(tmp_path):
    cells = {"imagenet-a": {"images": 7500.0, "acc1": 50.0}}
    robustness_report.write(tmp_path / "scores", "imagenet-a", cells, r"imagenet-a, $\frac{1$")
    assert (tmp_path / "scores.png").exists()


def test_imagenet_v2_folders_are_class_numbers(tmp_path, monkeypatch):
    folders = [str(number) for number in range(1000)]
    class_folders(tmp_path / "imagenetv2-matched-frequency-format-val", folders, "a.jpeg", lambda label: label)
    suite = find("imagenet-v2", tmp_path)
    assert list(suite.cells) == ["matched-frequency"]
    source = open_cell(suite, "matched-frequency").source
    places = [int(source.name(index).split("/")[-2]) for index in range(1000)]
    assert places[:4] == [0, 1, 10, 100]  # the order of names
    assert source.labels.tolist() == places
    monkeypatch.chdir(tmp_path / "imagenetv2-matched-frequency-format-val")
    assert find("imagenet-v2", Path(".")) == suite


def test_suites_with_one_folder_accept_archives(tmp_path):
    class_folders(tmp_path / "set" / "imagenet-a", robustness.subset("imagenet-a"), "a.jpg", lambda label: label)
    archive = shutil.make_archive(str(tmp_path / "imagenet-a"), "tar", tmp_path / "set")
    source = open_cell(find("imagenet-a", tmp_path / "imagenet-a.tar"), "imagenet-a").source
    assert archive in source.name(0)
    assert source.labels.tolist() == list(range(200))


def test_an_archive_of_imagenets_validation_images(tmp_path):
    """Flat, as published, or with the folder of the unpacked archive."""
    for folder in ("", "val/n01440764"):
        paint(tmp_path / "set" / folder, "ILSVRC2012_val_00000002.JPEG", 0)
        shutil.make_archive(str(tmp_path / "images"), "tar", tmp_path / "set")
        assert len(open_cell(find("imagenet-real", tmp_path / "images.tar"), "imagenet-real").source) == 1
        shutil.rmtree(tmp_path / "set")
    with pytest.raises(ValueError, match=r"imagenet-v2 .*archives"):
        find("imagenet-v2", tmp_path / "images.tar")


def test_a_subset_is_spread_over_all_classes(tmp_path):
    class_folders(tmp_path, robustness.subset("imagenet-r"), "art_0.jpg", lambda label: label)
    suite = find("imagenet-r", tmp_path)
    assert open_cell(suite, "imagenet-r", 5).source.labels.tolist() == [0, 49, 99, 149, 199]
    assert len(open_cell(suite, "imagenet-r", 999).source) == 200


def test_real_labels_are_looked_up_by_file_names(tmp_path):
    """Image 1 has one label and image 2 two labels; images without labels are ignored."""
    labels = RealLabelsImagenet([""] * 50_000).real_labels
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 101)]
    unlabeled = [name for name in names if not labels[name]]
    for name in names:
        paint(tmp_path / "val" / "n01440764", name, 0)
    cell = open_cell(find("imagenet-real", tmp_path), "imagenet-real")
    assert len(cell.source) == 100 - len(unlabeled) < 100
    kept = [name for name in names if name not in unlabeled]
    assert [cell.source.name(index).split("/")[-1] for index in range(len(kept))] == kept
    assert cell.answers == [labels[name] for name in kept]
    assert any(len(answers) > 1 for answers in cell.answers)
    flat = open_cell(find("imagenet-real", tmp_path / "val" / "n01440764"), "imagenet-real", 10)
    assert [len(flat.source), len(flat.answers)] == [10, 10]


def corrupted(root, families=False):
    for family, corruptions in robustness.ALEXNET.items():
        for corruption in corruptions:
            for severity in SEVERITIES:
                (root / (family if families else "") / corruption / str(severity)).mkdir(parents=True)


@pytest.mark.parametrize("families", [False, True])
def test_imagenet_c_unpacked_into_one_folder_or_four(tmp_path, families):
    corrupted(tmp_path, families)
    cells = find("imagenet-c", tmp_path).cells
    assert len(cells) == 75
    assert cells["snow/5"] == tmp_path / ("weather" if families else "") / "snow" / "5"


def test_invalid_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--data_path: .*nowhere"):
        find("imagenet-a", tmp_path / "nowhere")
    corrupted(tmp_path / "c")
    (tmp_path / "c" / "snow" / "5").rmdir()
    (tmp_path / "c" / "fog" / "2").rmdir()
    with pytest.raises(ValueError, match=r"2 of the 75 folders .*: snow/5, fog/2$"):
        find("imagenet-c", tmp_path / "c")
    with pytest.raises(ValueError, match="imagenetv2-matched-frequency"):
        find("imagenet-v2", tmp_path / "c")

    sketch = tmp_path / "sketch"
    paint(sketch / "n01440764", "sketch_0.JPEG", 0)
    with pytest.raises(ValueError, match=r"999 of the 1000 .*: n01443537"):
        open_cell(find("imagenet-sketch", sketch), "imagenet-sketch")
    paint(sketch / "goldfish", "sketch_1.JPEG", 1)
    with pytest.raises(ValueError, match=r"unknown class folders: goldfish; .*1000"):
        open_cell(find("imagenet-sketch", sketch), "imagenet-sketch")
    paint(tmp_path / "flat", "a.jpg", 0)
    with pytest.raises(ValueError, match=r"no images .*200 class folders of imagenet-r"):
        open_cell(find("imagenet-r", tmp_path / "flat"), "imagenet-r")
    with pytest.raises(ValueError, match=r"1 files, such as a\.jpg"):
        open_cell(find("imagenet-real", tmp_path / "flat"), "imagenet-real")
    rendition = class_folders(tmp_path / "r", robustness.subset("imagenet-r"), "art_0.jpg", lambda label: label)
    with pytest.raises(ValueError, match=r"unknown class folders: n01443537, .*imagenet-a"):
        open_cell(find("imagenet-a", rendition), "imagenet-a")
    (rendition / "__MACOSX").mkdir()
    assert len(open_cell(find("imagenet-r", rendition), "imagenet-r").source) == 200
    (rendition / robustness.subset("imagenet-r")[7] / "art_0.jpg").unlink()
    with pytest.raises(ValueError, match=rf"1 of the 200 .* missing or empty: {robustness.subset('imagenet-r')[7]}$"):
        open_cell(find("imagenet-r", rendition), "imagenet-r")


def test_labels_of_all_cells_are_numbers_of_imagenet(tmp_path):
    class_folders(tmp_path, robustness.synsets(), "sketch_0.JPEG", lambda label: label)
    suite = find("imagenet-sketch", tmp_path)
    assert suite.columns == list(range(1000))
    assert np.array_equal(open_cell(suite, "imagenet-sketch").source.labels, np.arange(1000))
