"""The study of the rules of fine-tuning: its runs, and its table."""

import pytest
from mains import parse
from test_finetuning_recipe import MINI

import main_finetune
from benchmarks import cells, finetune_rule
from mae.files import locks
from mae.inference import get_model
from mae.recommend import finetuning
from mae.settings.arguments import arguments


def rows_of(**accuracies) -> list[dict]:
    return [
        {"kind": "cells", "labels": 200, "draw": draw, "way": way.replace("_", " "), "accuracy": accuracy, "epochs": 9}
        for way, found in accuracies.items()
        for draw, accuracy in enumerate(found)
    ]


def test_the_rule_is_compared_with_the_best_other_way():
    rows = rows_of(rule=[70, 72, 90], by_hand=[69, 74], published=[50, 60])
    *_, line = finetune_rule.table(rows).splitlines()
    assert line == (
        "| cells | 200 | 2 | 71.00 ± 1.41 | 71.50 ± 3.54 | 55.00 ± 7.07 | -0.50 (by hand) | 9 9 9 |"
    )  # the third draw has one way only


def test_runs_that_are_done_are_left_out_and_busy_ones_come_later(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0)
    study = finetune_rule.rehearsal(tmp_path)
    busy = [finetune_rule.Case("cells", 120, 0, "published")]

    def measure(_, case):
        if case in busy:
            busy.remove(case)
            raise locks.Busy(tmp_path)
        return {"accuracy": 50, "epochs": 1}

    monkeypatch.setattr(finetune_rule, "measure", measure)
    done = rows_of(rule=[1])
    done[0]["labels"] = 120
    found = list(finetune_rule.rows_of(study, done))
    assert [found[-1][name] for name in ("kind", "labels", "way")] == ["cells", 120, "published"]
    assert len(found) == 2 * 2 * 3 - 1


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "images"
    cells.write(folder, {"train": 4, "val": 1})
    return finetune_rule.Study({"cells": (folder, 1)}, (16, "all"), (0,), 1, tmp_path)


@pytest.mark.parametrize("way", finetune_rule.WAYS)
def test_the_settings_of_a_way_parse(way, study, tmp_path):
    """Those of the rule are those of the recipe."""
    get_model("vit_mini_patch4", input_size=32, in_chans=1, nb_classes=0).save_pretrained(tmp_path / "encoder")
    settings, labels = finetune_rule.settings_of(study, finetune_rule.Case("cells", 16, 0, way), tmp_path / "encoder")
    run = parse(main_finetune, *arguments(settings))
    assert (labels.images, run.data.train_per_class) == (16, 2)
    if way == "rule":
        lines = finetuning.optimization_lines(labels, MINI, finetune_rule.noise.ONE_CORE)
        assert {line.name: run[line.name] for line in lines} == {line.name: line.value for line in lines}
    assert (run.augmentation.aa == "none") == (way == "by hand")
