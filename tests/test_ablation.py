"""Ablations of pre-training: encoders are pre-trained and compared, and results are not computed twice."""

import json
import runpy

import numpy as np
import pytest
from conftest import ROOT
from mains import lines, parse
from PIL import Image

import main_compare
import main_pretrain
import main_segment
from benchmarks import image_sets
from benchmarks.ablation import Ablation, Run
from benchmarks.mask_blocks import study as mask_blocks
from benchmarks.small_data import other_images
from benchmarks.small_data import study as small_data
from demo import segmentation
from demo.segmentation import write_pictures
from util.cli.advice import arguments

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


def test_two_encoders_are_pretrained_and_compared_once(data, tmp_path, monkeypatch):
    study = small_data.STUDY
    runs = {"base": Run("base", 100, 1, {}), "mask-0.5": Run("mask-0.5", 100, 2, {"mask_ratio": 0.5})}
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


def test_rows_with_several_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {f"a-{seed}": Run("a", 100, 2, {"seed": seed}) for seed in range(2)} | {"b": Run("b", 1_000, 3, {})}
    accuracies = {"a-0": [70, 72], "a-1": [73, 75], "b": [80, 84]}
    results = {name: {"loss": 0.5, "accuracies": {"linear probe": values}} for name, values in accuracies.items()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    study = Ablation(tmp_path, tmp_path, runs, small_data.BASE, {})
    assert study.table().splitlines()[2:] == [
        "| a | 100 | 2 | 1.00 | 0.5000 | 72.5 ± 2.1 |",  # over the means of the seeds, 71 and 74
        "| b | 1,000 | 3 | 15.00 | 0.5000 | 82.0 ± 2.8 |",  # over the draws
    ]


def test_the_cost_is_that_of_the_layers(tmp_path, monkeypatch):
    """Multiply-adds by hand, of linear layers and attention: they are more than 99 % of all."""
    monkeypatch.chdir(ROOT)
    runs = {"a": Run("a", 10, 2, {"patch_size": 4, "mask_ratio": 0.75})}
    counted = Ablation(tmp_path, tmp_path, runs, small_data.BASE, {}).macs("a")

    def blocks(depth, tokens, width):
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

    encoder = 49 * 16 * 128 + blocks(4, 13, 128)  # 12 visible patches and the class token
    decoder = 13 * 128 * 64 + blocks(1, 50, 64) + 50 * 64 * 16
    assert encoder + decoder == pytest.approx(counted / 20, rel=0.01)


def test_the_commands_parse_and_differ_in_one_setting():
    study = small_data.STUDY
    settings = {name: vars(parse(main_pretrain, *arguments(study.flags(name)))) for name in study.runs}
    for name, own in settings.items():
        base = settings["1000-images" if name.startswith("1000-images") else "base"]
        changed = {flag for flag in own if own[flag] != base[flag]} - {"save_every", "warmup_epochs", "output_dir"}
        assert len(changed - {"log_dir"}) == (name not in ("base", "1000-images")), name


STUDIES = [small_data.STUDY, mask_blocks.STUDY, *map(other_images.study, other_images.DATASETS)]


@pytest.mark.parametrize("study", STUDIES, ids=["small_data", "mask_blocks", *other_images.DATASETS])
def test_the_commands_of_the_evaluation_parse(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    for run in study.runs:
        parse(main_pretrain, *arguments(study.flags(run)))
    parse(main_compare, *arguments({**study.evaluation, "encoders": ["base"]}))
    if study.segmentation:
        parse(main_segment, *arguments(study.segmentation))


def test_an_encoder_with_mask_blocks_is_evaluated_by_segmentation(data, tmp_path):
    study, pictures = mask_blocks.STUDY, tmp_path / "runs" / "pictures"
    write_pictures(pictures, 32)
    flags = {**study.segmentation, "data_path": pictures, "palette": pictures / "palette.txt", "epochs": 1}
    runs = {"a": Run("a", 100, 1, {"mask_block": 4, "num_cls_tokens": 4})}
    small = Ablation(tmp_path, tmp_path / "runs", runs, study.shared, {}, flags, data)
    small.accuracies = lambda names, baselines: {name: {} for name in names}
    small.run(["a"])
    (score,) = small.results.read()["a"]["accuracies"]["segmentation, mean IoU"]
    assert 0 < score < 100


def test_the_pictures_of_mask_blocks_are_written_when_the_study_runs(monkeypatch, capsys):
    """Not by --help or a wrong name, which argparse refuses."""
    calls, script, name = [], str(ROOT / "benchmarks/mask_blocks/study.py"), "block-1-tokens-1-depth-1-seed-0"
    monkeypatch.setattr(segmentation, "write_pictures", lambda folder, count: calls.append("pictures"))
    monkeypatch.setattr(Ablation, "run", lambda study, names: calls.append(names))
    monkeypatch.chdir(ROOT)

    def run(*argv):
        monkeypatch.setattr("sys.argv", [script, *argv])
        runpy.run_path(script, run_name="__main__")

    for argument, expected in (("--help", name), ("x", "there is no encoder x; the names")):
        with pytest.raises(SystemExit):
            run(argument)
        printed = capsys.readouterr()
        assert expected in printed.out + printed.err
    assert calls == []
    run(name)
    assert calls == ["pictures", [name]]
    run()
    assert calls[-1] == list(mask_blocks.STUDY.runs)


def test_the_images_are_the_first_of_each_class(data, tmp_path):
    Ablation(tmp_path, tmp_path, {}, {}, {}, data=data).write_list(100)
    listed = (tmp_path / "100.txt").read_text().splitlines()
    assert len(listed) == 100
    assert (listed[0], listed[9], listed[10]) == ("class0/000.png", "class0/009.png", "class1/000.png")


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
    page = (ROOT / "SMALL_DATA.md").read_text().splitlines()
    (header,) = (line for line in page if line.startswith("| images | epoch 0 |"))
    epochs = [text.strip().removeprefix("epoch ") for text in header.split("|")[2:-1]]
    names = ("1000-images", "1000-images-epochs-1000", "base", "epochs-80")
    for name in names:
        run = small_data.STUDY.runs[name]
        losses = small_data.STUDY.results.read()[name]["losses"]
        (row,) = (line for line in page if line.startswith(f"| {run.images:,}, {run.epochs:,} epochs |"))
        values = [f"{losses[epoch]:.3f}" if epoch in losses else "" for epoch in epochs]
        assert [text.strip() for text in row.split("|")[2:-1]] == values
