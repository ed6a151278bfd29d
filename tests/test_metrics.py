"""--metric and --class_weight: the scores of scikit-learn and SciPy, and what they select."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from mains import call, lines
from sklearn import metrics as sk
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

import main_compare
import main_finetune
import main_knn
import main_linprobe
from mae.checkpoints import checkpoint
from mae.evaluate.metrics import METRICS, Metric, compute, names_of
from mae.evaluate.tasks import balanced_weights
from mae.inference import get_model
from mae.settings.choices import CLASSIFICATION

NAMES = names_of(CLASSIFICATION)


def probabilities(file, data, split="val"):
    """Labels and probabilities of the images of a split, one image at a time."""
    model = get_model(file)
    files = sorted((data / split).glob("*/*"))
    truth = np.array([model.classes.index(path.parent.name) for path in files])
    with torch.inference_mode():
        logits = torch.cat([model(model.prepare([str(path)])) for path in files])
    return truth, logits.double().softmax(dim=1).numpy()


def expected(truth, scores):
    predicted, one_hot = scores.argmax(axis=1), np.eye(scores.shape[1])[truth]
    return {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "macro_f1": sk.f1_score(truth, predicted, average="macro", zero_division=0),
        "kappa": sk.cohen_kappa_score(truth, predicted, weights="quadratic", labels=range(scores.shape[1])),
        "auroc": sk.roc_auc_score(truth, scores, multi_class="ovr"),
        "average_precision": sk.average_precision_score(one_hot, scores, average="macro"),
    }


def test_macro_f1_of_a_single_class_is_its_f1():
    """So the row of a class in the report of a multilabel task is that of the class."""
    truth, predictions = (np.random.default_rng(seed).integers(0, 2, (50, 3)) for seed in (0, 1))
    each = [compute("macro_f1", truth[:, [c]], predictions[:, [c]].astype(float), None, 1) for c in range(3)]
    assert each == [sk.f1_score(truth[:, c], predictions[:, c]) for c in range(3)]
    assert np.mean(each) == pytest.approx(compute("macro_f1", truth, predictions.astype(float), None, 3))


def test_kappa_weights_gaps_by_the_numbers():
    """Grades 2 and 4 are two steps apart. Without `labels`, scikit-learn counts the grades that occur: one step."""
    grades = np.array([0, 1, 2, 4])
    truth = np.arange(200) % 4
    predicted = np.where((truth == 3) & (np.arange(200) % 3 == 0), 2, truth)
    found = compute("kappa", truth, predicted, None, 4, grades.astype(float))
    ours, theirs = grades[truth], grades[predicted]
    with_gap = sk.cohen_kappa_score(ours, theirs, weights="quadratic", labels=range(5))
    assert found == pytest.approx(with_gap)
    assert abs(found - sk.cohen_kappa_score(ours, theirs, weights="quadratic")) > 0.01
    without = compute("kappa", truth, predicted, None, 4)
    assert without == pytest.approx(sk.cohen_kappa_score(truth, predicted, weights="quadratic"))


def test_kappa_warns_of_classes_in_another_order_than_numbers(labelled, classify, tmp_path, capsys):
    """Folders are sorted as text. The labels of a list are numbers."""
    flags = {"k": 5, "metric": "kappa"}
    for split in ("train", "val"):
        for kind, name in enumerate((10, 9, 8, 2, 1, 0)):
            shutil.copytree(labelled / split / f"kind{kind}", tmp_path / "grades" / split / str(name))
        names = [path.relative_to(tmp_path) for path in sorted(tmp_path.glob(f"grades/{split}/*/*"))]
        (tmp_path / f"{split}.txt").write_text("".join(f"{name} {name.parent.name}\n" for name in names))
    classify(main_knn, data_path=tmp_path / "grades", **flags)
    assert len(re.findall(r"metric=kappa .* 0, 1, 10, 2, 8 .*`train_list`", capsys.readouterr().out)) == 1
    classify(main_knn, data_path=tmp_path / "grades", k=5, metric="accuracy")
    classify(
        main_knn, data_path=tmp_path, **flags, **{f"{one}_list": tmp_path / f"{one}.txt" for one in ("train", "val")}
    )
    assert "metric=kappa" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main_finetune.py", "main_linprobe.py"])
def test_log_has_the_metrics_of_scikit_learn(script, labelled, tmp_path):
    """23 images in batches of 4: the last batch is smaller, and the processes have different numbers of images."""
    own = {"main_finetune.py": ("--aa", "none", "--lr", 0.0003), "main_linprobe.py": ("--blr", 3, "--warmup_epochs", 0)}
    argv = ("--data_path", labelled, "--output_dir", tmp_path / "run", "--model", "vit_mini_patch4", "--input_size", 16,
            "--batch_size", 4, "--epochs", 3, "--num_workers", 0, "--device", "cpu", "--amp", "off", *own[script],
            "--metric", *NAMES)  # fmt: skip
    output = forks.run(script, argv, tmp_path / "output", 3)
    found = lines(tmp_path / "run")[-1]
    truth, scores = probabilities(tmp_path / "run/checkpoint-2.pth", labelled)
    for name, value in expected(truth, scores).items():
        assert found[f"test_{name}"] == pytest.approx(value, abs=1e-6), name
        assert f" {name} {value:.3f}" in output
    assert found["test_acc1"] == pytest.approx(100 * found["test_accuracy"])


@pytest.mark.slow
def test_neighbors_have_the_metrics_of_scikit_learn(labelled, classify, tmp_path):
    encoder = classify(main_finetune, "tuned", aa="none", lr=0.003, epochs=4, cls_token=True) / "checkpoint-3.pth"
    argv = ("--data_path", labelled, "--finetune", encoder, "--k", 5, 20, "--temperature", 0.07, 1, "--batch_size", 4,
            "--num_workers", 0, "--device", "cpu", "--metric", *NAMES)  # fmt: skip
    output = forks.run("main_knn.py", argv, tmp_path / "output", 2)
    found = json.loads(output.splitlines()[-1])
    model, sets = get_model(encoder), []
    for split in ("train", "val"):
        files = sorted((labelled / split).glob("*/*"))
        features = torch.nn.functional.normalize(model.extract_feat([*map(str, files)]).detach(), dim=1)
        sets.append((features, torch.tensor([model.classes.index(path.parent.name) for path in files])))
    (bank, classes), (queries, truth) = sets
    similarity, order = (queries @ bank.T).sort(dim=1, descending=True)
    for k, temperature in ((5, 0.07), (20, 0.07), (5, 1), (20, 1)):
        votes = torch.zeros(len(queries), 6)
        votes.scatter_add_(1, classes[order[:, :k]], (similarity[:, :k] / temperature).exp())
        shares = (votes / votes.sum(dim=1, keepdim=True)).numpy()
        for name, value in expected(truth.numpy(), shares).items():
            assert found[f"knn_{name}_k{k}_t{temperature:g}"] == pytest.approx(value, abs=1e-6), (name, k, temperature)


@pytest.mark.slow
def test_the_first_metric_selects_the_best_checkpoint(classify, imbalanced):
    flags = {"data_path": imbalanced, "aa": "none", "epochs": 5, "lr": 0.003, "warmup_epochs": 0}
    for name in ("balanced_accuracy", "auroc"):
        out = classify(main_finetune, name, **flags, metric=f"{name} accuracy")
        scores = [line[f"test_{name}"] for line in lines(out)]
        assert checkpoint.read(out / "checkpoint-best.pth")["epoch"] == scores.index(max(scores))
        assert all(math.isfinite(line["test_accuracy"]) for line in lines(out))
    without = classify(main_finetune, "without", **flags)
    for line, other in zip(lines(without), lines(out), strict=True):
        assert line.keys() | {"test_accuracy", "test_auroc"} == other.keys()
        assert (line["train_loss"], line["test_loss"]) == (other["train_loss"], other["test_loss"])


def test_classes_without_images_are_named(classify, labelled, tmp_path, capsys):
    """An evaluation of some classes: the mean is over the classes with images."""
    file = classify(main_finetune, aa="none", lr=0.003) / "checkpoint-1.pth"
    flags = {"data_path": tmp_path / "part", "eval": True, "resume": file}
    (tmp_path / "part/val").mkdir(parents=True)
    (tmp_path / "part/val/kind0").symlink_to(labelled / "val/kind0")
    with pytest.raises(ValueError, match="metric=auroc"):
        classify(main_finetune, **flags, metric="auroc")
    for kind in ("kind1", "kind4"):
        (tmp_path / "part/val" / kind).symlink_to(labelled / "val" / kind)
    capsys.readouterr()
    found = classify(main_finetune, **flags, metric="auroc average_precision")
    printed = capsys.readouterr().out
    assert "metric=auroc" in printed and "kind2, kind3, kind5" in printed
    truth, scores = probabilities(file, tmp_path / "part")
    for name, score in (("auroc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
        values = [score(truth == number, scores[:, number]) for number in (0, 1, 4)]
        assert found.metrics[name] == pytest.approx(np.mean(values), abs=1e-6)


def test_balanced_classes_have_equal_weights(classify, labelled, imbalanced):
    flags = {"epochs": 1, "warmup_epochs": 0}
    for data, is_equal in ((labelled, True), (imbalanced, False)):
        plain, weighted = (lines(classify(main_linprobe, f"{data.name}{len(own)}", **flags, data_path=data, **own))[-1]
                           for own in ({}, {"class_weight": "balanced"}))  # fmt: skip
        assert (plain["train_loss"] == pytest.approx(weighted["train_loss"], rel=1e-6)) == is_equal


@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_balanced_weights_are_those_of_scikit_learn(imbalanced, classify, smoothing):
    """With a learning rate of 0: the mean of weight and loss over the training images."""
    flags = {"data_path": imbalanced, "aa": "none", "lr": 0, "min_lr": 0, "epochs": 1, "warmup_epochs": 0,
             "smoothing": smoothing, "reprob": 0, "drop_path": 0, "crop": "none", "hflip": 0,
             "batch_size": 41}  # fmt: skip
    out = classify(main_finetune, **flags, class_weight="balanced")
    truth, scores = probabilities(out / "checkpoint-0.pth", imbalanced, "train")
    loss = -(1 - smoothing) * np.log(scores[range(41), truth]) - smoothing * np.log(scores).mean(axis=1)
    expected = float((compute_sample_weight("balanced", truth) * loss).mean())
    assert lines(out)[-1]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_weights_need_single_classes(classify):
    with pytest.raises(ValueError, match=r"mixup=0.8 cutmix=1.0 class_weight=balanced"):
        classify(main_finetune, class_weight="balanced", mixup=0.8, cutmix=1.0)


def test_metrics_of_heads_and_neighbors(classify, imbalanced, capsys):
    """The metric selects among several rates; main_knn.py returns the first one."""
    classify(main_linprobe, data_path=imbalanced, epochs=2, blr="0.3 3 30", metric="macro_f1", held_out=0.4)
    assert "held-out macro_f1 0." in capsys.readouterr().out
    accuracy, fractions = classify(main_knn, k=5), classify(main_knn, k=5, metric="accuracy macro_f1")
    assert fractions[5, 0.07] == pytest.approx(accuracy[5, 0.07] / 100)


def test_a_new_metric_is_one_entry(classify, monkeypatch):
    """An error rate: lower values are better."""

    def errors(own):
        return (own.truth != own.predictions).mean()

    monkeypatch.setitem(METRICS, "errors", Metric("share", errors, (CLASSIFICATION,), lower_is_better=True))
    right, wrong = classify(main_knn, k=5, metric="accuracy"), classify(main_knn, k=5, metric="errors")
    assert wrong[5, 0.07] == pytest.approx(1 - right[5, 0.07])
    with pytest.raises(ValueError, match=r"metric=r2 is not for task=classification: give accuracy.* errors"):
        classify(main_knn, k=5, metric="r2")


OWN = """
from mae.evaluate.metrics import Metric
def errors(given):
    return (given.truth != given.predictions).mean()
def right(given):
    return (given.truth == given.scores.argmax(axis=1)).mean()
fewest = Metric("", errors, ("classification",), lower_is_better=True)
"""


def test_a_metric_of_the_users_code_selects_and_is_given_again(classify, own_module):
    """A file does not import it."""
    own_module("wrong", OWN)
    name, run = "wrong:fewest", {"metric": "wrong:fewest wrong:right accuracy", "aa": "none", "reprob": 0}
    out = classify(main_finetune, **run, epochs=3, lr=0.003)
    errors = [line[f"test_{name}"] for line in lines(out)]
    assert errors == pytest.approx([1 - line["test_accuracy"] for line in lines(out)])
    assert errors == pytest.approx([1 - line["test_wrong:right"] for line in lines(out)])
    assert checkpoint.read(out / "checkpoint-best.pth")["epoch"] == np.argmin(errors)
    METRICS.pop(name)
    with pytest.raises(ValueError, match=f"metric={name}"):
        classify(main_finetune, resume="auto", epochs=4)
    assert name not in METRICS
    classify(main_linprobe, "probe", metric=name, epochs=1)
    wrong, right = (classify(main_knn, k=30, metric=one)[30, 0.07] for one in (name, "accuracy"))
    assert wrong == pytest.approx(1 - right)
    with pytest.raises(ValueError, match="metric=wrong:nothing"):
        classify(main_knn, metric="wrong:nothing")


@pytest.mark.slow
def test_encoders_are_compared_by_a_metric_of_the_users_code(own_module, labelled, tmp_path):
    own_module("wrong", OWN)
    small = {"model": "vit_mini_patch4", "input_size": 16, "num_workers": 0, "device": "cpu"}
    flags = {"encoders": "scratch", "protocols": "knn", "labels": "all", "metric": "wrong:fewest"}
    table = call(main_compare, data_path=labelled, output_dir=tmp_path / "compared", **flags, **small)
    assert "wrong:fewest" in table


def test_classes_without_images_do_not_change_the_weights_of_the_others():
    labels = np.array([0, 0, 0, 2])
    first, last = compute_class_weight("balanced", classes=np.array([0, 2]), y=labels)
    source = SimpleNamespace(labels=labels, classes=["a", "b", "c"])
    assert balanced_weights(source).tolist() == pytest.approx([first, 0, last])
    tags = SimpleNamespace(labels=np.array([[1, 0], [1, 1], [1, 1]]), classes=["all", "some"])
    assert balanced_weights(tags).T.tolist() == [
        pytest.approx([0, 1]), pytest.approx(compute_class_weight("balanced", classes=np.array([0, 1]), y=[0, 1, 1]))
    ]  # fmt: skip
