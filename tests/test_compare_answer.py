"""What a pre-training is worth: the results in answer.json, and the sentence and the table that are made from them."""

import html
import json
import re
import shutil
import textwrap

import numpy as np
import pytest
import torch
from mains import call, lines, open_source
from PIL import Image
from scipy import stats

import main_compare
import main_knn
from mae.compare import answer, verdict
from mae.compare.verdict import ENCODER, PIXELS, RANDOM
from mae.data.run_data import RunData
from mae.inference import get_model, report
from mae.settings import DataSpec, ImageSpec
from mae.settings.choices import CLASSIFICATION


def results_of(scores, total, images):
    """Returns results with one use a row. `scores`: by row and number of labels, (draws, images) of 0 and 1."""
    rows = {}
    for title, by_labels in scores.items():
        uses = [
            {
                "labels": number,
                "draws": [
                    {"chosen": "k 20", "by_cross_validation": 0.7, "scores": verdict.packed(one, CLASSIFICATION)}
                    for one in drawn
                ],
            }
            for number, drawn in by_labels.items()
        ]
        kind = {ENCODER: "run", PIXELS: "pixels", RANDOM: "random"}.get(title, "other")
        rows[title] = {"kind": kind, "uses": {"RBF-SVM" if title == PIXELS else "k-NN": uses}, "input": "224 px"}
    found = {"task": CLASSIFICATION, "labels": total, "images": images, "held_out": "val", "equal": "", "rows": rows}
    return {**found, "sentences": verdict.sentences(found)}


def planted(draw, gains, total=2000, images=1000):
    """Returns results of rows whose true accuracy is 70 % plus a gain. Draws of 500 new labels change it by a point."""
    hard = draw.random(images)  # of an image, for all rows: they err on about the same images
    bound = np.quantile(hard, 0.7)
    influence = {title: 0.01 * 500**0.5 * draw.standard_normal(total) for title in gains}  # of each label

    def scores(title, labels):
        shift = gains[title] + influence[title][draw.permutation(total)[:labels]].mean()
        return hard + 0.25 * draw.standard_normal(images) < bound + shift

    sizes = answer.sizes_of(total)
    drawn = {
        title: {labels: np.stack([scores(title, labels) for _ in range(draws)]) for labels, draws in sizes}
        for title in gains
    }
    return results_of(drawn, total, images)


@pytest.mark.parametrize(("gain", "said"), [(0, 0.05), (0.05, 1), (-0.05, 0)])
def test_better_is_said_of_what_is_better(gain, said):
    """200 planted sets each, with 200 labels, and with 2,000 and 500 of them."""
    draw = np.random.default_rng(0)
    for total, number in ((200, -1), (2000, 0), (2000, 1)):
        found = [planted(draw, {ENCODER: gain, PIXELS: 0, RANDOM: -0.3}, total) for _ in range(200)]
        pairs = [verdict.of_baseline(results)[number] for results in found]
        better, worse = (np.mean([getattr(one, name) for one in pairs]) for name in ("is_better", "is_worse"))
        if gain == 0:
            assert better <= said and worse <= said
        else:
            assert (better > 0.3 and worse == 0) if gain > 0 else (worse > 0.25 and better == 0)


def test_too_few_labels_or_images_tell_nothing():
    draw = np.random.default_rng(0)
    for labels, images in ((150, 1000), (500, 80)):
        text = planted(draw, {ENCODER: 0.29, PIXELS: 0, RANDOM: -0.3}, labels, images)["sentences"][0]
        assert "too few to tell" in text and "better than" not in text and "helped" not in text


@pytest.mark.parametrize("gain", [0.0, 0.03, 0.2, -0.03, -0.2])
def test_the_sentence_agrees_with_the_table(gain):
    draw = np.random.default_rng(1)
    for _ in range(20):
        results = json.loads(json.dumps(planted(draw, {ENCODER: gain, PIXELS: 0, RANDOM: -0.1, "other": 0.1})))
        _, rows = verdict.table(results)
        accuracies = {row[0].partition(" (")[0]: [float(text.split()[0]) for text in row[1:3]] for row in rows}
        for title, text in zip((PIXELS, "other", RANDOM), results["sentences"], strict=True):
            cells = next(row[3:] for row in rows if row[0].startswith(title))
            for part, cell, ours, theirs in zip(
                text.split("; "), cells, accuracies[ENCODER], accuracies[title], strict=True
            ):
                mean, low, high = (float(number) for number in re.findall(r"[-+]\d+\.\d", cell))
                assert mean == pytest.approx(ours - theirs, abs=0.11) and cell[cell.index("(") + 1 : -1] in part
                word = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
                assert word in part or 0 in (low, high)  # rounded
                assert ("better" in part) <= (ours > theirs) and ("worse" in part) <= (ours < theirs)
        if "helped" in results["sentences"][0]:
            assert max(map(float.__sub__, accuracies[ENCODER], accuracies[PIXELS])) > 0


def test_the_use_with_the_best_cross_validation_is_compared():
    results = planted(np.random.default_rng(0), {ENCODER: 0, PIXELS: 0, RANDOM: 0})
    other = json.loads(json.dumps(results["rows"][PIXELS]["uses"]["RBF-SVM"]))
    for number, one in enumerate(other[0]["draws"]):
        one |= {"by_cross_validation": 0.7 + (0.1 if number else -0.1), "scores": "1" * 1000}
    results["rows"][PIXELS]["uses"]["logistic regression"] = other
    assert verdict.best_uses(results, PIXELS, 500) == ["RBF-SVM", *["logistic regression"] * 4]
    scores = verdict.scores_of_best(results, PIXELS, 500)
    assert scores[1:].all() and scores[0].mean() < 0.8
    assert "logistic regression or RBF-SVM on pixels" in verdict.sentences(results)[0]


def test_the_interval_is_that_of_images_and_labels():
    """Without a variance of labels, it is Student's t of the paired differences."""
    draw = np.random.default_rng(0)
    pairs = draw.integers(-1, 2, (1, 3000)).astype(float)
    mean, low, high = verdict.interval(pairs)
    bounds = stats.t.interval(0.95, 2999, pairs.mean(), stats.sem(pairs[0]))
    assert (mean, low, high) == pytest.approx((pairs.mean(), *bounds), abs=1e-4)
    _, low, high = verdict.interval(np.zeros((3, 3000)), (0.04, 2))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, 0, 0.2), rel=0.01)


def test_equal_predictions_leave_an_interval():
    """No image of 500 differs: a few differing images in 500 are still likely."""
    _, low, high = verdict.interval(np.zeros((1, 500)))
    assert low == -high and 0.001 < high < 0.01


@pytest.fixture(scope="module")
def images(labelled, tmp_path_factory):
    """`labelled`, of which some have the label of the next class: no classifier is always right."""
    folder = shutil.copytree(labelled, tmp_path_factory.mktemp("mixed") / "images")
    for file in [*folder.glob("*/*/*[25].png")]:
        file.rename(file.parent.with_name(f"kind{(int(file.parent.name[-1]) + 1) % 6}") / file.name)
    return folder


@pytest.fixture(scope="module")
def run(pretrain_once, images):
    return pretrain_once("run", data_path=images, epochs=2, probe_every=1, probe_path=images)


def paragraphs(page):
    return html.unescape(re.sub("<[^>]+>", " ", page))


def read(run):
    return json.loads((run / answer.FILE).read_text())


def test_the_first_section_of_a_page_is_the_answer(run):
    page = call(report, run, device="cpu", num_workers=0).read_text()
    first = page.split("<h2>")[1]
    text = re.sub(r"\s+", " ", paragraphs(first))
    results = read(run)
    assert first.startswith("Is it worth it?") and all(sentence in text for sentence in results["sentences"])
    assert f"explains {lines(run)[-1]['test_explained']:.1%} of the variance" in text
    for cells in verdict.table(results)[1]:
        assert all(f"<td>{html.escape(cell)}</td>" in first for cell in cells)
    assert "23 held-out images of" in text and "No released encoder was compared" in text
    assert "labels or held-out images are too few" in text or "better" not in " ".join(results["sentences"])
    assert page.count('<div class="facts">') == 1 and len(re.findall(r"<div><b>", page)) == 4
    assert page.index("What to do next") < page.index("Nearest neighbors") < page.index("<details>")


def test_scores_are_those_of_scikit_learn(run, images):
    """Of the chosen hyperparameters, on features that are exported."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    call(report, run, device="cpu", num_workers=0)
    (size,) = read(run)["rows"][ENCODER]["uses"]["linear probe"]
    (found,) = size["draws"]
    strength, pooling = re.fullmatch(r"C (\S+), (.*)", found["chosen"]).groups()
    model = get_model(run / "checkpoint-1.pth")
    pool = {"class token": "cls", "mean of the patches": "avg"}.get(pooling, "both")
    parts = []
    for split in ("train", "val"):
        source = open_source(split, str(images))
        paths = sorted((images / split).glob("*/*"), key=lambda path: str(path))
        assert [source.name(index) for index in range(len(source))] == [str(path) for path in paths]
        parts += [model.extract_feat(paths, pool=pool).numpy(), np.asarray(source.labels)]
    bank, truth, queries, wanted = parts
    scaler = StandardScaler().fit(bank)
    fitted = LogisticRegression(C=float(strength), max_iter=5000).fit(scaler.transform(bank), truth)
    right = fitted.predict(scaler.transform(queries)) == wanted
    assert (right == verdict.unpacked(found["scores"])).mean() > 0.9  # fp32 and fp64


def test_other_encoders_have_rows_and_only_these_are_computed(run, tmp_path, capsys):
    import timm
    import transformers

    call(report, run, device="cpu", num_workers=0)
    before = read(run)
    before["rows"][PIXELS]["images_per_s"] = 123.0
    (run / answer.FILE).write_text(json.dumps(before))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    names = [str(tmp_path / "dinov2"), f"{tmp_path}/vit.pth#timm:test_vit"]
    capsys.readouterr()
    page = call(report, run, "--against", *names, device="cpu", num_workers=0).read_text()
    results = read(run)
    assert {*results["rows"]} == {ENCODER, PIXELS, RANDOM, *names}
    assert {title: results["rows"][title] for title in before["rows"]} == before["rows"]
    for name, side in zip(names, (28, 160), strict=True):
        shown = f"{name.rpartition('/')[2]} ({side} px)"
        assert shown in paragraphs(page) and any(shown in sentence for sentence in results["sentences"])
    assert "No released encoder" not in page
    assert "pixels: computing" not in capsys.readouterr().out
    call(report, run, device="cpu", num_workers=0)
    assert {*read(run)["rows"]} == {ENCODER, PIXELS, RANDOM, *names}


@pytest.mark.parametrize(("labels", "task", "said"), [
    ([f"{0.1 * number:.2f}" for number in range(48)], "regression", "r2"),
    (["1 0", "0 1"] * 24, "multilabel", "several labels each"),
])  # fmt: skip
def test_numbers_have_baselines_and_several_labels_have_none(pretrain, labelled, own_module, labels, task, said):
    values = [[float(value) for value in label.split()] for label in labels]
    own_module(
        "own",
        textwrap.dedent(f"""
        import numpy as np
        from pathlib import Path
        from PIL import Image

        class Images:
            classes = {["a", "b"][: len(values[0])]}
            labels = np.array({values})
            files = sorted(Path({str(labelled)!r}).glob("train/*/*"))
            def __len__(self): return 48
            def __getitem__(self, index): return Image.open(self.files[index]).convert("RGB"), self.labels[index]

        def opened(split, path):
            return Images()
    """),
    )
    out = pretrain(dataset="py:own:opened", epochs=1)
    page = call(report, out, device="cpu", num_workers=0, dataset="py:own:opened").read_text()
    assert said in paragraphs(page.split("<h2>")[1])
    assert (out / answer.FILE).exists() == (task == "regression")


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
    """The first image, which is always drawn, can't be read."""
    shutil.copytree(labelled, tmp_path / "images")
    min(tmp_path.glob("images/train/*/*")).write_bytes(b"")
    out = pretrain(data_path=tmp_path / "images", epochs=1, on_bad_image="skip")
    text = call(report, out, device="cpu", num_workers=0).read_text()
    assert "Reconstructions" in text and "on_bad_image" in text.split("Classify by nearest")[1].split("<h3>")[0]
    assert read(out)["labels"] == 47


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
    return report.open_labelled(data, data.open_split("train"))[:2]


def test_an_image_that_a_list_repeats_is_in_one_part(labelled, tmp_path):
    """A training may read an image more often than others."""
    files = sorted((labelled / "train").glob("*/*"))
    rows = [f"{file},{file.parent.name}" for file in [*files, *files[:3]]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    parts = open_pair(train_list=str(tmp_path / "list.csv"))
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
        network = answer.with_random_weights(model)
        assert not any(torch.equal(weight, torch.full_like(weight, value)) for weight in network.parameters())
        return network.extract_feat(image)

    assert torch.equal(features_of_random(0.1234), features_of_random(0.2345))
    assert "random weights" not in caplog.text


def test_random_weights_are_new_and_the_model_stays(run):
    from mae import get_model

    model = get_model(run / "checkpoint-1.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = answer.with_random_weights(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    weights = dict(network.named_parameters())
    changed = [name for name in weights if not torch.equal(weights[name], before[name])]
    assert "blocks.0.attn.qkv.weight" in changed and "cls_token" in changed
    assert torch.equal(weights["norm.weight"], torch.ones_like(weights["norm.weight"]))


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
    parts = open_pair(data_path=str(labelled / "train"))
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
    assert "20 held-out images of" in text and f"{images}/val" in text
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
