"""ImageNet's robustness test sets: folders, classes, labels, and mean corruption errors."""

import shutil
from importlib import resources
from pathlib import Path

import pytest
from painted import class_folders, paint
from timm.data import RealLabelsImagenet

from mae.evaluate import robustness
from mae.evaluate.robustness import SEVERITIES, corruption_errors, find, open_cell


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_the_classes_equal_timms(name, tmp_path):
    file = resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_indices.txt"
    suite = find(name, tmp_path)
    assert suite.columns == [int(line) for line in file.read_text().split()]
    assert len(suite.columns) == len(set(suite.folders)) == 200
    assert [robustness.synsets()[label] for label in suite.columns] == suite.folders


ALEXNET = {  # Hendrycks & Dietterich (2019): top-1 errors of AlexNet
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
    assert found.mean == pytest.approx({name: 6.0 * number for number, name in enumerate(ALEXNET)})
    assert (found.mce, found.unnormalized) == pytest.approx((sum(expected.values()) / 15, 6.0 * 7))
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


def test_archives_are_suites_of_one_folder(tmp_path):
    """Validation images of ImageNet are flat, as published, or in the folder of the unpacked archive."""
    class_folders(tmp_path / "a" / "imagenet-a", robustness.subset("imagenet-a"), "a.jpg", lambda label: label)
    archive = shutil.make_archive(str(tmp_path / "a"), "tar", tmp_path / "a")
    source = open_cell(find("imagenet-a", Path(archive)), "imagenet-a").source
    assert archive in source.name(0)
    assert source.labels.tolist() == list(range(200))
    for name, folder in (("flat", ""), ("deep", "val/n01440764")):
        paint(tmp_path / name / folder, "ILSVRC2012_val_00000002.JPEG", 0)
        archive = Path(shutil.make_archive(str(tmp_path / name), "tar", tmp_path / name))
        assert len(open_cell(find("imagenet-real", archive), "imagenet-real").source) == 1
    with pytest.raises(ValueError, match="no folder of an archive of ImageNetV2"):
        find("imagenet-v2", archive)


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
    corrupted(tmp_path / "c")
    (tmp_path / "c" / "snow" / "5").rmdir()
    (tmp_path / "c" / "fog" / "2").rmdir()
    paint(tmp_path / "flat", "a.jpg", 0)
    paint(tmp_path / "sketch" / "n01440764", "sketch_0.JPEG", 0)
    paint(tmp_path / "more" / "n01440764", "sketch_0.JPEG", 0)
    paint(tmp_path / "more" / "goldfish", "sketch_1.JPEG", 1)
    r = class_folders(tmp_path / "r", robustness.subset("imagenet-r"), "art_0.jpg", lambda label: label)
    for suite, folder, message in (
        ("imagenet-a", "nowhere", "nowhere"),
        ("imagenet-c", "c", r"2 of the 75 folders .*: snow/5, fog/2$"),
        ("imagenet-v2", "c", "imagenetv2-matched-frequency"),
        ("imagenet-sketch", "sketch", r"1000 of imagenet-sketch: .*missing or empty n01443537"),
        ("imagenet-sketch", "more", r"1000 of imagenet-sketch: unknown are goldfish, "),
        ("imagenet-r", "flat", "200 of imagenet-r"),
        ("imagenet-real", "flat", r"1 files, such as a\.jpg"),
        ("imagenet-a", "r", r"imagenet-a: unknown are n01443537, "),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_cell(find(suite, tmp_path / folder), suite)
    (r / "__MACOSX").mkdir()
    assert len(open_cell(find("imagenet-r", r), "imagenet-r").source) == 200
    (r / robustness.subset("imagenet-r")[7] / "art_0.jpg").unlink()
    with pytest.raises(ValueError, match=rf"missing or empty {robustness.subset('imagenet-r')[7]}$"):
        open_cell(find("imagenet-r", r), "imagenet-r")
