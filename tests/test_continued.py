"""The study of continued encoders, on tiny images: its rows, its table, and that it goes on where it stopped."""

import importlib
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from benchmarks import continued, scoring, scripts
from mae.cli.script import Script

ARMS = ("full, Gram 1", "LoRA 16, preserve .1")


def write(folder, draw):
    """Two classes, which the brightness tells apart."""
    for split, count in (("train", 40), ("val", 30)):
        for label in range(2):
            out = folder / split / str(label)
            out.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 128, (28, 28)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(out / f"{number:02}.png")
    return folder


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped_and_has_a_table(tmp_path, monkeypatch, capsys):
    draw = np.random.default_rng(0)
    old, new = (write(tmp_path / name / "images", draw) for name in ("old", "new"))

    def run_python(script, *words, threads=None):
        module = importlib.import_module(script.removesuffix(".py"))
        module.main(continued.entry_point.parse(module.get_args_parser(), words))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(scripts, "run_python", run_python)  # in this process
    monkeypatch.setattr(scripts, "DATA", old)
    monkeypatch.setattr(continued.unpack, "OUT", old.parent)
    monkeypatch.setattr(continued, "images_of", lambda kind: new)
    monkeypatch.setattr(continued, "WORK", tmp_path / "work")
    monkeypatch.setattr(continued, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(continued, "PAGE", tmp_path / "page.md")
    continued.PAGE.write_text("<!-- python benchmarks/continued.py -->\n<!-- end -->\n")
    monkeypatch.setattr(continued, "ARMS", {name: continued.ARMS[name] for name in ARMS})
    for name, value in {"SECONDS": 0.1, "START_EPOCHS": 2, "TIMED_EPOCHS": 1, "RATES": (1e-4, 1e-3)}.items():
        monkeypatch.setattr(continued, name, value)
    monkeypatch.setitem(continued.BASE, "batch_size", 16)
    monkeypatch.setattr(scoring, "DRAWS", 1)
    monkeypatch.setattr(scoring, "LABELS", 40)
    monkeypatch.setitem(scoring.LINPROBE, "batch_size", 32)
    for flags in (scoring.FINETUNE, scoring.LINPROBE):
        for name, value in {"epochs": 1, "warmup_epochs": 0, "eval_every": 1}.items():
            monkeypatch.setitem(flags, name, value)

    def study(seed=0):
        continued.main(continued.get_args_parser().parse_args(["--seeds", str(seed), "--kinds", "cells"]))
        return [json.loads(line) for line in continued.ROWS.read_text().splitlines()]

    rows = study()
    assert [row["arm"] for row in rows] == [continued.START, *ARMS]
    assert all(0 <= row[name] <= 100 for row in rows for name in continued.MEASURES)
    assert all(0 < row[continued.AGREEMENT] < 1 for row in rows)
    assert {row["lr"] for row in rows[1:]} <= {1e-4, 1e-3}
    page = continued.PAGE.read_text()
    assert [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:] == [
        continued.START, *ARMS
    ]  # fmt: skip
    with monkeypatch.context() as other_machine:  # it takes rates and lengths from the rows
        other_machine.setattr(continued, "RATES", None)
        (continued.WORK / "speeds.json").unlink()
        other_machine.setattr(continued, "epochs_of", None)
        all_rows = study(seed=1)
    assert [(row["arm"], row.get("lr"), row.get("epochs")) for row in all_rows[len(rows) :]] == [
        (row["arm"], row.get("lr"), row.get("epochs")) for row in rows
    ]
    monkeypatch.setattr(Script, "call_main", None)  # nothing is trained again
    assert study() == all_rows
    continued.ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    monkeypatch.setattr(scoring, "of_encoder", lambda *_, **__: dict.fromkeys(continued.MEASURES[:3], 50.0))
    assert [row["arm"] for row in study()] == [row["arm"] for row in rows]


def test_the_gram_distance_is_that_of_cosines():
    ours, theirs = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def cosines(patches):
        array = patches.numpy()
        unit = array / np.linalg.norm(array, axis=2, keepdims=True)
        return np.einsum("bid,bjd->bij", unit, unit)

    expected = ((cosines(ours) - cosines(theirs)) ** 2).mean()
    assert continued.gram_distance(ours, theirs).item() == pytest.approx(expected)
    assert continued.gram_distance(ours, 3 * ours).item() == pytest.approx(0, abs=1e-12)
