"""The comparison of encoders: its results are those of the scripts, and an interruption loses none of them."""

import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from mains import Stopped, assert_same_run, call, fails, lines, open_source, parse, stop_after
from PIL import Image
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from test_knn import predictions
from test_libraries import write_idx
from threadpoolctl import threadpool_info, threadpool_limits

import main_compare
import main_finetune
import main_knn
import main_linprobe
from mae.checkpoints import checkpoint
from mae.compare import choices, encoders, store, summary, trials
from mae.compare.predictors import BASELINES, USES
from mae.compare.summary import Result
from mae.data import raw_pixels
from mae.data.labels import some_of_each_class
from mae.inference import get_model
from mae.interrupts import Interrupted
from mae.settings import ImageSpec
from mae.settings.choices import CLASSIFICATION

pytestmark = pytest.mark.usefixtures("forked")
SHAPE = {"input_size": 16, "patch_size": 8, "in_chans": 1, "num_cls_tokens": 2}
GIVEN = {**SHAPE, "mean": [0.45], "std": [0.3], "crop": "none", "crop_pct": 0.9, "num_workers": 1, "amp": "off",
         "device": "cpu", "fast_jpeg": True, "pin_mem": False, "download": True}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    model, path = (
        get_model("vit_mini_patch4", **SHAPE, nb_classes=0, global_pool=False),
        tmp_path_factory.mktemp("encoder") / "mine.pth",
    )
    args = model.settings | {"mean": [0.1], "std": [0.4], "crop": "random", "hflip": 0.2}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def noisy(count, kinds):
    """Gray pictures of 16 x 16 pixels, and their labels."""
    generator, labels = np.random.default_rng(0), np.arange(count) % kinds
    pixels = generator.normal(120, 60, (count, 16, 16))
    for picture, kind in zip(pixels, labels, strict=True):
        picture[4 * (kind % 3) :, 3 * (kind // 3) :][:6, :8] += 20
    return pixels.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """A folder of pictures of three classes, and lists of the first 60 for training and 120 for validation."""
    root = tmp_path_factory.mktemp("blobs")
    for split, count in (("train", 60), ("val", 120)):
        rows = []
        for number, (picture, kind) in enumerate(zip(*noisy(2 * count, 3), strict=True)):
            file = root / split / f"kind{kind}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
            rows.append(f"{file.relative_to(root)},kind{kind}\n")
        (root / f"{split}.csv").write_text("".join(["path,label\n", *rows[:count]]))
    return root


@pytest.fixture(scope="module")
def given(blobs):
    """All flags that the scripts share, with other values than the defaults and those of the encoder; and a few."""
    words = ["--protocols", "knn", "linear", "finetune", "--labels", "30", "--draws", "2", "--budget", "3",
             "--blr", "1e-3", "1e-2", "--keep_checkpoints", "--fast_jpeg", "--no_pin_mem", "--download"]  # fmt: skip
    for name, value in {**GIVEN, "train_list": blobs / "train.csv", "val_list": blobs / "val.csv"}.items():
        if not isinstance(value, bool):
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


@pytest.fixture(scope="module")
def compared(blobs, encoder, given, forked, tmp_path_factory):
    """A complete comparison: its folder and its text."""
    out = tmp_path_factory.mktemp("compare")
    return out, compare(blobs, out, encoder, *given)


def compare(data, out, encoder, *more):
    return call(main_compare, *flags_of(data, out, encoder, *more))


def flags_of(data, out, encoder, *more):
    return ["--num_workers", "0", "--device", "cpu", "--data_path", data, "--output_dir", out, "--encoders", "pixels",
            encoder, "--protocols", "knn", "finetune", "--labels", "12", "--draws", "1", "--budget", "2",
            *more]  # fmt: skip


RECIPE = ROOT / "recipes/finetune_fashion_mnist.yaml"


def rows(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def untimed(text):
    """The text of a comparison without the last column of the table, the seconds."""
    return re.sub(r"\|[^|]*\|$", "|", text, flags=re.MULTILINE)


def read(out):
    """The scores of the runs by name."""
    files = sorted(out.glob("runs/**/run.json"))
    return {str(file.parent.relative_to(out / "runs")): json.loads(file.read_text())["scores"] for file in files}


def pixels_of(source):
    """The pixels (n, 1, 16, 16) in [0, 1] and the labels of a source of files."""
    images = [np.asarray(Image.open(source.name(number))) for number in range(len(source))]
    return torch.from_numpy(np.stack(images)[:, None] / np.float32(255)), np.asarray(source.labels)


@pytest.fixture(scope="module")
def draws(blobs):
    """The training images of the two draws, and the validation images."""
    train, val = (open_source(split, str(blobs), str(blobs / f"{split}.csv")) for split in ("train", "val"))
    return [some_of_each_class(train, 10, draw) for draw in (0, 1)], val


def row_of(out, protocol, draw=0, encoder="mine"):
    cell = (encoder, protocol, str(draw))
    (row,) = (row for row in rows(out) if (row["encoder"], row["protocol"], row["draw"]) == cell)
    assert row["labels"] == "30"
    return float(row["accuracy"]), row["chosen"]


def recorded(file):
    return checkpoint.read(file)["args"]


def right(title, values, train, labels, test, truth):
    """The accuracy of scikit-learn in percent."""
    if title.startswith("k-NN"):
        if title != "k-NN":
            pca = PCA(min(int(values[0]), len(train) - 1), whiten=True, svd_solver="full").fit(train)
            train, test = pca.transform(train), pca.transform(test)
        sets = ((torch.from_numpy(features).float(), one) for features, one in ((train, labels), (test, truth)))
        return 100 * accuracy_score(truth, predictions(*sets, int(values[-1]), 0.07))
    is_svm = title == "RBF-SVM"
    model = SVC(C=values[0], gamma=values[1] / train.shape[1]) if is_svm else LogisticRegression(C=values[0])
    return 100 * make_pipeline(StandardScaler(), model.set_params(max_iter=1000)).fit(train, labels).score(test, truth)


@pytest.mark.slow
def test_rows_of_pixels_are_those_of_scikit_learn(compared, draws):
    """The labels of a draw choose by the rule of `choices`."""
    test, truth = (part.reshape(len(part), -1).squeeze() for part in map(np.asarray, pixels_of(draws[1])))
    for draw, source in enumerate(draws[0]):
        train, labels = (part.reshape(len(part), -1).squeeze() for part in map(np.asarray, pixels_of(source)))
        for predictor in BASELINES[CLASSIFICATION]:
            chosen = choices.choose(predictor, {"": train}, labels, draw)
            accuracy = right(predictor.title, chosen.values, train, labels, test, truth)
            assert row_of(compared[0], predictor.title, draw, "pixels") == (
                pytest.approx(accuracy), predictor.in_words(chosen.values)
            )  # fmt: skip


@pytest.mark.slow
def test_rows_of_a_frozen_encoder_are_those_of_scikit_learn(compared, encoder, draws):
    """The labels of a draw choose the pooling, too. The class token is the default of this file."""
    models = [get_model("vit_mini_patch4", **SHAPE, nb_classes=0, global_pool=pools) for pools in (False, True)]
    for model in models:  # the latter with a layer norm after pooling
        model.load_state_dict(checkpoint.read(encoder)["model"], strict=False)

    def features(source):
        images = (pixels_of(source)[0] - 0.45) / 0.3
        with torch.no_grad():
            token, mean = (model.eval().forward_features(images).numpy() for model in models)
            patches = models[0].get_intermediate_layers(images)[0][:, 2:].mean(dim=1).numpy()
        parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (token, patches)]
        both = np.concatenate(parts, axis=1)
        return {"class token": token, "mean of the patches": mean, "class token and mean of the patches": both}

    queries = features(draws[1])
    for draw, source in enumerate(draws[0]):
        banks = features(source)
        for title, predictor in USES[CLASSIFICATION].items():
            chosen = choices.choose(predictor, banks, source.labels, draw)
            sets = (banks[chosen.option], source.labels, queries[chosen.option], draws[1].labels)
            text = f"{predictor.in_words(chosen.values)}, {chosen.option}"
            assert row_of(compared[0], title, draw) == (pytest.approx(right(title, chosen.values, *sets)), text)


@pytest.mark.slow
def test_rows_of_classifiers_are_those_of_their_checkpoints(compared, draws):
    pixels, labels = pixels_of(draws[1])
    for draw in (0, 1):
        out = compared[0] / f"runs/mine/finetune/30/{draw}"
        file = out / f"checkpoint-{len(lines(out)) - 1}.pth"
        with torch.no_grad():
            predicted = get_model(str(file))((pixels - 0.45) / 0.3).argmax(dim=1)
        accuracy = pytest.approx(100 * accuracy_score(labels, predicted))
        assert row_of(compared[0], "fine-tuned", draw) == (accuracy, f"blr {recorded(file)['blr']:g}")


@pytest.mark.slow
def test_settings_of_the_runs(compared, blobs, encoder):
    """Shared flags, draws, chosen rates, and epochs."""
    out, scores = compared[0], read(compared[0])
    runs = {str(file.parent.relative_to(out / "runs")): recorded(file) for file in out.rglob("checkpoint-*.pth")}
    tried = {name: score["test_acc1"] for name, score in scores.items() if name.startswith("choices/mine/finetune")}
    cells = [f"mine/finetune/30/{draw}" for draw in (0, 1)]
    assert sorted(runs) == sorted([*tried, *cells])
    shared = {**GIVEN, "finetune": encoder, "data_path": blobs, "train_list": blobs / "train.csv",
              "val_list": blobs / "val.csv", "train_per_class": 10, "batch_size": 8}  # fmt: skip
    for name, args in runs.items():
        of_run = {"seed": int(name.split("/30/")[1][0]), "val_fraction": 0.2 if name in tried else None,
                  "epochs": 3, "layer_decay": 0.75, "warmup_epochs": 0}  # fmt: skip
        if name in cells:  # the choice has the best score on the held-out images of the draw
            of_draw = {
                rate.rpartition("/")[2]: score for rate, score in tried.items() if rate.startswith(f"choices/{name}")
            }
            assert {"0.001", "0.01"} < {*of_draw} and of_draw[f"{args['blr']}"] == max(of_draw.values())
        expected = {key: str(value) if isinstance(value, Path) else value for key, value in (shared | of_run).items()}
        assert {key: args[key] for key in expected} == expected
        assert args["resume"] == "auto"


@pytest.mark.slow
def test_every_result_can_be_repeated(compared):
    out, text = compared
    (words,) = (row["command"].split() for row in rows(out) if (row["protocol"], row["draw"]) == ("k-NN", "1"))
    assert words[:2] == ["python", "main_knn.py"]
    (accuracy,) = call(main_knn, *words[2:]).values()
    assert accuracy == pytest.approx(row_of(out, "k-NN", 1)[0])
    means = {(row["encoder"], row["protocol"]): [] for row in rows(out)}
    for row in rows(out):
        means[row["encoder"], row["protocol"]].append(float(row["accuracy"]))
    for (name, protocol), (first, second) in means.items():
        value = f"{(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f}"
        assert re.search(rf"^\| {name} \({protocol}\) \| (\*\*)?{value}(\*\*)? \(\w+ .*\) \|", text, re.MULTILINE)
    assert (out / "table.md").read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize("model", [[], ["--model", "vit_mini_patch4"]])
def test_architecture_and_data_of_the_runs(model, encoder, tmp_path):
    """Random weights have the settings of the first file, and pixels its size. A dataset of torchvision is shared.

    A recipe determines how its images are cropped, and the file the architecture. With --model, random weights have the
    images of the file only.
    """
    for split, count in (("train", 30), ("t10k", 20)):
        for kind, array in zip(("images-idx3", "labels-idx1"), noisy(count, 10), strict=True):
            write_idx(tmp_path / f"FashionMNIST/raw/{split}-{kind}-ubyte", array.astype(np.uint8))
    flags = ("--dataset", "FashionMNIST", "--encoders", "pixels", "scratch", encoder, "--labels", 10, "--protocols",
             "finetune", "finetune", "--budget", 1, "--keep_checkpoints",
             "--recipes", f"finetune={tmp_path / 'recipe.yaml'}")  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("crop: none\nbatch_size: 16\npatch_size: 4\n")
    compare(tmp_path, tmp_path / "out", encoder, *flags, *model)
    assert [row["encoder"] for row in rows(tmp_path / "out")] == ["pixels"] * 3 + ["scratch", "mine"]
    assert "--input_size 16" in rows(tmp_path / "out")[0]["command"]
    same = {**SHAPE, "dataset": "FashionMNIST", "model": "vit_mini_patch4", "epochs": 1, "nb_classes": 10,
            "crop": "none", "hflip": 0.2}  # fmt: skip
    scratch = {"finetune": "", "layer_decay": 1, "mean": [0.1], "std": [0.4]}
    scratch |= {"patch_size": 4, "num_cls_tokens": 1} if model else {}
    for name, own in (("scratch", scratch), ("mine", {"finetune": str(encoder)})):
        args = recorded(tmp_path / f"out/runs/{name}/finetune/10/0/checkpoint-0.pth")
        assert {key: args[key] for key in same | own} == same | own


def test_rates_are_selected_with_few_labels(pictures, tmp_path, capsys, monkeypatch):
    """Of two classes. A fifth is held out, and at least one image."""
    for split in ("train", "val"):
        pairs = shutil.copytree(pictures / "train", tmp_path / "pairs" / split).parent
    (tmp_path / "probe.yaml").write_text("epochs: 2\nwarmup_epochs: 0\nblr: [1, 10]\nprobe: attentive\n")
    flags = ("--encoders", "scratch", "--model", "vit_mini_patch4", "--protocols", "attentive", "--labels", "4",
             "--blr", "1e-3", "--recipes", f"attentive={tmp_path / 'probe.yaml'}",
             *(word for name, value in SHAPE.items() for word in (f"--{name}", value)))  # fmt: skip
    compare(pairs, tmp_path / "out", None, *flags)
    (row,) = rows(tmp_path / "out")
    args = parse(main_linprobe, *row["command"].split()[2:]).record()
    assert {name: args[name] for name in ("model", *SHAPE)} == {"model": "vit_mini_patch4", **SHAPE}
    assert re.fullmatch(r"blr \S+", row["chosen"])
    assert list((tmp_path / "out").rglob("log.txt"))
    assert not list((tmp_path / "out").rglob("*.pth")) + list((tmp_path / "out").rglob("tokens"))
    line = fails(capsys, monkeypatch, main_compare, *flags_of(pairs, tmp_path / "two", None, *flags, "--labels", "2"))
    assert re.search(r"1 image, fewer than .*the output is in .*recipes=attentive=YAML", line)


@pytest.mark.parametrize(("flags", "message"), [
    ("--labels 5", r"labels=5: give 6 \(one image of each class\) to 48"),
    ("--labels 7000", r"labels=7000: give 6 .* to 48 \(the smallest class has 8\), or all"),
    ("--draws 1 2", "draws.* has 2 values: give one, or one for each of 1 .*labels"),
    ("--budget 1 2 3", "budget.* has 3 values: give one, or one for each of 1 .*labels"),
    ("--labels 12 13", r"labels=\[12, 13\]: these are 12, 12 images"),
    ("--labels 48 all --budget 2 3", r"labels=\[48, all\]: these are 48, 48 images"),
    (f"--recipes lora={RECIPE}", "recipes=lora=.*: .* give PROTOCOL=YAML once for each of finetune"),
    ("--recipes finetune", "recipes=finetune: .* give PROTOCOL=YAML once for each of finetune"),
    (f"--recipes finetune={RECIPE} finetune={RECIPE}", "recipes=finetune=.*: .* PROTOCOL=YAML once for each of"),
    (f"--recipes knn={RECIPE}", "recipes=knn=.*: knn and linear are no trainings"),
    ("--encoders a=", "encoders=a=: give a file or a published name"),
    ("--encoders timm:vit_base_patch16_223", r"timm:vit_base_patch16_223: .* mean vit_base_patch16_224\?"),
    ("--encoders a=scratch.pth a=scratch.pth", "there is no file scratch.pth"),
    ("--encoders pixels=a.pth", r"encoders=pixels=a.pth: the name pixels is reserved; give .* mine=a.pth"),
    ("--encoders choices.pth", "the name choices is reserved"),
    ("--encoders a+b={encoder} a/b={encoder}", "encoders.: two have the name a_b; give names, such as long="),
])  # fmt: skip
def test_errors_are_one_line(labelled, encoder, tmp_path, flags, message, capsys, monkeypatch):
    more = flags.format(encoder=encoder).split()
    assert re.search(message, fails(capsys, monkeypatch, main_compare, *flags_of(labelled, tmp_path, encoder, *more)))


@pytest.mark.parametrize("budget", ["0", "5m", "1.5"])
def test_the_budget_is_a_number_of_epochs(budget, capsys):
    with pytest.raises(SystemExit):
        parse(main_compare, encoders="scratch", budget=budget)
    assert re.search(rf"argument --budget: .*{budget}", capsys.readouterr().err)


def test_names_of_encoders(tmp_path, monkeypatch):
    """A path may contain an equals sign, the name of a model of timm a dot."""
    monkeypatch.chdir(tmp_path)
    file = Path("lr=0.1/checkpoint-9.pth")
    for path in (file, Path("v1.5/config.json")):
        path.parent.mkdir()
        path.touch()
    timms, published = "vit_base_patch16_224.mae", "mae_pretrain_vit_base"
    named = {str(file): ("checkpoint-9", str(file)), f"mine={file}": ("mine", str(file)), "v1.5": ("v1.5", "v1.5"),
             f"timm:{timms}": (timms, f"timm:{timms}"), published: (published, published)}  # fmt: skip
    assert {text: encoders.name_and_file(text) for text in named} == named


def test_pixels_of_other_lists_are_computed_again(labelled, encoder, tmp_path, monkeypatch):
    computed = []
    choose = choices.choose
    monkeypatch.setattr(choices, "choose", lambda *args: computed.append(args[2]) or choose(*args))
    for count in (3, 4):
        files = [file for path in sorted(labelled.glob("train/*")) for file in sorted(path.iterdir())[:count]]
        (tmp_path / "list.txt").write_text("".join(f"{file} {file.parent.name}\n" for file in files))
        compare(labelled, tmp_path / "out", encoder, "--train_list", tmp_path / "list.txt", "--encoders", "pixels")
    assert [len(labels) for labels in computed] == 2 * [12] * 3 and len(rows(tmp_path / "out")) == 3


@pytest.mark.slow
def test_a_validation_set_that_is_added_computes_the_scores_again(labelled, encoder, tmp_path):
    """Training images took its place. They chose nothing, and now they do: each score is of other images."""
    data = tmp_path / "data"
    shutil.copytree(labelled / "train", data / "train")
    flags = ("--encoders", "pixels", encoder, "--blr", "1e-3", "1e-2", "--budget", "1")
    compare(data, tmp_path / "out", encoder, *flags)
    records = sorted((tmp_path / "out/runs").rglob("run.json"))
    before = [record.read_text() for record in records]
    compare(data, tmp_path / "out", encoder, *flags)
    assert [record.read_text() for record in records] == before
    shutil.copytree(labelled / "val", data / "val")
    compare(data, tmp_path / "out", encoder, *flags)
    after = [record.read_text() for record in records]
    assert any("choices" in record.parts for record in records)
    assert not set(before) & set(after)


@pytest.mark.slow
def test_another_label_computes_the_scores_again(labelled, encoder, tmp_path):
    """Of raw pixels, too. A table never has scores of other images."""
    data = shutil.copytree(labelled, tmp_path / "data")
    flags = ("--encoders", "pixels", encoder, "--protocols", "knn")
    compare(data, tmp_path / "out", encoder, *flags)
    records = sorted(record for record in (tmp_path / "out/runs").rglob("run.json") if "choices" not in record.parts)
    before = [record.read_text() for record in records]
    wrong, *_ = (data / "val").glob("*/*")
    other = next(folder for folder in (data / "val").iterdir() if folder != wrong.parent)
    wrong.rename(other / f"moved{wrong.suffix}")
    compare(data, tmp_path / "out", encoder, *flags)
    assert not {*before} & {record.read_text() for record in records}


def test_errors_of_the_scripts_come_before_the_runs(labelled, encoder, tmp_path, monkeypatch, capsys):
    names = []
    monkeypatch.setattr(store, "kept", lambda folder, *_: names.append(folder) or {})
    (tmp_path / "recipe.yaml").write_text("amps: off\n")
    flags = ("--protocols", "knn", "finetune", "--recipes", f"finetune={tmp_path / 'recipe.yaml'}")
    with pytest.raises(SystemExit):
        compare(labelled, tmp_path / "out", encoder, *flags)
    assert "recipe.yaml: there is no flag 'amps'; did you mean amp?" in capsys.readouterr().err
    assert names == []


def results(encoder, accuracies, labels=100):
    return [Result(encoder, "k-NN", labels, draw, acc, "", 1.0, "") for draw, acc in enumerate(accuracies)]


def test_the_conclusion_compares_the_best_encoder_with_another_encoder():
    """Differences are those of the same draws."""
    for found, said in (
        ([*results("a", [70.0, 72.0, 74.0]), *results("b", [69.0, 70.5, 72.0])],
         r"100 labels, a \(k-NN\) .* 72.0 ± 2.0 %, 1.5 ± 0.5 points above b \(k-NN\)"),
        ([*results("a", [70.0, 74.0]), *results("b", [72.0, 71.0])],
         r"a \(k-NN\) has the highest accuracy, 72.0 .*, not "
         r"distinguishable from b \(k-NN\) \(0.5 ± 3.5 points above it, within the error of 2 draws\)\.$"),
        ([*results("a", [70.0, 74.0]), *results("b", [67.0, 66.0])],
         r"a \(k-NN\) has the highest accuracy, 72.0 .*, not distinguishable from b \(k-NN\) \(5.5 ± 3.5 "),
        ([*results("a", [80.0] * 3), *results("b", [79.0] * 3), *results("c", [83.0, 70.0, 83.0])],
         r"not distinguishable from c \(k-NN\) .*, 1.0 ± 0.0 points above b \(k-NN\)\.$"),
        ([*results("a", [70.0], 5), *results("b", [72.0], 5), *results("a", [1.0], 9)],
         r"5 labels, b \(k-NN\) .* 72.0 %, 2.0 points \(one draw.*\) above a \(k-NN\).* 9 labels, a .* 1.0 %"),
        ([*results("a", [72.0]), Result("a", "linear probe", 100, 0, 71.0, "", 1.0, ""), *results("b", [69.0])],
         r"a \(k-NN\) .* 72.0 %, 3.0 points .* above b \(k-NN\)"),
        ([*results("a", [70.0, 72.0]), *results("b", [72.0, 70.0]), *results("c", [9.0, 9.0])],
         r"100 labels, a \(k-NN\) and b \(k-NN\) tie for the best accuracy, 71.0 %\.$"),
        ([*results("a", [72.0]), *results("b", [72.0]), *results("c", [72.0])],
         r"100 labels, a \(k-NN\), b \(k-NN\) and c \(k-NN\) tie for the best accuracy, 72.0 %\.$"),
        ([*results("a", [float("nan")]), *results("b", [69.0])], r"100 labels, b \(k-NN\) .* 69.0 %"),
    ):  # fmt: skip
        assert re.search(said, summary.conclusion(summary.entries_of(found)))


def test_an_interrupted_comparison_has_the_draws_that_all_rows_have(tmp_path):
    """The mean of all draws of a row that is further would name another encoder."""
    found = [*results("a", [70.0, 90.0, 92.0]), *results("b", [75.0, 91.0])]
    planned = [(f"{name} (k-NN)", 100, draw) for name in "ab" for draw in range(3)]
    table, conclusion, incomplete = summary.write(tmp_path, found, planned=planned).strip().split("\n\n")
    assert "| a (k-NN) | 80.0 ± 14.1 |" in table and "| b (k-NN) | **83.0 ± 11.3** |" in table
    assert "b (k-NN) has the highest accuracy, 83.0" in conclusion
    assert "4 of 6 results" in incomplete and "without 1 of draws" in incomplete
    assert len(summary.read(tmp_path)) == 5


def test_the_best_encoder_is_unknown_while_a_row_is_missing(tmp_path):
    """With the other numbers of labels, it is named."""
    found = [*results("a", [60.0]), *results("a", [70.0], 1000), *results("b", [50.0])]
    planned = [(f"{name} (k-NN)", labels, 0) for name in "ab" for labels in (100, 1000)]
    table, conclusion, incomplete = summary.write(tmp_path, found, planned=planned).strip().split("\n\n")
    assert "| a (k-NN) | **60.0** | 70.0 |" in table
    assert re.match(r"With 100 labels, a \(k-NN\) has the best accuracy, 60.0 %", conclusion)
    assert "1,000" not in conclusion
    assert all(part in incomplete for part in ("3 of 4 results", "1,000 labels", "b (k-NN)"))


@pytest.mark.parametrize(("images", "is_clear"), [(500, False), (5000, True)])
def test_few_test_images_can_not_tell_encoders_apart(images, is_clear):
    """Two standard errors of the difference of 72 and 69 %: 5.8 points of 500 images, and 1.8 of 5,000."""
    found = [*results("a", [71.9, 72.0, 72.1]), *results("b", [69.0, 69.0, 69.0]), *results("c", [40.0, 40.0, 40.0])]
    text = summary.conclusion(summary.entries_of(found), images)
    assert ("has the best accuracy, 72.0 ± 0.1 %, 3.0 ± 0.1 points above b (k-NN)" in text) is is_clear
    assert ("not distinguishable from b (k-NN)" in text) is not is_clear
    assert ("32.0 ± 0.1 points above c (k-NN)" in text) is not is_clear
    assert "not distinguishable from c" not in text


@pytest.mark.parametrize(
    ("accuracy", "images", "is_clear"),
    [(0, 1, False), (60, 10, False), (80, 20, False), (92, 50, False), (20, 20, True), (92, 500, True)],
)
def test_all_right_of_few_test_images_is_no_certainty(accuracy, images, is_clear):
    """Fisher's exact test of 100 % and this accuracy has p > .05, or p < .001."""
    right = round(images * accuracy / 100)
    p = stats.fisher_exact([[images, 0], [right, images - right]])[1]
    assert p < 0.001 if is_clear else p > 0.05
    text = summary.conclusion(summary.entries_of([*results("a", [100.0]), *results("b", [accuracy])]), images)
    assert ("not distinguishable" in text) is not is_clear


def test_the_table():
    costs = {"metric": "acc1", "trained_parameters": 1234, "peak_memory_gb": 1.25}
    found = [*results("a", [70.0, 72.0]),
             *(Result("b", "LoRA", 100, draw, score, "", 2.0, "", **costs) for draw, score in enumerate((60.0, 61.0))),
             *(Result("b", "LoRA", 1000, draw, 80.0, "", seconds, "", **costs)
               for draw, seconds in enumerate((10.0, 70.0, 20.0)))]  # fmt: skip
    table = summary.table(summary.entries_of(found), {"c (LoRA)": "it has no layer"})
    assert table.splitlines()[0].endswith("| trained parameters | seconds (100 / 1,000 labels) | GPU memory, GB |")
    assert table.splitlines()[2:] == [
        "| a (k-NN) | **71.0 ± 1.4** |  |  | 1.0 / – |  |",
        "| b (LoRA) | 60.5 ± 0.7 | **80.0 ± 0.0** | 1,234 | 2.0 / 20 | 1.2 |",
        "| c (LoRA) | – | – | – | – | – |", "", "c (LoRA) is left out: it has no layer.",
    ]  # fmt: skip


def test_the_table_says_of_which_images_its_scores_are(tmp_path):
    found = [*results("a", [70.0]), *results("a", [72.0], labels=1000)]
    images = "k-NN: k nearest neighbors among 100 or 1,000 images classify 23 held-out images."
    assert summary.write(tmp_path, found, 23).endswith(f"\n\nThe scores are of 23 held-out images. {images}\n")
    others = [Result("a", "fine-tuned", 100, 0, 0.5, "", 1.0, "", "r2")]
    assert summary.write(tmp_path, others, 23).endswith("\n\nThe scores are of 23 held-out images.\n")


def test_a_baseline_is_trained_on_all_images_by_one_thread(labelled, tmp_path, monkeypatch):
    """Also if some of them choose its hyperparameters."""
    fit, fits = SVC.fit, []

    def record(model, kernel, labels):
        fits.append((len(labels), max(pool["num_threads"] for pool in threadpool_info())))
        return fit(model, kernel, labels)

    monkeypatch.setattr(SVC, "fit", record)
    monkeypatch.setattr(choices, "MOST", 24)
    with threadpool_limits(2):
        compare(labelled, tmp_path, None, "--encoders", "pixels", "--labels", "all")
    assert fits[-1] == (48, 1) and {count for count, _ in fits[:-1]} <= {*range(18, 24)}


@pytest.mark.parametrize("limit", [0, 600])
def test_a_baseline_that_would_take_too_long_is_left_out(labelled, tmp_path, monkeypatch, limit):
    """No encoder is the best one where the baseline is missing that is the strongest with fewer labels."""
    monkeypatch.setattr(trials, "MANY", 20)
    monkeypatch.setattr(trials, "MOST_SECONDS", limit)
    monkeypatch.setattr(choices, "MOST", 18)
    text = compare(labelled, tmp_path, None, "--encoders", "pixels", "scratch", "--model", "vit_mini_patch4",
                   "--input_size", "16", "--protocols", "knn", "--labels", "12", "all")  # fmt: skip
    found = [row["labels"] for row in rows(tmp_path) if row["encoder"] == "pixels"]
    assert found.count("12") == 3 and found.count("48") == (0 if limit == 0 else 3)
    reasons = [line for line in text.splitlines() if "is left out: with 48 labels, a fit would take about" in line]
    assert len(reasons) == 3 - found.count("48")
    assert ("With 48 labels, there is none of pixels" in text) is (limit == 0)


def test_pixels_of_the_baselines(labelled, tmp_path):
    """They have at most 32 rows and columns, the default crop of the input size, and one range for 8 and 16 bits."""

    def read(path, *spec, **options):
        return raw_pixels.read(open_source("val", str(path)), ImageSpec(*spec, **options), 0)

    assert np.array_equal(read(labelled, 256, 1), read(labelled, 256, 1, crop_pct=1.0))
    pixels = read(labelled, (64, 32), 1, crop_pct=1)
    assert pixels.shape == (23, 32 * 32) and 0 <= pixels.min() < pixels.max() <= 1
    assert read(labelled, (8, 256), 1, crop="none").shape == (23, 8 * 32)  # as leads of a signal, which stay apart
    for crop in (None, "none"):  # the top rows of a high input are in it
        folder = tmp_path / "high/val/cat"
        folder.mkdir(parents=True, exist_ok=True)
        high = np.zeros((64, 32), np.uint8)
        high[:8] = 255
        Image.fromarray(high).save(folder / "0.png")
        rows = read(tmp_path / "high", (64, 32), 1, crop_pct=1, crop=crop).reshape(32, 32)
        assert rows[:3].min() > 0.9 and rows[6:].max() < 0.1
    assert read(labelled, 16, 3).shape == (23, 3 * 16 * 16)
    shades = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    for name, pixels in (("bytes", shades), ("deep", shades.astype(np.uint16) * 257)):
        (tmp_path / name / "val/cat").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "val/cat/0.png")
    found = [read(tmp_path / name, 8, 1, crop_pct=1) for name in ("bytes", "deep")]
    np.testing.assert_allclose(*found, atol=1e-6)
    assert found[0].max() == 1 and found[0].dtype == np.float32


def test_pixels_of_several_units_are_normalized(tmp_path):
    """The classes differ in a channel of small values, which cosines of raw values would not see."""
    draw = np.random.default_rng(0)
    for split, number in itertools.product(("train", "val"), range(40)):
        folder = tmp_path / "weather" / split / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = draw.normal(size=(4, 16, 16))
        noise[1] += 2 * (number % 2) - 1
        mean, std = np.array([[288, 0.008, 0, 101325], [8, 0.002, 10, 30]])[..., None, None]
        np.save(folder / f"{number}.npy", (mean + std * noise).astype(np.float32))
    images = ImageSpec(16, 4, mean=[288, 0.008, 0, 101325], std=[8, 0.002, 10, 30], crop="none")
    train, val = (open_source(split, str(tmp_path / "weather")) for split in ("train", "val"))
    nearest = KNeighborsClassifier(5, metric="cosine").fit(raw_pixels.read(train, images, 0), train.labels)
    assert nearest.score(raw_pixels.read(val, images, 0), val.labels) == 1


def test_a_remedy_of_a_script_is_given_in_a_recipe(labelled, encoder, tmp_path, capsys, monkeypatch):
    """main_compare.py does not have all flags of the scripts."""
    shutil.copytree(labelled, tmp_path / "data")
    damaged = sorted(tmp_path.glob("data/train/*/*"))[0]
    damaged.write_bytes(b"")
    few = (tmp_path / "data", tmp_path / "out", encoder, "--encoders", encoder, "--protocols", "finetune",
           "--labels", "all", "--budget", "1")  # fmt: skip
    line = fails(capsys, monkeypatch, main_compare, *flags_of(*few))
    assert re.search(rf"{damaged.name}.*on_bad_image=skip.*recipes=finetune=YAML", line)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("on_bad_image: skip\nbatch_size: 16\n")
    assert "fine-tuned" in compare(*few, "--recipes", f"finetune={recipe}")


def test_all_rows_leave_out_an_image_that_can_not_be_read(labelled, encoder, tmp_path):
    """Also raw pixels, and of the training images that stand for a missing validation set."""
    shutil.copytree(labelled / "train", tmp_path / "data/train")
    for folder in sorted(tmp_path.glob("data/train/*"))[:3]:
        min(folder.iterdir()).write_bytes(b"")
    flags = ("--protocols", "knn", "--labels", "all", "--on_bad_image", "skip")
    text = compare(tmp_path / "data", tmp_path / "out", encoder, *flags)
    assert "mine (k-NN)" in text and "pixels (RBF-SVM)" in text


@pytest.mark.slow
def test_a_comparison_resumes(compared, blobs, encoder, given, tmp_path):
    """Complete runs are not repeated; results of other flags are not used. A run has one result, after any others."""
    whole, text = compared
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    runs, before = tmp_path / "runs", read(whole)
    shutil.rmtree(runs / "mine/finetune/30/1")
    for name, part, value in (("mine/knn/30/0", "inputs", {}), ("pixels/RBF-SVM/30/0", "scores", None)):
        record = json.loads((runs / name / "run.json").read_text()) | {part: value}
        (runs / name / "run.json").write_text(json.dumps({key: own for key, own in record.items() if own is not None}))
        (runs / name / "rest").touch()
    assert untimed(compare(blobs, tmp_path, encoder, *given)) == untimed(text)
    after = read(tmp_path)
    again = {name for name in before if after[name]["seconds"] != before[name]["seconds"]}
    assert again == {"pixels/RBF-SVM/30/0", "mine/knn/30/0", "mine/finetune/30/1"}
    assert [{**after[name], "seconds": 0} for name in again] == [{**before[name], "seconds": 0} for name in again]
    assert [path.parent.parent.parent.name for path in runs.rglob("rest")] == ["RBF-SVM"]


@pytest.mark.slow
def test_an_interrupted_training_goes_on(labelled, encoder, tmp_path, monkeypatch):
    flags = ("--encoders", encoder, "--protocols", "finetune", "--keep_checkpoints")
    text = compare(labelled, tmp_path / "whole", encoder, *flags)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 1)
        compare(labelled, tmp_path / "parts", encoder, *flags)
    assert untimed(compare(labelled, tmp_path / "parts", encoder, *flags)) == untimed(text)
    assert_same_run(*(tmp_path / out / "runs/mine/finetune/12/0" for out in ("whole", "parts")))
    assert len((tmp_path / "parts/runs/mine/finetune/12/0/environment.jsonl").read_text().splitlines()) == 2


def test_a_signal_ends_the_comparison(labelled, encoder, tmp_path, monkeypatch, capsys):
    def stop(run, **options):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(main_finetune, "main", stop)
    flags = ("--data_path", labelled, "--output_dir", tmp_path, "--encoders", encoder, "--protocols", "finetune")
    line = fails(capsys, monkeypatch, main_compare, *flags)
    assert line.endswith("stopped by SIGTERM, the state is saved; the same command resumes the run")


def test_a_comparison_that_was_stopped_before_an_encoder_names_no_best_one(labelled, encoder, tmp_path, monkeypatch):
    """Raw pixels come first."""

    def stop(run, **options):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(main_finetune, "main", stop)
    with pytest.raises(Interrupted):
        compare(labelled, tmp_path, encoder, "--protocols", "finetune")
    table, incomplete, _ = (tmp_path / "table.md").read_text().split("\n\n")
    assert "pixels (RBF-SVM)" in table and "**" not in table
    assert all(part in incomplete for part in ("3 of 4 results", "12 labels", "mine (fine-tuned)"))


def test_a_comparison_is_one_process(labelled, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun"):
        compare(labelled, tmp_path, encoder)


def test_two_comparisons_share_the_runs(labelled, encoder, tmp_path):
    """Of one output directory, at once."""
    words = [sys.executable, ROOT / "main_compare.py", "--data_path", labelled, "--output_dir", tmp_path, "--labels",
             "12", "--draws", "4", "--encoders", encoder, "--protocols", "knn", "--device", "cpu", "--num_workers",
             "0"]  # fmt: skip
    processes = [subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    tables = [process.communicate()[0].split("\n\n")[1] for process in processes]
    assert tables[0] == tables[1] and "mine (k-NN)" in tables[0]
    assert [process.returncode for process in processes] == [0, 0]
    assert len([name for name in read(tmp_path) if name.startswith("mine/")]) == 4
    assert not (tmp_path / "runs/features").exists()


def test_a_recipe_does_not_replace_what_is_compared(labelled, encoder, tmp_path, capsys):
    """The start, the images and the metric are those of the comparison: a recipe of mae.data has some of them."""
    own = {"val_fraction": 0.25, "train_per_class": 4, "metric": ["balanced_accuracy"], "data_path": str(labelled)}
    probe = {"epochs": 1, "warmup_epochs": 0, "blr": 0.1, "batch_size": 8, "probe": "attentive"}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump({**own, **probe}))
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({**own, "finetune": str(encoder), "batch_size": 8}))
    flags = ("--encoders", "scratch", encoder, "--labels", "all", "--protocols", "attentive", "finetune")
    more = ("--recipes", f"attentive={tmp_path / 'probe.yaml'}", f"finetune={tmp_path / 'tuned.yaml'}")
    text = compare(labelled, tmp_path / "out", encoder, *flags, *more)
    commands = {(row["encoder"], row["protocol"]): row["command"] for row in rows(tmp_path / "out")}
    assert len(commands) == 4 and "48 labels" in text and "23 held-out images" in text
    for (name, protocol), command in commands.items():
        assert ("--finetune" in command) is (name != "scratch")
        assert not re.search("val_fraction|train_per_class|balanced_accuracy", command)
        assert ("--blr 0.1" in command) is (protocol == "attentive probe")
    output = capsys.readouterr().out
    assert output.count("`val_fraction`") == 2 and output.count("`finetune`") == 1  # a line for each recipe
    accuracies = [float(row["accuracy"]) for row in rows(tmp_path / "out")]
    assert max(accuracies) > 1  # percent


def test_the_learning_rate_of_a_probe_is_a_base_learning_rate(labelled, encoder, tmp_path, capsys, monkeypatch):
    (tmp_path / "r.yaml").write_text("lr: 6.4\nepochs: 1\nwarmup_epochs: 0\n")
    more = ("--protocols", "attentive", "--recipes", f"attentive={tmp_path / 'r.yaml'}", "--blr", "1e-3")
    line = fails(capsys, monkeypatch, main_compare, *flags_of(labelled, tmp_path / "out", encoder, *more))
    assert re.search(r"recipes=attentive=.*r.yaml: it has lr=6.4; give `blr`", line)


def test_a_result_belongs_to_the_contents_of_its_files(tmp_path):
    """Files of weights and lists, folders of sharded checkpoints, and one of several models in a file; not images."""
    (tmp_path / "sharded/sub").mkdir(parents=True)
    weights, listed, sharded = tmp_path / "checkpoint-last.pth", tmp_path / "train.csv", tmp_path / "sharded"
    files = (weights, listed, sharded / "sub/a")

    def is_computed(**flags) -> bool:
        computed = []
        store.kept(tmp_path / "run", flags, lambda out: computed.append(out) or {})
        return bool(computed)

    for path in files:
        path.write_text("first")
    base = {"finetune": weights, "train_list": listed, "data_path": tmp_path, "blr": 0.1, "num_workers": 1}
    assert is_computed(**base) and not is_computed(**base | {"num_workers": 2, "output_dir": tmp_path / "other"})
    for path in files[:2]:
        path.write_text("other")
        assert is_computed(**base) and not is_computed(**base)
    assert is_computed(**base | {"blr": 1})
    folder = {**base, "finetune": sharded}
    assert is_computed(**folder) and not is_computed(**folder)
    files[2].write_text("longer text")
    assert is_computed(**folder)
    assert is_computed(finetune=f"{weights}#teacher") and not is_computed(finetune=f"{weights}#teacher")
    assert is_computed(finetune=f"{weights}#student")
    weights.write_text("third")
    assert is_computed(finetune=f"{weights}#student")
    # The paths in a list are relative to its folder, unless there is a data_path.
    moved = shutil.copy(listed, tmp_path / "sharded/train.csv")
    assert is_computed(train_list=listed, data_path=None) and is_computed(train_list=moved, data_path=None)
    assert is_computed(train_list=listed, data_path="i") and not is_computed(train_list=moved, data_path="i")


@pytest.mark.parametrize(("recipe", "flags", "resumes"), [
    ("epochs: 20", {}, False), ("epochs: 1", {"seed": 2}, False), ("epochs: 1", {"output_dir": "the place"}, True),
])  # fmt: skip
def test_an_interrupted_run_of_other_flags_or_files_is_not_resumed(tmp_path, recipe, flags, resumes):
    def interrupt(out):
        (out / "state").touch()
        raise KeyboardInterrupt

    (tmp_path / "recipe").write_text("epochs: 1")
    before = {"seed": 1, "config": tmp_path / "recipe"}
    with pytest.raises(KeyboardInterrupt):
        store.kept(tmp_path / "run", before, interrupt)
    (tmp_path / "recipe").write_text(recipe)
    found = store.kept(tmp_path / "run", before | flags, lambda out: {"value": (out / "state").exists()})
    assert found["value"] is resumes


def test_the_seconds_of_an_interrupted_run_include_those_before(tmp_path):
    """Also after two interruptions, until the last file of each. Other settings begin anew."""

    def interrupt(out):
        time.sleep(0.3)
        (out / "state").touch()
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.kept(tmp_path / "run", {"seed": 1}, interrupt)
    assert store.kept(tmp_path / "run", {"seed": 1}, lambda out: {})["seconds"] > 0.55
    assert store.kept(tmp_path / "run", {"seed": 2}, lambda out: {})["seconds"] < 0.3


def test_files_of_another_command_are_not_removed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").touch()
    with pytest.raises(FileExistsError, match="has files and no run"):
        store.kept(tmp_path / "run", {}, dict)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_draws_that_tell_encoders_apart_are_those_of_students_t(count):
    """The limit is SciPy's two-sided 95 % interval of the mean difference of the draws."""
    noise = np.random.default_rng(0).normal(0, 1, count)
    limit = stats.t.interval(0.95, count - 1, scale=stats.sem(noise))[1]
    for factor, is_clear in ((0.98, False), (1.02, True)):
        found = [*results("a", 70 + noise - noise.mean() + factor * limit), *results("b", [70.0] * count)]
        text = summary.conclusion(summary.entries_of(found))
        assert ("not distinguishable from b" in text) is not is_clear
