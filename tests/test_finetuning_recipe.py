"""`python -m mae.data --recipe --for finetune`: the recipe fits labels, encoder and time, and runs as written."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from mains import argv_of, call, lines
from PIL import Image
from test_dino import of_transformers
from test_recommend import PHOTOS

import main_finetune
from mae.inference import get_model
from mae.recommend import check, finetuning, rules, trial
from mae.recommend.facts import Machine
from mae.recommend.finetuning import Labels, Start

TWO_CORES = Machine(gpus=0, cores=2, cache_bytes=1e12)
SMALL = replace(PHOTOS, height=28, width=28, shorter=28, spread=(28, 28), has_one_shape=True, in_chans=1)
MINI = Start("mine.pth", width=128, depth=4, in_chans=1, input_size=28, patch_size=(7, 7), has_images=True)
DINO = Start("dino", width=384, depth=12, in_chans=3, input_size=518, patch_size=(14, 14))


def settings_of(images=SMALL, labels=10_000, classes=10, start=MINI, machine=TWO_CORES):
    of_labels = Labels(labels, classes, labels // classes, labels // 4)
    found = [
        *finetuning.input_lines(images, start), *finetuning.augmentation_lines(images, of_labels),
        *finetuning.optimization_lines(of_labels, start, machine),
    ]  # fmt: skip
    assert all(line.reason for line in found)
    return {line.name: line.value for line in found}


def recipe_of(folder, out, *flags) -> dict:
    call(check, folder, "--recipe", out, "--for", "finetune", "--num_workers", 0, *flags)
    return yaml.safe_load(out.read_text())


@pytest.fixture
def fast_machine(monkeypatch):
    """A machine of two cores, without a trial run."""
    monkeypatch.setattr(trial, "measure", lambda *arguments: trial.Trial(1000, 5))
    monkeypatch.setattr("mae.parallel.cores_of_process", lambda: 2)


def test_the_settings_of_a_small_encoder_are_those_that_were_measured():
    expected = {"aa": "none", "reprob": 0, "smoothing": 0, "drop_path": 0, "layer_decay": 0.9, "lr": 1e-3}
    found = settings_of()
    assert found == expected | {"batch_size": 16}  # in each of two processes


def test_the_patches_fit_the_size_that_is_given():
    """Random weights, whose patches are free."""
    from_scratch = Start("", width=128, depth=4)
    lines = {line.name: line.value for line in finetuning.input_lines(PHOTOS, from_scratch, 32)}
    assert lines["patch_size"] == rules.patch_of(32, 32)
    assert 32 // np.max(lines["patch_size"]) >= 4


def test_wider_and_deeper_encoders_have_smaller_rates():
    found = settings_of(images=PHOTOS, start=DINO)
    assert found["lr"] < 1e-3 and found["layer_decay"] == 0.75
    assert found["input_size"] == 224  # not the 518 of the file
    assert (found["crop"], found["crop_scale"]) == ("random", [0.2, 1.0])


def test_many_labels_of_large_images_have_the_published_augmentation():
    machine = Machine(gpus=8, cores=64, cache_bytes=0)
    found = settings_of(images=PHOTOS, labels=1_281_167, classes=1000, start=DINO, machine=machine)
    published = yaml.safe_load((ROOT / "recipes/finetune_vit_base.yaml").read_text())
    assert {name: found[name] for name in ("reprob", "mixup", "cutmix", "drop_path")}.items() <= published.items()
    assert 8 * found["batch_size"] * found.get("accum_iter", 1) == 1024
    assert found["aa"].startswith("rand-")


def test_few_labels_have_the_published_augmentation_and_more_epochs():
    published = yaml.safe_load((ROOT / "recipes/finetune_vit_base.yaml").read_text())
    few, more = (settings_of(labels=labels) for labels in (200, 10_000))
    assert {name: few[name] for name in ("reprob", "mixup", "cutmix")}.items() <= published.items()
    assert few["aa"].startswith("rand-") and few["smoothing"] == 0.1
    assert more["aa"] == "none" and "mixup" not in more
    deep = settings_of(images=replace(SMALL, is_deep=True), labels=200)
    assert deep == few | {"aa": "none"}  # RandAugment refuses such images
    lines = finetuning.augmentation_lines(SMALL, Labels(200, 10, 20, 1000, has_inputs=True))
    assert not {"mixup", "cutmix"} & {line.name for line in lines}  # extra inputs are not mixed
    assert 360 <= finetuning.most_epochs(SMALL, Labels(200, 10, 20, 1000), MINI) <= 370
    assert finetuning.most_epochs(SMALL, Labels(200, 1, 0, 1000), MINI) == 141  # numbers, which are not mixed


@pytest.mark.parametrize("labels", [2, 7, 40, 500])
def test_few_labels_have_several_updates_in_an_epoch(labels):
    found = settings_of(labels=labels, classes=2)
    assert 1 <= found["batch_size"] <= 16
    assert labels < 6 or labels // found["batch_size"] >= 3
    assert found["batch_size"] > 1 or not found.get("mixup")  # which mixes pairs


@pytest.mark.parametrize(("labels", "measured"), [(100, 200), (500, 100), (2000, 40), (60_000, 15)])
def test_the_epochs_are_about_those_that_were_measured(labels, measured):
    """Without the augmentation of few labels."""
    found = finetuning.most_epochs(SMALL, Labels(labels, 10, 0, 1000), MINI)
    assert measured / 1.3 <= found <= 1.3 * measured


@pytest.mark.parametrize("minutes", [0.5, 2, 60])
def test_the_epochs_and_their_evaluations_fit_the_time(minutes):
    labels = Labels(10_000, 10, 1000, 10_000)
    measured = trial.Trial(1000, 5)
    found = finetuning.length_lines(SMALL, labels, MINI, measured, 9984, 60 * minutes)
    epochs, warmup, eval_every, _ = (line.value for line in found)
    assert epochs <= 20 and warmup == epochs / 10
    evaluations = -(-epochs // eval_every)
    takes = 5 + (epochs * 9984 + evaluations * 5000) / 1000
    assert takes <= 60 * minutes or found[0].is_warning
    assert found[0].is_warning == (minutes == 0.5 and epochs == 1 and takes > 30)


def test_a_short_run_measures_the_speed():
    """Of equally many images of each class; of all, if a class is too small and the images are few."""
    assert finetuning.of_trial(Labels(400, 10, 40, 100), 32).keys() == {"eval_every", "val_fraction"}
    assert finetuning.of_trial(Labels(10_000, 10, 1000, 2000), 32)["train_per_class"] == 60
    assert "train_per_class" not in finetuning.of_trial(Labels(10_000, 10, 1, 2000), 32)
    assert finetuning.of_trial(Labels(1_000_000, 10, 1, 2000), 32) is None


def test_a_recipe_has_what_is_given(fast_machine, labelled, tmp_path, capsys):
    given = {"train_per_class": 4, "val_fraction": 0.25, "crop": "none"}
    found = recipe_of(labelled, tmp_path / "tuned.yaml", *argv_of(given))
    assert {name: found[name] for name in given} == given and "crop_scale" not in found
    printed = capsys.readouterr().out
    assert "validation images are few" in printed and "the weights are random" in printed
    assert printed.splitlines()[-1].startswith("OMP_NUM_THREADS=")


@pytest.mark.parametrize(("flags", "name"), [
    (("--for", "finetune"), "recipe"), (("--finetune", "x.pth"), "finetune"),
    (("--recipe", "r.yaml", "--finetune", "x.pth"), "finetune"),
])  # fmt: skip
def test_an_encoder_without_a_recipe_of_fine_tuning_is_refused(labelled, flags, name):
    with pytest.raises(ValueError, match=name):
        call(check, labelled, *flags)


def test_images_without_labels_are_refused(fast_machine, tmp_path):
    for number in range(8):
        Image.fromarray(np.full((28, 28), number, np.uint8)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="classes"):
        recipe_of(tmp_path, tmp_path / "tuned.yaml")
    assert not (tmp_path / "tuned.yaml").exists()


@pytest.fixture(params=["ours", "dino"])
def encoder(request, tmp_path) -> Path:
    """A file of a small model with random weights: of this library, and a folder of transformers."""
    out = tmp_path / "encoder"
    if request.param == "dino":
        of_transformers("v2", out)
        return out
    get_model("mae_vit_mini_patch4", input_size=16, patch_size=4).save_pretrained(out)
    return out


@pytest.mark.slow
def test_a_recipe_runs_as_it_is_written(encoder, labelled, tmp_path, capsys, forked):
    """After a real trial run, by its own command."""
    file = tmp_path / "tuned.yaml"
    found = recipe_of(labelled, file, "--finetune", encoder, "--minutes", 0.5)
    printed = capsys.readouterr().out
    assert re.search(r"training    [1-9][\d,]* images/s: \d+ epochs? takes? ", printed)
    assert all(re.search(r"  # \w", text) for text in file.read_text().splitlines() if text[0] != "#")
    words = shlex.split(printed.splitlines()[-1])
    assert words[words.index("--config") + 1] == str(file)
    call(main_finetune, config=file, output_dir=tmp_path / "run", device="cpu", epochs=2, warmup_epochs=0)
    assert len(lines(tmp_path / "run")) == 2
    assert found["finetune"] == str(encoder)
