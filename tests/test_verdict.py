"""The first lines of the page of a run: whether its encoder is better than raw pixels and than random weights."""

import html
import os
import re
import shutil

import numpy as np
import pytest
import torch
from mains import call, open_source
from PIL import Image
from scipy import stats

import main_compare
import main_knn
from mae.data.run_data import RunData
from mae.inference import get_model, report, verdict
from mae.settings import DataSpec, ImageSpec


def test_an_interval_that_contains_zero_claims_nothing():
    """Of 60 planted sets of images with a true difference of 5 points, about 95 % of the intervals have it."""
    draw = np.random.default_rng(0)

    def planted(count, better):
        pixels = draw.random(count) < 0.7
        changed = draw.random(count)
        ours = np.where(pixels, changed > 0.1, changed < (0.1 * 0.7 + better) / 0.3)
        return {verdict.ENCODER: ours, verdict.PIXELS: pixels, verdict.RANDOM: pixels}

    covered = 0
    for _ in range(60):
        _, low, high = verdict.differences(planted(400, 0.05))[verdict.PIXELS]
        covered += low <= 5 <= high
    assert 52 <= covered <= 60
    same = verdict.in_words(verdict.PIXELS, verdict.differences(planted(50, 0.0))[verdict.PIXELS])
    assert same.startswith("Not distinguishable from raw pixels")
    assert verdict.in_words("raw pixels", (7.9, 4.1, 11.6)) == (
        "Better than raw pixels, by 7.9 points: 95 % interval +4.1 to +11.6."
    )
    assert verdict.in_words("raw pixels", (-7.9, -11.6, -4.1)).startswith("Worse than raw pixels, by 7.9 points")


@pytest.mark.parametrize(
    ("better", "images", "is_shown"), [(1, 1, False), (3, 3, False), (5, 5, False), (4, 10, False), (8, 10, True)]
)
def test_few_images_show_a_difference_only_with_a_significant_sign_test(better, images, is_shown):
    low, high = verdict.interval(better, 0, images)
    assert (low > 0) == is_shown == (stats.binomtest(better, better).pvalue < 0.05)
    assert -100 <= low < 100 * better / images <= high <= 100
    assert verdict.interval(0, better, images) == (-high, -low)


def test_equal_predictions_leave_an_interval():
    """No image of 500 differs: 4 differing images in 500 are still likely."""
    low, high = verdict.interval(0, 0, 500)
    assert low == -high and 0.5 < high < 1


@pytest.mark.parametrize(
    ("pixels", "random", "said"),
    [
        ((7.9, 4.1, 11.6), (3.0, 1.0, 5.0), "Pre-training helped."),
        ((31.7, 20.0, 40.0), (-4.9, -11.0, 0.0), "It is not shown that pre-training helped."),
        ((2.0, -1.0, 5.0), (-4.9, -11.0, -1.0), "Pre-training has not helped: random weights of the same model have"),
    ],
)
def test_the_conclusion_is_about_all_baselines(pixels, random, said):
    assert verdict.conclusion({verdict.PIXELS: pixels, verdict.RANDOM: random}).startswith(said)


def test_the_comparison_of_a_run_is_on_its_page(run):
    """Its conclusion may differ from that of k-NN: raw pixels have stronger classifiers there."""
    folder = run.with_name(f"{run.name}_compared")
    folder.mkdir()
    table = "| test accuracy, % | 24 labels | seconds |\n|---|---|---|\n| pixels (RBF-SVM) | **70.8** (C 10) |  |"
    (folder / "table.md").write_text(f"{table}\n\nWith 24 labels, pixels (RBF-SVM) <b> has the highest accuracy.\n")
    page = report.compared(run, run / "checkpoint-1.pth")
    assert "<td>70.8 (C 10)</td><td></td>" in page and "&lt;b&gt; has the highest accuracy." in page
    assert "earlier state" not in page
    os.utime(folder / "table.md", (0, 0))
    assert "older than checkpoint-1.pth" in report.compared(run, run / "checkpoint-1.pth")
    shutil.rmtree(folder)
    assert report.compared(run, run / "checkpoint-1.pth") == ""


@pytest.fixture(scope="module")
def run(pretrain_once, labelled):
    return pretrain_once("run", data_path=labelled, epochs=2, probe_every=1, probe_path=labelled)


def paragraphs(page):
    return html.unescape(re.sub("<[^>]+>", " ", page))


def test_the_first_section_of_a_page_is_the_verdict(run):
    """k-NN of the encoder and of raw pixels are those of the log, on the same held-out images."""
    path = call(report, run, device="cpu", num_workers=0)
    page = path.read_text()
    first = page.split("<h2>")[1]
    assert first.startswith("Did it help?")
    text = paragraphs(first)
    for name in (verdict.PIXELS, verdict.RANDOM):
        assert re.search(rf"(Better than|Worse than|Not distinguishable from) {name}", text)
    from mains import lines

    last = lines(run)[-1]
    assert f"explains {last['test_explained']:.1%} of the variance" in text
    assert f"{verdict.ENCODER}   {last['test_knn_acc1']:.1f}" in re.sub(r"\s{2,}", "   ", text)
    assert f"{verdict.PIXELS}   {last['test_knn_pixels']:.1f}" in re.sub(r"\s{2,}", "   ", text)
    assert "20 nearest neighbors among 48 images classify 23 held-out images." in text
    assert "k-NN in training (`probe_every`): 20 nearest neighbors among the training images of" in paragraphs(page)


def test_without_labels_it_says_what_is_explained_only(pretrain, pictures, tmp_path):
    images = tmp_path / "flat"
    images.mkdir()
    for file in (pictures / "train").glob("*/*"):
        shutil.copy(file, images)
    page = call(report, pretrain(epochs=1, data_path=images), device="cpu", num_workers=0).read_text()
    text = paragraphs(page.split("<h2>")[1])
    assert "of the variance of training images" in text
    assert "have no labels" in text and "accuracy" not in text


def test_it_has_the_loss_of_the_mean(pretrain, pictures, capsys):
    """That of the log, of the same images."""
    out = pretrain(epochs=1, data_path=pictures, norm_pix_loss=True)
    (of_mean,) = re.findall(r"0 % explained is a loss of (\S+),", capsys.readouterr().out)
    from mains import lines

    text = paragraphs(call(report, out, device="cpu", num_workers=0).read_text().split("<h2>")[1])
    assert f"loss of its predictions is {lines(out)[-1]['train_loss']:.3f}" in text
    assert f"that of their mean {float(of_mean):.3f}." in text


def test_a_page_leaves_out_the_images_that_the_run_has_left_out(pretrain, labelled, tmp_path):
    """The first image, which is always drawn, can't be read. Nor does the command of the comparison need it."""
    shutil.copytree(labelled, tmp_path / "images")
    min(tmp_path.glob("images/train/*/*")).write_bytes(b"")
    out = pretrain(data_path=tmp_path / "images", epochs=1, on_bad_image="skip")
    text = call(report, out, device="cpu", num_workers=0).read_text()
    assert "Reconstructions" in text and "on_bad_image" in text.split("Compare with raw pixels")[1].split("<h3>")[0]


def test_accuracies_of_0_tell_nothing(pretrain, tmp_path):
    """Each image is of a class of its own. A warning says that no neighbor has the class."""
    for number in range(10):
        folder = tmp_path / f"images/train/{number}"
        folder.mkdir(parents=True)
        Image.effect_noise((16, 16), 50 + number).convert("RGB").save(folder / "0.png")
    text = call(report, pretrain(data_path=tmp_path / "images", epochs=1, batch_size=4), device="cpu", num_workers=0)
    assert "These images tell nothing" in paragraphs(text.read_text().split("<h2>")[1])


def open_pair(**settings):
    data = RunData(ImageSpec(), DataSpec(**settings), torch.device("cpu"))
    return report.open_pair(data, data.open_split("train"))


def test_an_image_that_a_list_repeats_is_in_one_part(labelled, tmp_path):
    """A training may read an image more often than others."""
    files = sorted((labelled / "train").glob("*/*"))
    rows = [f"{file},{file.parent.name}" for file in [*files, *files[:3]]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    *parts, _ = open_pair(train_list=str(tmp_path / "list.csv"))
    names = [part.name(index) for part in parts for index in range(len(part))]
    assert sorted(names) == sorted(map(str, files))


def test_random_weights_have_nothing_of_the_model(caplog):
    """Nor low-rank updates, nor extra class tokens. They are the same for each state, and have no warning."""
    settings = {"input_size": 28, "patch_size": 7, "in_chans": 1, "lora": 4, "num_cls_tokens": 3}
    image = torch.zeros(1, 1, 28, 28)

    def features_of_random(value):
        model = get_model("mae_vit_mini_patch4", **settings)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(value)
        network = verdict.random_weights(model)
        assert not any(torch.equal(weight, torch.full_like(weight, value)) for weight in network.parameters())
        return network.extract_feat(image)

    assert torch.equal(features_of_random(0.1234), features_of_random(0.2345))
    assert "random weights" not in caplog.text


def test_random_weights_are_new_and_the_model_stays(run):
    from mae import get_model

    model = get_model(run / "checkpoint-1.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = verdict.random_weights(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    weights = dict(network.named_parameters())
    changed = [name for name in weights if not torch.equal(weights[name], before[name])]
    assert "blocks.0.attn.qkv.weight" in changed and "cls_token" in changed
    assert torch.equal(weights["norm.weight"], torch.ones_like(weights["norm.weight"]))


def test_the_interval_is_the_95_percent_of_the_paired_difference():
    """Bounds of the normal distribution. Of two accuracies that are not paired, they would be twice as far."""
    draw = np.random.default_rng(0)
    pixels = draw.random(3000) < 0.5
    ours = np.where(draw.random(3000) < 0.1, draw.random(3000) < 0.8, pixels)
    mean, low, high = verdict.differences({verdict.ENCODER: ours, verdict.PIXELS: pixels, verdict.RANDOM: pixels})[
        verdict.PIXELS
    ]
    error = 100 * stats.sem(ours.astype(float) - pixels)
    assert [(low - mean) / error, (high - mean) / error] == pytest.approx([-1.96, 1.96], abs=0.15)


def test_each_accuracy_is_that_of_its_own_features(labelled):
    """With random weights, each held-out image is near those of another class."""
    model = get_model("mae_vit_mini_patch4", input_size=16)
    train, val = (open_source(split, str(labelled)) for split in ("train", "val"))

    def extract(network, source):
        labels = torch.as_tensor(np.asarray(source.labels))
        moved = labels + int(network is not model and source is val)
        return torch.nn.functional.one_hot(moved % 6, 6).float()

    hits, equal = verdict.hits_of(model, train, val, extract, 0)
    assert hits[verdict.ENCODER].all() and not hits[verdict.RANDOM].any()
    assert equal == ""


def test_held_out_images_that_are_training_images_too_are_counted(pretrain, labelled, tmp_path, capsys):
    """The accuracies of all features are too high with them."""
    shutil.copytree(labelled, tmp_path / "leaked")
    for number, file in enumerate(sorted((labelled / "train").glob("*/*"))[:3]):
        shutil.copy(file, tmp_path / "leaked/val" / file.parent.name / f"leaked{number}{file.suffix}")
    out = pretrain(data_path=tmp_path / "leaked", epochs=1)
    page = call(report, out, device="cpu", num_workers=0)
    assert "3 of 26 held-out images equal training images" in paragraphs(page.read_text())
    assert "warning: 3 of 26 held-out images equal" in capsys.readouterr().out


def test_held_out_images_do_not_classify_themselves(labelled):
    train = open_source("train", str(labelled))
    *parts, _ = open_pair(data_path=str(labelled / "train"))
    bank, queries = ([part.name(index) for index in range(len(part))] for part in parts)
    assert sorted([*bank, *queries]) == sorted(map(train.name, range(48))) and len(queries) == 10


def test_all_evaluations_use_a_validation_set_that_lacks_a_class(pretrain, labelled, tmp_path, capsys):
    """The page, k-NN and a comparison name the same held-out images."""
    images = shutil.copytree(labelled, tmp_path / "images")
    shutil.rmtree(images / "val/kind5")
    out = pretrain(data_path=images, epochs=1)
    file = {"finetune": out / "checkpoint-0.pth", "data_path": images, "device": "cpu", "num_workers": 0}
    capsys.readouterr()
    call(main_knn, **file, k=5)
    named = f"20 of {images}/val"
    assert named in capsys.readouterr().out
    text = paragraphs(call(report, out, device="cpu", num_workers=0).read_text())
    assert named in capsys.readouterr().out
    assert "among 48 images classify 20 held-out images" in text and f"{images}/val" in text
    words = ["--encoders", file.pop("finetune"), "--protocols", "knn", "--labels", 12, "--draws", 1]
    table = call(main_compare, *words, **file, output_dir=tmp_path / "compared")
    assert f"20 held-out images of {images}/val" in table and named in capsys.readouterr().out


def test_a_validation_set_that_can_not_be_used_is_replaced_by_nothing(pretrain, labelled, tmp_path, capsys):
    """Else, the page would evaluate on images that the encoder was trained on."""
    images = shutil.copytree(labelled, tmp_path / "images")
    (images / "val/kind5").rename(images / "val/other")
    out = pretrain(data_path=images, epochs=1)
    capsys.readouterr()
    first = paragraphs(call(report, out, device="cpu", num_workers=0).read_text().split("<h2>")[1])
    assert "other" in first and "held-out images are" not in first
    assert "warning: " in (printed := capsys.readouterr().out) and "other" in printed
