"""Ablations of pre-training: encoders are pre-trained and compared, and results are not computed twice."""

import json

import numpy as np
import pytest
from conftest import ROOT
from mains import lines, parse
from PIL import Image

import main_compare
import main_pretrain
from benchmarks import image_sets
from benchmarks.ablation import Ablation, Run
from benchmarks.small_data import other_images
from benchmarks.small_data import study as small_data
from mae.settings.arguments import arguments

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with twelve training images of each of ten classes."""
    monkeypatch.chdir(ROOT)
    for split, images in (("train", 12), ("val", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(images):
                Image.fromarray(np.full((28, 28), 25 * label + number, np.uint8)).save(folder / f"{number:03}.png")
    return tmp_path / "data"


@pytest.mark.slow
def test_two_encoders_are_pretrained_and_compared_once(data, tmp_path, monkeypatch):
    study = small_data.STUDY
    runs = {"base": Run(100, 1, {}), "mask-0.5": Run(100, 2, {"mask_ratio": 0.5})}
    evaluation = {name: value for name, value in study.evaluation.items() if name not in ("recipes", "budget")}
    evaluation |= {"data_path": data, "protocols": ["knn"], "labels": [10], "draws": [1]}
    small = Ablation(tmp_path, tmp_path / "runs", runs, study.shared, evaluation, data=data, baselines=["scratch"])
    small.run(list(runs))
    header, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert header == "| encoder | images | epochs | cost | loss | k-NN, % |"
    rows = [line.split(" | ")[:3] for line in rows]
    assert rows == [["| scratch", "", ""], ["| base", "100", "1"], ["| mask-0.5", "100", "2"]]
    results = small.results.read()
    assert results["scratch"]["accuracies"].keys() == {"k-NN"}
    assert "--mask_ratio 0.5" in results["mask-0.5"]["command"]
    assert results["mask-0.5"]["loss"] == lines(tmp_path / "runs/mask-0.5")[1]["train_loss"]

    monkeypatch.setattr(small, "compare", None)  # is not called again
    small.run(list(runs))
    assert small.results.read() == results


def test_the_rows_have_means_and_costs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, accuracies = {"a": Run(100, 2, {}), "b": Run(1_000, 3, {})}, {"a": [70, 72], "b": [80, 84]}
    results = {name: {"loss": 0.5, "accuracies": {"linear probe": values}} for name, values in accuracies.items()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    study = Ablation(tmp_path, tmp_path, runs, small_data.BASE, {})
    assert study.table().splitlines()[2:] == [
        "| a | 100 | 2 | 1.00 | 0.5000 | 71.0 ± 1.4 |",
        "| b | 1,000 | 3 | 15.00 | 0.5000 | 82.0 ± 2.8 |",
    ]


def test_the_cost_is_that_of_the_layers(tmp_path, monkeypatch):
    """Multiply-adds by hand, of linear layers and attention: they are more than 99 % of all."""
    monkeypatch.chdir(ROOT)
    runs = {"a": Run(10, 2, {"patch_size": 4, "mask_ratio": 0.75})}
    counted = Ablation(tmp_path, tmp_path, runs, small_data.BASE, {}).macs("a")

    def blocks(depth, tokens, width):
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

    encoder = 49 * 16 * 128 + blocks(4, 13, 128)  # 12 visible patches and the class token
    decoder = 13 * 128 * 64 + blocks(1, 50, 64) + 50 * 64 * 16
    assert encoder + decoder == pytest.approx(counted / 20, rel=0.01)


def test_the_commands_parse_and_differ_in_one_setting():
    study = small_data.STUDY
    settings = {name: parse(main_pretrain, *arguments(study.flags(name))).record() for name in study.runs}
    for name, own in settings.items():
        base = settings["1000-images" if name.startswith("1000-images") else "base"]
        changed = {flag for flag in own if own[flag] != base[flag]} - {"save_every", "warmup_epochs", "output_dir"}
        assert len(changed - {"log_dir"}) == (name not in ("base", "1000-images")), name


STUDIES = [small_data.STUDY, *map(other_images.study, other_images.DATASETS)]


@pytest.mark.parametrize("study", STUDIES, ids=["small_data", *other_images.DATASETS])
def test_the_commands_of_the_evaluation_parse(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    for run in study.runs:
        parse(main_pretrain, *arguments(study.flags(run)))
    parse(main_compare, *arguments({**study.evaluation, "encoders": ["base"]}))


def test_an_unknown_encoder_is_refused(capsys):
    with pytest.raises(SystemExit):
        small_data.get_args_parser().parse_args(["x"])
    assert "there is no encoder x; the names are base, " in capsys.readouterr().err


def test_the_images_are_the_first_of_each_class(data, tmp_path):
    Ablation(tmp_path, tmp_path, {}, {}, {}, data=data).write_list(100)
    listed = (tmp_path / "100.txt").read_text().splitlines()
    assert len(listed) == 100
    assert (listed[0], listed[9], listed[10]) == ("class0/000.png", "class0/009.png", "class1/000.png")


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "classes", "size"), [("digits", 10, 8), ("photographs", 16, 96)])
def test_the_images_of_other_kinds(tmp_path, dataset, classes, size):
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        image_sets.WRITERS[dataset](folder)
        written.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")})
    files, again = written
    assert files == again
    for split in ("train", "val"):
        assert len({path.parent for path in files if path.parts[0] == split}) == classes
    assert Image.open(tmp_path / "a" / next(iter(files))).size == (size, size)
    images = other_images.DATASETS[dataset].images
    Ablation(tmp_path, tmp_path, {}, {}, {}, data=tmp_path / "a").write_list(images)
    assert len((tmp_path / f"{images}.txt").read_text().splitlines()) == images  # each class has enough


def test_the_document_has_the_losses_of_the_runs():
    page = (ROOT / "docs/small_data.md").read_text().splitlines()
    (header,) = (line for line in page if line.startswith("| images | epoch 0 |"))
    epochs = [text.strip().removeprefix("epoch ") for text in header.split("|")[2:-1]]
    names = ("1000-images", "1000-images-epochs-1000", "base", "epochs-80")
    for name in names:
        run = small_data.STUDY.runs[name]
        losses = small_data.STUDY.results.read()[name]["losses"]
        (row,) = (line for line in page if line.startswith(f"| {run.images:,}, {run.epochs:,} epochs |"))
        values = [f"{losses[epoch]:.3f}" if epoch in losses else "" for epoch in epochs]
        assert [text.strip() for text in row.split("|")[2:-1]] == values
