"""--task regression and multilabel: labels of lists and datasets, losses, scores and predictions in units."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT
from mains import Stopped, argv_of, assert_same_run, call, lines, open_source, stop_after, stop_and_resume
from PIL import Image
from scipy import stats
from sklearn import metrics as sk
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import main_compare
import main_finetune
import main_knn
import main_linprobe
from mae.checkpoints import checkpoint
from mae.checkpoints.checkpoint import CheckpointError
from mae.compare import summary
from mae.compare.predictors import BASELINES
from mae.data import open as opener
from mae.data import raw_pixels
from mae.inference import export, get_model
from mae.settings import DataSpec, ImageSpec

NUMBERS, TAGS = ["weight", "age"], ["green", "red"]
SMALL = {"model": "vit_mini_patch4", "input_size": 16, "batch_size": 8, "num_workers": 0, "device": "cpu", "amp": "off"}
MILD = {"aa": "none", "reprob": 0, "crop_scale": "0.8 1", "lr": 0.001}
STILL = {"aa": "none", "reprob": 0, "crop": "none", "hflip": 0, "drop_path": 0, "lr": 0, "min_lr": 0, "epochs": 1,
         "warmup_epochs": 0, "batch_size": 50}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 and 23 pictures whose red and green brightness determine two numbers and two tags."""
    root, generator = tmp_path_factory.mktemp("targets"), np.random.default_rng(0)
    for split, count in (("train", 50), ("val", 23)):
        rows = [["path", "weight", "age", "tags", "green", "red"]]
        for number in range(count):
            red, green = generator.uniform(0, 1, 2)
            pixels = generator.uniform(0, 0.2, (20, 20, 3))
            pixels[:, :, :2] += 0.8 * np.array([red, green])
            name = f"{split}{number:02}.png"
            Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(root / name)
            tags = ";".join(name for name, value in (("red", red), ("green", green)) if value > 0.4)
            rows.append([name, 1000 + 200 * red, -3 * green, tags, int(green > 0.4), int(red > 0.4)])
        write(root / f"{split}.csv", rows)
    return root


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def lists(folder):
    return {"train_list": folder / "train.csv", "val_list": folder / "val.csv"}


def column_of(folder, split, *names):
    """The labels in the list, (n, columns)."""
    with (folder / f"{split}.csv").open() as file:
        return np.array([[float(row[name]) for name in names] for row in csv.DictReader(file)])


def files_of(folder, split):
    return [str(file) for file in sorted(folder.glob(f"{split}*.png"))]


@pytest.fixture
def tune(classify, folder):
    def run(main=main_finetune, name="run", **flags):
        settings = {"data_path": folder} | lists(folder) | flags
        return classify(main, name, **{flag: value for flag, value in settings.items() if value != ""})

    return run


@pytest.fixture(scope="module")
def weighed(classify_once, folder):
    """A checkpoint of a regression of one number."""
    flags = {**lists(folder), "task": "regression", "label_columns": "weight", **MILD}
    return classify_once(main_finetune, "weighed", data_path=folder, **flags) / "checkpoint-1.pth"


def scores_of_numbers(truth, values):
    return {
        "r2": sk.r2_score(truth, values), "mae": sk.mean_absolute_error(truth, values),
        "spearman": np.mean([stats.spearmanr(*pair).statistic for pair in zip(truth.T, values.T, strict=True)]),
    }  # fmt: skip


def scores_of_tags(truth, scores):
    return {
        "average_precision": sk.average_precision_score(truth, scores, average="macro"),
        "auroc": sk.roc_auc_score(truth, scores, average="macro"),
        "macro_f1": sk.f1_score(truth, scores >= 0.5, average="macro"),
    }  # fmt: skip


KINDS = {"regression": ("weight age", "mae spearman r2", NUMBERS, "pred_values", scores_of_numbers),
         "multilabel": ("tags", "average_precision auroc macro_f1", TAGS, "pred_scores", scores_of_tags)}  # fmt: skip


def in_processes(script, processes, out, **flags):
    return forks.run(script, argv_of(flags), out.with_suffix(".output"), processes)


OWN = {"main_finetune.py": MILD, "main_linprobe.py": {"blr": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "processes"), [("regression", 3), ("multilabel", 2)])
@pytest.mark.parametrize("script", OWN)
def test_scores_are_those_of_scikit_learn(script, task, processes, folder, tmp_path):
    """Each image once. The labels are those of the list, and the predictions those of `inference`, image by image."""
    columns, metric, names, key, score = KINDS[task]
    in_processes(script, processes, tmp_path / "run", **lists(folder), **SMALL | {"batch_size": 4}, **OWN[script],
                 epochs=3, warmup_epochs=1, output_dir=tmp_path / "run", task=task, label_columns=columns,
                 metric=metric)  # fmt: skip
    model = get_model(tmp_path / "run/checkpoint-2.pth")
    values = np.stack([model.predict(file)[key] for file in files_of(folder, "val")])
    found = lines(tmp_path / "run")
    for name, value in score(column_of(folder, "val", *names), values).items():
        assert found[-1][f"test_{name}"] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    if task == "multilabel":
        assert model.classes == names
        return
    errors = [line["test_mae"] for line in found]
    assert checkpoint.read(tmp_path / "run/checkpoint-best.pth")["epoch"] == errors.index(min(errors))
    record, train = checkpoint.read(tmp_path / "run/checkpoint-2.pth")["args"], column_of(folder, "train", *names)
    assert record["target_mean"] == pytest.approx(train.mean(axis=0))
    assert record["target_std"] == pytest.approx(train.std(axis=0))


@pytest.mark.parametrize(("main", "own"), [
    (main_finetune, MILD), (main_linprobe, {"blr": 1}), (main_linprobe, {"probe": "attentive"}),
])  # fmt: skip
@pytest.mark.parametrize(("flags", "written"), [
    ({"task": "regression", "label_columns": "weight age", "regression_loss": "huber"},
     {"targets.csv"}),
    ({"task": "multilabel", "label_columns": "tags"}, {"classes.csv"}),
])  # fmt: skip
def test_an_evaluation_of_the_file_equals_the_last_epoch(main, own, flags, written, tune, folder, tmp_path):
    """The file records the task, the columns, the units and the loss."""
    out, report = tune(main, **own, **flags), tmp_path / "report"
    expected = {key: value for key, value in lines(out)[-1].items() if key.startswith("test_")}
    scores = call(main, eval=True, resume=out / "checkpoint-1.pth", **lists(folder), **SMALL, report=report,
                  **(own if "probe" in own else {}))  # fmt: skip
    assert main is main_linprobe or scores.stats() == pytest.approx(expected)
    assert {file.name for file in report.iterdir()} == written
    with next(report.glob("*.csv")).open() as file:
        means = np.mean([[float(cell) for cell in row[2:]] for row in list(csv.reader(file))[1:]], axis=0)
    assert means[0] == pytest.approx(next(iter(expected.values())), rel=1e-5)


@pytest.mark.slow
def test_neighbors_are_averaged_like_the_vote(tune, folder, tmp_path, capsys):
    out = tune(task="regression", label_columns="weight age", **MILD, cls_token=True)
    said = capsys.readouterr().out
    assert "2 numbers for each" in said and "classes" not in said.split("parameters to train")[1].splitlines()[0]
    model = get_model(out / "checkpoint-1.pth")
    sets = [model.extract_feat(files_of(folder, split)).detach() for split in ("train", "val")]
    bank, queries = (torch.nn.functional.normalize(features, dim=1).numpy() for features in sets)

    def averaged(k, *names):
        neighbors = KNeighborsRegressor(k, weights=lambda d: np.exp(-(d**2) / 2 / 0.07), algorithm="brute")
        return neighbors.fit(bank, column_of(folder, "train", *names)).predict(queries)

    flags = {"finetune": out / "checkpoint-1.pth", "k": "5 20", "temperature": 0.07, **lists(folder), **SMALL}
    output = in_processes("main_knn.py", 2, tmp_path / "knn", **flags, task="regression", label_columns="weight age",
                          metric="r2 mae spearman")  # fmt: skip
    found = json.loads(output.splitlines()[-1])
    for k in (5, 20):
        for name, value in scores_of_numbers(column_of(folder, "val", *NUMBERS), averaged(k, *NUMBERS)).items():
            assert found[f"knn_{name}_k{k}"] == pytest.approx(value, rel=1e-4), (name, k)
    found = tune(main_knn, finetune=out / "checkpoint-1.pth", k=5, task="multilabel", label_columns="tags",
                 metric="auroc")[5, 0.07]  # fmt: skip
    expected = scores_of_tags(column_of(folder, "val", *TAGS), averaged(5, *TAGS))
    assert found == pytest.approx(expected["auroc"], abs=1e-6)


@pytest.mark.parametrize(("loss", "amp"), [("l1", "off"), ("l2", "off"), ("huber", "off"), ("l2", "bf16")])
def test_the_loss_is_that_of_standardized_numbers(loss, amp, tune, folder):
    """In 16 bits, the labels are exact; the outputs of the head, which is almost 0, do not matter."""
    out = tune(task="regression", label_columns="weight age", regression_loss=loss, **STILL | {"amp": amp})
    train = column_of(folder, "train", *NUMBERS)
    model = get_model(out / "checkpoint-0.pth")
    values = np.stack([one["pred_values"] for one in model.predict(files_of(folder, "train"))])
    z = np.abs(values - train) / train.std(axis=0)
    expected = {"l1": z, "l2": z**2, "huber": np.where(z < 1, z**2 / 2, z - 0.5)}[loss].mean()
    assert lines(out)[-1]["train_loss"] == pytest.approx(expected, rel=1e-5 if amp == "off" else 5e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_tags_is_the_binary_cross_entropy(weighted, tune, folder):
    out = tune(task="multilabel", label_columns="tags", **STILL, **({"class_weight": "balanced"} if weighted else {}))
    model = get_model(out / "checkpoint-0.pth")
    scores = np.stack([one["pred_scores"] for one in model.predict(files_of(folder, "train"))]).astype(float)
    truth = column_of(folder, "train", *TAGS)
    losses = -np.log(np.where(truth > 0, scores, 1 - scores))
    if weighted:  # of scikit-learn, for each class alone
        from sklearn.utils.class_weight import compute_sample_weight

        losses *= np.stack([compute_sample_weight("balanced", own) for own in truth.T], axis=1)
    assert lines(out)[-1]["train_loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_unix_times_are_exact_in_any_order_of_the_columns(tune, folder, tmp_path, caplog):
    """Of times near 1.7e9, fp32 has every 128th second only. An evaluation may name the columns in another order."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        times = 1.7e9 + generator.uniform(-30, 30, len(files_of(folder, split)))
        rows = [(Path(file).name, f"{time:.3f}", n) for n, (file, time) in
                enumerate(zip(files_of(folder, split), times, strict=True))]  # fmt: skip
        write(tmp_path / f"{split}.csv", [("path", "time", "number"), *rows])
    own = {"task": "regression", **lists(tmp_path)}
    out = tune(label_columns="number time", epochs=1, **own, **MILD)
    record = checkpoint.read(out / "checkpoint-0.pth")["args"]
    train, truth = (column_of(tmp_path, split, "number", "time") for split in ("train", "val"))
    assert record["target_mean"] == pytest.approx(train.mean(axis=0), rel=1e-12)
    assert record["target_std"] == pytest.approx(train.std(axis=0), rel=1e-9)
    model = get_model(out / "checkpoint-0.pth")
    values = np.stack([model.predict(file)["pred_values"] for file in files_of(folder, "val")])
    caplog.clear()
    for order in ("number time", "time number"):
        scores = tune(label_columns=order, eval=True, resume=out / "checkpoint-0.pth", **own)
        assert scores.metrics["mae"] == pytest.approx(np.abs(values - truth).mean(), rel=1e-5), order
        assert scores.labels == pytest.approx(truth, abs=1e-4)
    assert "is the same" not in caplog.text


class Pictures:
    """The pictures of the fixture as a dataset, with vectors as labels."""

    def __init__(self, split, data_path, names, lists_labels):
        self.files, self.classes = files_of(Path(data_path), split), list(names)
        self.vectors = column_of(Path(data_path), split, *names)
        if lists_labels:
            self.labels = self.vectors

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.files[index], torch.from_numpy(self.vectors[index])


class Timed(Pictures):
    """The attribute `labels` is of another minute than the items."""

    def __init__(self, split, data_path):
        super().__init__(split, data_path, NUMBERS, True)
        self.vectors = np.full((len(self.files), 2), 1.7e9)
        self.labels = self.vectors + np.arange(2)


def test_times_of_items_are_compared_with_their_list_exactly(tmp_path, folder):
    source = open_source("train", str(folder), dataset="py:test_tasks:Timed", task="regression")
    with pytest.raises(ValueError, match=r"labels\[0\] is"):
        source[0]


numbers = partial(Pictures, names=NUMBERS, lists_labels=True)
unlisted_numbers = partial(Pictures, names=NUMBERS, lists_labels=False)
tags = partial(Pictures, names=TAGS, lists_labels=True)


def test_lists_columns_and_datasets_are_the_same(tune, folder, tmp_path):
    """Lists with a;b, with a column for each class, JSON, and vectors of a dataset; with images in memory."""
    for split in ("train", "val"):
        with (folder / f"{split}.csv").open() as file:
            rows = [{"path": str(folder / row["path"]), "label": [one for one in row["tags"].split(";") if one]}
                    for row in csv.DictReader(file)]  # fmt: skip
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    json_lists = {f"{split}_list": tmp_path / f"{split}.json" for split in ("train", "val")}
    no_lists = {"train_list": "", "val_list": ""}

    def losses(name, task, **own):
        out = tune(main_finetune, name, epochs=1, warmup_epochs=0, **MILD, task=task, **own)
        return [(line["train_loss"], line["test_loss"]) for line in lines(out)]

    first = losses("list", "multilabel", label_columns="tags")
    for name, own in (("columns", {"label_columns": "green red"}), ("json", json_lists),
                      ("key", json_lists | {"label_columns": "label"}),
                      ("memory", {"label_columns": "tags", "cache_images": True}),
                      ("dataset", {"dataset": "py:test_tasks:tags", **no_lists})):  # fmt: skip
        assert losses(name, "multilabel", **own) == first, name
    first = losses("numbers", "regression", label_columns="weight age")
    for name in ("numbers", "unlisted_numbers"):
        assert losses(f"py-{name}", "regression", dataset=f"py:test_tasks:{name}", **no_lists) == first


def test_a_single_column_of_0_and_1_is_one_class(tune, folder):
    out = tune(task="multilabel", label_columns="red", **MILD)
    model = get_model(out / "checkpoint-1.pth")
    scores = np.stack([one["pred_scores"] for one in model.predict(files_of(folder, "val"))])
    expected = scores_of_tags(column_of(folder, "val", "red"), scores)["average_precision"]
    assert (model.classes, lines(out)[-1]["test_average_precision"]) == (["red"], pytest.approx(expected))


def test_a_file_has_one_label(tune, folder, tmp_path):
    """Except for regression, whose images may be measured several times."""
    with (folder / "train.csv").open() as file:
        rows = list(csv.reader(file))
    again = [rows[1][0], "5", "6", "blue", *(1 - int(cell) for cell in rows[1][4:])]
    write(tmp_path / "train.csv", [*rows, again])
    for task, columns in (("multilabel", "tags"), ("multilabel", "green red"), ("classification", "red")):
        with pytest.raises(ValueError, match=r"`train_list` .*train00.png"):
            tune(task=task, label_columns=columns, train_list=tmp_path / "train.csv")
    tune(task="regression", label_columns="weight", train_list=tmp_path / "train.csv", **MILD)


def test_repeated_rows_are_not_held_out(classify, labelled, tmp_path):
    """They repeat images for training; the held-out images would be among them."""
    names = [f"{path.relative_to(labelled)} {path.parent.name}\n" for path in sorted(labelled.glob("train/*/*"))]
    for name, rows in (("twice", names + names[:1]), ("once", names)):
        (tmp_path / f"{name}.txt").write_text("".join(rows))
    twice, once = ({"train_list": tmp_path / f"{name}.txt"} for name in ("twice", "once"))
    for main, flags, flag in ((main_finetune, {"val_fraction": 0.2}, "val_fraction=0.2"),
                              (main_linprobe, {"blr": "1 3", "held_out": 0.3}, "held_out=0.3")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{flag}: .*00.png"):
            classify(main, "twice", **flags, **twice)
        classify(main, main.__name__, **flags, **once)
    classify(main_finetune, "repeated", **MILD, **twice)


def test_predictions_are_printed(tune, weighed, folder, tmp_path):
    image = folder / "val00.png"
    argv = (image, "--model", weighed, "--device", "cpu", "--out", tmp_path / "picture.png")
    value = get_model(weighed).predict(str(image))["values"]["weight"]
    output = forks.run("mae/inference/predict.py", argv, tmp_path / "output", environment={"PYTHONPATH": str(ROOT)})
    assert f"{value:.6g}  weight" in output
    assert Image.open(tmp_path / "picture.png").size[0] > 100
    assert 900 < value < 1300
    out = tune(name="tags", task="multilabel", label_columns="tags", **MILD)
    found = get_model(out / "checkpoint-1.pth").predict([str(image)])[0]
    assert found["pred_classes"] == [TAGS[label] for label in found["pred_labels"]]
    assert found["pred_labels"] == [label for label, score in enumerate(found["pred_scores"]) if score >= 0.5]
    assert found["classes"] == TAGS


def test_exports_keep_the_units_or_are_refused(weighed, folder, tmp_path):
    image = str(folder / "val00.png")
    for to, suffix in (("reference", ".pth"), ("safetensors", ".safetensors")):
        export.export(get_model(weighed), to, tmp_path / f"model{suffix}")
        found = get_model(tmp_path / f"model{suffix}").predict(image)["values"]
        assert found == pytest.approx(get_model(weighed).predict(image)["values"])
    with pytest.raises(ValueError, match=r"to=onnx: .*regression"):
        export.export(get_model(weighed), "onnx", tmp_path / "model.onnx")


@pytest.mark.parametrize(("weights", "flags", "message"), [
    ({5: "nan"}, {}, r"`train_list` .*weight .*train04\.png .*nan"),
    ({5: ""}, {}, r"weight .*train04\.png"),
    ({5: "heavy"}, {}, r"weight .*train04\.png .*heavy"),
    ({5: "inf"}, {}, "weight .*inf"),
    ({5: ["71", "5"]}, {}, r"train04\.png .*7 and 6"),
    ({}, {"label_columns": "wieght"}, "wieght .*`label_columns`"),
    ({}, {"label_columns": ""}, "label_columns="),
    ({}, {"task": "multilabel"}, "weight .*task=multilabel"),
    ({}, {"task": "classification"}, "task=classification"),
    (dict.fromkeys(range(1, 51), "5"), {}, "task=regression: weight"),
    ({}, {"train_per_class": 2}, "train_per_class=2"),
    ({}, {"class_weight": "balanced"}, "class_weight=balanced"),
    ({}, {"metric": "auroc"}, "metric=auroc"),
    ({}, {"nb_classes": 3}, "`nb_classes`"),
], ids=range(14))  # fmt: skip
def test_wrong_labels_are_one_line(weights, flags, message, tune, folder, tmp_path):
    rows = list(csv.reader((folder / "train.csv").read_text().splitlines()))
    for number, text in weights.items():
        rows[number][1:2] = text if isinstance(text, list) else [text]
    write(tmp_path / "train.csv", rows)
    flags = {"task": "regression", "label_columns": "weight age", "train_list": tmp_path / "train.csv"} | flags
    with pytest.raises(ValueError, match=message) as raised:
        tune(**flags)
    assert "\n" not in str(raised.value)


def test_a_mistake_in_a_column_of_0_and_1_is_no_class(tmp_path):
    def classes(*cells):
        rows = "".join(f"{number}.png,{cell}\n" for number, cell in enumerate(cells))
        (tmp_path / "0.png").touch()
        (tmp_path / "list.csv").write_text("path,tumor\n" + rows)
        flags = {"file_list": str(tmp_path / "list.csv"), "task": "multilabel", "label_columns": ["tumor"]}
        return open_source("train", **flags).classes

    for mistake, said in (("", "empty"), ("?", r"\?"), ("2", "2")):
        with pytest.raises(ValueError, match=rf"tumor .*1\.png .*{said}"):
            classes("1", mistake, "0")
    assert classes("1", "0", "1") == ["tumor"]
    assert classes("cat", "", "cat;dog") == ["cat", "dog"]
    assert classes("1", "", "1;2") == ["1", "2"]


def test_label_columns_do_not_change_the_images_of_a_list(tmp_path):
    for name in ("thumbnail.png", "picture.png"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("image,path,label\nthumbnail.png,picture.png,1\n")
    for own in ({}, {"label_columns": ["label"]}, {"label_columns": ["label"], "task": "regression"}):
        source = open_source("train", file_list=str(tmp_path / "list.csv"), **own)
        assert source.name(0) == str(tmp_path / "picture.png")


def test_scores_that_are_undefined_choose_nothing(tune):
    """A single held-out image has no r2."""
    with pytest.raises(ValueError, match="undefined"):
        tune(main_linprobe, task="regression", label_columns="weight", metric="r2", blr="0.01 0.1", held_out=0.01)


@pytest.mark.parametrize("main", [main_finetune, main_linprobe, main_knn])
def test_a_metric_that_is_undefined_is_null_with_a_warning(main, tune, folder, tmp_path, capsys):
    """A single validation image has no r2, and has an error. The scores are JSON, which has no NaN."""
    write(tmp_path / "one.csv", [["path", "weight"], ["val00.png", 1100]])
    own = {"k": 10} if main is main_knn else {"epochs": 1}
    out = tune(main, task="regression", val_list=tmp_path / "one.csv", label_columns="weight", **own)
    output = capsys.readouterr().out
    text = output.splitlines()[-1] if main is main_knn else (out / "log.txt").read_text()
    scores = json.loads(text, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    (r2, *_), (mae, *_) = ([value for name, value in scores.items() if metric in name] for metric in ("r2", "mae"))
    assert r2 is None and mae > 0
    assert [warning for warning in output.splitlines() if warning.startswith("warning: ") and "r2" in warning]
    assert main is main_knn or not (out / "checkpoint-best.pth").exists()


def test_labels_that_are_all_equal_are_named_and_select_no_state(tune, folder, tmp_path, capsys):
    """scikit-learn returns an r2 of 0, whatever the predictions are."""
    write(tmp_path / "equal.csv", [["path", "weight"], *([f"val{number:02}.png", 1100.1] for number in range(11))])
    own = {"task": "regression", "val_list": tmp_path / "equal.csv", "label_columns": "weight", "metric": "r2 mae"}
    out = tune(main_finetune, **own)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if "r2" in line and "weight" in line]
    assert [line["test_r2"] for line in lines(out)] == [0, 0]
    assert not (out / "checkpoint-best.pth").exists()


@pytest.mark.parametrize(("task", "main"), [
    ("regression", main_finetune), ("multilabel", main_linprobe), ("regression", main_knn),
])  # fmt: skip
def test_class_folders_are_for_classification(task, main, classify):
    with pytest.raises(ValueError, match=f"task={task}: .*`train_list`"):
        classify(main, task=task)


@pytest.mark.parametrize(("flag", "value"), [("mixup", 0.8), ("cutmix", 1), ("smoothing", 0.1)])
def test_mixed_and_smoothed_labels_are_for_classification(flag, value, tune):
    with pytest.raises(ValueError, match=f"{flag}=0"):
        tune(task="multilabel", label_columns="tags", **{flag: value})


def test_a_file_has_one_task(tune, weighed, classify):
    with pytest.raises(ValueError, match="task=multilabel"):
        tune(task="multilabel", label_columns="tags", eval=True, resume=weighed)
    classify(main_finetune, "other", finetune=weighed, epochs=1)  # the head is a new one
    assert classify(main_knn, finetune=weighed, k=3)  # of class folders, although the file is of numbers


def command_of(out, protocol):
    """The flags in the command of a result of a comparison."""
    return next(
        row.command.split()[2:] for row in summary.read(out) if (row.encoder, row.protocol) == ("mine", protocol)
    )


@pytest.mark.slow
def test_encoders_are_compared_by_their_errors(tune, folder, forked, tmp_path):
    """The lowest error is the best one. Each cell is the result of the script."""
    out = tune(task="regression", label_columns="weight age", **MILD, epochs=8)
    flags = {**lists(folder), "task": "regression", "label_columns": "weight age", "metric": "mae", "labels": "all",
             "input_size": 16, "device": "cpu", "num_workers": 0, "amp": "off",
             "encoders": f"mine={out}/checkpoint-7.pth scratch", "protocols": "knn finetune", "budget": 2,
             "output_dir": tmp_path / "compare"}  # fmt: skip
    table = call(main_compare, **flags).splitlines()
    assert table[0].startswith("| test mae | 50 labels |")
    cells = {line.split(" |")[0].strip("| "): line.split(" |")[1].strip() for line in table[2:6]}
    errors = {name: float(cell.split()[0].strip("*")) for name, cell in cells.items()}
    assert errors.keys() == {f"{name} ({how})" for name in ("mine", "scratch") for how in ("k-NN", "fine-tuned")}
    best = min(errors, key=errors.get)
    assert [name for name, cell in cells.items() if cell.startswith("**")] == [best]
    assert best.startswith("mine")
    (conclusion,) = (line for line in table if f"{best} has the best mae, " in line)
    assert " below scratch" in conclusion
    (neighbors,) = call(main_knn, *command_of(tmp_path / "compare", "k-NN")).values()
    assert errors["mine (k-NN)"] == pytest.approx(neighbors, rel=1e-3)
    logged = lines(next((tmp_path / "compare/runs/scratch/finetune").glob("*/0")))[-1]["test_mae"]
    assert errors["scratch (fine-tuned)"] == pytest.approx(logged, rel=1e-3)
    several = {"task": "multilabel", "metric": "average_precision", "label_columns": "tags"}
    for changed, message in (({"labels": 10}, r"labels=.*10.* give labels=all"),
                             (several | {"encoders": "pixels"}, r"encoders=.*pixels.*task=multilabel")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call(main_compare, **flags | changed)


@pytest.mark.slow
def test_baselines_and_probes_of_a_comparison_are_those_of_scikit_learn(folder, forked, tmp_path):
    """Of numbers. The error is the mean over both, in their units."""
    flags = {**lists(folder), "task": "regression", "label_columns": "weight age", "metric": "mae", "labels": "all",
             "input_size": 16, "device": "cpu", "num_workers": 0, "encoders": "pixels scratch", "protocols": "linear",
             "model": "vit_mini_patch4", "output_dir": tmp_path}  # fmt: skip
    call(main_compare, **flags)
    found = {(row.encoder, row.protocol): row for row in summary.read(tmp_path)}
    assert found.keys() == {*(("pixels", each.title) for each in BASELINES["regression"]), ("scratch", "linear probe")}
    data = DataSpec(train_list=flags["train_list"], val_list=flags["val_list"])
    sets = [opener.open_source(data, split, task="regression", label_columns=["weight", "age"])
            for split in ("train", "val")]  # fmt: skip
    train, val = (raw_pixels.read(source, ImageSpec(16, 3), 0) for source in sets)
    row = found["pixels", "ridge regression"]
    model = make_pipeline(StandardScaler(), Ridge(float(row.chosen.removeprefix("alpha "))))
    target = StandardScaler().fit(sets[0].labels)
    predicted = target.inverse_transform(model.fit(train, target.transform(sets[0].labels)).predict(val))
    assert row.accuracy == pytest.approx(sk.mean_absolute_error(sets[1].labels, predicted), rel=1e-3)


@pytest.mark.slow
def test_encoders_are_compared_by_several_labels(tune, folder, forked, tmp_path):
    """The result of k-NN is that of the script."""
    out = tune(task="multilabel", label_columns="tags", epochs=2)
    flags = {**lists(folder), "task": "multilabel", "label_columns": "tags", "labels": "all", "input_size": 16,
             "device": "cpu", "num_workers": 0, "amp": "off", "encoders": f"mine={out}/checkpoint-1.pth",
             "protocols": "knn linear", "output_dir": tmp_path / "compare"}  # fmt: skip
    call(main_compare, **flags)
    near, probe = summary.read(tmp_path / "compare")
    (neighbors,) = call(main_knn, *command_of(tmp_path / "compare", "k-NN")).values()
    assert near.metric == probe.metric == "average_precision" and near.accuracy == pytest.approx(neighbors, rel=1e-3)
    assert 0 < probe.accuracy <= 1


def test_labels_of_a_dataset_are_checked(tune):
    for name, message in (("not_a_number", "nan: task=regression"), ("text", "heavy: task=regression"),
                          ("constant", "task=regression: 0 ")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tune(task="regression", dataset=f"py:test_tasks:{name}", train_list="", val_list="")


class Wrong(Pictures):
    def __init__(self, split, data_path, vectors):
        super().__init__(split, data_path, NUMBERS, False)
        self.vectors = vectors
        del self.classes

    def __getitem__(self, index):
        return self.files[index], self.vectors[min(index, 1)]


text = partial(Wrong, vectors=["heavy", "heavy"])
# The standard deviation of equal numbers is a rounding error, not 0.
constant = partial(Wrong, vectors=[[0.1, 0.1], [0.1, 0.2]])


def not_a_number(split, data_path):
    data = numbers(split, data_path)
    data.labels = np.where(np.arange(len(data.labels))[:, None] == 3, np.nan, data.labels)
    return data


def test_a_resumed_run_is_the_whole_run(tune, monkeypatch):
    flags = {"task": "regression", "label_columns": "weight age", **MILD}

    def run(name, **more):
        return tune(name=name, **flags, **more)

    assert_same_run(run("whole"), stop_and_resume(monkeypatch, run, 9))


@pytest.mark.parametrize(("main", "own", "task", "column"), [
    (main_finetune, MILD, "regression", "weight"), (main_linprobe, {"cache_features": True}, "multilabel", "tags"),
    (main_linprobe, {"blr": "0.1 1"}, "classification", "red"),
])  # fmt: skip
def test_an_epoch_is_not_resumed_with_exchanged_labels(main, own, task, column, tune, folder, tmp_path, monkeypatch):
    """The images are the same. A list in another folder, with the same images at another path, is the same."""
    flags = {"task": task, "label_columns": column, **own}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, "save", 2)
        tune(main, "parts", **flags, save_minutes=0)
    with (folder / "train.csv").open() as file:
        header, *rows = csv.reader(file)
    moved = shutil.copytree(folder, tmp_path / "moved")
    write(moved / "train.csv", [header, *([str(moved / name), *others] for name, *others in rows)])
    index = header.index(column)
    other = next(row for row in rows if row[index] != rows[0][index])
    rows[0][index], other[index] = other[index], rows[0][index]
    write(tmp_path / "exchanged.csv", [header, *rows])
    with pytest.raises(CheckpointError, match="labels"):
        tune(main, "parts", **flags, train_list=tmp_path / "exchanged.csv", resume="auto")
    tune(main, "parts", **flags, train_list=moved / "train.csv", val_list=folder / "val.csv", resume="auto")


def test_the_lowest_error_selects_a_rate_and_a_temperature(tune, monkeypatch):
    found = []
    monkeypatch.setattr(main_linprobe, "report_best_rate", lambda blrs, best, title, scores, *_: found.append(
        (best, title, scores)) or {})  # fmt: skip
    flags = {"task": "regression", "label_columns": "weight", "metric": "mae"}
    tune(main_linprobe, **flags, blr="1e-9 3", epochs=4, warmup_epochs=0)
    best, title, scores = found[-1]
    assert title == "mae" and best == np.argmin(scores) != np.argmax(scores)
    monkeypatch.setattr(main_knn, "report", lambda scores, best: found.append(best))
    values = tune(main_knn, **flags, k="1 5 30", temperature="0.01 1")
    assert values[found[-1]] == min(values.values()) < max(values.values())
